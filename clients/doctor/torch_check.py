"""PyTorch, imported and run in a process of its own: some builds crash on some processors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import fleet
from clients.doctor.findings import OK, PROBLEM, UNKNOWN, WARNING, Finding
from clients.doctor.readings import size

SECONDS = 300  # a Pi reads PyTorch from its SD card for half a minute
CONSTRAINTS = "constraints-pi.txt"

# A 3 × 3 conv of ones over ones is 9 per input channel, and so is its weight's gradient per pixel.
_PROBE = """
import json, resource, sys
if sys.path[0] == "":
    del sys.path[0]  # whatever lies in the current folder
import torch, torchvision
images = torch.ones(2, 4, 8, 8)
weight = torch.ones(5, 4, 3, 3, requires_grad=True)
out = torch.nn.functional.conv2d(images, weight)
out.sum().backward()
right = bool((out == 36).all()) and bool((weight.grad == 2 * 36).all())
print(json.dumps({
    "version": torch.__version__, "torchvision": torchvision.__version__,
    "cuda": torch.version.cuda, "cuda_usable": torch.cuda.is_available(), "right": right,
    "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
}))
"""


def install_command() -> str:
    """Installs the PyTorch that this project was tried with on devices."""
    package = Path(fleet.__file__).parent  # a wheel carries the file there, a checkout beside it
    places = (package / CONSTRAINTS, package.parent / CONSTRAINTS)
    path = next((str(place) for place in places if place.exists()), CONSTRAINTS)
    return f"pip install -c {path} torch torchvision"


@dataclass(frozen=True)
class Probe:
    """How PyTorch did.

    Attributes:
        installed: its version by the package's own word; None if it is not there.
        returncode: of the process that imported it; None if it did not end in time.
        output: what that process printed as JSON.
        fault: the last line that it printed as error.
        machine: the kernel's architecture.
        cuda_packages: those of CUDA that are installed.
    """

    installed: str | None
    returncode: int | None = 0
    output: dict[str, object] = field(default_factory=dict)
    fault: str = ""
    machine: str = "x86_64"
    cuda_packages: tuple[str, ...] = ()


def probe_torch(machine: str, python: str = sys.executable) -> Probe:
    """Import PyTorch and torchvision in a process of its own and run one conv, both ways."""
    installed = _version("torch")
    if installed is None:
        return Probe(None, machine=machine)
    cuda_packages = tuple(
        sorted(
            name
            for distribution in metadata.distributions()
            if (name := str(distribution.metadata["Name"])).startswith(("nvidia-", "cuda-"))
        )
    )
    returncode, output, fault = _run_probe(python)
    return Probe(installed, returncode, output, fault, machine, cuda_packages)


def _run_probe(python: str) -> tuple[int | None, dict[str, object], str]:
    try:
        done = subprocess.run(
            [python, "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
    except subprocess.TimeoutExpired:
        return None, {}, ""
    errors = done.stderr.decode(errors="replace").strip().splitlines()
    try:
        output = json.loads(done.stdout.decode(errors="replace").strip().splitlines()[-1])
    except (ValueError, IndexError):
        output = {}
    return done.returncode, output, errors[-1] if errors else ""


def torch_finding(probe: Probe, project_installed: bool) -> Finding:
    """Whether PyTorch runs here, and which build it is."""
    check, name = "PyTorch", f"torch {probe.installed}"
    if probe.installed is None:
        if project_installed:
            return Finding(check, PROBLEM, f"not installed in {sys.prefix}", install_command())
        return Finding(
            check, UNKNOWN, "not installed yet", f"with the project, or: {install_command()}"
        )
    if probe.returncode is None:
        return Finding(
            check,
            WARNING,
            f"{name} was not imported within {SECONDS} s",
            "look for a slow or failing SD card (dmesg), or free memory",
        )
    if probe.returncode < 0:
        return Finding(check, PROBLEM, f"{name}: {_crash(-probe.returncode)}", install_command())
    if probe.returncode or not probe.output:
        return Finding(
            check,
            PROBLEM,
            f"{name} cannot be imported with torchvision: {probe.fault or 'no reason given'}",
            install_command(),
        )
    if not probe.output["right"]:
        return Finding(check, PROBLEM, f"{name}: a conv of ones came out wrong", install_command())
    return _build_finding(probe)


def _build_finding(probe: Probe) -> Finding:
    """Of a PyTorch that works: whether it brought packages that a device has no use for."""
    told = probe.output
    seen = (
        f"torch {told['version']} with torchvision {told['torchvision']} runs a conv, "
        f"{size(int(told['peak_kib']) * 1024)} resident"
    )
    if not told["cuda"] or told["cuda_usable"]:
        return Finding("PyTorch", OK, seen)
    seen += f", built for CUDA {told['cuda']}, which this machine has not"
    if probe.cuda_packages:
        seen += f" ({len(probe.cuda_packages)} packages of CUDA)"
    if probe.machine not in ("aarch64", "arm64"):
        return Finding("PyTorch", OK, seen)
    remove = f"pip uninstall {' '.join(probe.cuda_packages)}; " if probe.cuda_packages else ""
    return Finding("PyTorch", WARNING, f"{seen}: gigabytes for nothing", remove + install_command())


def _crash(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if name == "SIGILL":
        return "its import ends with SIGILL: this build has instructions that the processor lacks"
    if name == "SIGKILL":
        return "its import ends with SIGKILL: most likely killed for want of memory"
    return f"its import, or a conv, ends with {name}"


def project_installed() -> bool:
    """Whether the project is installed for this Python.

    A wheel that is only on PYTHONPATH has the project's own metadata and none of its
    requirements.
    """
    return None not in (_version("fleet-mobiletl"), _version("flwr"))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
