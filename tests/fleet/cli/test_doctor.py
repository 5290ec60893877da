import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from clients.doctor import Finding, checkup
from fleet.cli import main


@pytest.fixture
def finds(monkeypatch):
    """Sets what the doctor finds."""

    def put(*findings):
        monkeypatch.setattr(checkup, "CHECKS", (("all", lambda subject: list(findings)),))

    return put


def doctor(*arguments):
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


FINDINGS = (
    Finding("Python", "ok", "3.11.2 in /usr"),
    Finding("swap", "warning", "none [yet]", "make some"),
    Finding("data", "unknown", "not looked at", "give --data DIR"),
)


def test_text_has_a_line_each_with_state_fact_and_remedy(finds):
    finds(*FINDINGS)
    result = doctor()
    assert result.exit_code == 0
    for finding in FINDINGS:
        (line,) = (ln for ln in result.stdout.splitlines() if f" {finding.check} " in ln)
        assert line.startswith(finding.state)
        assert finding.fact in line
        assert finding.remedy in line
    assert result.stdout.endswith("\nNothing blocks; 1 warning.\n")


def test_a_problem_ends_with_1_in_both_formats(finds):
    finds(*FINDINGS, Finding("memory", "problem", "too little", "more"))
    assert doctor().exit_code == 1
    assert "Not ready: memory; 1 warning." in doctor().stdout
    result = doctor("--format", "json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["ready"] is False
    assert told["counts"] == {"ok": 1, "warning": 1, "problem": 1, "unknown": 1}
    assert told["findings"][1] == {
        "check": "swap",
        "state": "warning",
        "fact": "none [yet]",
        "remedy": "make some",
    }


def test_options_reach_the_checks(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(checkup, "CHECKS", (("all", lambda subject: seen.append(subject) or []),))
    result = doctor(
        *("--server", "a:1", "--ca", tmp_path / "ca.crt", "--data", tmp_path / "images"),
        *("--state", tmp_path / "state", "--cache", tmp_path / "cache"),
    )
    assert result.exit_code == 0, result.output
    assert seen == [
        checkup.Subject(
            server="a:1",
            authority=tmp_path / "ca.crt",
            data=str(tmp_path / "images"),
            state=tmp_path / "state",
            cache=tmp_path / "cache",
        )
    ]


def test_contradictions_are_told_in_a_line(tmp_path):
    result = doctor("--bundle", tmp_path / "b.tar.gz", "--server", "a:1")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: --bundle names its own server; leave out --server, or --bundle\n"
    )


def test_the_command_itself_imports_neither_pytorch_nor_flower():
    code = (
        "import sys; from click.testing import CliRunner; from fleet.cli import main\n"
        "import clients.doctor\n"
        "assert CliRunner().invoke(main, ['doctor', '--help']).exit_code == 0\n"
        "print(*({'torch', 'torchvision', 'timm', 'flwr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_it_works_where_importing_pytorch_crashes(tmp_path):
    """A build with instructions that the processor lacks: the whole command, on this machine."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    done = subprocess.run(
        [sys.executable, "-m", "fleet.cli", "doctor", "--format", "json", "--state", tmp_path],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    told = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1, done.stderr
    assert told["PyTorch"]["state"] == "problem"
    assert "SIGILL" in told["PyTorch"]["fact"]
    assert "constraints-pi.txt" in told["PyTorch"]["remedy"]


def environment(folder):
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
