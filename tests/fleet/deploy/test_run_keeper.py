import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fleet.config import default_settings
from fleet.deploy.control import ControlError, FlowerRun, Node
from fleet.deploy.run_keeper import MOST_FRUITLESS, RunKeeper
from fleet.deploy.wishes import Wish, Wishes
from fleet.errors import ConfigError
from fleet.records import RoundReport, RunRecord, to_json


class FakeFlower:
    """Runs that are told how they fare, as Flower's Control API would show them."""

    def __init__(self):
        self.runs = {}
        self.submitted = []
        self.signatures = []
        self.refusal = None
        self.away = False
        self.online = 2

    def nodes(self):
        self._answer()
        absent = Node(9, b"absent", "offline")
        return [Node(i, b"%d" % i, "online") for i in range(self.online)] + [absent]

    def start_run(self, app, settings, signatures):
        self._answer()
        if self.refusal:
            raise ControlError(self.refusal, refused=True)
        self.submitted.append((app, settings))
        self.signatures.append(signatures)
        number = 2**63 + len(self.submitted)  # Flower's numbers have 64 bits
        self.runs[number] = FlowerRun("running", "", "")
        return number

    def run(self, run_id):
        self._answer()
        return self.runs.get(run_id)

    def unfinished(self, run_dir):
        self._answer()
        for number, (_, settings) in enumerate(self.submitted, start=2**63 + 1):
            run = self.runs.get(number)
            if settings["run-dir"] == run_dir and run and run.status != "finished":
                return number
        return None

    def stop_run(self, run_id):
        self._answer()
        self.runs[run_id] = FlowerRun("finished", "stopped", "")

    def end(self, outcome, details=""):
        """The run that was submitted last."""
        self.runs[2**63 + len(self.submitted)] = FlowerRun("finished", outcome, details)

    def _answer(self):
        if self.away:
            raise ControlError("the SuperLink did not answer", refused=False)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def flower():
    return FakeFlower()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def wishes(tmp_path):
    wishes = Wishes(tmp_path / "runs")
    settings = default_settings() | {"rounds": 4}
    wishes.make("first", Wish(run_dir=str(tmp_path / "record"), settings=settings), b"app")
    return wishes


@pytest.fixture
def attend(wishes, flower, clock):
    """One look of the keeper, long after the last; where the wish stands then."""
    keeper = RunKeeper(wishes, clock)

    def look():
        clock.now += 1000.0
        keeper.attend(flower)
        return wishes.standing("first")

    return look


def add_round(wishes, number):
    folder = Path(wishes.read("first").run_dir)
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").touch()
    with (folder / "rounds.jsonl").open("a") as file:
        report = RoundReport(server_round=number, accuracy=0.5, loss=1.0)
        file.write(to_json(asdict(report)) + "\n")


def finish(wishes, rounds=4):
    """As a run to so many rounds ends."""
    folder = Path(wishes.read("first").run_dir)
    for number in range(RunRecord(folder).last_round + 1, rounds + 1):
        add_round(wishes, number)
    (folder / "summary.json").write_text(json.dumps({}))


def test_a_wish_is_submitted_once_with_its_settings_and_app(wishes, flower, attend):
    assert attend().status == attend().status == "running"
    ((app, settings),) = flower.submitted
    assert app == b"app" and settings["rounds"] == 4
    assert settings["run-dir"] == wishes.read("first").run_dir
    assert not settings.get("resume", False)


def test_every_submission_has_the_signatures_of_the_wish(tmp_path, wishes, flower, attend):
    signed = replace(wishes.read("first"), signatures={"SHA256:a+/": '{"signed_at": 1}'})
    wishes.write("first", signed)
    attend()
    flower.end("failed", "the SuperLink was away")
    attend()
    assert attend().submissions == 2
    assert flower.signatures == [{"SHA256:a+/": '{"signed_at": 1}'}] * 2


def test_a_run_that_ends_well_is_finished(wishes, flower, attend):
    attend()
    finish(wishes)
    flower.end("completed")
    assert attend().status == attend().status == "finished"
    assert len(flower.submitted) == 1


def test_a_run_that_flower_lost_goes_on_from_its_checkpoint(wishes, flower, attend):
    attend()
    add_round(wishes, 0)
    flower.end("failed", "the SuperLink was away")
    lost = attend()
    assert lost.status == "waiting"
    assert lost.reason == "it was lost (the SuperLink was away) and goes on from its checkpoint"
    assert attend().status == "running"
    (_, first), (app, second) = flower.submitted
    assert second["resume"] is True and app == b"app"
    assert {**second, "resume": None} == {**first, "resume": None}
    finish(wishes)
    flower.end("completed")
    assert attend().status == "finished"


def test_a_run_that_a_lost_database_forgot_goes_on(flower, attend):
    attend()
    flower.runs.clear()
    assert "does not know it any more" in attend().reason
    assert attend().status == "running"


