import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import clients.doctor
from clients.doctor import STATES, Finding, Subject, checkup, diagnose, report
from clients.doctor.findings import verdict
from fleet.deploy.certificates import make_device_key
from fleet.errors import ConfigError

ROOT = Path(clients.__path__[0]).parent
OLDEST = (3, 9)  # Debian 11's


@pytest.fixture
def quick(monkeypatch):
    """Without importing PyTorch."""
    monkeypatch.setattr(checkup, "_probe", lambda subject: checkup.Probe(None))
    monkeypatch.setattr(checkup, "project_installed", lambda: False)


def test_every_check_says_something_on_this_machine(quick, tmp_path):
    names = []
    findings = diagnose(Subject(state=tmp_path, data=str(tmp_path)), names.append)
    assert names == [name for name, _ in checkup.CHECKS]
    assert {finding.state for finding in findings} <= set(STATES)
    assert not any("this check failed" in finding.fact for finding in findings)
    checks = [finding.check for finding in findings]
    assert len(checks) == len(set(checks))
    assert {"64-bit", "Python", "memory", "swap", "memory cgroup", "PyTorch", "power"} < set(checks)


def test_every_problem_and_warning_has_a_remedy(quick, tmp_path):
    subject = Subject(
        bundle=tmp_path / "gone.tar.gz", data=str(tmp_path), root=tmp_path, state=tmp_path
    )
    found = [f for f in diagnose(subject) if f.state in ("problem", "warning")]
    assert {"bundle", "server", "data"} <= {f.check for f in found}
    assert all(f.remedy for f in found)


def test_a_check_that_fails_itself_does_not_hide_the_others(quick, monkeypatch, tmp_path):
    def fail(subject):
        raise ZeroDivisionError("by nought")

    broken = tuple((name, fail if name == "memory" else check) for name, check in checkup.CHECKS)
    monkeypatch.setattr(checkup, "CHECKS", broken)
    findings = diagnose(Subject(state=tmp_path))
    assert Finding(
        "memory", "unknown", "this check failed: ZeroDivisionError: by nought"
    ) in findings  # fmt: skip
    assert findings[-1].check == "data"


def test_where_nothing_is_named_a_finding_says_what_to_name(quick, tmp_path):
    found = {f.check: f for f in diagnose(Subject(state=tmp_path))}
    assert "bundle" not in found
    assert found["server"].remedy == (
        "give --bundle pi-01.tar.gz, or --server HOST:PORT --ca ca.crt"
    )
    assert found["data"].remedy == "give --data DIR"


def test_the_server_is_that_of_the_bundle_with_the_authority_in_it(
    quick, authority, serve, tmp_path
):
    server = serve(authority)
    folder = tmp_path / "pi-01"
    folder.mkdir()
    (folder / "bundle.toml").write_text(f'version = 1\nname = "pi-01"\nserver = "{server}"\n')
    (folder / "ca.crt").write_text(authority.pem)
    (folder / "device.key").write_bytes(make_device_key()[0])
    (folder / "device.key").chmod(0o600)
    by_bundle = diagnose(Subject(bundle=folder, state=tmp_path))
    states = {f.check: f.state for f in by_bundle}
    expected = dict.fromkeys(("bundle", "server", "certificate", "clock"), "ok")
    assert {check: states[check] for check in expected} == expected
    by_name = diagnose(Subject(server=str(server), authority=authority.path, state=tmp_path))
    (certificate,) = (f for f in by_name if f.check == "certificate")
    assert certificate in by_bundle


def test_a_bundle_or_an_authority_that_cannot_be_read_is_a_problem_with_its_way_out(
    quick, tmp_path
):
    (tmp_path / "b.tar.gz").write_bytes(b"no archive")
    found = {f.check: f for f in diagnose(Subject(bundle=tmp_path / "b.tar.gz", state=tmp_path))}
    assert found["bundle"].state == found["server"].state == "problem"
    assert found["bundle"].remedy == "copy the bundle from the server again"
    gone = Subject(server="a:1", authority=tmp_path / "ca.crt", state=tmp_path)
    found = {f.check: f for f in diagnose(gone)}
    assert found["server"].state == "problem"
    assert found["server"].remedy == "copy ca.crt from the server"


def test_what_contradicts_itself_is_refused():
    with pytest.raises(ConfigError, match="--bundle names its own server; leave out --server"):
        Subject(bundle=Path("b"), server="a:1")
    with pytest.raises(ConfigError, match="--ca goes with --server"):
        Subject(authority=Path("ca.crt"))
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        Subject(server="a:b")


def test_the_report_counts_states_and_one_problem_is_not_ready():
    findings = [Finding("a", "ok", "x"), Finding("b", "warning", "y", "do"), Finding("c", "ok", "")]
    assert report(findings)["counts"] == {"ok": 2, "warning": 1, "problem": 0, "unknown": 0}
    assert report(findings)["ready"] is True
    assert verdict(findings) == "Nothing blocks; 1 warning."
    findings += [Finding("d", "problem", "z", "do"), Finding("d", "problem", "z", "do")]
    assert report(findings)["ready"] is False
    assert verdict(findings) == "Not ready: d; 1 warning."
    assert verdict([]) == "Nothing blocks."


def test_it_runs_from_one_archive_without_a_single_package(tmp_path):
    """As from the wheel on a new device: `PYTHONPATH=….whl python3 -m clients.doctor`."""
    with zipfile.ZipFile(tmp_path / "project.whl", "w") as archive:
        for module in [*ROOT.glob("clients/**/*.py"), *ROOT.glob("fleet/**/*.py")]:
            archive.write(module, module.relative_to(ROOT))
    done = subprocess.run(
        [sys.executable, "-S", "-m", "clients.doctor", "--format", "json"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "project.whl")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {f["check"]: f for f in json.loads(done.stdout)["findings"]}
    assert found["PyTorch"]["fact"] == "not installed yet"
    assert "disk, packages" in found
    assert done.returncode == int(any(f["state"] == "problem" for f in found.values()))


@pytest.mark.parametrize(
    "module",
    [
        *(ROOT / "clients/doctor").glob("*.py"),
        *(ROOT / name for name in ("clients/__init__.py", "fleet/__init__.py", "fleet/errors.py")),
    ],
    ids=lambda path: path.name,
)
def test_an_older_python_can_read_it_to_be_told_that_it_is_too_old(module):
    tree = ast.parse(module.read_text(), feature_version=OLDEST)
    if module.parent.name == "doctor" and module.name != "__init__.py":
        names = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert "__future__" in names  # else `str | None` fails as it is defined


def test_it_imports_nothing_but_the_standard_library_and_itself():
    code = (
        "import sys; before = set(sys.modules); import clients.doctor\n"
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    top = {name.split(".")[0] for name in done.stdout.split()}
    assert top - sys.stdlib_module_names == {"clients", "fleet"}
