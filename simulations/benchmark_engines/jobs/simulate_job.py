"""The command `fleet simulate` itself, on the smallest fleet that trains a real model."""

import contextlib
import io
import tempfile
from importlib.metadata import version
from pathlib import Path

from marks import Marks

# Everything else is as the command has it: digits, pretrained EfficientNet-Lite0, MobileTL.
OPTIONS = {
    "clients": 2,
    "train-examples": 100,
    "test-examples": 50,
    "image-size": 32,
    "blocks": 1,
    "local-epochs": 1,
}


def run(marks: Marks) -> float:
    """Run the command in this process, without a cache of earlier runs; the last loss."""
    from fleet.cli import main
    from fleet.records import RunRecord

    record = RunRecord.add_round

    def noting(self, report):
        record(self, report)
        marks.note(report.server_round)

    RunRecord.add_round = noting  # the round is over once it is on the disk
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        words = [f"--{name}={value}" for name, value in OPTIONS.items()]
        words += [
            f"--rounds={marks.last}",
            f"--run-dir={folder}/run",
            f"--cache-dir={folder}/cache",
        ]
        main(["simulate", *words], standalone_mode=False)
        return RunRecord(Path(folder) / "run").summary()["loss"]


def _load_flower() -> None:
    import flwr.app
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401


if __name__ == "__main__":
    marks = Marks()
    marks.imported("torch", lambda: __import__("torch"))
    marks.imported("flwr", _load_flower)
    loss = run(marks)
    marks.report(loss, {name: version(name) for name in ("torch", "flwr", "timm")})
