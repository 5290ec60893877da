"""The feature cache: what comes back is what was put in, or nothing."""

import errno
import hashlib
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fleet.errors import ConfigError
from fleet.features import cache as feature_cache
from fleet.features.cache import PRECISIONS, FeatureCache
from fleet.mobiletl.stash import keep, restore

REPO = Path(__file__).parents[2]
KEY = "0123abcd"
MAP = (6, 5, 4)
ROW_BYTES = {"float16": 20 + 2 * 120, "int8": 28 + 120}
PLENTY = 2**30
FORK = multiprocessing.get_context("fork")  # a fresh process would import for seconds


def ids_of(numbers):
    return [hashlib.blake2b(b"%d" % n, digest_size=16).digest() for n in numbers]


def features(numbers, shape=MAP):
    """The row of each number, the same wherever it is asked for; maps in channels_last."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in numbers]
    x = torch.stack(rows) if rows else torch.empty(0, *shape)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 3 else x


def open_cache(directory, *, key=KEY, shape=MAP, precision="float16", max_bytes=PLENTY):
    return FeatureCache(directory, key, shape, precision, max_bytes)


def fill(directory, numbers, *, at_a_time=4, **options):
    with open_cache(directory, **options) as cache:
        for start in range(0, len(numbers), at_a_time):
            some = numbers[start : start + at_a_time]
            cache.write(ids_of(some), features(some, options.get("shape", MAP)))
    return cache


def shards(directory, key=KEY, precision="float16"):
    return sorted((directory / f"{key}-{precision}").glob("*.npy"))


def everything(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def disk(directory):
    return sum(p.stat().st_size for p in everything(directory))


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def right_rows(cache, numbers):
    """How many rows are there; each that is there is the right one, each other NaN."""
    x, found = cache.read(ids_of(numbers))
    expected = cache.round_trip(features(numbers))
    assert same_bits(x[found], expected[found])
    assert x[~found].isnan().all()
    return int(found.sum())


def forget_what_was_read():
    """As another process would find it."""
    feature_cache._known_of.cache_clear()


@pytest.fixture
def small_shards(monkeypatch):
    """Four rows a shard at float16."""
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 4 * ROW_BYTES["float16"])


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, logger="fleet.features.cache")
    return lambda: [record.getMessage() for record in caplog.records]


# Rows


@pytest.mark.parametrize("shape", [MAP, (7,), (3, 1, 1), (1, 4, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_float16_is_numpys_cast(shape, seed, tmp_path):
    x = features(range(seed, seed + 9), shape) * 10.0 ** (2 * seed - 4)
    expected = torch.from_numpy(x.numpy().astype(np.float16).astype(np.float32))
    assert same_bits(open_cache(tmp_path, shape=shape).round_trip(x), expected)


@pytest.mark.parametrize("shape", [MAP, (7,)])
def test_int8_is_the_stashs_rounding_of_each_row(shape, tmp_path):
    x = features(range(9), shape)
    x[3] = 2.5  # a constant row has no range
    expected = torch.stack([restore(keep(row, None, "int8")) for row in x])
    ours = open_cache(tmp_path, shape=shape, precision="int8").round_trip(x)
    assert same_bits(ours, expected)
    span = (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, *[1] * len(shape))
    assert ((ours - x).abs() <= span / 254 * 0.51 + 1e-6).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [MAP, (7,), (3, 1, 1)])
@pytest.mark.parametrize("when", ["held back", "written", "opened again"])
def test_what_is_read_is_the_round_trip_bit_for_bit(when, shape, precision, tmp_path):
    x, ids = features(range(20), shape), ids_of(range(20))
    cache = open_cache(tmp_path, shape=shape, precision=precision)
    cache.write(ids, x)
    if when != "held back":
        cache.flush()
    if when == "opened again":
        cache = open_cache(tmp_path, shape=shape, precision=precision)
    order = np.random.default_rng(0).permutation(20)[:13]
    ours, found = cache.read([ids[i] for i in order])
    assert len(cache) == 20 and found.all() and found.dtype == torch.bool
    assert ours.dtype == torch.float32 and same_bits(ours, cache.round_trip(x)[order])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_batches_of_maps_are_channels_last(precision, tmp_path):
    cache = fill(tmp_path, range(10), precision=precision)
    batch, _ = cache.read(ids_of(range(8)))
    assert batch.shape == (8, *MAP)
    for x in (batch, cache.round_trip(features(range(8)))):
        assert x.is_contiguous(memory_format=torch.channels_last)
    (shard,) = shards(tmp_path, precision=precision)
    assert np.load(shard)["features"].shape == (10, 5, 4, 6)


def test_rows_of_any_memory_format_are_the_same(tmp_path):
    x = features(range(4))
    cache = open_cache(tmp_path)
    assert same_bits(cache.round_trip(x.contiguous()), cache.round_trip(x))


def test_no_rows_are_an_empty_batch(tmp_path):
    cache = open_cache(tmp_path)
    cache.write([], features([]))
    x, found = cache.read([])
    assert x.shape == (0, *MAP) and found.shape == (0,) and cache.round_trip(x).shape == x.shape


def test_absent_rows_are_nan_and_can_be_filled_in(tmp_path):
    cache = fill(tmp_path, range(4))
    x, found = cache.read(ids_of([2, 9, 0]))
    assert found.tolist() == [True, False, True] and x[1].isnan().all()
    x[~found] = features([9])
    assert same_bits(x[1], features([9])[0])
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_rows_are_known_by_all_their_sixteen_bytes(tmp_path):
    ids = [bytes(16), bytes(15) + b"\1", b"\1" + bytes(15), b"ab" + bytes(14)]
    with open_cache(tmp_path) as cache:
        cache.write(ids, features(range(4)))
    assert same_bits(open_cache(tmp_path).read(ids)[0], cache.round_trip(features(range(4))))


def test_rows_that_are_there_are_not_written_again(tmp_path):
    fill(tmp_path, range(4))
    before = everything(tmp_path)
    with open_cache(tmp_path) as cache:
        cache.write(ids_of([0, 1]), features([5, 6]))
        assert right_rows(cache, range(4)) == 4
        cache.write(ids_of([7, 7]), features([7, 8]))
    assert len(everything(tmp_path)) == len(before) + 1
    assert right_rows(open_cache(tmp_path), [0, 1, 2, 3, 7]) == 5


def test_float16_clamps_what_would_overflow(tmp_path):
    x = torch.tensor([[7e4, -7e4, 65504.0, 65519.0, 3e38]])
    top = torch.tensor([[65504.0, -65504.0, 65504.0, 65504.0, 65504.0]])
    with open_cache(tmp_path, shape=(5,)) as cache:
        assert_close(cache.round_trip(x), top, rtol=0, atol=0)
        cache.write(ids_of([0]), x)
    assert_close(open_cache(tmp_path, shape=(5,)).read(ids_of([0]))[0], top, rtol=0, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_is_never_kept(bad, precision, tmp_path):
    x = features(range(3))
    x[1, 2, 3, 1] = bad
    with open_cache(tmp_path, precision=precision) as cache:
        ours = cache.round_trip(x)
        assert ours[1, 2, 3, 1].isnan() and ours[[0, 2]].isfinite().all()
        assert x[1, 2, 3, 1].isnan() if bad != bad else x[1, 2, 3, 1] == bad  # as it was given
        cache.write(ids_of(range(3)), x)
        assert cache.read(ids_of(range(3)))[1].tolist() == [True, False, True]
    assert len(open_cache(tmp_path, precision=precision)) == 2


def test_features_are_detached_and_may_come_in_other_floats(tmp_path):
    x = features(range(2)).double().requires_grad_()
    cache = open_cache(tmp_path)
    ours = cache.round_trip(x)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    assert same_bits(ours, cache.round_trip(x.detach().float()))


# What a caller may get wrong


def test_an_unknown_precision_lists_the_known_ones(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^unknown cache precision float8; known: float16, int8$"
    ):
        open_cache(tmp_path, precision="float8")


@pytest.mark.parametrize("key", ["", "../up", "ABC", "xyz"])
def test_a_key_is_a_hex_digest(key, tmp_path):
    with pytest.raises(ValueError, match="a cache key is a hex digest, got"):
        open_cache(tmp_path, key=key)
    assert not everything(tmp_path)


def test_other_shapes_are_refused(tmp_path):
    cache = open_cache(tmp_path)
    text = r"features have shape \(2, 6, 4, 5\), this cache holds \(N, 6, 5, 4\)"
    with pytest.raises(ValueError, match=text):
        cache.write(ids_of([0, 1]), torch.zeros(2, 6, 4, 5))
    with pytest.raises(ValueError, match="features have shape"):
        cache.round_trip(torch.zeros(6, 5, 4))


@pytest.mark.parametrize("ids", [ids_of([0]), [b"a", b"b"], [bytes(16), bytes(17)]])
def test_ids_that_do_not_fit_the_rows_are_refused(ids, tmp_path):
    with pytest.raises(ValueError, match="2 rows need as many ids of 16 bytes"):
        open_cache(tmp_path).write(ids, features([0, 1]))


# Shards


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_shard_is_numpys_own_format(precision, tmp_path):
    fill(tmp_path, range(10), precision=precision)
    (shard,) = shards(tmp_path, precision=precision)
    rows = np.load(shard, allow_pickle=False)
    assert [bytes(i) for i in rows["id"]] == ids_of(range(10))
    assert rows.dtype.itemsize == ROW_BYTES[precision]
    assert ("step" in rows.dtype.names) == (precision == "int8")
    again = shard.with_name("again")
    with again.open("wb") as file:
        np.save(file, rows)
    assert again.read_bytes() == shard.read_bytes()


def test_shards_are_bounded(small_shards, tmp_path):
    fill(tmp_path, range(30), at_a_time=7)
    assert [len(np.load(s)) for s in shards(tmp_path)] == [4] * 7 + [2]
    assert right_rows(open_cache(tmp_path), range(30)) == 30


def test_shards_are_numbered_as_they_are_written(tmp_path):
    for n in range(4):  # or an older copy of a row might win
        fill(tmp_path, [n])
        assert [bytes(i) for s in shards(tmp_path) for i in np.load(s)["id"]] == ids_of(
            range(n + 1)
        )
    assert [s.name[:9] for s in shards(tmp_path)] == [f"0000000{n}-" for n in range(1, 5)]


def test_a_row_larger_than_a_shard_has_one_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 100)
    cache = open_cache(tmp_path)
    cache.write(ids_of(range(3)), features(range(3)))
    assert [len(np.load(s)) for s in shards(tmp_path)] == [1, 1, 1]


def test_what_is_held_back_is_bounded_and_what_is_read_is_not_kept(tmp_path):
    """Writing and reading 64 MiB: beyond a shard and its copy, nothing stays."""
    program = f"""
