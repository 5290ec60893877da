import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from fleet.cli import main
from fleet.deploy import client as module
from fleet.deploy.addresses import Address
from fleet.deploy.bundle import install_bundle
from fleet.deploy.client import ClientOptions, Watchdog
from fleet.deploy.device_status import Seen
from fleet.deploy.diagnosis import diagnose
from fleet.deploy.flower_process import node_config
from fleet.deploy.one_at_a_time import alone_in
from fleet.deploy.provisioning import Provisioner
from fleet.deploy.supernode import HALF_DEAD
from fleet.deploy.supernode_link import has_unsent_reply, send_late_replies
from fleet.deploy.supervisor import Ending
from fleet.errors import ConfigError

NOT_ACTIVATED = ("ERROR: Failed to initialize the connection", "[code: 2004] Not activated.")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    provisioner = Provisioner(folder)
    provisioner.begin([Address("127.0.0.1", 9)], ["pi-01"])  # where nobody ever listens
    return install_bundle(provisioner.bundle_path("pi-01"), folder / "state")


@pytest.fixture
def options(bundle, tmp_path):
    (tmp_path / "images").mkdir()
    node = {"name": "pi-01", "data": str(tmp_path / "images")}
    return ClientOptions(state=tmp_path / "state", node=node, bundle=bundle)


def ending(code, *tail):
    return Ending(code, 1.0, tail)


@pytest.mark.parametrize(
    ("code", "tail", "seen", "reason", "pause"),
    [
        (0, (), Seen("offline", 3600.0), "clock is 3600 s ahead of the server's", 5),
        (0, (), Seen("offline", -400.0), "400 s behind .*timedatectl", 5),
        (0, (), Seen("unknown", 0.0), "does not know the key of pi-01: it was taken out", 60),
        (1, NOT_ACTIVATED, Seen("unknown", 0.0), "fleet provision --add NAME", 60),
        (1, NOT_ACTIVATED, Seen("online", 0.0), "still counts this device as online", 5),
        (1, NOT_ACTIVATED, Seen("online", 0.0), "in use on another device.*provision --add", 5),
        (1, NOT_ACTIVATED, Seen("registered", 0.0), "did not let this device in then", 0),
        (1, (), Seen("refused", 0.0, "no signature"), "no signature; .*--bundle", 60),
        (1, (), Seen("unreachable", problem="timed out"), r"cannot be reached \(timed out\)", 5),
        (HALF_DEAD, ("ERROR: x died", "y"), Seen("online", 0.0), r"in part only \(ERROR: x", 0),
        (1, ("starting", "ValueError: odd", "bye"), Seen("online", 0.0), "ValueError: odd", 0),
        (0, ("INFO : bye",), Seen("offline", 0.0), "refused its key or clock then", 0),
        (1, (), Seen("online", 0.0), "it said nothing", 0),
    ],
)
def test_an_ending_is_explained_with_the_way_out(bundle, code, tail, seen, reason, pause):
    diagnosis = diagnose(ending(code, *tail), seen, bundle)
    assert re.search(reason, diagnosis.reason), diagnosis.reason
    assert diagnosis.pause == pause


def test_what_one_that_was_killed_said_last_is_no_reason(bundle):
    assert diagnose(ending(-9, "ERROR : no more heartbeats"), Seen("online", 0.0), bundle) is None


class FakeSupervisor:
    """A SuperNode that has been up for so long; restarts are written down."""

    def __init__(self, uptime):
        self.up, self.restarts = uptime, []

    def uptime(self, name):
        return self.up

    def restart(self, name, reason):
        self.restarts.append(reason)


def watched(options, monkeypatch, statuses, uptime=1000.0):
    """Restarts after the server has answered so, one after the other."""
    answers = iter(statuses)
    watchdog = Watchdog(options)
    monkeypatch.setattr(watchdog, "_ask", lambda: Seen(next(answers), 0.0))
    supervisor = FakeSupervisor(uptime)
    for _ in statuses:
        watchdog.watch(supervisor)
    return supervisor.restarts


@pytest.mark.parametrize("status", ["offline", "registered", "unknown"])
def test_a_supernode_that_the_server_does_not_see_is_restarted(options, monkeypatch, status):
    (reason,) = watched(options, monkeypatch, [status] * 3)
    assert reason == f"the server sees this device as {status}"


def test_one_answer_in_between_is_no_reason(options, monkeypatch):
    assert watched(options, monkeypatch, ["offline", "online"] * 5) == []


