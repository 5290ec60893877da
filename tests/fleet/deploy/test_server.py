import ast
import hashlib
import importlib.util
import json
import re
import socket
import subprocess
import sys
import termios
import threading
import time
import zipfile
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import pexpect
import pytest
from click.testing import CliRunner

from fleet.cli import main
from fleet.deploy import server as module
from fleet.deploy.addresses import Address
from fleet.deploy.app_bundle import LEFT_OUT, app_files, build_app
from fleet.deploy.control import ControlError, Node
from fleet.deploy.diagnosis import last_words
from fleet.deploy.one_at_a_time import alone_in, somebody_in
from fleet.deploy.provisioning import Provisioner, ServerFolder
from fleet.deploy.server import Attendant, ServerOptions, answers
from fleet.deploy.supervisor import Ending
from fleet.deploy.wishes import Standing, Wishes
from fleet.errors import ConfigError
from fleet.records import RoundReport, to_json
from tests.forked import exit_code, on_terminal
from tests.ssh_keys import fingerprint, make_key, public, verified


@pytest.fixture
def folder(tmp_path):
    provisioner = Provisioner(tmp_path)
    provisioner.begin([Address("server.local", 9000)], ["pi-01", "pi-02"])
    return provisioner.server


@pytest.fixture
def options(folder):
    return ServerOptions(folder=folder, state=folder.state_path, host="127.0.0.1", port=9000)


def add_round(folder, number):
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").touch()
    report = RoundReport(server_round=number, accuracy=0.5, loss=1.0)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(to_json(asdict(report)) + "\n")


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "server.local", "::"])
def test_without_keys_it_serves_on_loopback_alone(tmp_path, host):
    result = run("server", "--dir", tmp_path, "--insecure", "--host", host)
    assert result.exit_code == 1
    assert f"--insecure serves without encryption and keys, and --host {host}" in result.output


def test_without_keys_it_refuses(tmp_path):
    result = run("server", "--dir", tmp_path)
    assert result.exit_code == 1
    assert "there is no server's key or certificate" in result.output
    assert "make them with: fleet provision --host NAME" in result.output


@pytest.mark.parametrize("missing", ["ca.crt", "server.pem", "server.key", "devices.toml"])
def test_a_key_that_is_missing_is_named(options, missing):
    (options.folder.path / missing).unlink()
    with pytest.raises(ConfigError, match=f"{missing}; make them with: fleet provision"):
        options.check()


def test_a_second_server_in_the_same_state_is_refused(options):
    with (
        alone_in(options.state, "fleet server"),
        pytest.raises(ConfigError, match=r"another fleet server runs in .* already"),
    ):
        module.serve(options, lambda stop: None)


def test_a_second_server_in_the_same_folder_is_refused_wherever_its_state_lies(options, tmp_path):
    elsewhere = replace(options, state=tmp_path / "elsewhere")
    complaint = rf"another fleet server runs in {options.folder.path} already; .* with --dir"
    with options.folder.alone(), pytest.raises(ConfigError, match=complaint):
        module.serve(elsewhere, lambda stop: None)
    assert not elsewhere.state.exists()


def test_a_server_is_found_by_its_folder_while_it_serves(options, monkeypatch, tmp_path):
    """Whatever its --state, be it the folder itself."""
    for state in (tmp_path / "elsewhere", options.folder.path):
        found = []

        def stop_at_once(stop, found=found):
            found.append(options.folder.has_server())
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            module.serve(replace(options, state=state), stop_at_once)
        assert found == [True] and not options.folder.has_server()


def test_flower_is_started_with_everything_on(options, folder):
    options.state.mkdir()
    superlink, superexec = module._children(options)
    words = list(superlink.command())
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= {*words}
    given = {w: words[i + 1] for i, w in enumerate(words[:-1]) if w.startswith("--")}
    assert given["--isolation"] == "process"
    assert given["--ssl-keyfile"] == str(folder.key_path.resolve())
    assert given["--database"] == str(options.state / "flower.db")
    secret = options.state / "superexec.secret"
    assert given["--superexec-auth-secret-file"] == str(secret)
    assert secret.stat().st_mode & 0o777 == 0o600 and len(secret.read_bytes()) == 64
    assert str(secret) in list(superexec.command())
    assert superlink.environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert superlink.environment["FLWR_HOME"] == str(options.state / "flower")
    assert "--insecure" not in words


