"""Checkpoints: whole or not there, whatever befalls process, power, disk or bits."""

import errno
import logging
import os
import re
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import safetensors
from numpy.testing import assert_array_equal

from fleet.checkpoint import Checkpoints
from fleet.durable import waiting_for_room, write_durably
from fleet.errors import CheckpointError, ConfigError


def tree(number):
    rng = np.random.default_rng(number)
    return {
        "round": number,
        "state": {"head.weight": rng.normal(size=(10, 7)).astype(np.float32)},
        "memory": ({}, {"head.weight": {"steps": number, "moment": rng.normal(size=(10, 7))}}),
        "held": {"pi-1": "ab" * 8, "pi-2": None},
    }


def assert_holds(checkpoints, number):
    found, loaded = checkpoints.load()
    assert found == number
    wanted = tree(number)
    assert loaded["round"] == number and loaded["held"] == wanted["held"]
    assert_array_equal(loaded["state"]["head.weight"], wanted["state"]["head.weight"])
    ours, theirs = loaded["memory"][1]["head.weight"], wanted["memory"][1]["head.weight"]
    assert ours["steps"] == number
    assert_array_equal(ours["moment"], theirs["moment"])


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "run" / "checkpoints")


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_newest_counts_and_the_one_before_it_stays(checkpoints):
    assert checkpoints.load() is None
    for number in (0, 1, 2, 3):
        checkpoints.save(number, tree(number))
        assert_holds(checkpoints, number)
    assert names(checkpoints) == ["000002.safetensors", "000003.safetensors"]
    checkpoints.drop_older()
    assert names(checkpoints) == ["000003.safetensors"]


def test_any_safetensors_reader_shows_the_arrays(checkpoints):
    checkpoints.save(1, tree(1))
    with safetensors.safe_open(checkpoints.folder / "000001.safetensors", "numpy") as file:
        state = file.get_tensor("/state/head.weight")
    assert_array_equal(state, tree(1)["state"]["head.weight"])


def test_a_run_of_a_million_rounds_is_in_order(checkpoints):
    for number in (999_999, 1_000_000):
        checkpoints.save(number, tree(number))
    assert checkpoints.load()[0] == 1_000_000


def test_arrays_that_come_back_may_be_written_to(checkpoints):
    frozen = np.ones(3)
    frozen.flags.writeable = False
    checkpoints.save(1, [frozen])
    checkpoints.load()[1][0][:] = 0


# Damage


def flipped(data, rng):
    data = bytearray(data)
    bit = rng.integers(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def cut(data, rng):
    return data[: rng.integers(len(data))]


@pytest.mark.parametrize("damage", [flipped, cut])
def test_two_hundred_damages_are_all_noticed_and_the_one_before_is_used(
    checkpoints, damage, caplog
):
    for number in (4, 5):
        checkpoints.save(number, tree(number))
    path = checkpoints.folder / "000005.safetensors"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        path.write_bytes(damage(whole, rng))
        assert_holds(checkpoints, 4)
    assert f"checkpoint {path} is damaged (" in caplog.text
    assert "the one before it is used" in caplog.text
    path.write_bytes(whole)
    assert_holds(checkpoints, 5)


def test_flips_all_over_a_file_are_noticed(checkpoints):
    for number in (4, 5):
        checkpoints.save(number, {"n": np.float32(number)})
    path = checkpoints.folder / "000005.safetensors"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):  # two or three of every byte
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert checkpoints.load()[0] == 4, bit


def test_the_next_round_takes_the_place_of_a_damaged_one(checkpoints):
    for number in (4, 5):
        checkpoints.save(number, tree(number))
    (checkpoints.folder / "000005.safetensors").write_bytes(b"torn")
    assert_holds(checkpoints, 4)
    checkpoints.save(5, tree(5))
    assert_holds(checkpoints, 5)
    assert names(checkpoints) == ["000004.safetensors", "000005.safetensors"]


