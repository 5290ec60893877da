"""Real processes, real signals.

Where nothing depends on how it is started, the process is a fork of the tests', which has
imported PyTorch. `-m slow` takes the other signals where one of them stands for all.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial

import click
import pexpect
import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from fleet.cli import main
from fleet.cli.simulate import _beside_config
from fleet.cli.stopping import _ONE_SECONDS, stopping
from fleet.records import RunRecord
from fleet.signals import ENDING
from simulations import simulate
from tests.commands import FLEET, HEAR
from tests.forked import Forked, exit_code, on_terminal

pytestmark = pytest.mark.usefixtures("quick_runs")

SETTINGS = {
    "clients": 2,
    "train-examples": 60,
    "test-examples": 30,
    "backbone": "mobilenet_v3_small",
    "weights": "none",
    "image-size": 32,
    "local-epochs": 1,
    "blocks": "0,1",
    "rounds": 500,
}
SMALL = tuple(f"--{name}={value}" for name, value in SETTINGS.items())
# What clients and strategy remember between rounds.
REMEMBERING = {
    "strategy": "fedadam",
    "server-learning-rate": 0.01,
    "codec-up": "int4+feedback",
    "codec-down": "int4+feedback",
}
PATIENCE = 600  # seconds; a busy machine takes minutes to import PyTorch


def wait_for(what, run):
    """Poll until something is so; a run that ends before that fails."""
    deadline = time.monotonic() + PATIENCE
    while not (value := what()):
        stderr = getattr(run, "stderr", None)  # a fork has none
        said = stderr.read()[-3000:] if run.poll() is not None and stderr else ""
        assert run.poll() is None, f"the run ended with {run.poll()}: {said}"
        assert time.monotonic() < deadline, f"not within {PATIENCE} s"
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def started(command, **options):
    """A process, which ends with the block and all that it started with it."""
    with subprocess.Popen(command, text=True, **options) as run:
        try:
            yield run
        finally:
            if run.poll() is None:
                parent = psutil.Process(run.pid)
                for process in (*parent.children(recursive=True), parent):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


def be_fleet(*words):
    """The command, in a fork of the tests' process."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    main(words, prog_name="fleet")


