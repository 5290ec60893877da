"""The SuperExec, which ends with the process that started it, and starts apps as ours.

    python -m fleet.deploy.superexec ARGUMENTS    # those of flower-superexec

Flower's own `--parent-pid` asks whether a process of that number exists: one that
was killed does, for as long as nobody has waited for it. Apps: `app_process`.
"""

import sys

from fleet.deploy.app_process import start_here
from fleet.deploy.flower_process import end_with_parent


def main() -> None:
    """Run the SuperExec until it is told to end, or its parent is gone."""
    end_with_parent()
    start_here()
    sys.argv[0] = "flower-superexec"
    from flwr.supercore.cli.flower_superexec import flower_superexec

    flower_superexec()


if __name__ == "__main__":
    main()
