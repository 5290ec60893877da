"""What Flower's processes are started with, and when they end."""

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

# A task waits until somebody looks for it: Flower's own interval is 1 s, and every look costs
# CPU for as long as nothing happens. A device has a task for every message of a round, the
# server one for a whole run.
SERVER_POLL_SECONDS, DEVICE_POLL_SECONDS = 1.0, 0.4
# Of a piece of a tensor. Flower's 5 MiB take 11 minutes at 64 kbit/s; a server gives up a
# reply of which nothing more has come for 3, and a reset begins a piece anew.
CHUNK_BYTES = 256 * 1024

_PARENT_POLL_SECONDS = 1.0


def flower_environment(home: Path, poll_seconds: float, **more: str) -> dict[str, str]:
    """All variables of a process of Flower's that stays by itself.

    What the user has set for other Flower processes does not reach it, nor do
    proxies; it installs nothing and calls nobody.

    Args:
        home: where it keeps its own files.
        poll_seconds: between two looks for a task.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FLWR_")
        and not name.lower().endswith("_proxy")
        # Each message would compile the app's code anew.
        and name != "PYTHONDONTWRITEBYTECODE"
    }
    scripts = str(Path(sys.executable).parent)  # Flower starts its own commands by name
    return inherited | {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(home),
        "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(CHUNK_BYTES),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll_seconds),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def own_command(module: str, *arguments: object) -> list[str]:
    """A module of the project as a program; the working directory is not searched for it."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def end_with_parent() -> None:
    """Let SIGTERM end this process once its parent is gone, however that went."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def node_config(values: Mapping[str, str | int | float | bool]) -> str:
    """Settings as `flower-supernode --node-config` reads them: `key="value"`, by spaces."""
    return " ".join(f"{key}={_toml_value(value)}" for key, value in values.items())


def _toml_value(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return repr(value)
    # Flower's reader ends a value at the next quote of its kind, escaped or not.
    escaped = value.replace("\\", "\\\\").replace('"', "\\u0022").replace("'", "\\u0027")
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
