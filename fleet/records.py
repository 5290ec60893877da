"""What a run leaves behind: configuration, rounds, summary and model, in one folder."""

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from fleet.durable import make_folder, sync_folder
from fleet.errors import ConfigError
from fleet.typed_json import from_json

if TYPE_CHECKING:
    import torch

_PACKAGES = ("fleet-mobiletl", "flwr", "torch", "torchvision", "timm", "numpy")
_PART = re.compile(r"\.(config\.toml|summary\.json|model\.safetensors)\.\d+")
_MENDED = "copy it again, remove summary.json to see the rounds alone, or repeat the run"
_BESIDE: ContextVar[Mapping[str, Any]] = ContextVar("tables beside the settings")


@dataclass(frozen=True, kw_only=True)
class ClientReport:
    """One client's part in one round.

    Attributes:
        name: the client's.
        blocks: k, how many blocks it trained.
        num_examples: its training images.
        loss: its mean training loss, in nats; None in a record if it was not finite.
        peak_bytes: the most that PyTorch allocates at once, beyond the loaded model, in
            a training step whose images no cache holds yet; batch and momentum are
            among it.
        seconds: of its local update.
        metrics: what else it measured (temperature, resident memory); None as in loss.
    """

    name: str
    blocks: int
    num_examples: int
    loss: float | None
    peak_bytes: int
    seconds: float
    metrics: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One round. Round 0 is the model before any training.

    Attributes:
        server_round: from 0 on.
        accuracy, loss: of the global model after the round, 0…1 and in nats;
            None if it was not evaluated, and in a record if it was not finite.
        train_loss: mean of the clients' training losses, by examples.
        bytes_up, bytes_down: of states and updates on their way to and from
            the server, records and their headers included.
        peak_client_bytes: the largest client's `peak_bytes`.
        seconds: wall time from the first message to the end of evaluation.
        clients: whose updates count.
        asked: who was to train.
        refused: client → why its reply, or its absence, did not count.
        late: asked clients without whom the round went on, as its goal was reached.
        late_replies: replies to messages of earlier rounds, dropped in this one.
        full_state: clients that were sent the state itself, not the steps to it from
            a version that they hold.
        stepped: whether the model moved; not with fewer updates than min-updates.
        coverage: tensor → how many clients trained it.
        bytes_by_client: client → bytes up, bytes down.
        bytes_by_role: `up`, `down` → role of tensors (`weight`, `shift`, …) or
            `headers` → bytes. An update that was refused is all headers.
        accuracy_by_client: client → its validation images, accuracy of the model after
            the round on them, 0…1; empty where the server evaluates.
    """

    server_round: int
    accuracy: float | None
    loss: float | None
    train_loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    peak_client_bytes: int = 0
    seconds: float = 0.0
    clients: tuple[ClientReport, ...] = ()
    asked: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    late: tuple[str, ...] = ()
    late_replies: int = 0
    full_state: tuple[str, ...] = ()
    stepped: bool = False
    coverage: Mapping[str, int] = field(default_factory=dict)
    bytes_by_client: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    bytes_by_role: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    accuracy_by_client: Mapping[str, tuple[int, float | None]] = field(default_factory=dict)

    @property
    def abandoned(self) -> bool:
        """Whether it was to move the model and did not, for want of updates."""
        return self.server_round > 0 and not self.stepped


class RunRecord:
    """The folder of one run: `config.toml`, `rounds.jsonl`, `summary.json`, `model.safetensors`."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @classmethod
    def reserve(cls, run_dir: str) -> "RunRecord":
        """Where a new run will go; nothing is written yet.

        Args:
            run_dir: a path; empty names a folder in `runs/` by the clock.

        Raises:
            ConfigError: if the folder holds a run or any file of one, or cannot be one.
        """
        record = cls(Path(run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"))
        ours = (
            record.config_path,
            record.rounds_path,
            record.summary_path,
            record.model_path,
            record.page_path,
            record.checkpoints_path,
        )
        try:
            there = set(os.listdir(record.path))
        except FileNotFoundError:
            return record
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise record._unusable(error) from error
        if there & {path.name for path in ours}:
            raise record._taken()
        return record

    @classmethod
    def create(cls, run_dir: str, settings: Mapping[str, Any]) -> "RunRecord":
        """Make the folder and write everything that is in force.

        Args:
            run_dir: as in `reserve`.
            settings: the run configuration.

        Raises:
            ConfigError: if the folder holds a run, or cannot be made. Of two runs
                that want one folder at once, one is refused.
        """
        record = cls.reserve(run_dir)
        try:
            content = record._facts(settings)
            make_folder(record.path)
        except (OSError, ValueError) as error:
            raise record._unusable(error) from error
        try:
            with record.config_path.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(record.path)
        except FileExistsError as error:
            raise record._taken() from error
        except OSError as error:
            raise record._unusable(error) from error
        return record

    @classmethod
    def reopen(cls, run_dir: str, settings: Mapping[str, Any]) -> "RunRecord":
        """The folder of a run that goes on, or of one that never got to its first round.

        Its config.toml says what is in force from now on; a summary, which says
        that the run has ended, is gone.

        Args:
            run_dir: a path.
            settings: the run configuration.

        Raises:
            ConfigError: if the folder cannot be written.
        """
        record = cls(Path(run_dir))
        try:
            content = record._facts(settings)
            make_folder(record.path)
            record.summary_path.unlink(missing_ok=True)
            for part in record.path.glob(".*.[0-9]*"):  # of a process that was killed
                if _PART.fullmatch(part.name):
                    part.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            raise record._unusable(error) from error
        with _replacing(record.config_path) as path:
            path.write_bytes(content)
        return record

    def _facts(self, settings: Mapping[str, Any]) -> bytes:
        """What `config.toml` holds."""
        facts = {
            "settings": dict(settings) | {"run-dir": str(self.path)},
            "versions": {name: version(name) for name in _PACKAGES},
            "machine": {"python": platform.python_version(), "platform": platform.platform()},
        }
        return tomli_w.dumps(facts | dict(_BESIDE.get({}))).encode()

    def _taken(self) -> ConfigError:
        return ConfigError(
            f"run directory {self.path} holds a run already; name another with run-dir, "
            f"or remove it"
        )

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"cannot write run directory {self.path}: {_reason(error)}; name another with run-dir"
        )

    @contextlib.contextmanager
    def held(self, patience: float = 10.0) -> Iterator[None]:
        """Keep every other process from running in this folder, made if it is not there.

        Args:
            patience: seconds that another one, which may be ending, is waited for.

        Raises:
            ConfigError: if another one runs in it still, or it cannot be made or opened.
        """
        deadline = time.monotonic() + patience
        try:
            make_folder(self.path)
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            while not _locked(handle):
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"run {self.path} goes on in another process; end that first, or name "
                        f"another run-dir"
                    )
                time.sleep(0.1)
            yield
        finally:
            os.close(handle)

    @property
    def config_path(self) -> Path:
        """Settings, versions and machine, as TOML."""
        return self.path / "config.toml"

    @property
    def rounds_path(self) -> Path:
        """One JSON object a line, a line a round."""
        return self.path / "rounds.jsonl"

    @property
    def summary_path(self) -> Path:
        """The run in one JSON object."""
        return self.path / "summary.json"

    @property
    def model_path(self) -> Path:
        """The trained model under the original names."""
        return self.path / "model.safetensors"

    @property
    def checkpoints_path(self) -> Path:
        """Folder of what the run goes on from, should it be ended before its end."""
        return self.path / "checkpoints"

    @property
    def page_path(self) -> Path:
        """The run as one HTML page."""
        return self.path / "report.html"

    def add_round(self, report: RoundReport) -> None:
        """Append a round and see it to the disk.

        Raises:
            ConfigError: if it cannot be written; the rounds before it are as they were.
        """
        self._append(to_json(asdict(report)))

    def end_with(self, line: str) -> None:
        """Make the rounds on record those up to one, as after a run that was killed.

        What is behind it is cut off, half a line too; what is missing of it is appended.

        Args:
            line: of `rounds.jsonl`: of the round that is to be the last.

        Raises:
            ConfigError: if the file cannot be read or written, or a line before it
                is not a round.
        """
        last, end = parse_round(line.encode()).server_round, 0
        if self.rounds_path.is_file():
            for report, behind in self.rounds_from(0):
                if report.server_round >= last:
                    break
                end = behind
            try:
                if self.rounds_path.read_bytes()[end:] == f"{line}\n".encode():
                    return
                os.truncate(self.rounds_path, end)
            except OSError as error:
                raise _unwritten(self.rounds_path, error) from error
        self._append(line)

    def _append(self, line: str) -> None:
        """Append a line to the rounds, whole or not at all unless the power is lost."""
        is_new = not self.rounds_path.exists()
        try:
            with self.rounds_path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    _write_all(file, f"{line}\n".encode())
                    os.fsync(file.fileno())
                except BaseException:
                    with contextlib.suppress(OSError):  # half a line would spoil the next
                        file.truncate(before)
                    raise
            if is_new:
                sync_folder(self.path)
        except OSError as error:
            raise _unwritten(self.rounds_path, error) from error

    def rounds(self) -> Iterator[RoundReport]:
        """The rounds so far; a line that is still being written is left out.

        Raises:
            ConfigError: if there is no run here, or a line is not a round.
        """
        for report, _ in self.rounds_from(0):
            yield report

    def check_whole(self) -> None:
        """Refuse a record that was damaged since its run ended; one under way may have any rounds.

        Raises:
            ConfigError: as `rounds` and `summary`, and if there are fewer rounds than the
                summary says.
        """
        try:
            os.stat(self.path)
        except FileNotFoundError:
            pass  # as any folder that holds no run
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise ConfigError(
                f"cannot read {self.path}: {_reason(error)}; name the folder of a run"
            ) from error
        # The summary first: it is written last.
        said = self.summary().get("rounds") if self.summary_path.is_file() else None
        last = max((report.server_round for report in self.rounds()), default=-1)
        if said is not None and type(said) is not int:
            raise ConfigError(
                f"{self.summary_path} is not a summary: rounds must be a whole number, got "
                f"{said!r}; {_MENDED}"
            )
        if said is not None and last < said:
            has = f"ends with round {last}" if last >= 0 else "has no round"
            raise ConfigError(
                f"{self.rounds_path} is damaged: it {has}, and {self.summary_path.name} beside it "
                f"says {said} rounds; {_MENDED}"
            )

    @property
    def last_round(self) -> int:
        """Number of the last round on record; −1 before there is one.

        Raises:
            ConfigError: if a line is not a round.
        """
        if not self.rounds_path.is_file():
            return -1
        return max((report.server_round for report in self.rounds()), default=-1)

    def check_more_rounds(self, rounds: int) -> None:
        """Refuse to go on to a round that is done.

        Raises:
            ConfigError: naming both.
        """
        done = max(0, self.last_round)
        if rounds <= done:
            raise ConfigError(
                f"rounds is {rounds}, and the run in {self.path} has done {done}; name a later "
                f"round to go on to"
            )

    def rounds_from(self, position: int) -> Iterator[tuple[RoundReport, int]]:
        """Rounds from a byte of `rounds.jsonl` on, each with the byte behind it.

        Who follows a run so reads every line once.

        Raises:
            ConfigError: as `rounds`.
        """
        if not self.rounds_path.is_file():
            if not self.config_path.is_file():
                raise ConfigError(f"{self.path} holds no run: there is no config.toml in it")
            return
        for line, end in _lines_from(self.rounds_path, position):
            try:
                report = parse_round(line)
            except ValueError as error:
                number = 1 + _read(self.rounds_path)[: end - 1].count(b"\n")
                raise ConfigError(
                    f"{self.rounds_path}, line {number}, is not a round: {error}; "
                    f"remove the line, or repeat the run"
                ) from error
            yield report, end

    def save_model(self, tensors: "Mapping[str, torch.Tensor]", facts: Mapping[str, str]) -> None:
        """Write `model.safetensors`; whoever reads it finds the last model or this one, whole.

        Args:
            tensors: name → tensor, on any device; no two may share memory.
            facts: what is needed to use the model again; the file's metadata.

        Raises:
            ConfigError: if it cannot be written.
        """
        # Here, not above: it brings torch, which a report does without.
        from safetensors import SafetensorError

        from fleet.model_file import model_bytes

        try:
            with _replacing(self.model_path) as path:
                # Not safetensors' save_file: its files are for their owner alone.
                path.write_bytes(model_bytes(tensors, facts))
        except SafetensorError as error:
            raise _unwritten(self.model_path, error) from error

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`; its being there says that the run ended well.

        Raises:
            ConfigError: if it cannot be written.
        """
        content = to_json(summary, indent=2) + "\n"
        with _replacing(self.summary_path) as path:
            path.write_text(content)

    def summary(self) -> dict[str, Any]:
        """The summary of a run that has ended.

        Raises:
            ConfigError: if it has not, or the file is damaged.
        """
        if not self.summary_path.is_file():
            rounds = sum(1 for _ in self.rounds())
            raise ConfigError(f"run {self.path} has no summary yet: it wrote {rounds} rounds")
        try:
            return _parse_object(_read(self.summary_path))
        except ValueError as error:
            raise ConfigError(
                f"{self.summary_path} is not a summary: {error}; {_MENDED}"
            ) from error


@contextlib.contextmanager
def recorded_beside(tables: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Have the runs that begin inside write these tables too, beside their settings."""
    token = _BESIDE.set(tables)
    try:
        yield
    finally:
        _BESIDE.reset(token)


def summarise(rounds: Iterable[RoundReport]) -> dict[str, Any]:
    """Totals over the rounds and the last round's accuracy and loss.

    Args:
        rounds: one at least; gone through once, and not held.
    """
    totals: Counter[str] = Counter()
    peak, last = 0, None
    for last in rounds:
        peak = max(peak, last.peak_client_bytes)
        totals["bytes_up"] += last.bytes_up
        totals["bytes_down"] += last.bytes_down
        totals["seconds"] += last.seconds
        totals["refused"] += len(last.refused)
        totals["late"] += len(last.late)
        totals["full_states"] += len(last.full_state)
        totals["abandoned_rounds"] += last.abandoned
    return {
        "accuracy": last.accuracy,
        "loss": last.loss,
        "rounds": last.server_round,
        "bytes_up": totals["bytes_up"],
        "bytes_down": totals["bytes_down"],
        "peak_client_bytes": peak,
        "seconds": round(totals["seconds"], 3),
        "refused": totals["refused"],
        "late": totals["late"],
        "full_states": totals["full_states"],
        "abandoned_rounds": totals["abandoned_rounds"],
    }


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is not finite becomes null.

    Python would write NaN and Infinity, which RFC 8259 does not know. A loss
    that diverged is told from one that was not measured by the run's log alone.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same value with None for every NaN and infinity in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def parse_round(line: str | bytes) -> RoundReport:
    """A line of `rounds.jsonl`; ValueError says what is wrong with it.

    An older version's line lacks the keys that were added since: those take their defaults.
    """
    values = _parse_object(line)
    # Where it was not on record yet, every round that had updates stepped.
    values.setdefault("stepped", bool(values.get("clients")))
    return from_json(RoundReport, values)


def _parse_object(content: str | bytes) -> dict[str, Any]:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {value!r}")
    return value


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` once it is whole and on the disk.

    Raises:
        ConfigError: if it cannot be written; `path` is then as it was.
    """
    # One name a process: two that write the same file do not mix their bytes.
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _locked(folder: int) -> bool:
    """Lock an open folder, until it is closed or this process ends; False: another one has."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_all(file: Any, content: bytes) -> None:
    """Write to an unbuffered file, which may take a part at a time."""
    left = memoryview(content)
    while len(left):
        left = left[file.write(left) :]


def _lines_from(path: Path, position: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines from a byte on, each with the byte behind it."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            for line in file:
                if line.endswith(b"\n"):
                    position += len(line)
                    yield line[:-1], position
    except OSError as error:
        raise _unreadable(path, error) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"cannot read {path}: {_reason(error)}; make it readable for this user")


def _unwritten(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot write {path}: {_reason(error)}; free space or give write permission there, "
        f"then resume the run, or run again with another run-dir"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
