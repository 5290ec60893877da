import contextlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass

import psutil
import pytest

from fleet.deploy import supervisor as module
from fleet.deploy.supervisor import Backoff, Child, Supervisor
from fleet.errors import ConfigError

SOON = 20.0  # seconds after which what should have happened has not


@dataclass
class Verdict:
    reason: str
    pause: float = 0.0


def program(code):
    """A command that runs a few lines of Python, quickly: without site-packages."""
    return [sys.executable, "-S", "-E", "-c", textwrap.dedent(code)]


def child(name, code, **options):
    options.setdefault("backoff", Backoff(first=0.0, most=0.0))
    return Child(name, lambda: program(code), dict(os.environ), **options)


@pytest.fixture
def keep(tmp_path):
    """Keeps children running in a thread until the test ends; returns the supervisor."""
    with contextlib.ExitStack() as stack:

        def start(*children):
            supervisor = Supervisor(children, tmp_path / "logs", tmp_path)
            thread = threading.Thread(target=supervisor.run, kwargs={"every": 0.02})
            thread.start()
            stack.callback(thread.join)
            stack.callback(supervisor.stop)
            return supervisor

        yield start


def eventually(condition):
    deadline = time.monotonic() + SOON
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
    return found


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def pids(path):
    return [int(line) for line in lines(path)]


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


NOTE_PID = """
    import os, time
    with open("pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
"""
STAY = NOTE_PID + "    time.sleep(600)\n"