import psutil, torch
from fleet.features import FeatureCache
torch.set_num_threads(1)
shape, ids = (64, 32, 32), [n.to_bytes(16, "big") for n in range(512)]
x = torch.randn(8, *shape).contiguous(memory_format=torch.channels_last)
def step(cache, n):
    cache.write(ids[n : n + 8], x), cache.read(ids[n : n + 8])
def resident():
    return psutil.Process().memory_info().rss
with FeatureCache({str(tmp_path)!r}, "ab", shape, "float16", 2**30) as cache:
    for n in range(0, 96, 8):
        step(cache, n)
    before, most = resident(), 0
    for n in range(96, 512, 8):
        step(cache, n)
        most = max(most, resident())
print(most - before, cache.nbytes, len(cache))
"""
    growth, nbytes, rows = map(int, run(program).split())
    assert nbytes > 64 * 2**20 and rows == 512
    assert growth < 12 * 2**20


def test_the_size_is_that_of_the_folder(small_shards, tmp_path):
    fill(tmp_path, range(5), key="ffff")
    cache = fill(tmp_path, range(9))
    assert cache.nbytes == sum(s.stat().st_size for s in shards(tmp_path)) < disk(tmp_path)


def test_keys_precisions_and_shapes_do_not_mix(tmp_path):
    fill(tmp_path, range(4))
    assert len(open_cache(tmp_path, key="ffff")) == 0
    assert len(open_cache(tmp_path, precision="int8")) == 0
    # A shard under another key's name is told by its checksums.
    target = tmp_path / "ffff-float16"
    shards(tmp_path)[0].rename(target / shards(tmp_path)[0].name)
    assert right_rows(open_cache(tmp_path, key="ffff"), range(4)) == 0


def run(program):
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return ran.stdout


# Damage


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_flipped_byte_never_gives_a_wrong_row(precision, tmp_path):
    fill(tmp_path, range(5), precision=precision)
    (shard,) = shards(tmp_path, precision=precision)
    whole = shard.read_bytes()
    rows_start = len(whole) - 5 * ROW_BYTES[precision]
    rng = np.random.default_rng(0)
    # Every byte of the header, and of the rows each third.
    for position in (*range(rows_start), *range(rows_start, len(whole), 3)):
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        shard.write_bytes(damaged)
        forget_what_was_read()
        there = right_rows(open_cache(tmp_path, precision=precision), range(5))
        assert there == 4 if position >= rows_start else there in (0, 5)


def test_damage_after_opening_never_gives_a_wrong_row(tmp_path):
    fill(tmp_path, range(5))
    (shard,) = shards(tmp_path)
    whole = shard.read_bytes()
    rows_start = len(whole) - 5 * ROW_BYTES["float16"]
    for position in range(rows_start, len(whole), 7):
        forget_what_was_read()
        cache = open_cache(tmp_path)
        assert right_rows(cache, range(5)) == 5
        damaged = bytearray(whole)
        damaged[position] ^= 64
        shard.write_bytes(damaged)
        in_id = 4 <= (position - rows_start) % ROW_BYTES["float16"] < 20  # known from opening
        assert right_rows(cache, range(5)) == len(cache) == (5 if in_id else 4)
        shard.write_bytes(whole)


def test_a_damaged_row_is_written_anew_and_the_new_copy_wins(tmp_path):
    fill(tmp_path, range(5))
    (shard,) = shards(tmp_path)
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    for _ in range(2):
        with open_cache(tmp_path) as cache:
            cache.write(ids_of(range(5)), features(range(5)))  # not known to be damaged yet
            _, found = cache.read(ids_of(range(5)))
            cache.write(ids_of(range(5)), cache.round_trip(features(range(5))))
    assert found.all() and len(shards(tmp_path)) == 2
    assert right_rows(open_cache(tmp_path), range(5)) == 5


def test_rows_under_each_others_ids_are_not_taken(tmp_path):
    fill(tmp_path, range(5))
    rows = np.load(shards(tmp_path)[0], mmap_mode="r+")
    rows["id"][:2] = rows["id"][1::-1].copy()
    rows.flush()
    assert right_rows(open_cache(tmp_path), range(5)) == 3


@pytest.mark.parametrize("seed", range(20))
def test_a_shard_cut_short_is_dropped_and_named(seed, small_shards, warned, tmp_path):
    fill(tmp_path, range(12))
    rng = np.random.default_rng(seed)
    shard = shards(tmp_path)[rng.integers(3)]
    length = int(rng.integers(shard.stat().st_size)) if seed else 0
    os.truncate(shard, length)
    cache = open_cache(tmp_path)
    assert right_rows(cache, range(12)) == len(cache) == 8
    (text,) = warned()
    assert text.startswith(f"feature cache: dropped {shard}, whose rows are made anew: ")
    assert not shard.exists()
    fill(tmp_path, range(12))
    assert right_rows(open_cache(tmp_path), range(12)) == 12


@pytest.mark.parametrize("damage", ["a flipped bit", "a cut"])
def test_two_hundred_damages_are_all_noticed_and_the_rows_made_anew(damage, tmp_path):
    fill(tmp_path, range(5))
    (shard,) = shards(tmp_path)
    whole, rng = shard.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        if damage == "a cut":
            del damaged[rng.integers(len(whole)) :]
        else:
            bit = rng.integers(8 * len(whole))
            damaged[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(damaged)
        assert right_rows(open_cache(tmp_path), range(5)) < 5
    shard.write_bytes(whole)
    assert right_rows(open_cache(tmp_path), range(5)) == 5


@pytest.mark.parametrize("seed", range(10))
def test_a_shard_cut_short_after_opening_kills_nobody(seed, small_shards, tmp_path):
    fill(tmp_path, range(12))
    cache = open_cache(tmp_path)
    shard = shards(tmp_path)[1]
    os.truncate(shard, np.random.default_rng(seed).integers(shard.stat().st_size))
    assert 8 <= right_rows(cache, range(12)) < 12


def test_a_shard_removed_after_opening_is_absent(small_shards, tmp_path):
    fill(tmp_path, range(12))
    with open_cache(tmp_path) as cache:
        shards(tmp_path)[1].unlink()
        assert right_rows(cache, range(12)) == 8
        cache.write(ids_of(range(12)), features(range(12)))
    assert right_rows(open_cache(tmp_path), range(12)) == 12


def test_a_shard_that_vanishes_while_opening_is_skipped(
    small_shards, warned, monkeypatch, tmp_path
):
    fill(tmp_path, range(12))
    forget_what_was_read()
    read = np.lib.format.open_memmap

    def vanish(path, **options):
        if path == shards(tmp_path)[0] and len(shards(tmp_path)) == 3:
            path.unlink()
        return read(path, **options)

    monkeypatch.setattr(np.lib.format, "open_memmap", vanish)
    assert right_rows(open_cache(tmp_path), range(12)) == 8
    assert not warned()


def foreign_arrays():
    wrong = np.zeros(3, [("checksum", "<u4"), ("id", "u1", (16,)), ("features", "<f2", MAP)])
    yield "another row shape", wrong
    yield "no rows", np.zeros(0, open_cache_dtype())
    yield "two axes", np.zeros((2, 2), open_cache_dtype())
    yield "plain numbers", np.arange(1000.0)
    yield "pickled", np.array([{"a": 1}], dtype=object)


def open_cache_dtype():
    return np.dtype([("checksum", "<u4"), ("id", "u1", (16,)), ("features", "<f2", (5, 4, 6))])


@pytest.mark.parametrize("array", [pytest.param(a, id=n) for n, a in foreign_arrays()])
def test_an_array_of_something_else_is_dropped(array, warned, tmp_path):
    fill(tmp_path, range(4))
    foreign = shards(tmp_path)[0].with_name(f"00000009-{'0' * 32}.npy")
    np.save(foreign, array, allow_pickle=True)
    assert right_rows(open_cache(tmp_path), range(4)) == 4
    (text,) = warned()
    assert text.startswith(f"feature cache: dropped {foreign}, whose rows are made anew: ")
    assert not foreign.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"no array", b"PK\3\4 a zip", b"\x93NUMPY\1\0\xff\xff{", b"\x93NUMPY" + b"(" * 999],
)
def test_bytes_of_something_else_are_dropped(content, warned, tmp_path):
    fill(tmp_path, range(4))
    foreign = shards(tmp_path)[0].with_name("1.npy")
    foreign.write_bytes(content)
    assert right_rows(open_cache(tmp_path), range(4)) == 4
    assert len(warned()) == 1 and str(foreign) in warned()[0] and not foreign.exists()


def test_a_shard_with_something_after_its_rows_is_dropped(warned, tmp_path):
    fill(tmp_path, range(4))
    (shard,) = shards(tmp_path)
    size = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(b"\0")
    assert len(open_cache(tmp_path)) == 0
    assert warned() == [
        f"feature cache: dropped {shard}, whose rows are made anew: "
        f"it has {size + 1} bytes, not {size}"
    ]


def test_files_that_are_no_shards_are_left_alone(warned, tmp_path):
    fill(tmp_path, range(4))
    folder = shards(tmp_path)[0].parent
    for path in (folder / "notes.txt", tmp_path / "photo.npy", tmp_path / "photos/1.npy"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    (folder / "1.npy").mkdir()
    fill(tmp_path, range(9), key="ffff", max_bytes=100)  # has no room, looks for some
    assert [p.read_bytes() for p in everything(tmp_path)] == [b"mine"] * 3
    assert right_rows(open_cache(tmp_path), range(4)) == 0  # these were in the way
    assert not [text for text in warned() if "dropped" in text]


def test_what_a_killed_process_left_is_removed_after_an_hour(tmp_path):
    fill(tmp_path, range(4))
    folders = [shards(tmp_path)[0].parent, tmp_path / "ffff-int8", tmp_path / "eeee-int8"]
    now = time.time()
    for folder in folders:
        folder.mkdir(exist_ok=True)
    for folder in folders[:2]:
        for name, age in (("old", 3700), ("young", 3500)):
            part = folder / f"{name}.part"
            part.write_bytes(b"half a shard")
            os.utime(part, (now - age, now - age))
    os.utime(folders[2], (now - 3700, now - 3700))
    open_cache(tmp_path)
    assert [p.name for p in everything(tmp_path) if p.suffix == ".part"] == ["young.part"] * 2
    assert folders[1].exists() and not folders[2].exists()  # empty, and long unused


def write_until_killed(folder):
    feature_cache.SHARD_BYTES = 4 * ROW_BYTES["float16"]
    for start in range(0, 4000, 4):
        fill(folder, range(start, start + 4))


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_writer_leaves_right_rows_only(seed, warned, tmp_path):
    rng = np.random.default_rng(seed)
    writer = FORK.Process(target=write_until_killed, args=(tmp_path,))
    writer.start()
    target = rng.integers(1, 30)
    while writer.is_alive() and len(shards(tmp_path)) < target:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.01))
    writer.kill()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    on_disk = 4 * len(shards(tmp_path))
    cache = open_cache(tmp_path)
    assert right_rows(cache, range(4000)) == len(cache) == on_disk > 0
    assert not warned()


@pytest.mark.parametrize("moment", range(6))
def test_whenever_writing_is_cut_off_nothing_half_written_is_seen(
    moment, small_shards, warned, monkeypatch, tmp_path
):
    """A kill before each of the steps that reach the disk, in turn."""

    class Killed(BaseException):
        pass

    steps = iter(range(100))

    def cut(function):
        def step(*args, **kwargs):
            if next(steps) == moment:
                raise Killed
            return function(*args, **kwargs)

        return step

    cache = open_cache(tmp_path)
    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "open")):
            patch.setattr(owner, name, cut(getattr(owner, name)))
        patch.setattr(Path, "unlink", lambda *a, **k: None)  # a killed process tidies nothing
        with pytest.raises(Killed):
            cache.write(ids_of(range(8)), features(range(8)))
    again = open_cache(tmp_path)
    assert right_rows(again, range(8)) == len(again) == 4 * len(shards(tmp_path))
    assert len(shards(tmp_path)) == [0, 0, 0, 1, 1, 1][moment]
    assert not warned()


# Limits


def test_the_oldest_other_key_makes_room_first(small_shards, warned, tmp_path):
    for age, key in ((300, "aaaa"), (200, "bbbb"), (100, "cccc")):
        fill(tmp_path, range(8), key=key)
        past = time.time() - age
        os.utime(tmp_path / f"{key}-float16", (past, past))
    limit = disk(tmp_path)
    open_cache(tmp_path, key="aaaa", max_bytes=limit)  # now it was used last
    kept = {key: 2 for key in ("aaaa", "bbbb", "cccc")}
    for written, order in enumerate(("bbbb", "bbbb", "cccc", "cccc", "aaaa", "aaaa")):
        cache = fill(tmp_path, range(4 * written, 4 * written + 4), max_bytes=limit)
        kept[order] -= 1
        assert {key: len(shards(tmp_path, key)) for key in kept} == kept
        assert disk(tmp_path) <= limit
    assert right_rows(open_cache(tmp_path), range(24)) == 24 and not warned()
    cache = fill(tmp_path, range(24, 28), max_bytes=limit)
    assert len(cache) == 24 and len(warned()) == 1


def test_a_full_cache_reads_on_and_never_evicts_itself(small_shards, warned, tmp_path):
    limit = 10 * ROW_BYTES["float16"] + 3 * 192
    with open_cache(tmp_path, max_bytes=limit) as cache:
        for start in range(0, 40, 4):
            some = range(start, start + 4)
            cache.write(ids_of(some), features(some))
    assert right_rows(cache, range(40)) == len(cache) == right_rows(cache, range(10)) == 10
    assert disk(tmp_path) <= limit
    assert warned() == [
        f"feature cache {tmp_path} is full at {limit / 2**20:g} MiB (cache-mib); the rest is "
        f"computed each time, unless cache-mib is raised"
    ]
    again = fill(tmp_path, range(40), max_bytes=limit)
    assert right_rows(again, range(40)) == 10 and len(warned()) == 1  # once a process


@pytest.mark.parametrize(("max_bytes", "rows"), [(0, 0), (1, 0), (451, 0), (452, 1), (711, 1)])
def test_a_limit_holds_to_the_byte(max_bytes, rows, warned, tmp_path):
    cache = fill(tmp_path, range(6), max_bytes=max_bytes)  # a header of 192, rows of 260
    assert disk(tmp_path) == (192 + 260 * rows if rows else 0)
    assert right_rows(cache, range(6)) == rows and len(warned()) == 1


def test_a_cache_that_is_full_and_cannot_be_written_says_so_once(warned, monkeypatch, tmp_path):
    with open_cache(tmp_path, max_bytes=500) as cache:
        cache.write(ids_of(range(4)), features(range(4)))
        monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    assert len(warned()) == 1 and len(cache) == 0 and not everything(tmp_path)


def test_a_lowered_limit_makes_other_keys_go_on_opening(small_shards, tmp_path):
    fill(tmp_path, range(8), key="aaaa")
    fill(tmp_path, range(8))
    own = sum(s.stat().st_size for s in shards(tmp_path))
    assert right_rows(open_cache(tmp_path, max_bytes=own), range(8)) == 8
    assert disk(tmp_path) == own
    assert right_rows(open_cache(tmp_path, max_bytes=own // 2), range(8)) == 8  # its own stay


def test_unfinished_shards_of_other_keys_are_counted_and_left(small_shards, tmp_path):
    part = tmp_path / "aaaa-float16/1.part"
    part.parent.mkdir()
    part.write_bytes(bytes(1000))
    cache = fill(tmp_path, range(4), max_bytes=1500)
    assert part.exists() and len(cache) == 1 and disk(tmp_path) <= 1500


# Disks that fail


FAULTS = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO]


def failing(fault):
    def fail(*args, **kwargs):
        raise OSError(fault, os.strerror(fault))

    return fail


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", ["open", "write", "fsync", "rename", "mkdir"])
def test_a_disk_that_fails_is_given_up_with_one_warning(
    step, fault, small_shards, warned, monkeypatch, tmp_path
):
    fill(tmp_path, range(4))
    with open_cache(tmp_path) as cache, monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(Path, "open", lambda path, *_, **__: FullDisk(path, fault))
        else:
            owner = os if step == "fsync" else Path
            patch.setattr(owner, step, failing(fault))
        for start in range(4, 40, 4):
            some = range(start, start + 4)
            cache.write(ids_of(some), features(some))
            patch.setattr(os, "fsync", failing(fault))
    assert warned() == [
        f"feature cache {tmp_path / f'{KEY}-float16'} cannot be written: {os.strerror(fault)}; "
        f"training goes on uncached"
    ]
    assert len(everything(tmp_path)) == 1  # nothing half-written stays
    assert right_rows(cache, range(40)) == len(cache) == 4


class FullDisk:
    """A file that takes some bytes and then no more."""

    def __init__(self, path, fault):
        self._file, self._fault = io.FileIO(path, "xb"), fault

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def writelines(self, parts):
        self._file.write(next(iter(parts)))
        raise OSError(self._fault, os.strerror(self._fault))


def test_a_write_that_fails_is_not_tried_again(small_shards, monkeypatch, tmp_path):
    tries = []

    def fsync(descriptor):
        tries.append(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_cache(tmp_path) as cache:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            cache.write(ids_of(range(30)), features(range(30)))
        cache.write(ids_of(range(30)), features(range(30)))
    assert len(tries) == 1 and not everything(tmp_path) and len(cache) == 0


@pytest.mark.parametrize("place", ["", "below"])
def test_a_directory_that_is_a_file_stores_nothing(place, warned, tmp_path):
    (tmp_path / "taken").write_bytes(b"mine")
    directory = tmp_path / "taken" / place
    cache = fill(directory, range(4))
    assert right_rows(cache, range(4)) == len(cache) == cache.nbytes == 0
    (text,) = warned()
    assert text.startswith(f"feature cache {directory / f'{KEY}-float16'} cannot be written: ")
    assert text.endswith("; training goes on uncached")
    assert (tmp_path / "taken").read_bytes() == b"mine"


@pytest.mark.parametrize("fault", [errno.EACCES, errno.EROFS])
def test_a_directory_that_cannot_be_made_stores_nothing(fault, warned, monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "mkdir", failing(fault))
    cache = fill(tmp_path / "there", range(4))
    assert len(cache) == 0 and not everything(tmp_path)
    assert len(warned()) == 1 and f"cannot be written: {os.strerror(fault)}; " in warned()[0]


def test_a_read_only_cache_can_be_read(warned, monkeypatch, tmp_path):
    fill(tmp_path, range(4))
    os.utime(shards(tmp_path)[0].parent, (0, 0))
    monkeypatch.setattr(os, "utime", failing(errno.EROFS))
    monkeypatch.setattr(Path, "unlink", failing(errno.EROFS))
    cache = fill(tmp_path, range(8))
    assert right_rows(cache, range(8)) == 4 and len(warned()) == 1


# Several at once


def write_share(directory, start):
    torch.set_num_threads(1)
    feature_cache.SHARD_BYTES = 4 * ROW_BYTES["float16"]
    fill(directory, range(start, start + 60), at_a_time=3)


def test_two_may_write_one_key_at_once(warned, tmp_path):
    writers = [FORK.Process(target=write_share, args=(tmp_path, s)) for s in (0, 30)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers] == [0, 0]
    assert right_rows(open_cache(tmp_path), range(90)) == 90
    assert not warned() and all(p.suffix == ".npy" for p in everything(tmp_path))


def test_a_folder_that_is_removed_meanwhile_is_made_again(warned, tmp_path):
    with open_cache(tmp_path) as cache:
        shards_folder = tmp_path / f"{KEY}-float16"
        shards_folder.rmdir()
        cache.write(ids_of(range(4)), features(range(4)))
    assert right_rows(open_cache(tmp_path), range(4)) == 4 and not warned()


def test_many_shards_need_no_descriptors(monkeypatch, tmp_path):
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)
    fill(tmp_path, range(60))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    cache = open_cache(tmp_path)
    assert right_rows(cache, range(60)) == 60 and len(shards(tmp_path)) == 60
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_shards_are_opened_for_reading_only(monkeypatch, tmp_path):
    fill(tmp_path, range(4))
    forget_what_was_read()
    modes = []
    read, opened = np.lib.format.open_memmap, Path.open

    def map_(path, mode):
        modes.append(mode)
        mapped = read(path, mode=mode)
        assert isinstance(mapped, np.memmap) and mapped.mode == "r"
        return mapped

    def open_(path, mode="r", **options):
        modes.append(mode)
        return opened(path, mode, **options)

    monkeypatch.setattr(np.lib.format, "open_memmap", map_)
    monkeypatch.setattr(Path, "open", open_)
    assert right_rows(open_cache(tmp_path), range(4)) == 4
    assert set(modes) == {"r", "rb"}


def test_a_key_that_is_opened_again_reads_only_what_others_wrote_since(
    small_shards, monkeypatch, tmp_path
):
    fill(tmp_path, range(12))
    mapped, read = [], np.lib.format.open_memmap
    monkeypatch.setattr(
        np.lib.format, "open_memmap", lambda path, mode: (mapped.append(path), read(path, mode))[1]
    )
    forget_what_was_read()
    assert right_rows(open_cache(tmp_path), range(12)) == 12
    assert len(mapped) == 3
    forked = os.fork()  # another process, for which this one's memory is not
    if not forked:
        forget_what_was_read()
        fill(tmp_path, range(12, 20))
        os._exit(0)
    os.waitpid(forked, 0)
    mapped.clear()
    for _ in range(5):
        assert right_rows(open_cache(tmp_path), range(20)) == 20
    assert mapped == shards(tmp_path)[3:]


def test_a_folder_that_has_not_changed_is_not_looked_through_again(
    small_shards, monkeypatch, tmp_path
):
    fill(tmp_path, range(12))
    looked, files_in = [], feature_cache.files_in
    monkeypatch.setattr(
        feature_cache, "files_in", lambda folder: (looked.append(folder), files_in(folder))[1]
    )
    folder = shards(tmp_path)[0].parent
    changed = time.time() - 10  # what was written a moment ago may not be all
    os.utime(folder, (changed, changed))
    for _ in range(5):
        assert right_rows(open_cache(tmp_path), range(12)) == 12
    assert len(looked) == 1
    shards(tmp_path)[0].unlink()
    assert [len(open_cache(tmp_path)) for _ in range(5)] == [8] * 5
    assert len(looked) == 6
    os.utime(folder, (changed, changed))
    assert [len(open_cache(tmp_path)) for _ in range(5)] == [8] * 5
    assert len(looked) == 7
    open_cache(tmp_path, max_bytes=PLENTY - 1)  # another limit may call for room
    assert len(looked) == 8


def test_a_key_in_use_is_marked_as_opened_once_a_minute(tmp_path):
    fill(tmp_path, range(4))
    folder = shards(tmp_path)[0].parent
    for age, marked in ((feature_cache.OPENED_SECONDS - 10, False), (3600, True)):
        opened = time.time() - age
        os.utime(folder, (opened, opened))
        for _ in range(3):
            open_cache(tmp_path)
        assert (folder.stat().st_mtime > opened + 5) == marked


def test_shards_that_went_meanwhile_are_known_to_be_gone(small_shards, tmp_path):
    fill(tmp_path, range(12))
    assert len(open_cache(tmp_path)) == 12
    shards(tmp_path)[0].unlink()
    assert len(open_cache(tmp_path)) == 8
