import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.deploy.services import systemd_version
from fleet.deploy.units import Service, check_path, is_as_written, quoted, unit_text
from fleet.device_files import hidden
from fleet.errors import ConfigError

SYSTEMD = systemd_version()
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
CLIENT = Service(
    name="fleet-client",
    description="100 % ours",
    command=[sys.executable, "client", "--data", "/home/pi/my images"],
    user="daemon",
    state=Path("/var/lib/fleet-client"),
    program=[Path("/home/pi/venv"), Path("/usr")],
    readable=[Path("/home/pi/pi-01.tar.gz"), Path("/home/pi/my images"), Path("/mnt/stick")],
    memory_max="80%",
    oom_score_adjust=300,
    clock=["time-sync.target", "systemd-time-wait-sync.service"],
    environment={"FLEET_CACHE": "/var/lib/fleet-client/features"},
)
SERVER = Service(
    name="fleet-server",
    description="server",
    command=[sys.executable, "server"],
    user="daemon",
    state=Path("/srv/state"),
    writable=[Path("/home/me/server"), Path("/srv/runs")],
    devices=True,
    low_port=True,
    systemd_version=252,
)
BOTH = pytest.mark.parametrize("service", [CLIENT, SERVER], ids=["client", "server"])
# What systemd.syntax(7), specifiers, variables and shells give a meaning.
HARD_ARGUMENTS = [
    *("", " ", "a b", "50%", "%h", "%%", "$HOME", "${HOME}", "$$", "a$", ";", "a;b", "\\;"),
    *('"', "'", 'a"b', "it's", "\\", "\\n", "C:\\x", "tab\there", "two\nlines", "+x", "@x", "-x"),
    *("é ü", "→", "#no comment", "*", "~", "a=b", "name='x y' blocks=1", "[x]", "\x07", "\x7f"),
]


def settings(text):
    """Every (key, value) of a unit."""
    return [tuple(line.split("=", 1)) for line in text.splitlines() if re.match(r"[A-Z]\w+=", line)]


def values(service, key):
    return [value for name, value in settings(unit_text(service)) if name == key]


