import subprocess
import sys

from simulations.flower_env import checkout_environment, install


def test_two_checkouts_share_neither_home_nor_port(tmp_path):
    one, two = checkout_environment(tmp_path / "one"), checkout_environment(tmp_path / "two")
    for key in (
        "FLWR_HOME",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT",
        "FLWR_LOCAL_CONTROL_API_PORT",
    ):
        assert one[key] != two[key]


def test_python_starts_with_the_settings_and_keeps_those_already_set(tmp_path):
    path = install(tmp_path, tmp_path)
    code = (
        f"import os, site; site.addsitedir({str(tmp_path)!r}); "
        "print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['FLWR_HOME'])"
    )
    printed = subprocess.run(
        [sys.executable, "-I", "-c", code],
        env={"FLWR_HOME": "mine"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split() == ["0", "mine"]
    assert path.parent == tmp_path