def test_a_child_that_crashes_is_started_again(keep, tmp_path):
    keep(child("crashing", NOTE_PID + "    os._exit(3)"))
    eventually(lambda: len(pids(tmp_path / "pids")) >= 3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_is_killed_is_started_again(keep, tmp_path, number):
    supervisor = keep(child("victim", STAY))
    (first,) = eventually(lambda: pids(tmp_path / "pids"))
    os.kill(first, number)
    first_again, second = eventually(lambda: len(found := pids(tmp_path / "pids")) == 2 and found)
    assert first_again == first and alive(second)
    assert supervisor.starts("victim") == 2


def test_a_child_that_ends_well_is_started_again_too(keep, tmp_path):
    keep(child("ending", NOTE_PID))  # as a SuperNode whose clock is off does
    eventually(lambda: len(pids(tmp_path / "pids")) >= 2)


def test_one_that_dies_leaves_the_others_alone(keep, tmp_path):
    supervisor = keep(child("dying", "raise SystemExit(1)"), child("staying", STAY))
    eventually(lambda: supervisor.starts("dying") >= 3 and pids(tmp_path / "pids"))
    assert supervisor.starts("staying") == 1 and supervisor.uptime("staying") > 0


def test_one_that_cannot_be_started_is_tried_again_and_named(keep, caplog):
    missing = Child("missing", lambda: ["/no/such/program"], {}, backoff=Backoff(0.0, 0.0))
    supervisor = keep(missing)
    eventually(lambda: caplog.text.count("cannot start missing") >= 2)
    assert "No such file" in caplog.text and supervisor.uptime("missing") is None


def test_what_it_leaves_behind_ends_before_it_is_started_again(keep, tmp_path):
    code = """
        import os, subprocess, sys
        sleeper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        with open("left", "a") as file:
            file.write(f"{sleeper.pid}\\n")
        os._exit(1)
    """
    keep(child("careless", code))
    first, *_ = eventually(lambda: len(found := pids(tmp_path / "left")) >= 2 and found)
    assert not alive(first)


def test_stopping_ends_every_child_and_grandchild_also_the_stubborn(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STOP_SECONDS", 0.5)
    monkeypatch.setattr(module.end_family, "__defaults__", (0.5,))
    code = """
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ignoring = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
        sleeper = subprocess.Popen([sys.executable, "-S", "-c", ignoring])
        with open("pids", "w") as file:
            file.write(f"{os.getpid()}\\n{sleeper.pid}\\n")
        time.sleep(600)
    """
    supervisor = Supervisor([child("stubborn", code)], tmp_path / "logs", tmp_path)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    found = eventually(lambda: len(found := pids(tmp_path / "pids")) == 2 and found)
    assert all(map(alive, found))
    supervisor.stop()
    thread.join(SOON)
    assert not thread.is_alive() and not any(map(alive, found))


def test_a_restart_that_is_asked_for_ends_it_first(keep, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    supervisor = keep(child("asked", STAY))
    (first,) = eventually(lambda: pids(tmp_path / "pids"))
    supervisor.restart("asked", "its certificate is a new one")
    eventually(lambda: len(pids(tmp_path / "pids")) == 2)
    assert not alive(first)
    assert "asked is started again: its certificate is a new one" in caplog.text


def test_a_child_does_not_hear_the_terminals_ctrl_c(keep, tmp_path):
    keep(child("apart", STAY))
    (found,) = eventually(lambda: pids(tmp_path / "pids"))
    assert os.getpgid(found) != os.getpgid(0) and os.getsid(found) == found


def test_why_it_ended_is_told_with_the_pause_that_the_reason_asks_for(keep, caplog):
    endings = []

    def judge(ending):
        endings.append(ending)
        return Verdict("the disk is full", pause=500.0)

    supervisor = keep(child("told", "print('one'); print('two'); raise SystemExit(4)", judge=judge))
    told = "told ended with 4: the disk is full; started again in 500.0 s"
    eventually(lambda: told in caplog.text)
    assert (endings[0].code, endings[0].tail) == (4, ("one", "two"))
    time.sleep(0.2)
    assert supervisor.starts("told") == 1


def test_a_signal_is_told_as_such(keep, caplog):
    keep(child("shot", "import os; os.kill(os.getpid(), 9)", backoff=Backoff(first=500.0)))
    eventually(lambda: "shot was killed by signal 9" in caplog.text)


def test_what_it_prints_is_logged_with_the_time_and_without_colours(keep, tmp_path):
    coloured = 'print("\\x1b[91mERROR\\x1b[0m: x", flush=True)'
    keep(child("loud", f"{coloured}; import time; time.sleep(600)"))
    log = tmp_path / "logs" / "loud.log"
    (line,) = eventually(lambda: lines(log))
    assert line.endswith(" ERROR: x") and line[:2] == "20"


def test_a_log_does_not_grow_for_ever(keep, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOG_BYTES", 2_000)
    code = """
        for i in range(1000): print(i, "x" * 80)
        print("done", flush=True)
        import time; time.sleep(600)
    """
    keep(child("talkative", code))
    logs = tmp_path / "logs"
    eventually(lambda: any("done" in line for line in lines(logs / "talkative.log")))
    files = list(logs.iterdir())
    assert len(files) == module.LOG_FILES
    assert sum(file.stat().st_size for file in files) < module.LOG_FILES * 2_200


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cannot write log .*a\.log"):
        Supervisor([child("a", "")], tmp_path / "logs", tmp_path)


def test_pauses_double_up_to_the_most_and_begin_anew_after_a_healthy_time():
    backoff = Backoff(first=1.0, most=10.0, healthy=60.0)
    assert [backoff.pause(0.1) for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert backoff.pause(61.0) == 1.0
    assert backoff.pause(59.0) == 2.0


def test_a_process_of_ours_ends_when_its_parent_is_killed(tmp_path):
    watched = "import time; from fleet.deploy.flower_process import end_with_parent; "
    watched += "end_with_parent(); print('ready', flush=True); time.sleep(600)"
    parent = subprocess.Popen(
        program(f"""
            import subprocess, time
            command = [{sys.executable!r}, "-c", {watched!r}]
            child = subprocess.Popen(command, stdout=subprocess.PIPE)
            child.stdout.readline()
            print(child.pid, flush=True)
            time.sleep(600)
        """),
        stdout=subprocess.PIPE,
        text=True,
    )
    child_pid = int(parent.stdout.readline())
    assert alive(child_pid)
    parent.kill()
    parent.wait()
    eventually(lambda: not alive(child_pid))


def test_what_a_child_prints_is_heard_line_by_line(keep):
    heard = []
    keep(child("talker", 'print("\\x1b[91mone\\x1b[0m\\ntwo")', hear=heard.append))
    eventually(lambda: heard[:2] == ["one", "two"])
