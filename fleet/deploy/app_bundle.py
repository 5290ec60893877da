"""The app as Flower sends it to devices, from a checkout or from what is installed.

Every device fetches it before its first message of a run, over whatever link it has.
"""

import zipfile
from io import BytesIO
from pathlib import Path

from fleet.errors import ConfigError

PACKAGES = ("fleet", "clients", "strategies")
# Commands, which a machine runs from its own installation; no run imports them.
LEFT_OUT = ("fleet/cli", "fleet/deploy", "clients/doctor", "clients/executor")
_PROJECT = "pyproject.toml"


def app_files(root: Path | None = None) -> dict[str, Path]:
    """Path in the bundle → file, of everything that server and devices run.

    Args:
        root: that the packages lie in; None: of those that this program runs from.

    Raises:
        ConfigError: if a package is missing.
    """
    root = Path(__file__).resolve().parents[2] if root is None else root
    # Beside the packages in a checkout, inside one of them once they are installed.
    projects = [path for path in (root / _PROJECT, root / "fleet" / _PROJECT) if path.is_file()]
    if not projects:
        raise ConfigError(f"{_PROJECT} is missing in {root}; install fleet-mobiletl again")
    files = {_PROJECT: projects[0]}
    for package in PACKAGES:
        modules = sorted((root / package).rglob("*.py"))
        if not modules:
            raise ConfigError(f"package {package} is missing in {root}; install fleet-mobiletl")
        files |= {module.relative_to(root).as_posix(): module for module in modules}
    commands = tuple(f"{name}{end}" for name in LEFT_OUT for end in ("/", ".py"))
    return {path: file for path, file in files.items() if not path.startswith(commands)}


def build_app(root: Path | None = None) -> bytes:
    """Flower's app bundle (FAB); the same bytes for the same files.

    Raises:
        ConfigError: if a package is missing, or Flower does not take the files.
    """
    from flwr.cli.build import build_fab_from_files

    files = app_files(root)
    try:
        bundle = build_fab_from_files(files)[0]
    except (ValueError, OSError) as error:
        raise ConfigError(f"Flower cannot bundle the app: {error}") from error
    return _deflated(bundle)


def _deflated(bundle: bytes) -> bytes:
    """The same files, compressed. Flower 1.41 asks for that too, and each file undoes it."""
    smaller = BytesIO()
    with zipfile.ZipFile(BytesIO(bundle)) as stored, zipfile.ZipFile(smaller, "w") as deflated:
        for member in stored.infolist():
            deflated.writestr(
                zipfile.ZipInfo(member.filename, member.date_time),
                stored.read(member),
                zipfile.ZIP_DEFLATED,
                compresslevel=9,
            )
    return smaller.getvalue()
