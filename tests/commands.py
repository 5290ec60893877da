"""The project in processes of its own: its command, which hears signals, and code."""

import os
import subprocess
import sys
from pathlib import Path

# Python leaves signals ignored where its parent does, as a shell's background job or nohup.
HEAR = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
)
FLEET = (sys.executable, "-c", HEAR + "from fleet.cli import main; main()")


def printed_elsewhere(program: str) -> str:
    """What a program prints in another process, where sets have another order than here."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
