"""Real processes, real signals."""

import os
import signal
import subprocess
import sys
import time

import pexpect
import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from fleet.cli import main
from fleet.cli.simulate import _beside_config
from fleet.records import RunRecord
from fleet.signals import ENDING
from tests.commands import FLEET, HEAR

SMALL = (
    *("--clients", "2", "--train-examples", "60", "--test-examples", "30", "--image-size", "32"),
    *("--local-epochs", "1", "--blocks", "0,1", "--rounds", "500"),
)


def wait_for(what, seconds=200):
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_with_its_record_written(tmp_path, number):
    run_dir = tmp_path / "run"
    run = subprocess.Popen(
        [*FLEET, "simulate", *SMALL, "--run-dir", str(run_dir), "--format", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: rounds_on_record(run_dir) > 2)
    run.send_signal(number)
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 128 + number
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
    environment = os.environ | {"TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    terminal = pexpect.spawn(
        FLEET[0],
        [*FLEET[1:], "simulate", *SMALL, "--run-dir", str(run_dir)],
        env=environment,
        dimensions=(24, 40),
        encoding="utf-8",
        timeout=200,
    )
    terminal.expect(r"round 2/500: [\d.]+ %, loss [\d.]+, [\d.]+ s\b")
    terminal.expect(r"round \d+ of 500 .* left")
    terminal.sendintr()
    terminal.expect("stopped after round")
    assert "\x1b[?25h" in terminal.before  # the cursor is back
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 130
    assert "Traceback" not in terminal.before
    check_record(run_dir, tmp_path)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_terminal_that_is_closed_ends_a_run_with_its_record_written(tmp_path, workers):
    run_dir = tmp_path / "run"
    environment = os.environ | {"TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    terminal = pexpect.spawn(
        FLEET[0],
        [*FLEET[1:], "simulate", *SMALL, "--workers", workers, "--run-dir", str(run_dir)],
        env=environment,
        encoding="utf-8",
        timeout=200,
    )
    terminal.expect(r"round 2/500")
    family = psutil.Process(terminal.pid).children(recursive=True)
    os.close(terminal.child_fd)
    assert terminal.ptyproc.wait() == 128 + signal.SIGHUP
    assert not psutil.wait_procs(family, timeout=10)[1]
    check_record(run_dir, tmp_path)


def test_a_run_whose_terminal_may_go_goes_on(tmp_path):
    run_dir = tmp_path / "run"
    run = subprocess.Popen(
        [
            *("nohup", sys.executable, "-m", "fleet.cli"),
            *("simulate", *SMALL, "--rounds", "8", "--run-dir", str(run_dir)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: rounds_on_record(run_dir) > 2)
    run.send_signal(signal.SIGHUP)
    assert run.wait(timeout=100) == 0
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
    run = subprocess.Popen(
        [sys.executable, "-c", HEAR + STUBBORN, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = psutil.Process(int(run.stdout.readline()))
    assert run.stdout.readline() == "on\n"
    run.send_signal(signal.SIGINT)
    assert run.stdout.readline() == "ending\n"
    assert child.is_running()
    run.send_signal(second)
    assert run.wait(timeout=10) == 128 + second
    run.stdout.close()
    assert not psutil.wait_procs([child], timeout=10)[1]


# The second time Flower's processes are being ended when the signal comes again.
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_run_on_flower_that_is_stopped_leaves_no_process_behind(tmp_path, numbers):
    pytest.importorskip("ray", reason="Flower's simulation runtime needs the extra sim")
    run_dir = tmp_path / "run"
    run = subprocess.Popen(
        [*FLEET, "simulate", *SMALL, "--engine", "flower", "--run-dir", str(run_dir)],
        stderr=subprocess.PIPE,
        text=True,
    )
    family = []
    try:
        wait_for(lambda: rounds_on_record(run_dir) > 1)
        family = psutil.Process(run.pid).children(recursive=True)
        for number in numbers:
            run.send_signal(number)
            time.sleep(0.5)
        _, stderr = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 128 + numbers[-1]
    assert len(family) > 3
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    if len(numbers) == 1:
        assert stderr.endswith(f"fleet simulate --resume {run_dir} --engine flower\n")
        check_record(run_dir, tmp_path)


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
