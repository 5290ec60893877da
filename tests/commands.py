"""The project's command as a process that hears signals, however the tests were started."""

import sys

# Python leaves signals ignored where its parent does, as a shell's background job or nohup.
HEAR = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
)
FLEET = (sys.executable, "-c", HEAR + "from fleet.cli import main; main()")