def test_a_damaged_checkpoint_is_told_once(checkpoints, caplog):
    for number in (4, 5):
        checkpoints.save(number, tree(number))
    (checkpoints.folder / "000005.safetensors").write_bytes(b"torn")
    for _ in range(2):
        assert_holds(checkpoints, 4)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_where_none_is_whole_each_is_named_with_the_way_out(checkpoints):
    for number in (4, 5):
        checkpoints.save(number, tree(number))
        (checkpoints.folder / f"{number:06d}.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load()
    text = str(caught.value)
    assert text.startswith("no checkpoint of this run is whole (")
    assert "000005.safetensors: its header" in text and "000004.safetensors: its header" in text
    assert text.endswith("put a copy in its place, or begin the run anew in another run-dir")


def test_another_versions_format_is_refused_and_not_passed_over(checkpoints, monkeypatch):
    checkpoints.save(4, tree(4))
    with monkeypatch.context() as patch:
        patch.setattr("fleet.checkpoint.FORMAT", "fleet checkpoint 9")
        checkpoints.save(5, tree(5))
    wanted = "a checkpoint is in the format fleet checkpoint 9, this version reads fleet checkp"
    with pytest.raises(CheckpointError, match=wanted):
        checkpoints.load()


def test_what_cannot_be_kept_writes_nothing(checkpoints):
    checkpoints.save(4, tree(4))
    with pytest.raises(CheckpointError, match="/x is a object, which a checkpoint cannot hold"):
        checkpoints.save(5, {"x": object()})
    assert names(checkpoints) == ["000004.safetensors"]


def test_files_that_cannot_be_read_are_named(checkpoints):
    checkpoints.folder.mkdir(parents=True)
    (checkpoints.folder / "000001.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*000001.*; make it readable"):
        checkpoints.load()


# A disk that fails


STEPS = ("open", "write", "fsync", "replace")


def failing(monkeypatch, step, fault, at):
    """Fail at one call of a step, counted from 0, and at all that follow."""
    plain, calls = getattr(os, step), iter(range(10**6))

    def fail(*arguments, **options):
        if next(calls) >= at:
            raise OSError(fault, os.strerror(fault))
        return plain(*arguments, **options)

    monkeypatch.setattr(os, step, fail)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_fails_leaves_the_one_before_and_says_what_to_do(
    checkpoints, monkeypatch, step, fault
):
    checkpoints.save(4, tree(4))
    path = checkpoints.folder / "000005.safetensors"
    wanted = (
        f"cannot write checkpoint {path}: {os.strerror(fault)}; the one before it is as it was: "
        f"free space or give write permission there, then resume the run"
    )
    with monkeypatch.context() as patch:
        failing(patch, step, fault, at=0)
        with pytest.raises(CheckpointError, match=f"^{re.escape(wanted)}$"):
            checkpoints.save(5, tree(5))
        assert names(checkpoints) == ["000004.safetensors"]
    assert_holds(checkpoints, 4)
    checkpoints.save(5, tree(5))  # the disk works again
    assert_holds(checkpoints, 5)


def test_a_full_disk_is_waited_for_until_there_is_room(checkpoints, monkeypatch, caplog):
    checkpoints.save(4, tree(4))
    full = iter([True] * 5)
    plain = os.write

    def write(handle, content):
        if next(full, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(handle, content[:100])  # and then it takes a little at a time

    monkeypatch.setattr(os, "write", write)
    waiting_for_room(lambda: checkpoints.save(5, tree(5)), seconds=60, poll_seconds=0)
    assert_holds(checkpoints, 5)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and warnings[0].endswith("waiting up to 60 s for room")


def test_waiting_for_room_ends_with_the_error():
    def fail():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ConfigError("cannot write x") from error

    with pytest.raises(ConfigError, match="cannot write x"):
        waiting_for_room(fail, seconds=0.02, poll_seconds=0.01)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), CheckpointError("/x")])
def test_other_errors_are_not_waited_for(error):
    attempts = []

    def fail():
        attempts.append(1)
        raise error

    with pytest.raises(type(error)):
        waiting_for_room(fail, seconds=60, poll_seconds=60)
    assert attempts == [1]


# Loss of power