def test_what_the_user_has_set_for_other_flower_processes_does_not_reach_it(options, monkeypatch):
    monkeypatch.setenv("FLWR_DATABASE", "elsewhere")
    monkeypatch.setenv("https_proxy", "http://proxy:1")
    options.state.mkdir()
    superlink, _ = module._children(options)
    assert not {"FLWR_DATABASE", "https_proxy"} & superlink.environment.keys()


class FakeSupervisor:
    def __init__(self, uptime=1000.0):
        self.up, self.restarts = uptime, []

    def uptime(self, name):
        return self.up

    def starts(self, name):
        return 1

    def restart(self, name, reason):
        self.restarts.append((name, reason))


def test_a_superlink_that_hangs_is_started_again(options, monkeypatch):
    monkeypatch.setattr(module, "answers", lambda *_: False)
    supervisor = FakeSupervisor()
    attendant = Attendant(options, supervisor)
    for _ in range(module._HUNG_AFTER):
        assert supervisor.restarts == []
        attendant._go_round()
    assert supervisor.restarts == [("superlink", "it does not answer")]


def test_one_that_has_just_begun_is_given_time(options, monkeypatch):
    monkeypatch.setattr(module, "answers", lambda *_: False)
    supervisor = FakeSupervisor(uptime=20.0)
    attendant = Attendant(options, supervisor)
    for _ in range(3 * module._HUNG_AFTER):
        attendant._go_round()
    assert supervisor.restarts == []


def test_a_renewed_certificate_is_taken_up(options, monkeypatch, tmp_path):
    supervisor = FakeSupervisor(uptime=None)
    attendant = Attendant(options, supervisor)
    attendant._go_round()
    assert supervisor.restarts == []
    Provisioner(tmp_path).renew()
    attendant._go_round()
    attendant._go_round()
    assert supervisor.restarts == [("superlink", "its certificate is a new one")]


def test_an_expiry_that_is_near_is_told(options, monkeypatch, caplog):
    monkeypatch.setattr(module, "EXPIRES_SOON_DAYS", 1000)
    Attendant(options, FakeSupervisor(uptime=None))._go_round()
    assert re.search(r"server.s certificate expires in 82[45] days; renew it", caplog.text)


def test_an_expiry_that_is_over_is_told(options, monkeypatch, caplog):
    monkeypatch.setattr(module, "days_left", lambda moment: -3)
    Attendant(options, FakeSupervisor(uptime=None))._go_round()
    assert "certificate has expired, and no device connects; renew it: fleet prov" in caplog.text


def test_a_port_that_is_taken_is_told_at_once_and_tried_again(options, monkeypatch, caplog):
    """A server that has just been killed holds it for a moment longer."""

    class Supervisor(FakeSupervisor):
        def __init__(self, *_):
            super().__init__(None)

        def run(self, tick):
            pass

        def stop(self):
            pass

    monkeypatch.setattr(module, "Supervisor", Supervisor)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        module.serve(replace(options, port=port), lambda stop: None)
    (told,) = [r.getMessage() for r in caplog.records if "listen" in r.getMessage()]
    assert told.startswith(f"cannot listen on 127.0.0.1, port {port}: Address already in use")
    assert told.endswith("; end what listens there, or name another --host or --port; tried again")
    caplog.clear()
    module.serve(replace(options, port=port), lambda stop: None)
    assert "listen" not in caplog.text


