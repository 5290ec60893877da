import logging

import pytest
from flwr.common.logger import log

from fleet.errors import ConfigError
from strategies import run_log
from strategies.run_log import logged_beside


def test_what_flower_and_we_log_is_in_the_file_and_nothing_of_after(tmp_path):
    with logged_beside(tmp_path / "run"):
        log(logging.INFO, "round %d", 3)
        logging.getLogger("strategies.resume").warning("no room")
    log(logging.INFO, "later")
    lines = (tmp_path / "run" / "server.log").read_text().splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["INFO    round 3", "WARNING no room"]


def test_the_file_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "FILE_BYTES", 1000)
    with logged_beside(tmp_path):
        for number in range(500):
            log(logging.INFO, "round %d", number)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"server.log", "server.log.1"}
    assert max(sizes.values()) <= 1000
    assert "round 499" in (tmp_path / "server.log").read_text()


def test_a_run_that_goes_on_adds_to_it(tmp_path):
    for word in ("first", "second"):
        with logged_beside(tmp_path):
            log(logging.INFO, word)
    assert len((tmp_path / "server.log").read_text().splitlines()) == 2


@pytest.mark.parametrize(("error", "told"), [(ValueError("odd"), True), (ConfigError("x"), False)])
def test_an_error_that_nobody_foresaw_is_there_with_its_place(tmp_path, error, told):
    with pytest.raises(type(error)), logged_beside(tmp_path):
        raise error
    content = (tmp_path / "server.log").read_text()
    assert ("ERROR   the run ends\nTraceback" in content) is told
    assert ("ValueError: odd" in content) is told


def test_a_file_that_cannot_be_written_costs_the_copy_alone(tmp_path, caplog):
    (tmp_path / "server.log").mkdir()  # permissions would not stop root
    with logged_beside(tmp_path):
        log(logging.INFO, "on it goes")
    assert f"cannot write {tmp_path / 'server.log'}: Is a directory" in caplog.text