def test_a_run_whose_standing_was_removed_goes_on(wishes, flower, attend):
    attend()
    add_round(wishes, 0)
    flower.end("failed")
    (wishes.folder / "first.state.toml").unlink()
    standing = attend()
    assert (standing.status, standing.submissions) == ("running", 1)
    assert [settings["resume"] for _, settings in flower.submitted] == [False, True]


def test_a_run_that_is_complete_without_a_summary_has_not_ended_well(flower, attend):
    attend()
    flower.end("completed")
    lost = attend()
    assert (lost.status, lost.fruitless) == ("waiting", 1)
    assert "complete, and it has no summary" in lost.reason


def test_a_run_that_never_gets_anywhere_is_given_up_with_the_reason(flower, attend):
    for _ in range(MOST_FRUITLESS):
        assert attend().status == "running"
        flower.end("failed", "no such backbone")
        standing = attend()
    assert standing.status == attend().status == "failed"
    assert len(flower.submitted) == MOST_FRUITLESS == 3
    assert standing.reason == (
        "given up: it was lost 3 times in a row without a new round; the last time: "
        "no such backbone"
    )


FAULT = "ServerApp failed with exception: the run cannot begin: unknown model x\n"


def test_a_run_that_cannot_begin_fails_at_once_and_can_be_asked_to_go_on(wishes, flower, attend):
    attend()
    flower.end("failed", FAULT)
    standing = attend()
    assert standing.status == attend().status == "failed"
    assert standing.reason == "the run cannot begin: unknown model x"
    assert len(flower.submitted) == 1
    wishes.resume("first")
    assert attend().status == "running"


def test_one_that_has_begun_is_tried_again_whatever_it_says(wishes, flower, attend):
    attend()
    add_round(wishes, 0)
    flower.end("failed", FAULT)
    assert attend().status == "waiting" and attend().status == "running"


def test_a_run_that_gets_on_is_never_given_up(wishes, flower, attend):
    for number in range(10):
        assert attend().status == "running"
        add_round(wishes, number)
        flower.end("failed", "power cut")
        assert attend().status == "waiting"
    assert len(flower.submitted) == 10


def test_for_want_of_devices_it_waits_and_is_never_given_up(wishes, flower, attend):
    flower.online = 1
    assert attend().status == attend().status == "waiting" and not flower.submitted
    assert attend().reason == "it waits for devices: 1 online, min-clients is 2"
    for _ in range(2 * MOST_FRUITLESS):
        flower.online = 2
        assert attend().status == "running"
        flower.online = 0
        flower.end("failed", "too few clients came: 0 online after 600 s")
        assert (attend().status, attend().fruitless) == ("waiting", 0)
    flower.online = 2
    standing = attend()
    assert (standing.status, standing.reason) == ("running", "")


def test_devices_that_were_gone_for_a_while_do_not_count_against_it(flower, attend):
    for _ in range(2 * MOST_FRUITLESS):
        assert attend().status == "running"
        flower.end("failed", "ServerApp failed: too few clients came: 1 online after 600 s")
        assert (attend().status, attend().fruitless) == ("waiting", 0)


def test_for_want_of_room_it_waits_and_is_never_given_up(wishes, flower, attend, monkeypatch):
    full = "the disk of the record is full"
    monkeypatch.setattr("fleet.deploy.run_keeper.want_of_room", lambda folder: full)
    assert attend().status == attend().status == "waiting" and not flower.submitted
    assert attend().reason == f"it waits for room: {full}"
    for _ in range(2 * MOST_FRUITLESS):
        monkeypatch.setattr("fleet.deploy.run_keeper.want_of_room", lambda folder: "")
        assert attend().status == "running"
        monkeypatch.setattr("fleet.deploy.run_keeper.want_of_room", lambda folder: full)
        flower.end("failed", "No space left on device")
        assert (attend().status, attend().fruitless) == ("waiting", 0)


def test_two_losses_with_a_round_between_do_not_add_up(wishes, flower, attend):
    fruitless = []
    for number in range(6):
        attend()
        if number == 2:
            add_round(wishes, 0)
        flower.end("failed")
        fruitless.append(attend().fruitless)
    assert fruitless == [1, 2, 0, 1, 2, 3]


def test_pauses_before_it_is_submitted_again_grow(wishes, flower, clock):
    keeper = RunKeeper(wishes, clock)
    waited = []
    for _ in range(2):
        while wishes.standing("first").status != "running":
            clock.now += 1.0
            keeper.attend(flower)
        flower.end("failed")
        keeper.attend(flower)
        began = clock.now
        while wishes.standing("first").status != "running":
            clock.now += 1.0
            keeper.attend(flower)
        waited.append(clock.now - began)
    assert waited == [10.0, 20.0]