def analyze(folder, service, *arguments, level="debug"):
    """systemd's own reading of a unit, and what it has to say against it."""
    path = folder / f"{service.name}.service"
    path.write_text(unit_text(service))
    return subprocess.run(
        ["systemd-analyze", *arguments, str(path)],
        env={**os.environ, "SYSTEMD_LOG_LEVEL": level, "SYSTEMD_COLORS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_systemd
@BOTH
def test_systemd_finds_nothing_wrong(tmp_path, service):
    done = analyze(
        tmp_path, replace(service, systemd_version=SYSTEMD), "verify", "--man=no", level="info"
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if service.name in line] == []


@needs_systemd
def test_systemd_does_find_what_is_wrong(tmp_path):
    """The test above can fail."""
    broken = replace(CLIENT, command=["/no/such/program"])
    assert analyze(tmp_path, broken, "verify", "--man=no").returncode != 0
    newer = replace(CLIENT, systemd_version=SYSTEMD + 100)
    told = analyze(tmp_path, newer, "verify", "--man=no", level="info").stderr
    assert ("Unknown key 'RestartSteps'" in told) == (SYSTEMD < 254)


@needs_systemd
def test_systemd_reads_every_argument_as_it_was(tmp_path):
    service = replace(CLIENT, command=[sys.executable, *HARD_ARGUMENTS])
    done = analyze(tmp_path, service, "verify", "--man=no")
    (line,) = re.findall(r"^\s*Command Line: (.*)$", done.stdout, re.MULTILINE)
    assert _unescaped(line) == [sys.executable, *HARD_ARGUMENTS]


def _unescaped(line):
    """The words of a command line as systemd prints it, variables put in."""
    words = re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', line)
    return [bare or _c_unescaped(quoted) for quoted, bare in words]


def _c_unescaped(text):
    def sign(escape):
        code = escape[1]
        if len(code) == 3:
            return chr(int(code, 8))
        return {"a": "\a", "n": "\n", "t": "\t"}.get(code, code)

    return re.sub(r"\\([0-7]{3}|.)", sign, text).replace("$$", "$")


@needs_systemd
def test_systemd_reads_every_path_as_it_was(tmp_path):
    hard = Path("/home/pi/50% of $all; my #images* ü")
    state = Path("/srv/a state %h")
    service = replace(CLIENT, state=state, readable=[hard], writable=[Path("/home/x y")])
    dump = analyze(tmp_path, service, "verify", "--man=no").stdout
    for line in (
        f"WorkingDirectory: {state}",
        f"Environment: HOME={state}",
        f"ReadWritePaths: {state}",
        f"BindReadOnlyPaths: -{hard}:{hard}:rbind",
        "BindPaths: /home/x y:/home/x y:rbind",
        f"RequiresMountsFor: {hard} (origin-file)",
    ):
        assert f"\t{line}\n" in dump


@needs_systemd
@BOTH
def test_its_exposure_is_low_by_systemds_own_count(tmp_path, service):
    done = analyze(tmp_path, service, "security", "--offline=true", "--threshold=30")
    assert done.returncode == 0, done.stdout  # 3.0 at most; 10 is no protection at all


@BOTH
def test_a_unit_restarts_for_ever_and_is_watched(service):
    told = dict(settings(unit_text(service)))
    assert told["Restart"] == "always"
    assert told["StartLimitIntervalSec"] == "0"
    assert told["Type"] == "notify"
    assert int(told["WatchdogSec"]) > 0
    assert told["OOMPolicy"] == "continue"
    assert told["NoNewPrivileges"] == "yes"
    assert told["ProtectSystem"] == "strict"
    assert told["WantedBy"] == "multi-user.target"


def test_it_waits_longer_from_restart_to_restart_where_systemd_can():
    assert values(CLIENT, "RestartSteps") and values(CLIENT, "RestartMaxDelaySec") == ["300"]
    assert values(SERVER, "RestartSteps") == values(SERVER, "RestartMaxDelaySec") == []
    assert values(SERVER, "RestartSec") == ["5"]


def test_memory_is_limited_and_the_client_ends_first():
    assert values(CLIENT, "MemoryMax") == ["80%"]
    assert values(CLIENT, "OOMScoreAdjust") == ["300"]
    assert values(SERVER, "MemoryMax") == ["infinity"]


def test_it_starts_after_network_and_clock():
    assert values(CLIENT, "After") == ["network-online.target time-sync.target"]
    assert values(CLIENT, "Wants") == [
        "network-online.target time-sync.target systemd-time-wait-sync.service"
    ]
    assert values(SERVER, "After") == values(SERVER, "Wants") == ["network-online.target"]


def test_only_what_the_sandbox_hides_is_bound_in_and_only_the_state_is_written():
    assert values(CLIENT, "BindReadOnlyPaths") == [
        '"-/home/pi/venv"',
        '"-/home/pi/pi-01.tar.gz"',
        '"-/home/pi/my images"',
    ]
    assert values(CLIENT, "BindPaths") == values(CLIENT, "ReadWritePaths") == []
    assert values(CLIENT, "StateDirectory") == ['"fleet-client"']
    assert values(SERVER, "ReadWritePaths") == ['"/srv/state"', '"/srv/runs"']
    assert values(SERVER, "BindPaths") == ['"/home/me/server"']
    assert values(SERVER, "StateDirectory") == []


@BOTH
def test_what_would_break_flower_or_pytorch_is_not_forbidden(service):
    """Seen with systemd 252: a SuperNode that cannot see its SuperExec ends itself."""
    keys = {key for key, _ in settings(unit_text(service))}
    assert keys.isdisjoint(
        {"ProtectProc", "ProcSubset", "MemoryDenyWriteExecute", "PrivateNetwork"}
    )


def test_what_lies_in_a_writable_folder_is_not_bound_twice():
    service = replace(
        SERVER,
        writable=[Path("/home/me")],
        readable=[Path("/home/me/b.tar.gz"), Path("/home/you"), Path("/home/you/x")],
    )
    assert values(service, "BindPaths") == ['"/home/me"']
    assert values(service, "BindReadOnlyPaths") == ['"-/home/you"']


def test_devices_and_low_ports_are_open_only_where_they_are_needed():
    assert values(CLIENT, "PrivateDevices") == values(CLIENT, "ProtectClock") == ["yes"]
    assert values(CLIENT, "CapabilityBoundingSet") == [""]
    assert values(SERVER, "PrivateDevices") == values(SERVER, "ProtectClock") == []
    assert values(SERVER, "CapabilityBoundingSet") == ["CAP_NET_BIND_SERVICE"]
    assert values(SERVER, "AmbientCapabilities") == ["CAP_NET_BIND_SERVICE"]


@pytest.mark.parametrize(
    ("path", "is_hidden"),
    [
        ("/home/pi", True),
        ("/home", True),
        (Path("/root") / "x", True),
        ("/tmp/x", True),
        ("/homes/x", False),
        ("/var/lib/x", False),
        ("/mnt/home/x", False),
    ],
)
def test_homes_and_temporary_folders_are_hidden(path, is_hidden):
    assert hidden(Path(path)) == is_hidden


def test_a_changed_unit_is_told_from_one_as_written():
    text = unit_text(CLIENT)
    assert is_as_written(text)
    assert not is_as_written(text.replace("MemoryMax=80%", "MemoryMax=90%"))
    assert not is_as_written(text + "# mine\n")
    assert not is_as_written(text.partition("\n")[2])
    assert not is_as_written("")


@pytest.mark.parametrize("sign", [":", "\\", '"', "'", "\n", "\t", "\x7f"])
def test_a_path_that_lists_cannot_hold_is_refused(sign):
    with pytest.raises(ConfigError, match=r"which systemd's lists of paths cannot hold; rename it"):
        check_path(Path(f"/home/pi/a{sign}b"))
    with pytest.raises(ConfigError, match="rename it"):
        replace(CLIENT, readable=[Path(f"/home/pi/a{sign}b")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": Path("here")}, "path 'here' must be absolute"),
        ({"name": "../x"}, r"a service's name is of letters, digits, '_', '.' and '-', got '../x'"),
        ({"name": "a\nb"}, "a service's name is of letters"),
        ({"user": "a b"}, "user 'a b' is no user's name; give --user NAME"),
        ({"user": "pi\nUser=root"}, "is no user's name"),
        ({"memory_max": "lots"}, "memory-max must be like 80%, 1500M, 2G or infinity, got 'lots'"),
        ({"memory_max": "101%"}, "memory-max must be like 80%"),
        ({"description": "a\nUser=root"}, "description 'a.nUser=root' must be one line"),
        ({"environment": {"A": 'x"y'}}, "environment A='x\"y' contains"),
    ],
)
def test_what_no_unit_can_hold_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(CLIENT, **changes)


def test_an_argument_with_nul_is_refused():
    with pytest.raises(ConfigError, match="contains NUL"):
        quoted("a\0b")
