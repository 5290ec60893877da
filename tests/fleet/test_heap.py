"""What the C library's heap keeps; each case in a process of its own, as settings stay."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap is Linux's")

# A large block that is released teaches glibc to put such blocks into its heap, where
# a small one that lies behind them keeps them.
MESSAGES = """
import ctypes, sys
from fleet.heap import keep_little, trim

def anonymous():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024

if sys.argv[1] == "little":
    keep_little()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(8 << 20))
before = anonymous()
blocks = [libc.malloc(4 << 20) for _ in range(8)]
for block in blocks:
    ctypes.memset(block, 1, 4 << 20)
pin = libc.malloc(64 << 10)
for block in blocks:
    libc.free(block)
kept = anonymous() - before
if sys.argv[1] == "trim":
    trim()
    kept = anonymous() - before
print(kept)
"""


def kept_mib(how: str) -> float:
    done = subprocess.run([sys.executable, "-c", MESSAGES, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_glibc_keeps_what_messages_took():
    assert kept_mib("as it is") > 24


@pytest.mark.parametrize("how", ["little", "trim"])
def test_nothing_is_kept_of_them(how):
    assert kept_mib(how) < 4


MAPPED = """
import ctypes, sys
import torch
from fleet.heap import reuse, trim

if sys.argv[1] == "reuse":
    reuse()

class Info(ctypes.Structure):  # mallinfo2 of glibc; hblkhd is what it has mapped block by block
    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]

info = ctypes.CDLL(None).mallinfo2
info.restype = Info
before = info().hblkhd
maps = [torch.ones(size << 18) for size in (1, 2, 3, 5, 8, 13)]  # 1 to 13 MiB
mapped = info().hblkhd - before
del maps
trim()
lines = open("/proc/self/smaps_rollup").read().splitlines()
held = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))
print(mapped / 2**20, held / 1024)
"""


def mapped_and_held(how: str) -> tuple[float, float]:
    """MiB that the system is asked for block by block; and that are held after a trim."""
    done = subprocess.run([sys.executable, "-c", MAPPED, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mapped, held = map(float, done.stdout.split())
    return mapped, held


def test_blocks_of_a_heap_that_is_reused_are_its_own_and_can_be_trimmed():
    (mapped, least), (reused, held) = mapped_and_held("as it is"), mapped_and_held("reuse")
    assert mapped > 30
    assert reused <= 0
    assert held < least + 4
