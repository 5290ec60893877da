"""A client's memory: what was written comes back whole, in another process, or not at all."""

import errno
import itertools
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
from numpy.testing import assert_array_equal

from clients.memory import ClientMemory, state_directory
from fleet.errors import ConfigError, UpdateError

RUN = "00ff00ff00ff00ff"


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "features.1.conv.weight": rng.normal(size=(4, 3, 1, 1)).astype(np.float32),
        "packed": rng.integers(0, 256, 17, dtype=np.uint8),
        "scalar": np.array(rng.normal()),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": rng.normal(size=(3, 5)).astype(np.float16).T,
    }


def files(directory):
    return sorted(path for path in Path(directory).rglob("*") if path.is_file())


def assert_holds(memory, part, tensors, facts):
    found = memory.read(part)
    assert found.facts == facts
    assert found.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found.tensors[name].dtype == array.dtype
        assert found.tensors[name].shape == array.shape
        assert_array_equal(found.tensors[name], array)


def test_a_part_comes_back_as_it_was_written(tmp_path):
    memory = ClientMemory(tmp_path, RUN, "pi-01")
    facts = {"round": "3", "größe": "ä\n\"'", "": "__metadata__"}
    memory.write("residual", arrays(), facts)
    memory.write("version", {}, {"digest": "abc"})
    assert_holds(ClientMemory(tmp_path, RUN, "pi-01"), "residual", arrays(), facts)
    assert_holds(memory, "version", {}, {"digest": "abc"})
    memory.read("residual").tensors["packed"][:] = 0  # it is the reader's own
    assert_holds(memory, "residual", arrays(), facts)


def test_the_last_writing_counts_and_leaves_one_file(tmp_path):
    memory = ClientMemory(tmp_path, RUN, "pi-01")
    for seed in range(3):
        memory.write("residual", arrays(seed))
    assert_holds(memory, "residual", arrays(2), {})
    assert [path.name for path in files(tmp_path)] == ["residual.safetensors"]


def test_any_safetensors_reader_reads_a_part(tmp_path):
    ClientMemory(tmp_path, RUN, "pi-01").write("residual", arrays())
    with safetensors.safe_open(files(tmp_path)[0], "numpy") as file:
        for name, array in arrays().items():
            assert_array_equal(file.get_tensor(name), array)


def test_another_process_remembers(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path; from clients.memory import *\n"
        "ClientMemory(Path(sys.argv[1]), sys.argv[2], 'pi').write('n', {'x': np.arange(3)})"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, RUN], check=True)
    assert_holds(ClientMemory(tmp_path, RUN, "pi"), "n", {"x": np.arange(3)}, {})


def test_what_was_never_written_or_was_forgotten_is_absent(tmp_path):
    memory = ClientMemory(tmp_path / "not" / "there", RUN, "pi-01")
    assert memory.read("residual") is None
    memory.forget("residual")
    assert not files(tmp_path)
    memory.write("residual", arrays())
    memory.write("version", arrays())
    memory.forget("residual")
    assert memory.read("residual") is None
    assert_holds(memory, "version", arrays(), {})


NAMES = (
    "pi-01",
    "PI-01",
    "Pi-01",
    "pi/01",
    "pi\\01",
    "pi 01",
    "pi_01",
    "../pi-01",
    "/etc/passwd",
    "..",
    ".",
    "",
    "-",
    "Küche",
    "Ku\u0308che",  # the same letters, composed otherwise
    "厨房",
    "🥧",
    "\udcff",  # what a file name that is no UTF-8 becomes in Python
    "a\0b",
    "CON",
    "x" * 300,
    "x" * 299 + "y",
    "x" * 301,
)


def test_clients_of_any_name_have_a_memory_each(tmp_path):
    for i, name in enumerate(NAMES):
        ClientMemory(tmp_path, RUN, name).write("n", {"i": np.array(i)})
    for i, name in enumerate(NAMES):
        assert_holds(ClientMemory(tmp_path, RUN, name), "n", {"i": np.array(i)}, {})
    folders = [path.parent for path in files(tmp_path)]
    assert {folder.parent for folder in folders} == {tmp_path / RUN}
    # As a disk that ignores case sees them; 255 bytes are the most that any takes.
    assert len({folder.name.lower() for folder in folders}) == len(NAMES)
    assert all(re.fullmatch(r"[a-z0-9-]{32,80}", folder.name) for folder in folders)


def test_runs_do_not_share_a_memory(tmp_path):
    ClientMemory(tmp_path, "aa", "pi").write("n", {"i": np.array(1)})
    assert ClientMemory(tmp_path, "bb", "pi").read("n") is None


@pytest.mark.parametrize("run", ["", "..", "a/b", "AB", "0x1", "0" * 65, "ab\n"])
def test_a_run_that_is_no_hexadecimal_id_is_refused(run, tmp_path):
    with pytest.raises(UpdateError, match=r"a run's id is 1 to 64 digits from 0 to f, got '"):
        ClientMemory(tmp_path, run, "pi")


@pytest.mark.parametrize("part", ["", "..", "a/b", "A", "a.b"])
def test_a_part_that_would_be_a_path_is_a_mistake_of_the_code(part, tmp_path):
    with pytest.raises(ValueError, match="a part's name is of small letters"):
        ClientMemory(tmp_path, RUN, "pi").write(part, {})


