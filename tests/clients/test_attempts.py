"""What a device learns from trainings that did not end, with real processes that are killed."""

import re
import signal
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from clients import attempts
from clients.attempts import Attempt, Experience, attempting, is_out_of_memory, recall, recover
from clients.memory import ClientMemory
from fleet.errors import ConfigError, UpdateError
from tests.forked import Forked

MIB = 2**20
TRIED = Attempt(server_round=3, blocks=5, batch_size=16, peak_bytes=100 * MIB)


@pytest.fixture
def memory(tmp_path):
    return ClientMemory(tmp_path, "ab12", "attic")


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """What the kernel tells: boot, and processes that it killed for memory."""
    boot, vmstat = tmp_path / "boot_id", tmp_path / "vmstat"
    monkeypatch.setattr(attempts, "_BOOT", boot)
    monkeypatch.setattr(attempts, "_VMSTAT", vmstat)

    class Kernel:
        @staticmethod
        def tells(boot_id="one", oom_kills=0):
            boot.write_text(f"{boot_id}\n")
            line = "" if oom_kills is None else f"oom_kill {oom_kills}\n"
            vmstat.write_text(f"oom_kill_x 9\n{line}pgmajfault 3\n")

    Kernel.tells()
    return Kernel


def die(memory, attempt=TRIED):
    """A training begins, and its process is gone before it ends."""
    with attempting(memory, recall(memory), attempt):
        mark = memory.read(attempts.PART)
    memory.write(attempts.PART, {}, mark.facts)


def succeed(memory):
    with attempting(memory, recall(memory), TRIED):
        pass


def test_a_device_that_was_never_killed_has_learnt_nothing(memory, kernel):
    succeed(memory)
    assert recall(memory) == Experience()
    assert recall(memory).metrics() == {}
    assert recall(memory).within(None) is None
    assert recall(memory).within(7) == 7


def test_a_kill_that_the_kernel_counts_cuts_what_the_next_is_planned_within(memory, kernel):
    die(memory)
    kernel.tells(oom_kills=1)
    learnt = recall(memory)
    assert learnt.limit_bytes == 70 * MIB
    assert learnt.metrics() == {"killed-before": 1, "memory-limit-bytes": 70 * MIB}
    assert learnt.within(None) == learnt.within(100 * MIB) == 70 * MIB
    assert learnt.within(50 * MIB) == 50 * MIB
    assert recall(memory) == learnt  # until the next training


def test_where_the_kernel_counts_no_kills_every_death_passes_for_one(memory, kernel):
    kernel.tells(oom_kills=None)
    die(memory)
    assert recall(memory).limit_bytes == 70 * MIB


def test_one_death_without_a_kill_counted_is_a_restart_and_two_are_none(memory, kernel):
    die(memory)
    assert recall(memory).limit_bytes is None
    assert recall(memory).metrics() == {}
    die(memory)
    assert recall(memory).metrics()["killed-before"] == 1


def test_a_training_that_ends_between_two_deaths_makes_both_restarts(memory, kernel):
    for _ in range(2):
        die(memory)
        succeed(memory)
    assert recall(memory) == Experience()


def test_after_a_power_cut_nothing_is_cut(memory, kernel):
    die(memory)
    kernel.tells("two", oom_kills=0)
    assert recall(memory) == Experience()


def test_a_second_kill_cuts_further(memory, kernel):
    for kills, peak in ((1, 100), (2, 70)):
        die(memory, replace(TRIED, peak_bytes=peak * MIB))
        kernel.tells(oom_kills=kills)
        recall(memory)
    learnt = recall(memory)
    assert (learnt.limit_bytes, learnt.kills) == (49 * MIB, 2)


def test_rounds_that_end_well_give_it_back_slowly_and_slower_after_more_kills(memory, kernel):
    rounds = []
    for kills in (1, 2):
        die(memory)
        kernel.tells(oom_kills=kills)
        limits = [recall(memory).limit_bytes]
        while limits[-1] is not None:
            succeed(memory)
            limits.append(recall(memory).limit_bytes)
        assert limits[:-1] == sorted(limits[:-1]) and limits[-2] < 100 * MIB
        rounds.append(len(limits) - 1)
    assert rounds[0] == 8  # 0.7 · 1.05⁸ > 1
    assert rounds[1] == 15  # 0.7 · 1.025¹⁵ > 1