def test_devices_are_looked_after_when_the_registry_changes(options, monkeypatch, tmp_path):
    seen = []
    supervisor = FakeSupervisor()
    attendant = Attendant(options, supervisor)
    monkeypatch.setattr(
        attendant._membership, "reconcile", lambda devices, control: seen.append([*devices])
    )
    attendant._look_after_devices(None)
    attendant._look_after_devices(None)
    Provisioner(tmp_path).add(["pi-03"])
    attendant._look_after_devices(None)
    attendant._look_after_devices(None)
    assert seen == [["pi-01", "pi-02"], ["pi-01", "pi-02", "pi-03"]]


def test_what_goes_wrong_is_told_once_and_does_not_end_the_attendant(options, monkeypatch, caplog):
    monkeypatch.setattr(module, "_ATTEND_SECONDS", 0.01)
    attendant = Attendant(options, FakeSupervisor())
    rounds = []

    def fail():
        rounds.append(None)
        raise ConfigError("the registry cannot be read")

    monkeypatch.setattr(attendant, "_go_round", fail)
    thread = threading.Thread(target=attendant.run)
    thread.start()
    while len(rounds) < 5:
        time.sleep(0.01)
    attendant.stop()
    thread.join()
    assert caplog.text.count("the registry cannot be read; tried again") == 1


def test_a_disk_that_is_full_is_told_once_and_again_when_it_is_once_more(
    options, monkeypatch, caplog
):
    attendant = Attendant(options, FakeSupervisor(uptime=None))
    lacking = {options.folder.runs_path: "the disk of runs is full"}
    monkeypatch.setattr(module, "want_of_room", lambda folder: lacking.get(folder, ""))
    for full in (True, True, False, True):
        lacking[options.state] = "the disk of state is full" if full else ""
        attendant._go_round()
    told = [record.getMessage() for record in caplog.records]
    state, runs = (f"the disk of {folder} is full; tried again" for folder in ("state", "runs"))
    assert told == [state, runs, state]


@pytest.fixture
def attended(options, monkeypatch):
    """An attendant of a SuperLink that is well, and how often it has attended the runs."""
    monkeypatch.setattr(module, "answers", lambda *_: True)
    attendant = Attendant(options, FakeSupervisor())
    attendant._control = FakeControl()
    attended = []
    monkeypatch.setattr(attendant._runs, "attend", attended.append)
    return attendant, attended


class FakeControl:
    closed = False

    def nodes(self):
        return []

    def register(self, public_key, name):
        pass

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ("registry_path", "devices.toml cannot be read"),
        ("certificate_path", "server.pem: it holds no certificate that can be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_once_and_runs_are_attended(
    attended, options, caplog, broken, complaint
):
    attendant, attended = attended
    path = getattr(options.folder, broken)
    before = path.read_bytes()
    for content in (b"[[", b"[["), (before,), (b"[[",):
        told = caplog.text.count(complaint)
        for broken_or_not in content:
            path.write_bytes(broken_or_not)
            with attendant._complaints("round"):
                attendant._go_round()
        assert caplog.text.count(complaint) - told == (content != (before,))
    assert len(attended) == 4


def test_a_superlink_that_is_lost_at_the_devices_is_asked_nothing_more(
    attended, monkeypatch, caplog
):
    attendant, attended = attended
    control = attendant._control

    def fail(devices, control):
        raise ControlError("the SuperLink did not list its nodes: away", refused=False)

    monkeypatch.setattr(attendant._membership, "reconcile", fail)
    with pytest.raises(ControlError, match="did not list its nodes"):
        attendant._go_round()
    assert control.closed and attendant._control is None and not attended


def test_nobody_there_does_not_answer(folder):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert not answers(Address("127.0.0.1", port), folder.authority_path, seconds=0.3)
    assert not answers(Address("127.0.0.1", port), None)


def test_a_lock_ends_with_the_process_that_held_it(tmp_path):
    code = "import sys, time; from pathlib import Path\n"
    code += "from fleet.deploy.one_at_a_time import alone_in\n"
    code += "with alone_in(Path(sys.argv[1]), 'x'): print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s")], stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    assert somebody_in(tmp_path / "s")
    holder.kill()
    holder.wait()
    assert not somebody_in(tmp_path / "s")


