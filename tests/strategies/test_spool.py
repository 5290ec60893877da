import errno
import os
import re

import numpy as np
import pytest

from fleet.errors import UpdateError
from strategies import spool as module
from strategies.spool import Spool


@pytest.fixture
def kept():
    """Spools that a test opens, closed behind it."""
    spools = []

    def build(memory_bytes):
        spools.append(Spool(memory_bytes))
        return spools[-1]

    yield build
    for spool in spools:
        spool.close()


@pytest.mark.parametrize("memory_bytes", [0, 3000, 5000, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_memory_and_file_slice_to_the_same_bytes(kept, memory_bytes, seed):
    rng = np.random.default_rng(seed)
    spool = kept(memory_bytes)
    sent = [rng.bytes(int(n)) for n in rng.integers(1, 3000, size=12)]
    stored = [spool.keep(data) for data in sent]
    for data, what in zip(sent, stored, strict=True):
        assert len(what) == len(data)
        start, stop = sorted(rng.integers(0, len(data) + 1, size=2).tolist())
        for part in (slice(None), slice(start, stop), slice(start, None), slice(stop, start)):
            assert bytes(what[part]) == data[part]
    assert any(isinstance(what, bytes) for what in stored) == (memory_bytes > 0)
    assert all(isinstance(what, bytes) for what in stored) == (memory_bytes == 10**6)


def test_the_file_goes_away_with_the_spool(kept):
    spool = kept(0)
    stored = spool.keep(b"update")
    assert os.fstat(stored.file).st_size == 6
    assert os.fstat(stored.file).st_nlink == 0  # no name: gone too if the process is killed
    spool.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(stored.file)
    spool.close()


def test_a_full_disk_refuses_the_update_and_harms_no_other(kept, monkeypatch):
    spool, write = kept(0), os.pwrite
    before = spool.keep(b"before")

    def full_after_two_bytes(file, data, start):
        if len(data) < 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:2], start)

    monkeypatch.setattr(module.os, "pwrite", full_after_two_bytes)
    text = "no place on the server for this update of 7 bytes (No space left on device); free space"
    with pytest.raises(UpdateError, match=re.escape(text)):
        spool.keep(b"refused")
    monkeypatch.undo()
    after = spool.keep(b"after it")
    assert (before[:], after[:]) == (b"before", b"after it")
    spool.close()


def test_a_folder_that_cannot_be_written_refuses_the_update(kept, monkeypatch):
    def no_folder(**kwargs):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", no_folder)
    with pytest.raises(UpdateError, match=r"No usable temporary directory .* set TMPDIR"):
        kept(0).keep(b"update")


def test_what_a_write_takes_in_parts_is_whole(kept, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(module.os, "pwrite", lambda f, data, at: write(f, data[:3], at))
    assert kept(0).keep(b"in many parts")[:] == b"in many parts"