def rounds_on_record(run_dir):
    path = run_dir / "rounds.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_record(run_dir, tmp_path):
    """What was stopped is whole: its model is that of a run of as many rounds."""
    record = RunRecord(run_dir)
    last = list(record.rounds())[-1].server_round
    assert not record.summary_path.exists()
    assert f"<td>{last}</td>" in record.page_path.read_text()
    assert {path.name for path in run_dir.iterdir()} <= {
        *("config.toml", "rounds.jsonl", "model.safetensors", "report.html", "clients"),
        "checkpoints",
    }
    again = ("simulate", str(record.config_path), "--run-dir", str(tmp_path / "again"))
    result = CliRunner().invoke(main, [*again, "--rounds", str(last)])
    assert result.exit_code == 0, result.output
    ours, theirs = (load_file(p / "model.safetensors") for p in (run_dir, tmp_path / "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    return last


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        # These two come from a terminal below.
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_with_its_record_written(tmp_path, number):
    run_dir = tmp_path / "run"
    options = ("--run-dir", str(run_dir), "--format", "json")
    with (tmp_path / "stderr").open("w+") as errors:
        run = Forked(partial(be_fleet, "simulate", *SMALL, *options), errors)
        try:
            wait_for(lambda: rounds_on_record(run_dir) > 2, run)
            run.send_signal(number)
            stdout, code = run.stdout.read(), run.wait(timeout=PATIENCE)
        finally:
            run.kill()
        errors.seek(0)
        stderr = errors.read()
    assert code == 128 + number
    assert stdout == "" and "Traceback" not in stderr
    last = check_record(run_dir, tmp_path)
    *rounds, what, look, repeat = stderr.splitlines()
    assert rounds[-1].startswith(f"round {last}/500: ")
    assert what == (
        f"stopped after round {last}; its model and all rounds until then are in {run_dir}"
    )
    assert look == f"look at them:  fleet report {run_dir}"
    assert repeat == f"go on with it:  fleet simulate --resume {run_dir}"


def test_ctrl_c_on_a_terminal_clears_the_display_and_says_how_to_go_on(tmp_path):
    run_dir = tmp_path / "run"
    simulation = partial(be_fleet, "simulate", *SMALL, "--run-dir", str(run_dir))
    with on_terminal(simulation, dimensions=(24, 40)) as (pid, terminal):
        terminal.expect(r"round 2/500: [\d.]+ %, loss [\d.]+, [\d.]+ s\b")
        terminal.expect(r"round \d+ of 500 .* left")
        terminal.send("\x03")  # Ctrl-C
        terminal.expect("stopped after round")
        assert "\x1b[?25h" in terminal.before  # the cursor is back
        terminal.expect(pexpect.EOF)
        assert exit_code(pid) == 130
    assert "Traceback" not in terminal.before
    check_record(run_dir, tmp_path)


# A single process hears the signal as it does SIGTERM above.
@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_terminal_that_is_closed_ends_a_run_with_its_record_written(tmp_path, workers):
    run_dir = tmp_path / "run"
    options = ("--workers", workers, "--run-dir", str(run_dir))
    with on_terminal(partial(be_fleet, "simulate", *SMALL, *options)) as (pid, terminal):
        terminal.expect(r"round 2/500")
        family = psutil.Process(pid).children(recursive=True)
        assert len(family) >= (int(workers) if workers != "1" else 0)
        os.close(terminal.child_fd)
        assert exit_code(pid) == 128 + signal.SIGHUP
    assert not psutil.wait_procs(family, timeout=60)[1]
    check_record(run_dir, tmp_path)


def test_a_run_whose_terminal_may_go_goes_on(tmp_path):
    run_dir = tmp_path / "run"

    def under_nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        main(["simulate", *SMALL, "--rounds", "8", "--run-dir", str(run_dir)], prog_name="fleet")

    run = Forked(under_nohup, sys.__stderr__)
    try:
        wait_for(lambda: rounds_on_record(run_dir) > 2, run)
        run.send_signal(signal.SIGHUP)
        assert run.wait(timeout=PATIENCE) == 0
    finally:
        run.kill()
    assert RunRecord(run_dir).summary()["rounds"] == 8


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("local", "1", ()), ""),
        (("flower", "1", ()), " --engine flower"),
        (("local", "auto", ("mlflow",)), " --workers auto --log-to mlflow"),
        (("local", "2", ("wandb:my fleets",)), " --workers 2 --log-to 'wandb:my fleets'"),
    ],
)
def test_the_command_that_goes_on_with_a_run_has_what_its_config_does_not_hold(given, words):
    assert _beside_config(*given) == words


STUBBORN = """
import subprocess, time
from fleet.cli.stopping import stopping
from fleet.records import RunRecord
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
with stopping(RunRecord.reserve(sys.argv[1]), ""):
    try:
        print("on", flush=True)
        time.sleep(600)
    finally:
        print("ending", flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_ends_the_run_and_its_children_at_once(tmp_path, second):
    command = [sys.executable, "-c", HEAR + STUBBORN, str(tmp_path / "run")]
    with started(command, stdout=subprocess.PIPE) as run:
        child = psutil.Process(int(run.stdout.readline()))
        assert run.stdout.readline() == "on\n"
        run.send_signal(signal.SIGINT)
        assert run.stdout.readline() == "ending\n"
        assert child.is_running()
        time.sleep(_ONE_SECONDS)  # sooner, it would be the same wish
        run.send_signal(second)
        # The child would stay for ten minutes.
        assert run.wait(timeout=60) == 128 + second
        assert not psutil.wait_procs([child], timeout=60)[1]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_two_signals_within_milliseconds_are_one(tmp_path, second):
    """GNU timeout signals the process, and then its group."""

    def run():
        with stopping(RunRecord.reserve(tmp_path / "run"), ""):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(second)
                print("cleared")

    with (tmp_path / "stderr").open("w") as errors:
        process = Forked(partial(click.command(run).main, [], "run"), errors)
    assert process.stdout.read() == "cleared\n"
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
    said = (tmp_path / "stderr").read_text()
    assert said == f"stopped; nothing was written to {tmp_path / 'run'} yet\n"


def stop_on_flower(run_dir, rounds, arguments, numbers):
    """Signal a run on Flower once it has so many rounds on record; what it said at its end."""
    command = [*FLEET, "simulate", *arguments, "--engine", "flower"]
    with started(command, stderr=subprocess.PIPE) as run:
        wait_for(lambda: rounds_on_record(run_dir) >= rounds, run)
        family = psutil.Process(run.pid).children(recursive=True)
        for number in numbers:
            run.send_signal(number)
            time.sleep(0.5)
        _, stderr = run.communicate(timeout=PATIENCE)
    assert run.returncode == 128 + numbers[-1]
    assert len(family) > 3
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    return stderr


@pytest.mark.slow  # signals and what goes on, on our own engine: above; one round on Flower: launch
def test_a_run_goes_on_on_flower_where_it_is_stopped_bit_for_bit_and_leaves_no_process(
    tmp_path, one_ray
):
    """A run that our own engine began; Flower's takes what both sides remember from the disk."""

    def end(report):
        if report.server_round == 1:
            raise KeyboardInterrupt

    run_dir = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        simulate(SETTINGS | REMEMBERING | {"run-dir": str(run_dir)}, on_round=end)
    begun = rounds_on_record(run_dir)
    stderr = stop_on_flower(run_dir, begun + 2, ("--resume", str(run_dir)), [signal.SIGTERM])
    assert stderr.endswith(f"fleet simulate --resume {run_dir} --engine flower\n")
    assert check_record(run_dir, tmp_path) >= begun + 1