def test_the_app_holds_what_server_and_devices_run_and_nothing_of_simulations():
    with zipfile.ZipFile(BytesIO(build_app())) as app:
        names = {*app.namelist()}
    assert {"pyproject.toml", "fleet/config.py", "clients/client_app.py"} <= names
    assert "strategies/server_app.py" in names
    assert not [name for name in names if name.startswith(("simulations", "tests"))]


def test_every_device_fetches_the_app_over_its_link_so_it_is_small():
    with zipfile.ZipFile(BytesIO(build_app())) as app:
        files = app.infolist()
    assert len(build_app()) < sum(file.file_size for file in files) / 2


def test_flower_installs_the_app(tmp_path):
    from flwr.cli.install import install_from_fab

    with zipfile.ZipFile(BytesIO(build_app())) as app:  # it holds every file against its hash
        installed = install_from_fab(build_app(), tmp_path, skip_prompt=True)
        names = [name for name in app.namelist() if not name.startswith(".info/")]
        assert all((installed / name).read_bytes() == app.read(name) for name in names)


def test_what_the_app_leaves_out_no_run_imports(tmp_path):
    """What a run imports is in the app: the rest of the project is hidden from it."""
    with zipfile.ZipFile(BytesIO(build_app())) as app:
        app.extractall(tmp_path)
    left_out = [name.replace("/", ".") for name in LEFT_OUT]
    assert all(importlib.util.find_spec(name) for name in left_out)
    for path in tmp_path.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                assert not name.startswith(tuple(left_out)), f"{path} imports {name}"


def test_the_app_of_an_installation_is_that_of_the_checkout(tmp_path):
    """A wheel has pyproject.toml inside the package fleet, and stands among others' packages."""
    for path, source in app_files().items():
        inside = "fleet/pyproject.toml" if path == "pyproject.toml" else path
        (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / inside).write_bytes(source.read_bytes())
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "x.py").touch()
    assert build_app(tmp_path) == build_app()