@pytest.mark.parametrize("uptime", [None, 5.0])
def test_one_that_has_just_begun_or_is_down_is_left_alone(options, monkeypatch, uptime):
    assert watched(options, monkeypatch, ["offline"] * 9, uptime) == []


def test_while_the_network_is_gone_nothing_is_restarted(options, monkeypatch):
    assert watched(options, monkeypatch, ["unreachable"] * 9) == []


def test_each_change_of_the_answer_is_told_once(options, monkeypatch, caplog):
    caplog.set_level("INFO")
    watched(options, monkeypatch, ["online", "online", "unreachable", "unreachable", "online"])
    assert caplog.text.count("sees this device as") == 3


def test_a_disk_that_is_full_is_told_once_and_so_is_that_it_has_room(options, monkeypatch, caplog):
    caplog.set_level("INFO")
    lacking = iter(["", "the disk is full, 1 MiB", "the disk is full, 0 MiB", "", ""])
    monkeypatch.setattr(module, "want_of_room", lambda folder: next(lacking))
    watched(options, monkeypatch, ["online"] * 5)
    told = [r.getMessage() for r in caplog.records if "disk" in r.getMessage()]
    assert told == [
        "the disk is full, 1 MiB; until then this device's updates may be lost",
        f"the disk of {options.state} has room again",
    ]


def test_the_command_line_has_tls_key_and_node(options, bundle):
    command = module._command(options)
    assert command[1:4] == ["-P", "-m", "fleet.deploy.supernode"]
    given = dict(zip(command[4::2], command[5::2], strict=True))
    assert given["--superlink"] == "127.0.0.1:9" and given["--host"] == "127.0.0.1"
    assert given["--root-certificates"] == str(bundle.authority_path)
    assert given["--auth-supernode-private-key"] == str(bundle.key_path)
    assert "--insecure" not in command


HARD = {
    "name": "pi 'one' \"two\" \\ three",
    "data": "/home/pi/my images=x/ünï",
    "budget-mib": "auto",
    "blocks": 3,
    "ratio": 0.5,
    "fast": True,
    "line": "a\nb\tc",
}


@pytest.mark.parametrize("key", HARD)
def test_flower_reads_the_node_configuration_as_it_was(key):
    from flwr.common.config import parse_config_args

    node = {key: HARD[key], "next": 1}
    assert parse_config_args([node_config(node)]) == node


def test_flower_reads_all_of_it_at_once():
    from flwr.common.config import parse_config_args

    assert parse_config_args([node_config(HARD)]) == HARD


def run(*arguments):
    return CliRunner().invoke(main, ["client", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "no bundle was ever given to this device"),
        (["--insecure", "--server", "10.0.0.1"], "10.0.0.1:8000 is not this machine"),
        (["--insecure", "--server", "server.local"], "sends what this device learns without"),
        (["--insecure", "--bundle", "x.tar.gz"], "--insecure uses no keys, and --bundle holds"),
        (["--server", "127.0.0.1"], "--server and --name go with --insecure"),
        (["--insecure", "--budget-mib", "lots"], "budget-mib must be off, auto or a number"),
        (["--insecure", "--set", "name=x"], "name has an option of its own, --name"),
        (["--insecure", "--set", "x"], "--set takes KEY=VALUE, got 'x'"),
        (["--insecure", "--set", "x=[1]"], "--set x takes text, a number, true or false"),
        (
            ["--insecure", "--set", "bogus=1"],
            "unknown setting bogus of a device's node; known: name, data, blocks, budget-mib, "
            "weights, soft-temperature, least-battery",
        ),
        (["--insecure", "--set", "soft-temperature=hot"], "number from 0 to 150, got 'hot'"),
        (["--insecure", "--set", "soft-temperature=nan"], "number from 0 to 150, got nan"),
        (["--insecure", "--set", "soft-temperature=true"], "number from 0 to 150, got True"),
        (["--insecure", "--set", "least-battery=101"], "least-battery must be a number from 0 to"),
        (["--insecure", "--set", "blocks=-1"], "must be a whole number from 0 on, got -1"),
        (["--insecure", "--set", "blocks=1.5"], "must be a whole number from 0 on, got 1.5"),
        (["--insecure", "--weights", "/no/file.pth"], "--weights /no/file.pth is no file; name a"),
        (["--insecure", "--set", "weights=/no/file.pth"], "--weights /no/file.pth is no file"),
        (["--insecure", "--weights", "/"], "or one of: default, imagenet, none"),
        (
            ["--insecure", "--trusted-entities", "no.yaml"],
            "no.yaml; write a line NAME: ssh-ed25519 AAAA… for each key",
        ),
    ],
)
def test_the_command_refuses_what_cannot_be(tmp_path, arguments, complaint):
    (tmp_path / "images").mkdir()
    result = run("--data", tmp_path / "images", "--state", tmp_path / "state", *arguments)
    assert result.exit_code == 1 and complaint in result.output