@pytest.mark.slow
def test_a_second_signal_as_flower_is_being_ended_leaves_no_process_behind(tmp_path, one_ray):
    run_dir = tmp_path / "run"
    arguments = (*SMALL, "--run-dir", str(run_dir))
    stop_on_flower(run_dir, 2, arguments, [signal.SIGINT, signal.SIGINT])


@pytest.fixture
def interrupted(monkeypatch):
    """`simulate` with a Ctrl-C in it, before or after the run has a folder."""

    def run(folder, create):
        def simulate(settings, *arguments, **more):
            if create:
                RunRecord.create(settings["run-dir"], {})
            raise KeyboardInterrupt

        monkeypatch.setattr("simulations.launch.simulate", simulate)
        named = ("--run-dir", str(folder)) if folder else ()
        result = CliRunner().invoke(main, ("simulate", *named))
        assert result.exit_code == 130
        assert "Traceback" not in result.output
        assert result.stdout == ""
        return result.stderr

    return run


def test_ctrl_c_before_the_first_round_says_so(interrupted, tmp_path):
    folder = tmp_path / "my run"
    assert interrupted(folder, create=True) == (
        f"stopped before the first round; settings are in {folder}\n"
        f"go on with it:  fleet simulate --resume '{folder}'\n"
    )


def test_ctrl_c_knows_a_folder_that_was_named_by_the_clock(interrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = interrupted(None, create=True)
    (folder,) = (tmp_path / "runs").iterdir()
    assert text.startswith(f"stopped before the first round; settings are in {folder}\n")


def test_ctrl_c_before_anything_is_written_says_so(interrupted, tmp_path):
    folder = tmp_path / "run"
    assert interrupted(folder, create=False) == f"stopped; nothing was written to {folder} yet\n"


def test_handlers_are_as_before_once_a_command_has_ended(interrupted, tmp_path):
    before = [signal.getsignal(number) for number in ENDING]
    interrupted(tmp_path / "run", create=True)
    assert [signal.getsignal(number) for number in ENDING] == before


AT_IMPORT = """
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, CtrlC())
from fleet.cli import main
main()
"""


@pytest.mark.parametrize("module", ["click", "fleet.cli.simulate"])
def test_ctrl_c_while_a_command_is_imported_ends_it_quietly(module):
    command = [sys.executable, "-c", HEAR + AT_IMPORT, module]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.communicate(timeout=PATIENCE) == ("", "")
    assert run.returncode == 130


def test_ctrl_c_in_a_command_that_leaves_nothing_behind_ends_it_quietly(monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(main.commands["plan"], "callback", interrupted)
    result = CliRunner().invoke(main, ["plan"])
    assert (result.exit_code, result.output) == (130, "")
