import os
import shutil
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from clients.doctor import room
from clients.doctor.room import disk_finding, disk_findings, meminfo, memory_finding, swap_finding

GIB, MIB = 2**30, 2**20


def memory(total, free=None):
    return {"MemTotal": total, "MemAvailable": total if free is None else free}


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not on Linux")
def test_memory_is_what_psutil_says():
    assert meminfo(Path("/"))["MemTotal"] == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("reading", "state", "fact", "remedy"),
    [
        (memory(4 * GIB, 3 * GIB), "ok", "3.0 GiB free of 4.0 GiB", ""),
        (memory(1848 * MIB, 1500 * MIB), "ok", "1.5 GiB free of 1.8 GiB", ""),
        (memory(900 * MIB, 800 * MIB), "warning", "800 MiB free of 900 MiB", "2 GB and up"),
        (
            memory(4 * GIB, 400 * MIB),
            "warning",
            "400 MiB free of 4.0 GiB, a client needs some 600 MiB",
            "end other programs",
        ),
        (memory(430 * MIB), "problem", "430 MiB free of 430 MiB", "a client needs some 600 MiB"),
        ({}, "unknown", "there is no /proc/meminfo", ""),
    ],
)
def test_memory_has_to_hold_a_client(reading, state, fact, remedy):
    found = memory_finding(reading)
    assert (found.state, found.fact) == (state, fact)
    assert found.remedy.startswith(remedy)


HEAD = "Filename\t\t\t\tType\t\tSize\tUsed\tPriority\n"


@pytest.mark.parametrize(
    ("swaps", "total", "state", "fact"),
    [
        (f"{HEAD}/dev/zram0  partition  524288  0  100\n", GIB, "ok", "zram, 512 MiB"),
        (f"{HEAD}/var/swap  file  102396  0  -2\n", GIB, "ok", "/var/swap, 100 MiB"),
        (HEAD, 2 * GIB, "warning", "none: a short peak ends with a killed process"),
        (HEAD, 16 * GIB, "ok", "none, which so much memory can do without"),
    ],
)
def test_swap_is_told_by_kind(tmp_path, swaps, total, state, fact):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/swaps").write_text(swaps)
    found = swap_finding(memory(total), tmp_path)
    assert (found.state, found.fact) == (state, fact)
    assert ("zram-tools" in found.remedy) == (state == "warning")


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes every disk has free."""
    Usage = namedtuple("Usage", "total used free")

    def put(nbytes):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, nbytes))

    return put


@pytest.mark.parametrize(
    ("nbytes", "state"), [(2 * GIB, "ok"), (500 * MIB, "warning"), (100 * MIB, "problem")]
)
def test_a_folder_that_is_not_there_is_judged_by_the_one_above(tmp_path, free, nbytes, state):
    free(nbytes)
    path = tmp_path / "not" / "yet"
    found = disk_finding("disk", path, needed=256 * MIB, comfortable=GIB)
    assert found.state == state
    assert found.fact.startswith(f"{room.size(nbytes)} free for {path}")


def test_free_bytes_are_the_file_systems(tmp_path):
    status = os.statvfs(tmp_path)
    nbytes = status.f_bavail * status.f_frsize
    spare = 64 * MIB  # others write meanwhile
    at_most = disk_finding("disk", tmp_path, needed=nbytes + spare, comfortable=0)
    at_least = disk_finding("disk", tmp_path, needed=max(nbytes - spare, 0), comfortable=0)
    assert (at_most.state, at_least.state) == ("problem", "ok")


def test_a_folder_that_cannot_be_written_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    found = disk_finding("disk, state", tmp_path, needed=0, comfortable=0)
    assert found.state == "problem"
    assert found.fact.endswith(f"but {tmp_path} cannot be written")
    assert found.remedy.startswith("run this as the client's user")


def test_a_file_in_the_place_of_a_folder_blocks(tmp_path):
    (tmp_path / "state").write_text("")
    found = disk_finding("disk, state", tmp_path / "state", needed=0, comfortable=0)
    assert (found.state, found.fact) == ("problem", f"{tmp_path / 'state'} is not a folder")


def test_room_for_packages_counts_only_until_they_are_there(tmp_path, free):
    free(GIB)
    before = disk_findings(tmp_path, tmp_path, tmp_path)
    after = disk_findings(tmp_path, tmp_path, None)
    assert [f.check for f in before] == ["disk, packages", "disk, state", "disk, cache"]
    assert [f.state for f in before] == ["problem", "ok", "warning"]
    assert after == before[1:]
    assert after[1].remedy.startswith("set cache-mib to half of it at most")
