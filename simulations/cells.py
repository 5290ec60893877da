"""A cell of a comparison: one run, found again by its configuration and the code that made it.

runs/KEY/              a run that ended well, with cell.json, written last
runs/KEY.part-PID/     one under way; of no use once its process is gone
runs/KEY.corrupt-N/    one that was not what its cell.json says, set aside
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fleet.config import Value
from fleet.data import BUILT_IN
from fleet.errors import ConfigError
from fleet.paths import expanded
from fleet.records import RunRecord, to_json
from simulations.deciding import code_version, deciding_files, own_version
from simulations.recipe import Variant

# Where something lies and how much room it has: results do not depend on it.
_NEUTRAL = ("cache-dir", "cache-mib")
_CHECKED = ("config.toml", "rounds.jsonl", "summary.json")
_MODEL = "model.safetensors"  # checked too where it was kept; whoever needs room may remove it
_CELL = "cell.json"


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        variant: what it has in common with its row.
        seed: that of the run.
        key: 16 hex digits, of all that decides its result.
    """

    variant: Variant
    seed: int
    key: str


class Keys:
    """Keys of cells, by code and files as they are when it is made or asked first."""

    def __init__(self) -> None:
        self._files = frozenset(deciding_files())
        self._code = code_version(sorted(self._files))
        self._state_of = cache(_state_of)
        self._own_code = cache(self._read_own_code)

    def cell(self, variant: Variant, seed: int) -> Cell:
        """The cell with its key."""
        return Cell(variant, seed, self.of(variant, seed))

    def of(self, variant: Variant, seed: int) -> str:
        """16 hex digits over configuration, data on the disk, code and libraries."""
        settings = {k: v for k, v in variant.settings.items() if k not in _NEUTRAL}
        facts = {
            "settings": settings | {"seed": seed},
            "engine": variant.engine,
            "adversity": dict(variant.adversity),
            "files": {key: self._state_of(key, settings[key]) for key in ("data", "weights")},
            "own": {key: self._own_code(settings[key]) for key in ("strategy", "rule")},
            "code": self._code,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _read_own_code(self, name: Value) -> str:
        """Of `package.module:name` its module and what that imports; empty for a built-in name."""
        module, colon, _ = str(name).partition(":")
        return own_version(module, self._files) if colon else ""


class CellFolders:
    """The runs of a comparison, each in a folder named by its key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def path(self, cell: Cell) -> Path:
        """Where its run is, once it has ended well."""
        return self.folder / cell.key

    def measured(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured beside the record; None if there is no run.

        Raises:
            ConfigError: for a run that is there but damaged, saying what is.
        """
        path = self.path(cell)
        if not path.exists():
            return None
        try:
            facts = json.loads((path / _CELL).read_bytes())
            digests, measured = facts["sha256"], facts["measured"]
            if facts["key"] != cell.key:
                raise ConfigError(f"it is of the key {facts['key']}, not of {cell.key}")
            for name in _checked(path):
                if _digest(path / name) != digests[name]:
                    raise ConfigError(f"{name} is not as it was written")
            float(measured["device_flops"])
            return dict(measured)
        except FileNotFoundError as error:
            raise ConfigError(f"{Path(error.filename).name} is missing") from error
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{_CELL} is damaged: {error}") from error

    def has_model(self, cell: Cell) -> bool:
        """Whether its run was kept with its model."""
        return RunRecord(self.path(cell)).model_path.is_file()

    def set_aside(self, cell: Cell) -> Path:
        """Rename a damaged run; its new place."""
        for number in itertools.count(1):
            place = self.folder / f"{cell.key}.corrupt-{number}"
            if not place.exists():
                os.rename(self.path(cell), place)
                return place
        raise AssertionError

    def part(self, key: str) -> Path:
        """Where a run of this process is made."""
        return self.folder / f"{key}.part-{os.getpid()}"

    def finish(self, key: str, measured: Mapping[str, Any]) -> Path:
        """A run that ended well takes its place, whole or not at all; one that was there goes."""
        part, place = self.part(key), self.folder / key
        config = part / "config.toml"  # it names its folder
        config.write_text(config.read_text().replace(part.name, place.name))
        facts = {
            "key": key,
            "sha256": {name: _digest(part / name) for name in _checked(part)},
            "measured": dict(measured),
        }
        with (part / _CELL).open("w") as file:
            file.write(to_json(facts, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(place, ignore_errors=True)
        os.rename(part, place)
        return place

    def clear(self) -> None:
        """Remove what runs left that were killed."""
        for part in self.folder.glob("*.part-*"):
            shutil.rmtree(part, ignore_errors=True)


def _checked(run: Path) -> tuple[str, ...]:
    """Files that are to be as they were written."""
    return (*_CHECKED, _MODEL) if (run / _MODEL).exists() else _CHECKED


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _state_of(setting: str, name: str) -> str:
    """Of a path on the disk its files' names, sizes and times; a built-in name has none."""
    path = expanded(name, setting)
    if name in BUILT_IN or not os.path.exists(path):
        return ""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        state = file.stat()
        digest.update(f"{file}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    return digest.hexdigest()