# Damage


def test_a_torn_file_counts_as_absent_with_one_warning(tmp_path, caplog):
    memory = ClientMemory(tmp_path, RUN, "pi-01")
    memory.write("residual", arrays(), {"round": "3"})
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert memory.read("residual") is None, length
        assert not path.exists()
    path.write_bytes(whole)
    assert_holds(memory, "residual", arrays(), {"round": "3"})
    assert f"dropped {path}, which is damaged: " in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_a_changed_byte_anywhere_is_noticed(seed, tmp_path):
    rng = np.random.default_rng(seed)
    memory = ClientMemory(tmp_path, RUN, "pi-01")
    memory.write("residual", arrays(), {"round": "3"})
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= rng.integers(1, 256)
        path.write_bytes(damaged)
        found = memory.read("residual")
        # A blank that pads the header may become a tab: that is no damage.
        if found is not None:
            assert_holds(memory, "residual", arrays(), {"round": "3"})
    memory.write("residual", arrays(1))  # it can be written again
    assert_holds(memory, "residual", arrays(1), {})


def test_a_damaged_file_is_told_once(tmp_path, caplog):
    memory = ClientMemory(tmp_path, RUN, "pi-01")
    for _ in range(2):
        memory.write("residual", arrays())
        files(tmp_path)[0].write_bytes(b"torn")
        assert memory.read("residual") is None
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "this client starts it anew" in warnings[0].message


@pytest.mark.parametrize("moment", range(6))
def test_whenever_writing_is_cut_off_the_old_or_the_new_is_there(moment, monkeypatch, tmp_path):
    """A kill before each of the steps that reach the disk, in turn."""

    class Killed(BaseException):
        pass

    steps = itertools.count()

    def cut(function):
        def step(*args, **kwargs):
            if next(steps) == moment:
                raise Killed
            return function(*args, **kwargs)

        return step

    memory = ClientMemory(tmp_path, RUN, "pi-01")
    memory.write("residual", arrays(0))
    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "utime"), (Path, "open")):
            patch.setattr(owner, name, cut(getattr(owner, name)))
        patch.setattr(Path, "unlink", lambda *a, **k: None)  # a killed process tidies nothing
        if moment < 5:
            with pytest.raises(Killed):
                memory.write("residual", arrays(1))
        else:
            memory.write("residual", arrays(1))
    assert_holds(memory, "residual", arrays(moment > 2), {})
    # What it left behind goes once it is old.
    for left in tmp_path.rglob("*.part"):
        os.utime(left, (time.time() - 7200,) * 2)
    memory.write("residual", arrays(2))
    assert [path.name for path in files(tmp_path)] == ["residual.safetensors"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_leaves_what_was_there(step, fault, monkeypatch, tmp_path):
    memory = ClientMemory(tmp_path, RUN, "pi-01")
    memory.write("residual", arrays(0))
    (path,) = files(tmp_path)

    def fail(*args):
        raise OSError(fault, os.strerror(fault))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        wanted = (
            f"cannot write {path}: {os.strerror(fault)}; free space or give write permission "
            f"there, or set state-dir to another folder"
        )
        with pytest.raises(ConfigError, match=f"^{re.escape(wanted)}$"):
            memory.write("residual", arrays(1))
    assert_holds(memory, "residual", arrays(0), {})
    assert files(tmp_path) == [path]


def test_a_directory_that_is_a_file_is_told_with_the_way_out(tmp_path):
    (tmp_path / "state").write_text("")
    memory = ClientMemory(tmp_path / "state", RUN, "pi-01")
    with pytest.raises(ConfigError, match=r"cannot write .*set state-dir to another folder"):
        memory.write("residual", arrays())
    with pytest.raises(ConfigError, match=r"cannot read .*state-dir to another folder"):
        memory.read("residual")


# Old runs


def test_a_run_that_nobody_touched_for_a_month_goes_when_another_begins(tmp_path):
    day = 24 * 3600

    def age(run, days):
        os.utime(tmp_path / run, (time.time() - days * day,) * 2)

    for run in ("aa", "bb", "cc"):
        ClientMemory(tmp_path, run, "pi-01").write("residual", arrays())
    for other in ("notes", "ee"):  # a user's own
        (tmp_path / other).mkdir()
        (tmp_path / other / "mine.txt").write_text("")
        age(other, 40)
    age("aa", 31)
    age("bb", 29)
    age("cc", 40)
    ClientMemory(tmp_path, "cc", "pi-01").read("residual")  # is used still
    age("bb", 29)
    ClientMemory(tmp_path, "bb", "pi-02").write("residual", arrays())  # not the run's beginning
    assert (tmp_path / "aa").exists()
    ClientMemory(tmp_path, "dd", "pi-01").write("residual", arrays())
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["bb", "cc", "dd", "ee", "notes"]
    assert (tmp_path / "ee" / "mine.txt").exists()


# Where


def test_the_setting_wins_over_the_environment_over_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/pi")
    monkeypatch.delenv("FLEET_STATE", raising=False)
    assert state_directory("") == Path("/home/pi/.local/state/fleet")
    monkeypatch.setenv("FLEET_STATE", "/var/fleet")
    assert state_directory("") == Path("/var/fleet")
    assert state_directory("~/state") == Path("/home/pi/state")