def test_an_installation_in_pieces_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"pyproject\.toml is missing"):
        build_app(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(ConfigError, match="package fleet is missing"):
        build_app(tmp_path)


def test_a_run_needs_a_server_that_runs(folder):
    result = run("run", "--dir", folder.path)
    assert result.exit_code == 1
    assert f"no server runs in {folder.path}; start it with: fleet server" in result.output


def test_a_wish_holds_every_setting_and_paths_that_the_server_finds(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    with folder.alone():
        result = run(
            *("run", "--dir", folder.path, "--name", "one", "--detach", "--data", "images"),
            *("--rounds", 3, "--set", "blocks=2", "--set", "evaluation=clients"),
        )
    assert result.exit_code == 0, result.output
    wishes = Wishes(folder.runs_path)
    wish = wishes.read("one")
    assert wish.settings["rounds"] == 3 and wish.settings["blocks"] == "2"
    assert wish.settings["evaluation"] == "clients" and wish.settings["seed"] == 0
    assert wish.settings["data"] == str(tmp_path / "images")
    assert wish.run_dir == wish.settings["run-dir"] == str(folder.runs_path / "one")
    assert wishes.app("one") == build_app()


def test_a_wish_holds_the_apps_signature_and_not_the_key(folder, tmp_path):
    key = make_key(tmp_path / "ops")
    with folder.alone():
        result = run("run", "--dir", folder.path, "--name", "one", "--detach", "--sign", key)
    assert result.exit_code == 0, result.output
    wishes = Wishes(folder.runs_path)
    signatures = wishes.read("one").signatures
    assert verified(wishes.app("one"), signatures, {fingerprint(key): public(key)})
    app = folder.runs_path / "one.fab"
    assert result.stderr == (
        f"signing the app one.fab: {app.stat().st_size} bytes, SHA-256 "
        f"{hashlib.sha256(app.read_bytes()).hexdigest()}, with key {fingerprint(key)}\n"
    )
    assert not [p for p in folder.path.rglob("*") if p.is_file() and b"OPENSSH" in p.read_bytes()]


def test_a_passphrase_is_asked_for_on_a_terminal(folder, tmp_path):
    pytest.importorskip("bcrypt")
    key = make_key(tmp_path / "ops", passphrase="secret")
    command = ["run", "--dir", folder.path, "--name", "one", "--detach", "--sign", key]
    with (
        folder.alone(),
        on_terminal(lambda: main([*map(str, command)])) as (pid, terminal),
    ):
        terminal.expect_exact("Passphrase of ")
        while termios.tcgetattr(terminal.child_fd)[3] & termios.ECHO:
            time.sleep(0.01)
        terminal.send("secret\n")
        terminal.expect(pexpect.EOF)
        assert exit_code(pid) == 0, terminal.before
    wishes = Wishes(folder.runs_path)
    trusted = {fingerprint(key): public(key)}
    assert verified(wishes.app("one"), wishes.read("one").signatures, trusted)


def test_a_passphrase_is_not_asked_for_without_a_terminal(folder, tmp_path):
    key = make_key(tmp_path / "ops", passphrase="secret")
    with folder.alone():
        result = run("run", "--dir", folder.path, "--detach", "--sign", key)
    assert result.exit_code == 1 and "there is no terminal to ask for it" in result.output
    assert not list(folder.path.glob("runs/*"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--set", "round=3"], "unknown setting round; known:"),
        (["--set", "rounds=many"], "rounds must be int, got 'many'"),
        (["--data", "no/such/images"], "data no/such/images does not exist; known forms: digits"),
        (["--weights", "no.safetensors"], "no weights file no.safetensors; name a .safetensors"),
        (["--name", "a/b"], "run name 'a/b' cannot be used"),
        (["--resume", "x"], "there is no run x; fleet run --list shows all"),
        (["--stop", "x"], "there is no run x; fleet run --list shows all"),
        (["--stop", "x", "--rounds", "3"], "--stop stands alone"),
        (["--stop", "x", "--resume", "y"], "--resume stands alone"),
        (["--sign", "no/key"], "there is no key to sign with, no/key; make one with: ssh-keygen"),
        (["--resume", "x", "--sign", "key"], "--resume stands alone"),
        (["--resume", "x", "--seed", "3"], "--resume stands alone, or with --rounds: a run that"),
        (["--resume", "x", "--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--set", "soft-temperature=hot"], "soft-temperature must be float, got 'hot' (str); it"),
        (["--soft-temperature", "200"], "soft-temperature must be a number from 0 to 150, got 200"),
        (["--blocks", "1,99"], "blocks is 99, efficientnet_lite0 has 16; choose 0 to 16"),
        (["--backbone", "mobilenet_v9"], "unknown backbone mobilenet_v9; examples"),
        (
            ["--min-clients", "3"],
            "min-clients is 3, and 2 devices are registered; add some where you began the fleet: "
            "fleet provision --add NAME, or lower it: --min-clients 2",
        ),
        (["--quorum", "3"], "quorum is 3, and 2 devices are registered"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_is_wished_for(folder, arguments, complaint):
    with folder.alone():
        result = run("run", "--dir", folder.path, *arguments)
    assert result.exit_code == 1 and complaint in result.output
    assert not list(folder.path.glob("runs/*.toml"))


def test_a_revoked_device_does_not_count(folder, tmp_path):
    Provisioner(tmp_path).revoke(["pi-01", "pi-02"])
    with folder.alone():
        result = run("run", "--dir", folder.path)
    assert result.exit_code == 1
    assert "min-clients is 2, and 0 devices are registered; add some" in result.output
    assert result.output.endswith("fleet provision --add NAME\n")


def test_without_keys_too_few_devices_are_a_warning(tmp_path, monkeypatch):
    asked = []

    class Flower:
        def __init__(self, address, authority):
            asked.append((str(address), authority))

        def nodes(self):
            return [Node(1, b"a", "online"), Node(2, b"b", "offline")]

        def close(self):
            asked.append("closed")

    monkeypatch.setattr("fleet.deploy.control.Control", Flower)
    server = ServerFolder(tmp_path / "server")
    options = ServerOptions(
        folder=server, state=server.state_path, host="127.0.0.1", port=9000, insecure=True
    )

    def wish(stop):
        start = ("run", "--dir", server.path, "--detach", "--evaluation", "clients")
        for count, warned in ((1, False), (2, True)):
            done = run(*start, "--beside", "--name", count, "--min-clients", count)
            assert done.exit_code == 0, done.output
            text = "Warning: 1 devices are online, and min-clients is 2; the run waits for more"
            assert (text in done.stderr) == warned
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module.serve(options, wish)
    assert asked == [("127.0.0.1:9000", None), "closed"] * 2


def test_with_keys_nobody_is_asked(options):
    def look(stop):
        assert options.folder.insecure_address() is None
        raise KeyboardInterrupt

    options.folder.note_serving(options.here, insecure=True)  # as it was tried before
    with pytest.raises(KeyboardInterrupt):
        module.serve(options, look)


@pytest.mark.parametrize("option", [["--list"], ["--stop", "x"]])
def test_a_folder_that_is_no_servers_is_refused(tmp_path, option):
    for folder in (tmp_path / "nowhere", tmp_path):
        result = run("run", "--dir", folder, *option)
        assert result.exit_code == 1
        assert f"{folder} is no server's folder: neither devices.toml nor runs is in it; name" in (
            result.output
        )
        assert "with --dir, or make one with: fleet provision --host" in result.output
    with alone_in(tmp_path, "fleet server", file="server.lock"):  # one without keys, and no run
        assert run("run", "--dir", tmp_path, "--list").exit_code == 0


def test_where_devices_evaluate_the_server_needs_no_images(folder):
    with folder.alone():
        result = run(
            *("run", "--dir", folder.path, "--detach", "--data", "no/such/images"),
            *("--evaluation", "clients"),
        )
    assert result.exit_code == 0, result.output


def test_runs_are_listed_and_stopped_without_a_server(folder):
    with folder.alone():
        assert run("run", "--dir", folder.path, "--name", "one", "--detach").exit_code == 0
    (listed,) = json.loads(run("run", "--dir", folder.path, "--list", "--format", "json").output)
    assert (listed["name"], listed["status"], listed["submissions"]) == ("one", "waiting", 0)
    stopped = run("run", "--dir", folder.path, "--stop", "one")
    assert "let it go on with: fleet run --resume one" in stopped.output
    assert not Wishes(folder.runs_path).read("one").wanted


@pytest.fixture
def runs(folder):
    """The wishes of a server that runs, one of them for a run `one`."""
    with folder.alone():
        start = ("run", "--dir", folder.path, "--name", "one", "--detach", "--rounds", 7)
        assert run(*start).exit_code == 0
        yield Wishes(folder.runs_path)


def test_a_second_run_is_refused_while_one_goes_on_with_the_ways_out(folder, runs):
    add_round(Path(runs.read("one").run_dir), 0)
    add_round(Path(runs.read("one").run_dir), 1)
    runs.write_standing("one", Standing(status="running"))
    refused = run("run", "--dir", folder.path, "--name", "two", "--detach")
    assert refused.exit_code == 1 and runs.names() == ["one"]
    for part in (
        "run one goes on (running, 1 of 7 rounds done)",
        "follow it with: fleet run --resume one;",
        "end it with: fleet run --stop one;",
        "at the same time with --beside",
    ):
        assert part in refused.output
    beside = run("run", "--dir", folder.path, "--name", "two", "--detach", "--beside")
    assert beside.exit_code == 0 and runs.going_on() == ["one", "two"]


@pytest.mark.parametrize("over", ["finished", "failed", "stopped", "asked to stop"])
def test_after_a_run_is_over_another_begins(folder, runs, over):
    if over == "asked to stop":
        runs.stop("one")
    else:
        runs.write_standing("one", Standing(status=over))
    assert runs.going_on() == []
    assert run("run", "--dir", folder.path, "--name", "two", "--detach").exit_code == 0
    assert runs.going_on() == ["two"]


def test_a_run_that_is_over_does_not_go_on_beside_another_unasked(folder, runs):
    runs.stop("one")
    assert run("run", "--dir", folder.path, "--name", "two", "--detach").exit_code == 0
    refused = run("run", "--dir", folder.path, "--resume", "one", "--detach")
    assert refused.exit_code == 1 and "run two goes on (waiting, 0 of 10" in refused.output
    assert not runs.read("one").wanted
    followed = run("run", "--dir", folder.path, "--resume", "two", "--detach")
    assert followed.exit_code == 0
    both = run("run", "--dir", folder.path, "--resume", "one", "--detach", "--beside")
    assert both.exit_code == 0 and runs.going_on() == ["one", "two"]


@pytest.mark.parametrize("status", ["finished", "stopped", "failed", "running"])
def test_a_run_goes_on_to_more_rounds_than_it_was_to_have(folder, runs, status):
    for number in range(8):
        add_round(Path(runs.read("one").run_dir), number)
    runs.write_standing("one", Standing(status=status))
    resume = ("run", "--dir", folder.path, "--resume", "one", "--detach")
    for rounds in (5, 7):
        refused = run(*resume, "--rounds", rounds)
        assert refused.exit_code == 1
        assert (
            f"rounds is {rounds}, and the run in {runs.read('one').run_dir} has done 7; name"
            in (refused.output)
        )
    before = runs.read("one")
    for rounds in (12, 12):  # twice is once
        assert run(*resume, "--set", f"rounds={rounds}").exit_code == 0
    assert runs.read("one") == replace(
        before, settings=before.settings | {"rounds": 12}, attempt=before.attempt + 1
    )
    fewer = run(*resume, "--rounds", 9)
    assert fewer.exit_code == 1
    assert "rounds is 9, and run one goes on to round 12; end it first: fleet run --stop one" in (
        fewer.output
    )


def test_a_finished_run_is_told_how_it_could_go_on(folder, runs):
    runs.write_standing("one", Standing(status="finished"))
    refused = run("run", "--dir", folder.path, "--resume", "one")
    assert refused.exit_code == 1
    assert "run one has finished its 7 rounds; look at it: fleet report " in refused.output
    assert "let it go on: fleet run --resume one --rounds MORE" in refused.output


@pytest.mark.parametrize("damaged", ["one.toml", "one.state.toml"])
def test_a_damaged_wish_hides_none_of_the_others_and_keeps_none_from_beginning(
    folder, runs, damaged
):
    (runs.folder / damaged).write_text("status = [")
    assert run("run", "--dir", folder.path, "--name", "two", "--detach").exit_code == 0
    listed = json.loads(run("run", "--dir", folder.path, "--list", "--format", "json").output)
    assert [(row["name"], row["status"]) for row in listed] == [
        ("one", "damaged"),
        ("two", "waiting"),
    ]
    assert f"{damaged} cannot be read" in listed[0]["reason"]
    assert "mend it, or remove it" in listed[0]["reason"]
    for option in ("--resume", "--stop"):
        refused = run("run", "--dir", folder.path, option, "one")  # though another goes on
        assert refused.exit_code == 1 and f"{damaged} cannot be read" in refused.output


@pytest.mark.parametrize(
    ("code", "tail", "reason"),
    [(1, ("INFO: x", "cannot listen on 0.0.0.0, port 80: in use"), "cannot listen"), (-9, (), "")],
)
def test_why_a_process_of_flowers_ended_is_what_it_said_last(code, tail, reason):
    verdict = last_words(Ending(code, 1.0, tail))
    assert reason in (verdict.reason if verdict else "") and bool(verdict) == bool(reason)
