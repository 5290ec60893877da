"""The app as Flower sends it to devices, from a checkout or from what is installed."""

from pathlib import Path

from fleet.errors import ConfigError

PACKAGES = ("fleet", "clients", "strategies")
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
    return files


def build_app(root: Path | None = None) -> bytes:
    """Flower's app bundle (FAB); the same bytes for the same files.

    Raises:
        ConfigError: if a package is missing, or Flower does not take the files.
    """
    from flwr.cli.build import build_fab_from_files

    files = app_files(root)
    try:
        return build_fab_from_files(files)[0]
    except (ValueError, OSError) as error:
        raise ConfigError(f"Flower cannot bundle the app: {error}") from error