@dataclass
class Disk:
    """What is sure to be on a disk, by the steps of a program that writes to it.

    A file's content is sure once the file was synced; which names a folder has, and of
    which files, once the folder was. What is not sure may be there, in part, or not.
    """

    root: Path
    steps: list = field(default_factory=list)
    open_files: dict = field(default_factory=dict)  # handle → path

    def watch(self, patch):
        plain = {name: getattr(os, name) for name in ("open", "close", *STEPS[1:], "unlink")}

        def opened(path, flags, *mode):
            handle = plain["open"](path, flags, *mode)
            if Path(path).is_relative_to(self.root):
                self.open_files[handle] = Path(path)
                if flags & os.O_CREAT:
                    self.steps.append(("create", Path(path)))
            return handle

        def closed(handle):
            self.open_files.pop(handle, None)
            plain["close"](handle)

        def write(handle, content):
            content = bytes(content)[:300]  # a few writes a file
            self.steps.append(("write", self.open_files[handle], content))
            return plain["write"](handle, content)

        def fsync(handle):
            if handle in self.open_files:
                self.steps.append(("sync", self.open_files[handle]))

        def replace(source, target):
            self.steps.append(("rename", Path(source), Path(target)))
            plain["replace"](source, target)

        def unlink(path, **options):
            self.steps.append(("unlink", Path(path)))
            plain["unlink"](path, **options)

        functions = (opened, closed, write, fsync, replace, unlink)
        for name, function in zip(plain, functions, strict=True):
            patch.setattr(os, name, function)

    def after(self, count, rng):
        """Path → content, as a loss of power after so many steps may leave them.

        Every file is an object of its own; names point to objects.
        """
        sure, seen = {}, {}  # name → object
        written, synced = {}, {}  # object → bytes
        for n, (kind, *what) in enumerate(self.steps[:count]):
            if kind == "create":
                seen[what[0]], written[n] = n, b""
            elif kind == "write":
                written[seen[what[0]]] += what[1]
            elif kind == "rename":
                seen[what[1]] = seen.pop(what[0])
            elif kind == "unlink":
                seen.pop(what[0], None)
            elif kind == "sync" and what[0] in seen:
                synced[seen[what[0]]] = written[seen[what[0]]]
            elif kind == "sync":  # a folder
                sure = dict(seen)
        # Each change of a name since may have come to the disk, or not.
        names = {n: (seen if rng.random() < 0.5 else sure).get(n) for n in {*seen, *sure}}
        return {
            name: self._torn(written[o], synced.get(o, b""), rng)
            for name, o in names.items()
            if o is not None
        }

    def _torn(self, written, synced, rng):
        """What a file may hold: what was synced, and of what was written since anything."""
        if written == synced:
            return synced
        length = rng.integers(len(synced), len(written) + 1)
        content = bytearray(written[:length])
        for start in range(len(synced), length, 64):  # blocks that never came
            if rng.random() < 0.5:
                content[start : start + 64] = bytes(len(content[start : start + 64]))
        return bytes(content)


def test_whenever_the_power_fails_an_old_or_the_new_one_is_whole(checkpoints, monkeypatch):
    checkpoints.save(0, tree(0))
    folder = checkpoints.folder
    start = {path: path.read_bytes() for path in folder.iterdir()}
    disk = Disk(folder)
    committed = []  # steps done as each save returned
    with monkeypatch.context() as patch:
        disk.watch(patch)
        for path, content in start.items():  # as files that are on the disk
            write_durably(path, [content])
        committed.append(len(disk.steps))
        for number in (1, 2, 3):
            checkpoints.save(number, tree(number))
            committed.append(len(disk.steps))
    assert len(disk.steps) > 40
    for count in range(committed[0], len(disk.steps) + 1):
        done = sum(count >= c for c in committed) - 1  # the last save that had returned
        for seed in range(8):
            shutil.rmtree(folder)
            folder.mkdir()
            for path, content in disk.after(count, np.random.default_rng([count, seed])).items():
                path.write_bytes(content)
            number, _ = checkpoints.load()
            assert number in (done, done + 1)
            assert_holds(checkpoints, number)


def test_new_folders_are_on_the_disk_before_what_is_in_them(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}"))
    )
    checkpoints = Checkpoints(tmp_path / "a" / "b")
    checkpoints.save(1, tree(1))
    part = f"{checkpoints.folder}/000001.safetensors.part"
    assert synced == [str(tmp_path), str(tmp_path / "a"), part, str(checkpoints.folder)]


def test_a_header_that_claims_more_than_there_is_is_damage(checkpoints):
    checkpoints.save(4, tree(4))
    (checkpoints.folder / "000005.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert_holds(checkpoints, 4)
