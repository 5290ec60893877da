"""A SuperNode's connection to its server, for links on which bytes and round trips are dear."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from google.protobuf.message import DecodeError

from fleet.durable import make_folder, write_durably

# That a connection is kept which nobody uses; httpx keeps one for 5 s. A new one takes three
# round trips. The server must not close it sooner: `fleet.deploy.superlink`.
KEPT_SECONDS = 60.0
APPS_KEPT = 3  # a device may serve several runs, each with a version of its own

_log = logging.getLogger("flwr")


def patient_client(client: type, apps: Path | None) -> type:
    """Flower's client, made to keep its connection, and to wait as long as the link takes.

    Args:
        client: `flwr.supernode.fleet_http_client.FleetHttpClient`.
        apps: folder of the apps that were fetched; None keeps none.
    """
    return type("PatientClient", (_Patience, client), {"apps": Apps(apps) if apps else None})


class _Patience:
    """What stands before Flower's client."""

    apps: "Apps | None"

    def __init__(self, *args: Any, verify: Any = True, **others: Any) -> None:
        super().__init__(*args, verify=verify, **others)
        usual = self._client.timeout
        self._client.close()
        self._client = httpx.Client(
            verify=verify,
            timeout=usual,
            follow_redirects=True,
            limits=httpx.Limits(keepalive_expiry=KEPT_SECONDS),
        )
        self._pace = Pace(usual.read or 0.0)

    def GetFab(self, request: Any) -> Any:
        """As Flower's; an app that is here already is not fetched."""
        response = self.apps.find(request.hash_str) if self.apps else None
        if response is None:
            response = super().GetFab(request)
            if self.apps:
                self.apps.keep(response)
        return response

    def _unary_unary(self, *, request: Any, timeout: float | None = None, **call: Any) -> Any:
        if timeout is not None:  # a heartbeat has a time of its own
            return super()._unary_unary(request=request, timeout=timeout, **call)
        with self._pace.timing(request.ByteSize()) as transfer:
            response = super()._unary_unary(request=request, timeout=transfer.timeout, **call)
            transfer.nbytes += response.ByteSize()
        return response


class Pace:
    """How long to wait for an answer, by what the link has shown of its pace.

    What is sent lies in the system's buffers long before it has reached the server, so the
    time until an answer begins grows with the request.

    Args:
        usual: seconds in which a request of a few bytes is answered.
        clock: seconds that pass.
    """

    LEAST_BYTES = 16 * 1024  # of a transfer that tells of the pace, rather than of the delay
    MOST_SECONDS = 900.0
    MARGIN = 3.0  # a link may slow down, and its two ways need not be alike

    def __init__(self, usual: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._usual = usual
        self._clock = clock
        self.seconds_per_byte = 0.0

    def timeout(self, nbytes: int) -> float:
        """Seconds to wait for the answer to a request of so many bytes."""
        return min(self._usual + self.MARGIN * nbytes * self.seconds_per_byte, self.MOST_SECONDS)

    @contextmanager
    def timing(self, nbytes: int) -> Iterator["Transfer"]:
        """Learn from a request: from how long it takes, or from an answer that is late."""
        transfer = Transfer(nbytes, self.timeout(nbytes))
        began = self._clock()
        try:
            yield transfer
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            if nbytes >= self.LEAST_BYTES:  # the next try is given twice the time
                self.seconds_per_byte = 2 * transfer.timeout / (self.MARGIN * nbytes)
            raise
        if transfer.nbytes >= self.LEAST_BYTES:
            self.seconds_per_byte = (self._clock() - began) / transfer.nbytes


class Transfer:
    """A request that is under way.

    Args:
        nbytes: of the request, and of its answer once there is one.
        timeout: seconds to wait for the answer.
    """

    def __init__(self, nbytes: int, timeout: float) -> None:
        self.nbytes = nbytes
        self.timeout = timeout


class Apps:
    """The apps that runs have sent, by their hash: each is fetched once.

    Args:
        folder: where they are; what else is in it is not touched.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, fab_hash: str) -> Any:
        """The server's answer with an app (`GetFabResponse`), if it is here unchanged; or None."""
        from flwr.proto.fab_pb2 import GetFabResponse

        path = self._path(fab_hash)
        try:
            response = GetFabResponse.FromString(path.read_bytes())
            os.utime(path)
        except (OSError, DecodeError):
            return None
        if hashlib.sha256(response.fab.content).hexdigest() != fab_hash:
            return None
        return response

    def forget(self, fab_hash: str) -> None:
        """Let an app be fetched the next time."""
        with suppress(OSError):
            self._path(fab_hash).unlink()

    def keep(self, response: Any) -> None:
        """Keep an app, and of the others those that were used last."""
        fab_hash = hashlib.sha256(response.fab.content).hexdigest()
        try:
            make_folder(self._folder)
            write_durably(self._path(fab_hash), [response.SerializeToString()])
        except OSError as error:  # the run does not need it
            _log.warning("the app is not kept in %s: %s", self._folder, error)
        with suppress(OSError):
            kept = sorted(self._folder.glob("*.app"), key=lambda path: path.stat().st_mtime)
            for path in kept[:-APPS_KEPT]:
                path.unlink()

    def _path(self, fab_hash: str) -> Path:
        name = hashlib.sha256(fab_hash.encode()).hexdigest()  # the server chooses no file's name
        return self._folder / f"{name}.app"
