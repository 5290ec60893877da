"""One simulated run in a process of its own, and what it held at the end of each round."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fleet.config import Value
from fleet.errors import ConfigError
from fleet.measure.comparison import commit
from fleet.records import RoundReport
from simulations.footprint import bound_on_peak, footprint, watching
from simulations.launch import simulate

_ROOT = Path(__file__).parents[2]
_MARK = "REPORT "


@dataclass(frozen=True, kw_only=True)
class RoundNote:
    """A round as its run's process saw it, workers included.

    Attributes:
        server_round: from 0 on.
        seconds: by the clock.
        pss, anonymous, files, processes: after the round, of `Footprint`.
        cpu_seconds: from the start of the run on.
        bound: `bound_on_peak`, until then.
    """

    server_round: int
    seconds: float
    pss: int
    anonymous: int
    files: int
    processes: int
    cpu_seconds: float
    bound: int


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run from its start to its end.

    Attributes:
        settings: of the run, its folders left out.
        workers: processes that clients ran in.
        commit: that it ran on.
        rounds: all but the last, at whose end workers are gone.
        accuracy: after the last round.
        peak_pss: the most that was seen at once, looked at every second.
        state_bytes, state_clients: what clients remember on disk, and of how many.
        cache_bytes: features on disk.
    """

    settings: Mapping[str, Value]
    workers: int
    commit: str
    rounds: tuple[RoundNote, ...]
    accuracy: float
    peak_pss: int
    state_bytes: int
    state_clients: int
    cache_bytes: int

    @property
    def bound(self) -> int:
        """Bytes that were never exceeded, whatever was not looked at."""
        return max(note.bound for note in self.rounds)


def run_kept(
    folder: Path,
    name: str,
    settings: Mapping[str, Value],
    workers: int,
    on_round: Callable[[RoundNote], None] = lambda note: None,
) -> Course:
    """A run, or what is kept of it from before, by the same commit.

    Args:
        folder: of all runs' courses; COMMIT/NAME.json in it is this one's.
        settings: that differ from the defaults; no folders.
        workers: as in `simulate`.

    Raises:
        ConfigError: if the run fails, with the last that it said; or if what is kept under
            its name ran with other settings.
    """
    code = commit()
    file = folder / (code or "no-commit") / f"{name}.json"
    if file.is_file():
        kept = json.loads(file.read_text())
        if (kept["settings"], kept["workers"]) != (dict(settings), workers):
            raise ConfigError(
                f"{file} is of {kept['settings']} with {kept['workers']} workers, asked for are "
                f"{dict(settings)} with {workers}; name another --out, or remove it"
            )
        return Course(**kept | {"rounds": tuple(RoundNote(**note) for note in kept["rounds"])})
    course = _run(name, settings, workers, code, on_round)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(asdict(course)))
    part.replace(file)
    return course


def _run(
    name: str,
    settings: Mapping[str, Value],
    workers: int,
    code: str,
    on_round: Callable[[RoundNote], None],
) -> Course:
    """In a process of its own, whose folders go with it."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    rounds, last = [], {}
    with tempfile.TemporaryDirectory(prefix="fleet-scale-") as folder:
        errors = Path(folder) / "errors"
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(dict(settings)), str(workers), folder],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=errors.open("w"),
            text=True,
        )
        try:
            with watching(process.pid) as peak:
                for row in _reported(process.stdout):
                    if "server_round" in row:
                        rounds.append(RoundNote(**row))
                        on_round(rounds[-1])
                    else:
                        last = row
        finally:
            process.terminate()
            process.wait()
        if not last:
            raise ConfigError(f"run {name} failed: {errors.read_text()[-1500:]}")
    return Course(
        settings=dict(settings),
        workers=workers,
        commit=code,
        rounds=tuple(rounds[:-1]),
        peak_pss=peak.pss,
        **last,
    )


def _reported(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What `_report` printed; what libraries print is passed over."""
    for line in lines:
        if line.startswith(_MARK):
            yield json.loads(line.removeprefix(_MARK))


def _report(row: Mapping[str, Any]) -> None:
    print(_MARK + json.dumps(dict(row)), flush=True)


def _main(settings: Mapping[str, Value], workers: int, folder: Path) -> None:
    """The run itself: a line at the end of each round, and one at its own end."""
    bound = 0

    def note(report: RoundReport) -> None:
        nonlocal bound
        bound = max(bound, bound_on_peak())
        held = asdict(footprint())
        _report(
            {"server_round": report.server_round, "seconds": report.seconds, "bound": bound} | held
        )

    folders = {"run-dir": "run", "state-dir": "state", "cache-dir": "cache"}
    paths = {key: str(folder / name) for key, name in folders.items()}
    record = simulate(dict(settings) | paths, on_round=note, workers=workers)
    states = list((folder / "state").rglob("*.safetensors"))
    _report(
        {
            "accuracy": record.summary()["accuracy"],
            "state_bytes": sum(path.stat().st_size for path in states),
            "state_clients": len({path.parent for path in states}),
            "cache_bytes": sum(
                path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()
            ),
        }
    )


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
