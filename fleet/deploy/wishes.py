"""Runs as they are wished for, and how far the server has come with each.

In the server's folder, for a run called NAME:

    runs/NAME.toml         the wish: settings, and whether it still holds; written by fleet run
    runs/NAME.fab          the app as it was when the run was wished for
    runs/NAME.state.toml   where it stands; written by fleet server alone
    runs/NAME/             the run's record, unless run-dir says another place
"""

import contextlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from fleet.config import Value
from fleet.deploy import private_files
from fleet.errors import ConfigError
from fleet.records import RunRecord

WAITING, RUNNING, FINISHED, FAILED, STOPPED = STATUSES = (
    "waiting",
    "running",
    "finished",
    "failed",
    "stopped",
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_WISH, _APP, _STATE = ".toml", ".fab", ".state.toml"

Table = TypeVar("Table")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A run that somebody wants.

    Attributes:
        run_dir: absolute path of its record.
        settings: all of them, by the names of the run configuration.
        signatures: of the app, `fleet.deploy.signing.sign_app`; without one, none.
        wanted: False once it is to be stopped.
        attempt: rises each time that somebody asks for it to go on.
    """

    run_dir: str
    settings: Mapping[str, Value]
    signatures: Mapping[str, str] = field(default_factory=dict)
    wanted: bool = True
    attempt: int = 1


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where the server has come with a wish.

    Attributes:
        status: one of `STATUSES`.
        attempt: the wish's that this is about.
        flower_run: Flower's number of the last submission; 0 before the first.
        submissions: how often it was submitted.
        rounds: rounds on record, round 0 among them, when it was submitted last.
        fruitless: submissions in a row that were lost without a new round.
        reason: why it stands so, in words.
    """

    status: str = WAITING
    attempt: int = 1
    flower_run: int = 0
    submissions: int = 0
    rounds: int = 0
    fruitless: int = 0
    reason: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it by itself."""
        return self.status in (FINISHED, FAILED, STOPPED)


class Wishes:
    """The folder of wishes.

    Args:
        folder: `runs` in the server's folder; made as the first wish is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Of all wishes, in the order of their names."""
        found = (path.name for path in self.folder.glob(f"*{_WISH}"))
        return sorted(n.removesuffix(_WISH) for n in found if not n.endswith(_STATE))

    def going_on(self) -> list[str]:
        """Names of the runs that are wanted and not over; one that cannot be read is none."""
        found = []
        for name in self.names():
            with contextlib.suppress(ConfigError):
                wish, standing = self.read(name), self.standing(name)
                if wish.wanted and not _is_over(wish, standing):
                    found.append(name)
        return found

    def make(self, name: str, wish: Wish, app: bytes) -> None:
        """Wish for a run.

        Args:
            name: its own; letters, digits, hyphens and underscores.
            wish: what is wanted.
            app: Flower's bundle.

        Raises:
            ConfigError: for a name that cannot be used or is taken.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"run name {name!r} cannot be used; take letters, digits, hyphens and "
                f"underscores, at most 63"
            )
        if self._path(name, _WISH).exists():
            raise ConfigError(f"there is a run {name} already; take another name with --name")
        private_files.make_private_folder(self.folder)
        private_files.replace(self._path(name, _APP), app)
        self.write(name, wish)  # last: it is what the server looks for

    def read(self, name: str) -> Wish:
        """A wish.

        Raises:
            ConfigError: if there is none of that name, or it cannot be read.
        """
        path = self._path(name, _WISH)
        if not path.exists():
            raise ConfigError(f"there is no run {name}; fleet run --list shows all")
        return _read_table(path, Wish, "wish for a run")

    def write(self, name: str, wish: Wish) -> None:
        """Change a wish."""
        private_files.replace(self._path(name, _WISH), _as_toml(wish))

    def app(self, name: str) -> bytes:
        """Flower's bundle of the run's app."""
        return private_files.read(self._path(name, _APP), "app bundle of the run", "wish anew")

    def standing(self, name: str) -> Standing:
        """Where the server has come with a wish; at the beginning, if it has not seen it yet."""
        path = self._path(name, _STATE)
        return _read_table(path, Standing, "state of a run") if path.exists() else Standing()

    def write_standing(self, name: str, standing: Standing) -> None:
        """Note where a wish stands; for the server alone."""
        private_files.replace(self._path(name, _STATE), _as_toml(standing))

    def stop(self, name: str) -> None:
        """Want a run no more.

        Raises:
            ConfigError: if there is no such run, or it is over.
        """
        wish, standing = self.read(name), self.standing(name)
        if _is_over(wish, standing):
            raise ConfigError(f"run {name} is over already: it has {standing.status}")
        self.write(name, replace(wish, wanted=False))

    def resume(self, name: str, rounds: int | None = None) -> None:
        """Want a run that is over to go on, or any run to have more rounds than it was to have.

        Raises:
            ConfigError: as `check`.
        """
        wish, standing = self.check(name, rounds)
        if rounds is not None and rounds != wish.settings["rounds"]:
            wish = replace(wish, settings={**wish.settings, "rounds": rounds})
        elif wish.wanted and not _is_over(wish, standing):
            return
        self.write(name, replace(wish, wanted=True, attempt=wish.attempt + 1))

    def check(self, name: str, rounds: int | None = None) -> tuple[Wish, Standing]:
        """A wish that may go on, and where it stands.

        Args:
            name: of the run.
            rounds: that it is to go on to; None: those that it was to have.

        Raises:
            ConfigError: if there is no such run, if it has finished and is to have no more
                rounds, or has done so many; or if it goes on and is to have fewer than it was to.
        """
        wish, standing = self.read(name), self.standing(name)
        if rounds is not None:
            RunRecord(Path(wish.run_dir)).check_more_rounds(rounds)
            going_on = name in self.going_on()
            if going_on and rounds < int(wish.settings["rounds"]):
                raise ConfigError(
                    f"rounds is {rounds}, and run {name} goes on to round "
                    f"{wish.settings['rounds']}; end it first: fleet run --stop {name}"
                )
        elif standing.status == FINISHED and _is_over(wish, standing):
            raise ConfigError(
                f"run {name} has finished its {wish.settings['rounds']} rounds; look at it: fleet "
                f"report {wish.run_dir}, or let it go on: fleet run --resume {name} --rounds MORE"
            )
        return wish, standing

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}{suffix}"


def _is_over(wish: Wish, standing: Standing) -> bool:
    """Whether nothing more will come of it, and nobody has asked for it to go on since."""
    return standing.over and standing.attempt == wish.attempt


def _as_toml(value: Wish | Standing) -> bytes:
    return tomli_w.dumps({k.replace("_", "-"): v for k, v in asdict(value).items()}).encode()


def _read_table(path: Path, kind: type[Table], what: str) -> Table:
    content = private_files.read(path, what, "see what there is with: fleet run --list")
    try:
        values: dict[str, Any] = tomllib.loads(content.decode())
        return kind(**{key.replace("-", "_"): value for key, value in values.items()})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); mend it, or remove it") from error
