"""What the benchmark of scale measures is there, and its tables say what was measured."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from fleet.errors import ConfigError
from fleet.measure.comparison import commit
from simulations.benchmark_scale import job
from simulations.benchmark_scale.__main__ import (
    _made_by,
    fleets_table,
    main,
    methods_table,
    soak_table,
)
from simulations.benchmark_scale.job import Course, RoundNote, run_kept
from simulations.benchmark_scale.trend import trend
from simulations.footprint import bound_on_peak, footprint, resident_alone, watching
from tests.forked import Forked
from tests.many import many

MIB = 2**20


@many("seed", range(10))
def test_a_trend_is_numpys_line_and_its_error_numpys(seed):
    rng = np.random.default_rng(seed)
    x = np.sort(rng.uniform(0, 100, 30))
    y = 3.0 * x + rng.normal(0, 5.0, 30)
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    line = trend(x, y)
    assert line.slope == pytest.approx(slope)
    assert line.standard_error == pytest.approx(np.sqrt(covariance[0, 0]))


def test_two_points_have_no_error():
    with pytest.raises(ValueError, match="a slope and its error need 3 points, got 2"):
        trend([0, 1], [0, 1])


CHILD = """
import os, sys
held = b"x" * (64 << 20)
files = [open(os.devnull) for _ in range(20)]
print("on", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child():
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    yield process
    process.communicate()


def test_a_footprint_is_of_a_process_and_its_children(child):
    child.stdout.readline()
    own, all_ = footprint(child.pid), footprint(os.getpid())
    assert own.pss > own.anonymous > 64 * MIB and own.files >= 23 and own.processes == 1
    assert all_.processes >= 2
    assert all_.pss > own.pss and all_.files > own.files
    assert bound_on_peak(child.pid) >= own.pss


SHARING = """
import mmap, os, sys
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
os.fork()  # both have all pages
assert not any(pages[i] for i in range(0, len(pages), mmap.PAGESIZE))
os.write(1, b"on\\n")  # in one piece
sys.stdin.read()
"""


def test_a_file_that_others_map_too_counts_in_full_and_once_for_a_device_alone(tmp_path):
    file = tmp_path / "library"
    file.write_bytes(bytes(64 * MIB))
    sharing = [
        subprocess.Popen(
            [sys.executable, "-c", SHARING, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    try:
        for process in sharing:
            assert [process.stdout.readline() for _ in range(2)] == [b"on\n"] * 2
        pid = sharing[0].pid
        assert 32 * MIB < footprint(pid).pss < 64 * MIB  # the other two processes have half
        assert 64 * MIB < resident_alone(pid) < 96 * MIB
    finally:
        for process in sharing:
            process.communicate()


def test_the_peak_is_of_what_was_seen_meanwhile(child):
    with watching(child.pid, period_seconds=0.01) as peak:
        child.stdout.readline()
        while peak.pss < 64 * MIB:
            pass
    assert peak.pss >= 64 * MIB
    assert peak.alone >= 64 * MIB


def test_a_process_that_is_gone_holds_nothing(child):
    child.communicate()
    assert footprint(child.pid).pss == bound_on_peak(child.pid) == resident_alone(child.pid) == 0


def course(pss, *, cpu=1.0, seconds=2.0, **more):
    """A run whose memory after each round is given, in MiB."""
    notes = tuple(
        RoundNote(
            server_round=number,
            seconds=seconds,
            pss=900 * MIB,
            anonymous=int(held * MIB),
            files=7,
            processes=1,
            cpu_seconds=cpu * number,
            bound=int(max(pss) * MIB),
        )
        for number, held in enumerate(pss)
    )
    settings = {
        "clients": 20,
        "sampled": 5,
        "rounds": len(pss),
        "method": "head",
        "image-size": 32,
        "codec-up": "int8",
        "codec-down": "int8",
        "train-examples": 640,
        "test-examples": 100,
        "local-epochs": 2,
        "batch-size": 16,
        "backbone": "mobilenet_v2",
    }
    facts = {
        "settings": settings,
        "workers": 1,
        "commit": "abc",
        "accuracy": 0.5,
        "peak_pss": 900 * MIB,
        "state_bytes": 3 * MIB,
        "state_clients": 20,
        "cache_bytes": 4 * MIB,
    }
    return Course(**facts | more, rounds=notes)


def named(run, **settings):
    run.settings.update(settings)


def test_the_trend_of_memory_is_of_the_second_half():
    growing = [100 * i for i in range(10)] + [1000 + 0.5 * i for i in range(10)]
    found = dict(soak_table(course(growing)).rows)
    assert found["memory, per 100 rounds"] == "+50.00 ± 0.00 MiB"
    assert found["peak memory, seen"] == "900 MiB"
    assert found["peak memory, at most"] == "1004 MiB"
    assert found["open files"] == "7 to 7; first 7, last 7"
    assert found["CPU a round"] == "1000 ms"


def test_a_fleet_is_held_against_the_smallest_of_the_same_repeat():
    pss = [1.0] * 8
    small = [course(pss, cpu=1.0), course(pss, cpu=2.0)]
    large = [course(pss, cpu=1.1), course(pss, cpu=2.4)]
    first, second = fleets_table({100: small, 300: large}).rows
    assert first[2] == "1.00 (1.00–1.00)"
    assert second[1] == "1750 (1100–2400)" and second[2] == "1.15 (1.10–1.20)"


def test_rounds_a_minute_are_held_against_full():
    pss = [1.0] * 8
    quick, slow = course(pss, cpu=0.5, seconds=1.0), course(pss, cpu=4.0, seconds=6.0)
    named(quick, method="mobiletl", blocks="5", stash="int8")
    named(slow, method="full")
    mobiletl, full = methods_table({"mobiletl-int8": [quick], "full": [slow]}).rows
    assert mobiletl[0] == "MobileTL, k = 5, int8, cached" and full[0] == "full"
    assert mobiletl[1:3] == ("120.0 (120.0–120.0)", "8.00 (8.00–8.00)")
    assert mobiletl[3:5] == ("60.0 (60.0–60.0)", "6.00 (6.00–6.00)")
    assert full[2] == "1.00 (1.00–1.00)"


@pytest.fixture
def forks(monkeypatch, quick_runs):
    """Runs are forks of this process and need import nothing."""

    def start(command, *, stderr, **options):
        *_, settings, workers, folder = command

        run = partial(job._main, json.loads(settings), int(workers), Path(folder))
        return Forked(run, stderr)

    monkeypatch.setattr(job, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))


@pytest.fixture(params=["forks", pytest.param("processes", marks=pytest.mark.slow)])
def runs(request):
    """Runs as forks of this process, and as the processes of their own that they are."""
    if request.param == "forks":
        request.getfixturevalue("forks")


@pytest.mark.usefixtures("runs")
def test_a_short_soak_is_run_once_for_a_commit_and_then_shown(tmp_path, monkeypatch):
    words = ["soak", "--clients", "4", "--sampled", "2", "--rounds", "5", "--images", "8"]
    words += ["--out", str(tmp_path)]
    first = CliRunner().invoke(main, words)
    assert first.exit_code == 0, first.output
    (file,) = tmp_path.glob("*/soak.json")
    kept = json.loads(file.read_text())
    assert [note["server_round"] for note in kept["rounds"]] == list(range(6))
    assert all(note["processes"] == 3 for note in kept["rounds"][1:])
    assert kept["state_clients"] == 4 and kept["state_bytes"] > 0 and kept["cache_bytes"] > 0
    assert kept["peak_pss"] > 100 * MIB
    assert "| peak memory, seen |" in first.stdout
    again = CliRunner().invoke(main, words)
    assert again.stdout == first.stdout and "round" not in again.stderr
    monkeypatch.setattr(job, "commit", lambda: "another")
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("run again, as is right"))
    with pytest.raises(pytest.fail.Exception, match="run again"):  # nothing of this one is shown
        CliRunner().invoke(main, words, catch_exceptions=False)


def test_commits_of_a_table_are_all_told():
    made = [course([1.0] * 3, commit=name) for name in ("abc", "abc", "def")]
    for one in made:
        named(one, data="somewhere/cifar10")
    assert "\nCommit abc, " in _made_by(made[:2])
    assert "\nCommits abc, def, " in _made_by(made) and "data cifar10." in _made_by(made)


@pytest.mark.slow  # the soak above takes the same way through the benchmark
@pytest.mark.usefixtures("forks")
def test_every_stash_asked_for_is_a_row_and_weights_need_not_be_at_hand(tmp_path):
    words = "methods --clients 2 --rounds 3 --repeats 1 --images 4 --image-size 32"
    words = (
        f"{words} --backbone mobilenet_v3_small --weights none --stash float32 --stash recompute"
    )
    done = CliRunner().invoke(main, [*words.split(), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    kept = {
        file.stem: json.loads(file.read_text())["settings"] for file in tmp_path.glob("*/*.json")
    }
    assert {name: run.get("stash") for name, run in kept.items()} == {
        "mobiletl-float32-32-0": "float32",
        "mobiletl-recompute-32-0": "recompute",
        "full-32-0": None,
    }
    assert all(run["weights"] == "none" for run in kept.values())
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| MobileTL, k = 5, float32, cached",
        "| MobileTL, k = 5, recompute, cached",
        "| full",
    ]


def test_an_unknown_stash_is_refused_with_those_that_there_are(tmp_path):
    done = CliRunner().invoke(main, ["methods", "--stash", "zip", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "'zip' is not one of 'recompute', 'int8'" in done.output


def test_another_run_under_a_name_that_is_taken_is_refused(tmp_path):
    file = tmp_path / (commit() or "no-commit") / "soak.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"settings": {"clients": 5}, "workers": 1}))
    text = f"{file} is of .*'clients': 5.* with 1 workers, asked for are .*6.* with 2; name another"
    with pytest.raises(ConfigError, match=text):
        run_kept(tmp_path, "soak", {"clients": 6}, 2)


@pytest.mark.usefixtures("forks")
def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(ConfigError, match=r"run soak failed: (.|\n)*unknown setting|colour"):
        run_kept(tmp_path, "soak", {"colour": "red"}, 1)
    assert not list(tmp_path.iterdir())
