import re
from pathlib import Path

import pytest

from clients.memory import state_directory
from fleet.data import check_source, load_data, load_device_data
from fleet.device_files import image_folder
from fleet.errors import ConfigError
from fleet.formats import export
from fleet.paths import expanded
from fleet.trained import trained_model
from fleet.weights import check_weights_file, read_weights

NOBODY = "~nobody-of-that-name/x"


def test_a_home_stands_where_its_sign_was(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert expanded("~/images", "data") == Path("/home/ada/images")
    assert expanded(Path("here/~/images"), "data") == Path("here/~/images")


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda path: expanded(path, "--to"), "--to"),
        (check_source, "data"),
        (lambda path: load_data(path, "train"), "data"),
        (load_device_data, "data"),
        (image_folder, "--data"),
        (lambda path: check_weights_file(Path(path)), "weights"),
        (lambda path: read_weights(Path(path)), "weights"),
        (trained_model, "model"),
        (lambda path: export("run", path), "file"),
        (state_directory, "state-dir"),
    ],
)
def test_a_home_of_nobody_is_refused_by_what_names_it(use, what):
    text = (
        f"{what} {NOBODY} begins with a home, and there is no user nobody-of-that-name; write the "
        f"whole path, or ./{NOBODY} for one of that name here"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        use(NOBODY)


def test_a_user_without_a_home_is_told(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ConfigError, match="data ~/x begins with a home, and this user has no home"):
        expanded("~/x", "data")
