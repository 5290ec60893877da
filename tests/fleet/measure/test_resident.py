"""Resident growth: of known allocations, and of a process that trains."""

import gc
import json
import sys

import pytest
import torch

import fleet.measure.resident as resident
from fleet.errors import ConfigError
from fleet.heap import trim
from fleet.measure.resident import resident_bytes, resident_growth
from fleet.measure.setup import Setup
from tests.forks import prepared

MIB = 2**20
SETUP = Setup(
    backbone="mobilenet_v3_small", method="mobiletl", blocks=2, batch_size=4, image_size=32
)


@pytest.fixture(scope="module")
def fresh():
    """A process that has imported what it takes to measure, to be forked."""
    imports = "import torch, fleet.measure.setup", "from fleet.measure.resident import *"
    with prepared(*imports) as process:
        yield process


@pytest.fixture(autouse=True)
def nothing_left_over():
    """Heap that earlier tests gave back would be used again, and nothing would grow."""
    gc.collect()
    trim()


def known():
    """Whether this system tells resident memory at all."""
    with resident_growth() as growth:
        pass
    return growth.bytes is not None


needs_proc = pytest.mark.skipif(not known(), reason="no /proc that can be reset")


@needs_proc
def test_growth_is_what_is_written_to():
    with resident_growth() as growth:
        kept = torch.ones(64 * MIB // 4)
    assert growth.bytes == pytest.approx(kept.nbytes, rel=0.1)


@needs_proc
def test_growth_is_the_most_at_once_even_if_it_is_given_back():
    with resident_growth() as growth:
        for _ in range(3):
            torch.ones(64 * MIB // 4)
    assert growth.bytes == pytest.approx(64 * MIB, rel=0.1)


@needs_proc
def test_growth_is_of_the_block_alone():
    torch.ones(64 * MIB // 4)  # an earlier peak, which is over
    before = torch.ones(32 * MIB // 4)
    with resident_growth() as growth:
        pass
    assert growth.bytes < 4 * MIB
    del before


@needs_proc
def test_growth_of_a_fresh_process_that_allocates_a_known_amount(fresh):
    code = "with resident_growth() as growth: x = torch.ones(64 * 2**18)\nprint(growth.bytes)"
    assert int(fresh.run(code)) == pytest.approx(64 * MIB, rel=0.1)


def test_a_system_that_does_not_tell_gives_none(monkeypatch, tmp_path):
    monkeypatch.setattr(resident, "_CLEAR", tmp_path / "nowhere" / "clear_refs")
    with resident_growth() as growth:
        torch.ones(1000)
    assert growth.bytes is None
    assert resident_bytes(SETUP) is None


def test_a_container_that_ignores_the_reset_gives_none(monkeypatch, tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t  900000 kB\nVmRSS:\t  500000 kB\n")
    monkeypatch.setattr(resident, "_STATUS", status)
    monkeypatch.setattr(resident, "_CLEAR", tmp_path / "clear_refs")
    with resident_growth() as growth:
        pass
    assert growth.bytes is None


@needs_proc
def test_a_process_that_trains_grows_by_some_mebibytes():
    """More than it allocates, as code and scratch memory come to it, but not by an import."""
    assert MIB < resident_bytes(SETUP) < 100 * MIB


def test_a_step_imports_nothing_large(fresh):
    """PyTorch's compiler stays resident with 150 MB; our step must not need it.

    Some torchvisions import it themselves, so it is hidden once the model is there.
    """
    code = (
        "import sys; from fleet.measure.setup import Setup, Subject\n"
        f"setup = Setup(backbone={SETUP.backbone!r}, method='mobiletl', blocks=2, batch_size=4,"
        " image_size=32)\n"
        "subject = Subject(setup, setup.load()); before = set(sys.modules)\n"
        "for name in [n for n in sys.modules if n.startswith('torch._dynamo')]:\n"
        "    sys.modules[name] = None\n"  # an import of it raises now
        "subject.step(); subject.step()\n"
        "import json; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    imported = json.loads(fresh.run(code).splitlines()[-1])
    assert [name for name in imported if name.startswith("torch")] == []


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    text = "the process that trains by mobiletl to measure its growth failed: exit code 1; lower"
    if not resident._CLEAR.exists():
        pytest.skip("no process is started here")
    with pytest.raises(ConfigError, match=text):
        resident_bytes(SETUP)
