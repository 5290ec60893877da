"""What a run's ServerApp logs, in a file beside the run's record."""

import logging
import logging.handlers
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleet.errors import FleetError

FILE = "server.log"
FILE_BYTES, OLDER = 1_000_000, 1  # of one file, and files that are kept before it


@contextmanager
def logged_beside(folder: Path) -> Iterator[None]:
    """Copy what Flower and we log inside into `server.log` of a folder, made if it is not there.

    What is raised is there too, with where it came from unless it is a FleetError, which whoever
    raises it has logged. A file that cannot be written costs the copy, not the run.
    """
    root = logging.getLogger()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            folder / FILE, maxBytes=FILE_BYTES, backupCount=OLDER, encoding="utf-8"
        )
    except OSError as error:
        root.warning("cannot write %s: %s", folder / FILE, error.strerror)
        yield
        return
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    handler.handleError = lambda record: None
    root.addHandler(handler)
    try:
        yield
    except FleetError:
        raise
    except BaseException as error:
        ended = {"levelno": logging.ERROR, "levelname": "ERROR", "msg": "the run ends"}
        where = (type(error), error, error.__traceback__)
        handler.handle(logging.makeLogRecord(ended | {"exc_info": where}))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
