import re

import pytest

from fleet.deploy.room import FULL_MIB, want_of_room
from tests.disks import disks_can_be_made, small_disk


@pytest.fixture
def disk(tmp_path):
    if not disks_can_be_made(tmp_path / "try"):
        pytest.skip("needs root, and mounts")
    with small_disk(tmp_path / "disk", 2 * FULL_MIB) as disk:
        yield disk


def test_a_disk_that_is_full_is_named_with_both_values_and_the_way_out(disk):
    folder = disk.folder / "not" / "there"  # yet
    assert want_of_room(folder) == ""
    disk.fill()
    assert want_of_room(folder) == (
        f"the disk of {folder} is full, 0 MiB of 64 MiB are left and 32 are needed; free space "
        f"there"
    )
    disk.free()
    assert want_of_room(folder) == ""


def test_what_is_there_decides_and_not_where_it_is_asked_from(disk, monkeypatch, tmp_path):
    disk.fill()
    monkeypatch.chdir(tmp_path)
    assert re.match(
        "the disk of disk/x is full", want_of_room((disk.folder / "x").relative_to(tmp_path))
    )
    assert want_of_room(tmp_path / "x") == ""


def test_a_disk_that_does_not_tell_is_left_to_who_writes_there(monkeypatch, tmp_path):
    def fail(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fleet.deploy.room.shutil.disk_usage", fail)
    assert want_of_room(tmp_path) == ""