def test_data_that_is_no_folder_is_refused(tmp_path):
    result = run("--data", tmp_path / "none", "--state", tmp_path / "s", "--insecure")
    assert result.exit_code == 1 and "none is no folder; name one" in result.output


@pytest.mark.parametrize("weights", ["none", "own.safetensors"])
def test_weights_by_name_or_file_reach_the_node(tmp_path, monkeypatch, weights):
    (tmp_path / "own.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(module, "run_client", lambda options, until: started.append(options))
    done = run("--data", tmp_path, "--state", tmp_path / "s", "--insecure", "--weights", weights)
    assert done.exit_code == 0, done.output
    (options,) = started
    options.check()
    expected = {"none": "none", "own.safetensors": str(tmp_path / "own.safetensors")}
    assert options.node["weights"] == expected[weights]


@pytest.mark.parametrize("there", [None, "notes.txt", "cat/a.jpg", "train/cat/a.jpg"])
def test_a_device_without_images_starts_with_one_warning(options, monkeypatch, caplog, there):
    data = Path(options.node["data"])
    if there is not None:
        (data / there).parent.mkdir(parents=True, exist_ok=True)
        (data / there).touch()
    monkeypatch.setattr(module.Supervisor, "run", lambda self, beat: None)
    module.run_client(options, lambda stop: None)
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    if there in (None, "notes.txt"):
        (warning,) = warnings
        assert f"there are no images in {data} yet" in warning
        assert warning.endswith(f"in a folder of its own: {data}/CLASS/image.jpg")
    else:
        assert warnings == []


def test_class_folders_may_be_links(options, monkeypatch, caplog, tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.jpg").touch()
    (Path(options.node["data"]) / "cat").symlink_to(tmp_path / "cats")
    monkeypatch.setattr(module.Supervisor, "run", lambda self, beat: None)
    module.run_client(options, lambda stop: None)
    assert "there are no images" not in caplog.text


def test_links_to_what_is_not_there_are_told(options, monkeypatch, caplog, tmp_path):
    data = Path(options.node["data"])
    (data / "cat").mkdir()
    (data / "cat" / "a.jpg").touch()
    (data / "dog").symlink_to(tmp_path / "dogs")
    monkeypatch.setattr(module.Supervisor, "run", lambda self, beat: None)
    module.run_client(options, lambda stop: None)
    (warning,) = (e.getMessage() for e in caplog.records if e.levelname == "WARNING")
    assert warning.startswith(f"1 link in {data} leads to nothing, or to what a service does not")
    assert warning.endswith(f"{data / 'dog'}, to {tmp_path / 'dogs'}: copy the images into {data}")


def test_a_second_client_in_the_same_state_is_refused(options):
    with (
        alone_in(options.state, "fleet client"),
        pytest.raises(ConfigError, match=r"another fleet client runs in .* already"),
    ):
        module.run_client(options, lambda stop: None)


def test_what_watches_over_a_device_loads_neither_pytorch_nor_flower():
    code = "import sys, fleet.cli, fleet.deploy.client; print({'torch', 'flwr'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def supernode(code):
    """The wrapper of the SuperNode around something that is none, as its own process."""
    program = f"""
import signal, sys, threading, types
from fleet.deploy import supernode
supernode._WATCH_SECONDS = 0.05
supernode._GRACE_SECONDS = 20.0
sys.argv = ["supernode", "--cold", "--host", "127.0.0.1", "--port", "9"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as Flower does
supernode.improve = lambda give_up: None
supernode._start = lambda superexec, address: None
fake = types.ModuleType("flwr.supernode.cli")
def flower_supernode():
{code}
fake.flower_supernode = flower_supernode
sys.modules["flwr.supernode.cli"] = fake
supernode.main()
"""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )


def test_a_heartbeats_thread_that_dies_ends_the_supernode():
    ended = supernode("""
    import time
    def beat():
        raise RuntimeError("500 Internal Server Error")
    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    try:
        while True: time.sleep(1)
    finally:
        print("goodbye", flush=True)
""")
    assert ended.returncode == HALF_DEAD
    assert "heartbeat has died" in ended.stderr and "500 Internal Server Error" in ended.stderr
    assert ended.stdout == "goodbye\n"  # the server is told


def test_flowers_own_heartbeat_dies_of_a_500_and_ends_the_supernode():
    ended = supernode("""
    import time, httpx
    from flwr.supercore.heartbeat import HeartbeatSender
    def beat():
        request = httpx.Request("POST", "https://server.local/")
        httpx.Response(500, request=request).raise_for_status()
    HeartbeatSender(beat).start()
    while True: time.sleep(1)
""")
    assert ended.returncode == HALF_DEAD, ended.stderr
    assert "has died" in ended.stderr and "500 Internal Server Error" in ended.stderr


def test_one_that_does_not_end_when_it_should_is_ended():
    ended = supernode("""
    import time
    supernode._GRACE_SECONDS = 0.3
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=lambda: 1 / 0, name="heartbeat").start()
    while True: time.sleep(1)
""")
    assert ended.returncode == HALF_DEAD


def test_one_that_is_told_to_end_is_not_half_dead():
    ended = supernode("""
    import os, time
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
    while True: time.sleep(1)
""")
    assert ended.returncode == 0


def test_a_main_loop_that_ends_ends_the_supernode_though_its_server_goes_on():
    ended = supernode("""
    import time
    threading.Thread(target=time.sleep, args=[600]).start()
""")
    assert ended.returncode == HALF_DEAD and "main loop has ended" in ended.stderr


def test_a_superexec_that_dies_ends_the_supernode():
    sleep = shutil.which("sleep")
    ended = supernode(f"""
    import subprocess, time
    child = subprocess.Popen([{sleep!r}, "0.4"])
    while True: time.sleep(1)
""")
    assert ended.returncode == HALF_DEAD
    assert "the SuperExec has died" in ended.stderr


@pytest.fixture
def node_state():
    """Flower's own store of a SuperNode."""
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate import NodeStateFactory

    return NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()


def put(node_state, message_id, reply_to=""):
    metadata = SimpleNamespace(message_id=message_id, reply_to_message_id=reply_to, run_id=1)
    node_state.store_message(SimpleNamespace(metadata=metadata))


def test_a_reply_is_unsent_until_flower_takes_it(node_state):
    put(node_state, "question")
    assert not has_unsent_reply(node_state)
    put(node_state, "answer", reply_to="question")
    assert has_unsent_reply(node_state) and has_unsent_reply(node_state)
    (taken,) = node_state.get_messages_legacy(is_reply=True)
    assert taken.metadata.message_id == "answer"
    assert not has_unsent_reply(node_state)


@pytest.mark.parametrize("patched", [False, True])
def test_flowers_loop_falls_a_step_behind_and_ours_does_not(node_state, monkeypatch, patched):
    """As Flower's main loop goes: pull; if there was a message, send what replies there are.

    A run ends as its message is being fetched, and the app answers it all the same.
    """
    from flwr.supernode import start_client_internal as loop

    answers = {"ended": "late answer", "question": "answer"}
    arriving = iter(["ended", "question", None, None])
    sent = []

    def pull(*, state, object_store):
        message = next(arriving)
        if message is not None:
            put(state, message)
            put(state, answers[message], reply_to=message)
        return None if message in (None, "ended") else 7

    monkeypatch.setattr(loop, "_pull_and_store_message", pull)
    if patched:
        send_late_replies(loop)
    taken_first = iter([1, 9, 9, 9])  # Flower sends as soon as one reply is there
    for _ in range(4):
        if loop._pull_and_store_message(state=node_state, object_store=None) is not None:
            replies = node_state.get_messages_legacy(is_reply=True, limit=next(taken_first))
            sent += [reply.metadata.message_id for reply in replies]
    assert sent == (["late answer", "answer"] if patched else ["late answer"])


def test_this_flower_has_the_loop_that_is_mended():
    import inspect

    from flwr.supernode import start_client_internal as loop

    assert "state" in inspect.signature(loop._pull_and_store_message).parameters
    source = inspect.getsource(loop.start_client_internal)
    assert "run_id = _pull_and_store_message(\n" in source and "if run_id is None:" in source
