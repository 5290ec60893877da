"""Flower's own commands, set up so that checkouts do not disturb one another.

    python -m simulations.flower_env

writes the setting into the virtual environment that runs it, as `make` does.
"""

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

_FIRST_PORT, _PORTS = 20000, 10000


def quiet_environment() -> dict[str, str]:
    """Flower neither installs an app's dependencies for every run nor calls home."""
    return {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def checkout_environment(root: Path) -> dict[str, str]:
    """Environment variables for `flwr` commands that belong to one checkout.

    `flwr run` keeps one local SuperLink a user, and simulated clients import
    code from where that was first started. A home and a pair of ports for each
    checkout keep their code apart.

    Args:
        root: of the checkout.
    """
    offset = int(hashlib.sha256(str(root).encode()).hexdigest(), 16) % (_PORTS // 2) * 2
    return quiet_environment() | {
        "FLWR_HOME": str(root / ".flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_FIRST_PORT + offset),
        "FLWR_LOCAL_CONTROL_API_PORT": str(_FIRST_PORT + offset + 1),
    }


def install(root: Path, site_packages: Path) -> Path:
    """Make a virtual environment's Python start with a checkout's Flower settings.

    Python runs the lines of `.pth` files that begin with `import` when it
    starts. Variables that are set already win.

    Returns:
        The file that was written.
    """
    path = site_packages / "fleet_flower_env.pth"
    variables = checkout_environment(root)
    # Flower starts its own commands by name: they must be found when the venv is not active.
    scripts = str(Path(sys.executable).parent) + os.pathsep
    path.write_text(
        f"import os; [os.environ.setdefault(k, v) for k, v in {variables!r}.items()]\n"
        f"import os; os.environ['PATH'] = {scripts!r} + os.environ.get('PATH', '')\n"
    )
    return path


if __name__ == "__main__":
    if sys.prefix == sys.base_prefix:
        sys.exit("not in a virtual environment; this would change Flower for every project")
    root = Path(__file__).resolve().parent.parent
    print(install(root, Path(sysconfig.get_path("purelib"))))
