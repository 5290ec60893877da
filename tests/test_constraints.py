"""The versions for devices: those of constraints.txt, but for PyTorch."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OTHERS = {"torch": "2.9.1", "torchvision": "0.24.1"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in pairs}


DEVICE, TESTED = pins("constraints-pi.txt"), pins("constraints.txt")


def test_devices_have_the_tested_versions_of_all_but_pytorch():
    common = (DEVICE.keys() & TESTED.keys()) - OTHERS.keys()
    assert len(common) > 50
    assert {name: DEVICE[name] for name in common} == {name: TESTED[name] for name in common}


def test_devices_have_the_pytorch_without_cuda():
    assert {name: DEVICE[name] for name in OTHERS} == OTHERS


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_the_project_takes_the_version_that_devices_have(requirement):
    needed = Requirement(requirement)
    version = DEVICE.get(canonicalize_name(needed.name))
    assert version is not None, f"constraints-pi.txt leaves {needed.name} open"
    assert needed.specifier.contains(version)
