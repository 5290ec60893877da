import pytest

from fleet.cli import follow as following
from fleet.cli import run as run_command
from fleet.cli.follow import Telling, _standings
from fleet.deploy.wishes import FINISHED, RUNNING, WAITING, Standing, Wish, Wishes
from fleet.records import RoundReport, RunRecord
from fleet.remarks import Remarks


@pytest.fixture
def shown():
    return []


@pytest.fixture
def wishes(tmp_path):
    found = Wishes(tmp_path / "runs")
    wish = Wish(run_dir=str(tmp_path / "runs" / "first"), settings={"rounds": 3})
    found.make("first", wish, b"app")
    return found


def report(number, **refused):
    refused = {name.replace("_", "-"): reason for name, reason in refused.items()}
    return RoundReport(server_round=number, accuracy=None, loss=None, refused=refused)


def test_who_was_refused_is_told_by_name_and_once_for_a_kind_of_reason(shown):
    tell = Telling(shown.append)
    tell.refused(report(1, pi_01="Traceback\n …\nits battery is at 19 %", pi_02="no reply"))
    tell.refused(report(2, pi_01="its battery is at 18 %"))
    tell.refused(report(3, pi_01="its disk is full", pi_02="no reply"))
    assert shown == [
        "  round 1: pi-01: its battery is at 19 %",
        "  round 1: pi-02: no reply",
        "  round 3: pi-01: its disk is full",
        "  round 3: pi-02: no reply",
    ]


def test_of_many_refused_ten_are_told(shown):
    Telling(shown.append).refused(report(1, **{f"pi_{i:02}": "no reply" for i in range(30)}))
    assert len(shown) == 11 and shown[-1] == "  and 20 more, see the record"


def test_a_remark_is_told_as_it_comes_and_again_once_it_was_gone(shown):
    tell = Telling(shown.append)
    for lines in (("a",), ("a", "b"), (), ("a",)):
        tell.remarks(lines)
    assert shown == ["the run: a", "the run: b", "the run: a"]


def test_who_follows_sees_what_a_run_waits_for_before_there_is_any_record(
    wishes, tmp_path, shown, monkeypatch
):
    remarks = Remarks(tmp_path / "runs" / "first")
    course = iter(
        [
            lambda: wishes.write_standing("first", Standing(status=RUNNING)),
            lambda: remarks.say("devices", ["refused: pi-02: no images"]),
            lambda: remarks.say("devices", []),
            lambda: wishes.write_standing("first", Standing(status=WAITING, reason="no room")),
            lambda: wishes.write_standing("first", Standing(status=FINISHED)),
        ]
    )
    monkeypatch.setattr(following.time, "sleep", lambda seconds: next(course)())
    record = RunRecord(tmp_path / "runs" / "first")
    told = Telling(shown.append)
    statuses = [s.status for s in _standings(wishes, "first", record, shown.append, told)]
    assert statuses[-1] == FINISHED
    assert shown == ["the run: refused: pi-02: no images", "the run: no room"]


def test_the_list_of_runs_says_what_one_that_goes_on_waits_for(wishes, tmp_path, capsys):
    wishes.write_standing("first", Standing(status=RUNNING))
    remarks = Remarks(tmp_path / "runs" / "first")
    remarks.say("devices", ["waiting for clients: 1 of 2", "refused: pi-02: no images"])
    run_command._show_list(wishes, "json")
    told = '"reason": "waiting for clients: 1 of 2; refused: pi-02: no images"'
    assert told in capsys.readouterr().out
    wishes.write_standing("first", Standing(status=FINISHED))
    run_command._show_list(wishes, "json")
    assert '"reason": ""' in capsys.readouterr().out
