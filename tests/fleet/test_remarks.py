import pytest

from fleet.remarks import Remarks, read_remarks


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_what_is_said_is_read_until_the_same_one_says_something_else(folder):
    remarks = Remarks(folder)
    remarks.say("devices", ["waiting for clients: 1 of 2"])
    remarks.say("pause", ["waiting 5 s, because …"])
    assert read_remarks(folder) == ("waiting for clients: 1 of 2", "waiting 5 s, because …")
    remarks.say("devices", [])
    assert read_remarks(folder) == ("waiting 5 s, because …",)


def test_nothing_is_written_while_there_is_nothing_new(folder):
    remarks = Remarks(folder)
    remarks.say("devices", [])
    assert not folder.exists()
    remarks.say("devices", ["one"])
    (written,) = folder.iterdir()
    before = written.stat().st_ino
    remarks.say("devices", ["one"])
    assert written.stat().st_ino == before


def test_what_an_earlier_process_said_is_gone_and_so_is_this_ones_at_the_end(folder):
    Remarks(folder).say("devices", ["of a process that was killed"])
    remarks = Remarks(folder)
    with remarks.while_it_runs():
        assert read_remarks(folder) == ()
        remarks.say("devices", ["waiting"])
        assert read_remarks(folder) == ("waiting",)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "{}", "3"])
def test_what_cannot_be_read_says_nothing(folder, content):
    folder.mkdir()
    Remarks(folder).say("devices", ["one"])
    (written,) = folder.iterdir()
    written.write_text(content)
    assert read_remarks(folder) == ()


def test_a_folder_that_cannot_be_written_costs_the_remark_alone(tmp_path, caplog):
    (tmp_path / "run").touch()
    Remarks(tmp_path / "run").say("devices", ["one"])
    assert "cannot write" in caplog.text and "remarks.json" in caplog.text


def test_a_run_that_nobody_follows_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remarks = Remarks(None)
    with remarks.while_it_runs():
        remarks.say("devices", ["one"])
    assert list(tmp_path.iterdir()) == []
