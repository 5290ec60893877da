"""The plain loop and our engine take the same steps, and costs are differences."""

import pytest

from fleet.errors import ConfigError
from simulations.benchmark_engines.__main__ import start_table, table
from simulations.benchmark_engines.measure import JOBS, Cost, Engine, engines, read_cost, run_job


# What the engine computes is held in test_launch and fleet/test_train; these run the benchmark.
@pytest.mark.slow
def test_our_engine_computes_what_the_plain_loop_does():
    loop, ours = (run_job(engine, (1, 2, 4)) for engine in engines(None)[:2])
    assert loop.result == ours.result
    assert loop.result < 2.29  # of ten classes unlearned: 2.30
    assert loop.cpu_seconds > 0 and ours.start_seconds > 0
    assert min(loop.peak_bytes, ours.peak_bytes) > 2**26  # PyTorch alone takes more


@pytest.mark.slow
def test_our_engine_computes_what_the_plain_loop_does_with_mobilenet_too():
    job = JOBS["mobilenet"]
    loop, ours = (run_job(engine, (1, 2, 4)) for engine in engines(None, job)[:2])
    assert loop.result == pytest.approx(ours.result, rel=1e-6)
    assert loop.peak_bytes > 2**26


def test_jobs_of_other_engines_are_the_small_one_alone(tmp_path):
    for name in ("blazefl", "pfl"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").touch()
    assert len(engines(tmp_path)) == 7
    assert len(engines(tmp_path, JOBS["mobilenet"])) == 4


def test_a_cost_is_of_the_rounds_between_two_looks():
    cost = read_cost(
        {
            "imports": {"torch": 2.0, "flwr": 0.5},
            "import_cpu": 1.75,
            "rounds": {
                "1": {"seconds": 4.0, "cpu": 3.0},
                "5": {"seconds": 5.0, "cpu": 4.0},
                "45": {"seconds": 25.0, "cpu": 14.0},
            },
            "result": 0.25,
            "versions": {"torch": "2"},
        }
    )
    assert (cost.start_seconds, cost.cpu_seconds, cost.seconds) == (1.5, 0.25, 0.5)
    assert (cost.import_seconds, cost.start_cpu_seconds, cost.job_seconds) == (2.5, 1.25, 25.0)


@pytest.mark.slow
def test_the_command_itself_is_timed_to_the_end_of_its_first_round():
    (engine,) = engines(None, JOBS["simulate"])
    cost = run_job(engine, (1, 2, 3))
    assert 0 < cost.result < 2.5 and cost.start_seconds > 0 and cost.import_seconds > 0
    (row,) = start_table([cost], JOBS["simulate"]).rows
    assert row[0] == "fleet simulate" and row[1].startswith(f"{cost.start_seconds:.1f} (")


def test_ratios_are_of_runs_beside_each_other():
    def costs(*cpu):
        others = {name: 1.0 for name in ("start_seconds", "seconds", "result", "import_seconds")}
        others |= {"start_cpu_seconds": 1.0, "job_seconds": 1.0, "versions": {}}
        return [Cost(cpu_seconds=each, job_cpu_seconds=2 * each, **others) for each in cpu]

    known = [Engine(name, "", ()) for name in ("plain loop", "ours")]
    grid = table(
        known, {"plain loop": costs(1.0, 2.0, 4.0), "ours": costs(1.1, 2.4, 4.0)}, JOBS["small"]
    )
    assert grid.rows[1][4] == "1.10 (1.00–1.20)"
    assert grid.rows[0][5] == grid.rows[0][9] == "0.91 (0.83–1.00)"


def test_a_job_that_fails_is_named():
    engine = Engine("broken", engines(None)[0].python, ("no_such_job.py",))
    with pytest.raises(ConfigError, match=r"broken failed: (.|\n)*no_such_job"):
        run_job(engine)
