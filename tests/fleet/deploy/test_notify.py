import logging
import os
import socket
import subprocess
import sys
import time

import pytest

from fleet.deploy import notify


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """A socket like systemd's; a function that gives the next message."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(5)
        receiver.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield lambda: receiver.recv(4096).decode()


@pytest.fixture(autouse=True)
def warned_anew():
    notify._warn.cache_clear()


def test_ready_alive_and_stopping_are_what_systemd_expects(systemd):
    notify.ready()
    notify.alive()
    notify.stopping()
    assert [systemd(), systemd(), systemd()] == ["READY=1", "WATCHDOG=1", "STOPPING=1"]


def test_a_status_is_one_line_whatever_it_is_given(systemd):
    notify.alive("connected\nREADY=0  twice")
    assert systemd() == "WATCHDOG=1\nSTATUS=connected READY=0 twice"


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_a_socket_in_the_abstract_namespace_is_reached(monkeypatch):
    name = f"fleet-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(5)
        receiver.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify.ready("up")
        assert receiver.recv(4096) == b"READY=1\nSTATUS=up"


def test_outside_a_service_nothing_is_sent(monkeypatch, caplog):
    def fail(*arguments):
        raise AssertionError("a socket was made")

    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setattr(socket, "socket", fail)
    notify.ready()
    notify.alive()
    assert not caplog.records


def test_a_socket_that_nobody_reads_ends_nothing_and_is_told_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    with caplog.at_level(logging.WARNING):
        notify.alive()
        notify.alive()
    (record,) = caplog.records
    assert record.message.startswith(f"systemd does not take WATCHDOG=1 at {tmp_path / 'gone'}: ")


def test_a_full_queue_does_not_hold_the_service_up_for_ever(systemd, caplog, monkeypatch):
    monkeypatch.setattr(notify, "SECONDS", 0.05)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        while not caplog.records:
            notify.alive()
            assert time.monotonic() - started < 60  # else it never fills
    assert "timed out" in caplog.records[0].message


def test_it_is_light():
    code = (
        "import sys, fleet.deploy.notify; print(*({'torch', 'flwr', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