def test_a_kill_is_told_until_an_update_came_through(memory, kernel):
    die(memory)
    kernel.tells(oom_kills=1)
    with pytest.raises(UpdateError), attempting(memory, recall(memory), TRIED):
        raise UpdateError("the loss is not finite")
    assert recall(memory).metrics()["killed-before"] == 1
    succeed(memory)
    assert "killed-before" not in recall(memory).metrics()
    assert "memory-limit-bytes" in recall(memory).metrics()


def test_a_limit_below_the_floor_rises_until_something_fits(memory, kernel):
    die(memory)
    kernel.tells(oom_kills=1)
    before = recall(memory)
    recover(memory, before)
    assert before.limit_bytes < recall(memory).limit_bytes < 1.06 * before.limit_bytes


@pytest.mark.parametrize("error", [UpdateError("x"), RuntimeError("x"), KeyboardInterrupt()])
def test_a_training_that_fails_otherwise_leaves_no_mark(memory, kernel, error):
    with pytest.raises(type(error)), attempting(memory, recall(memory), TRIED):
        raise error
    kernel.tells(oom_kills=1)
    assert recall(memory) == Experience()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),  # oneDNN's, of a convolution
    ],
    ids=lambda error: str(error)[:30],
)
def test_an_error_of_memory_is_a_refusal_and_makes_the_next_round_smaller(memory, kernel, error):
    text = (
        "training 5 blocks at batch 16 ran out of memory beyond 100.0 MiB that were predicted; the "
        "next round is planned within 70.0 MiB: end what else runs on this device, or lower "
    )
    learnt = recall(memory)
    with pytest.raises(ConfigError, match=re.escape(text)), attempting(memory, learnt, TRIED):
        raise error
    assert recall(memory).limit_bytes == 70 * MIB
    assert recall(memory).metrics()["killed-before"] == 1


def test_other_errors_are_none_of_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(KeyError("out of memory"))
    unable = "could not create a primitive descriptor for a convolution forward propagation"
    assert not is_out_of_memory(RuntimeError(unable))


def test_pytorch_s_own_error_is_known():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(found.value)


def test_a_mark_of_another_version_is_forgotten(memory, kernel):
    for facts in ({"experience": "no JSON"}, {"experience": '{"attempt": null, "new": 1}'}, {}):
        memory.write(attempts.PART, {}, facts)
        assert recall(memory) == Experience()


def test_this_kernel_tells():
    """What the rest relies on, where the tests run on Linux."""
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    assert len(attempts.boot_id()) == 36
    assert attempts.oom_kills() is None or attempts.oom_kills() >= 0


def test_a_process_that_is_ended_as_it_hangs_was_not_killed_for_memory(memory, tmp_path):
    for _ in range(3):
        child = Forked(partial(train, tmp_path, timeout=0.2), sys.__stderr__)
        assert child.stdout.readline() == "training\n"
        assert memory.read(attempts.PART) is not None
        deadline = time.monotonic() + 30
        while '"attempt": null' not in memory.read(attempts.PART).facts["experience"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.kill()
        child.wait()
    assert recall(memory) == Experience()


def train(folder, **options):
    memory = ClientMemory(folder, "ab12", "attic")
    attempt = Attempt(server_round=3, blocks=5, batch_size=16, peak_bytes=100 * 2**20)
    with attempting(memory, recall(memory), attempt, **options):
        print("training", flush=True)
        time.sleep(60)


def test_a_process_that_is_really_killed_leaves_its_mark(memory, tmp_path):
    for _ in range(2):  # twice, as this kernel's count does not rise by these
        child = Forked(partial(train, tmp_path), sys.__stderr__)
        assert child.stdout.readline() == "training\n"
        child.kill()
        assert child.wait() == -signal.SIGKILL
        recall(memory)
    assert recall(memory).limit_bytes == 70 * MIB
