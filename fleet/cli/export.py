"""`fleet export`."""

from pathlib import Path

import click

from fleet.cli.options import format_option
from fleet.records import to_json


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write; its suffix names the format.",
)
@format_option("text", "json")
def command(run: Path, to: Path, output_format: str) -> None:
    """Write the model of a RUN to a file that others run.

    RUN is a run's folder, or a .safetensors file that a run or this command wrote.

    \b
    .safetensors  tensors under their original names, for the original model of
                  torchvision or timm; fleet predict reads it
    .pt2, .pt     a whole program, run by PyTorch alone:
                  torch.export.load(FILE).module(); no pickle and no TorchScript
    .onnx         for ONNX runtimes; needs the extra onnx
    .pte          for ExecuTorch, one image at a time; needs the extra executorch

    A program takes images, (N, 3, S, S) float32, prepared, and returns logits. Classes and
    preprocessing travel inside: as metadata, or model.json in PyTorch's archive; with .pte they
    lie beside it, in FILE.json.
    """
    from fleet.formats import export

    written = export(run, to)
    if output_format == "json":
        beside = written.description
        values = {"path": str(written.path), "bytes": written.nbytes}
        click.echo(to_json(values | {"description": str(beside) if beside else None}, indent=2))
        return
    click.echo(f"{written.path}: {written.nbytes / 2**20:.2f} MiB")
    if written.description:
        click.echo(f"{written.description}: classes and preprocessing")