def test_what_flower_refuses_is_not_tried_again(flower, attend):
    flower.refusal = "[code 15] Invalid run configuration."
    standing = attend()
    assert standing.status == attend().status == "failed"
    assert standing.reason == flower.refusal


def test_a_superlink_that_is_away_changes_nothing(wishes, flower, attend):
    attend()
    before = wishes.standing("first")
    flower.away = True
    with pytest.raises(ControlError):
        attend()
    assert wishes.standing("first") == before
    flower.away = False
    assert attend() == before


def test_a_server_killed_right_after_it_had_submitted_does_not_submit_again(
    wishes, flower, clock, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(wishes, "write_standing", lambda *_: None)  # the power went
        RunKeeper(wishes, clock).attend(flower)
    assert len(flower.submitted) == 1 and wishes.standing("first").status == "waiting"
    RunKeeper(wishes, clock).attend(flower)
    assert len(flower.submitted) == 1
    assert wishes.standing("first").flower_run == next(iter(flower.runs))


def test_a_run_that_is_wanted_no_more_is_stopped(wishes, flower, attend):
    attend()
    wishes.stop("first")
    assert attend().status == "stopped"
    assert [run.outcome for run in flower.runs.values()] == ["stopped"]
    with pytest.raises(ConfigError, match="run first is over already: it has stopped"):
        wishes.stop("first")


def test_a_run_that_was_stopped_through_flower_stays_stopped(flower, attend):
    attend()
    flower.end("stopped")
    assert attend().status == attend().status == "stopped"


@pytest.mark.parametrize("how", ["stopped", "failed"])
def test_a_run_that_is_over_goes_on_when_asked_to(wishes, flower, attend, how):
    attend()
    if how == "stopped":
        wishes.stop("first")
        attend()
    else:
        for _ in range(MOST_FRUITLESS):
            attend()
            flower.end("failed")
            attend()
    assert wishes.standing("first").status == how
    wishes.resume("first")
    standing = attend()
    assert (standing.status, standing.fruitless) == ("running", 0)
    assert flower.submitted[-1][1]["resume"] is True


def test_one_that_has_finished_does_not_go_on(wishes, flower, attend):
    attend()
    finish(wishes)
    flower.end("completed")
    attend()
    with pytest.raises(ConfigError, match="run first has finished its 4 rounds; look at it"):
        wishes.resume("first")


@pytest.mark.parametrize("asked", ["while it goes on", "once it has ended", "once it has finished"])
def test_a_run_that_is_to_have_more_rounds_goes_on_after_its_end(wishes, flower, attend, asked):
    before = attend()
    if asked == "while it goes on":
        wishes.resume("first", 6)
        assert attend() == replace(before, attempt=2)
        assert len(flower.submitted) == 1
    finish(wishes)
    flower.end("completed")
    if asked == "once it has finished":
        assert attend().status == "finished"
    if asked != "while it goes on":
        wishes.resume("first", 6)
    standing = attend()
    if standing.status == "waiting":
        assert standing.reason == "it goes on to round 6"
        standing = attend()
    assert (standing.status, standing.fruitless) == ("running", 0)
    (_, first), (app, second) = flower.submitted
    assert second == first | {"rounds": 6, "resume": True} and app == b"app"
    assert attend().status == "running"  # though a summary of the rounds before is there
    finish(wishes, rounds=6)
    flower.end("completed")
    assert attend().status == attend().status == "finished"
    assert len(flower.submitted) == 2


def test_one_that_never_gets_to_its_further_rounds_is_given_up(wishes, flower, attend):
    attend()
    finish(wishes)
    flower.end("completed")
    attend()
    wishes.resume("first", 6)
    for _ in range(MOST_FRUITLESS):
        assert attend().status == "running"
        flower.end("failed", "no more")  # before it has removed its summary
        standing = attend()
    assert standing.status == "failed" and standing.reason.endswith("the last time: no more")


def test_asking_a_run_that_goes_on_to_go_on_changes_nothing(wishes, flower, attend):
    before = attend()
    wishes.resume("first")
    assert attend() == before and len(flower.submitted) == 1


def test_a_wish_that_cannot_be_read_does_not_hold_up_the_others(wishes, flower, attend, caplog):
    (wishes.folder / "broken.toml").write_text("x")
    assert attend().status == attend().status == "running"
    assert caplog.text.count("run broken is left as it is") == 1


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "-x", "a.b", "x" * 64])
def test_a_name_that_is_no_files_is_refused(wishes, name):
    with pytest.raises(ConfigError, match=r"run name .* cannot be used"):
        wishes.make(name, wishes.read("first"), b"")


def test_a_name_is_used_once(wishes):
    with pytest.raises(ConfigError, match="there is a run first already; take another name"):
        wishes.make("first", wishes.read("first"), b"")


def test_one_that_nobody_wished_for_is_named(wishes):
    with pytest.raises(ConfigError, match="there is no run second; fleet run --list shows all"):
        wishes.read("second")
