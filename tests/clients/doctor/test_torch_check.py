import signal
import sys
from dataclasses import replace

import pytest
import torch
import torchvision

from clients.doctor import torch_check
from clients.doctor.torch_check import Probe, install_command, probe_torch, torch_finding

TOLD = {
    "version": "2.9.1",
    "torchvision": "0.24.1",
    "cuda": None,
    "cuda_usable": False,
    "right": True,
    "peak_kib": 300 * 1024,
}
WELL = Probe("2.9.1", 0, TOLD, machine="aarch64")


def test_pytorch_here_is_imported_in_another_process_and_works():
    probe = probe_torch("x86_64")
    assert probe.returncode == 0, probe.fault
    assert probe.output["version"] == torch.__version__
    assert probe.output["torchvision"] == torchvision.__version__
    assert torch_finding(probe, project_installed=True).state == "ok"


@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_crash_in_the_other_process_is_told_by_its_signal(tmp_path, monkeypatch, number):
    crash = f"import os, signal\nos.kill(os.getpid(), signal.{signal.Signals(number).name})\n"
    (tmp_path / "torch.py").write_text(crash)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = probe_torch("aarch64")
    assert probe.returncode == -number
    found = torch_finding(probe, project_installed=True)
    assert (found.state, found.remedy) == ("problem", install_command())
    assert signal.Signals(number).name in found.fact
    assert found.fact.startswith(f"torch {torch.__version__.split('+')[0]}")


def test_an_import_that_raises_is_told_by_its_last_line(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libgomp-1.so: cannot allocate memory')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = torch_finding(probe_torch("aarch64"), project_installed=True)
    assert found.state == "problem"
    assert found.fact.endswith(
        "cannot be imported with torchvision: ImportError: libgomp-1.so: cannot allocate memory"
    )


def test_what_lies_in_the_current_folder_is_not_taken_for_pytorch(tmp_path, monkeypatch):
    for name in ("here", "installed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torch.py").write_text(f"raise ImportError('{name}')")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    assert probe_torch("x86_64").fault == "ImportError: installed"


def test_pytorch_that_is_not_there_blocks_only_once_the_project_is(monkeypatch):
    before = torch_finding(Probe(None), project_installed=False)
    assert (before.state, before.fact) == ("unknown", "not installed yet")
    assert before.remedy == f"with the project, or: {install_command()}"
    after = torch_finding(Probe(None), project_installed=True)
    assert (after.state, after.fact) == ("problem", f"not installed in {sys.prefix}")


def test_a_build_for_the_processor_alone_is_well():
    found = torch_finding(WELL, project_installed=True)
    assert found.state == "ok"
    assert found.fact == ("torch 2.9.1 with torchvision 0.24.1 runs a conv, 300 MiB resident")


@pytest.mark.parametrize(
    ("machine", "usable", "state"),
    [("aarch64", False, "warning"), ("aarch64", True, "ok"), ("x86_64", False, "ok")],
)
def test_cuda_on_a_device_that_has_none_is_named_with_the_way_out(machine, usable, state):
    told = TOLD | {"cuda": "12.8", "cuda_usable": usable}
    packages = ("nvidia-cublas", "nvidia-cudnn")
    found = torch_finding(
        replace(WELL, output=told, machine=machine, cuda_packages=packages), project_installed=True
    )
    assert found.state == state
    if state == "warning":
        assert "built for CUDA 12.8, which this machine has not (2 packages" in found.fact
        assert found.remedy == f"pip uninstall nvidia-cublas nvidia-cudnn; {install_command()}"


def test_a_wrong_result_blocks():
    found = torch_finding(replace(WELL, output=TOLD | {"right": False}), project_installed=True)
    assert (found.state, found.fact) == ("problem", "torch 2.9.1: a conv of ones came out wrong")


def test_an_import_that_takes_for_ever_is_a_warning():
    found = torch_finding(replace(WELL, returncode=None), project_installed=True)
    assert found.state == "warning"
    assert found.fact == "torch 2.9.1 was not imported within 300 s"


@pytest.mark.parametrize("place", ["fleet", "."])
def test_the_constraints_are_named_where_they_lie(tmp_path, monkeypatch, place):
    """A wheel carries them inside the package, a checkout beside it; else the name has to do."""
    (tmp_path / "fleet").mkdir()
    monkeypatch.setattr(torch_check.fleet, "__file__", str(tmp_path / "fleet/__init__.py"))
    assert install_command() == "pip install -c constraints-pi.txt torch torchvision"
    path = tmp_path / place / "constraints-pi.txt"
    path.touch()
    assert install_command() == f"pip install -c {path} torch torchvision"
