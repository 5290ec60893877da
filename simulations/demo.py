"""A fleet of ten unequal devices beside one that trains the head alone.

make demo
"""

import time
from pathlib import Path

from rich.console import Console

from fleet.cli import show_progress, show_run
from fleet.records import RunRecord
from fleet.report import write_page
from simulations.launch import simulate

# The head alone at the learning rate that served it best of 0.05, 0.01, 0.005 and 0.002.
_METHODS = {
    "head": {"method": "head", "learning-rate": 0.005},
    "mobiletl": {"method": "mobiletl", "blocks": "1,3,5"},
}
_ROUNDS = 10


def main() -> None:
    """Run both, show the fleet's table and what it gained."""
    console = Console()
    folder = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    console.print(
        "Ten simulated devices fine-tune EfficientNet-Lite0 on handwritten digits, split by "
        "Dirichlet(0.5). First only the classifier trains, for comparison; then, with MobileTL, "
        "the devices' top 1, 3 or 5 blocks do, each as many as the device affords."
    )
    records = {name: _run(console, name, folder) for name in _METHODS}
    write_page(records["mobiletl"], beside=[records["head"]])
    show_run(records["mobiletl"])
    head, fleet = (records[name].summary()["accuracy"] * 100 for name in _METHODS)
    console.print(
        f"held-out accuracy: {fleet:.1f} % with MobileTL, {head:.1f} % with the head alone "
        f"({fleet - head:+.1f} points)"
    )


def _run(console: Console, name: str, folder: Path) -> RunRecord:
    console.print(f"\n[bold]{name}[/bold]")
    settings = {**_METHODS[name], "rounds": _ROUNDS, "run-dir": str(folder / name)}
    with show_progress(_ROUNDS) as (on_round, on_reply):
        return simulate(settings, on_round=on_round, on_reply=on_reply)


if __name__ == "__main__":
    main()
