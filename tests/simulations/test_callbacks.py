import warnings

import pytest
from click.testing import CliRunner

from fleet.cli import main
from fleet.errors import FleetError
from simulations import Callback, simulate
from simulations.callbacks import Callbacks
from tests.runs import SMALL

pytestmark = pytest.mark.usefixtures("quick_runs")

EVENTS = ("on_run_start", "on_reply", "on_round_end", "on_run_end", "on_run_error")


class Heard(Callback):
    """Writes down what it hears; fails where it is told to."""

    def __init__(self, fails_in=()):
        self.events = []
        self._fails_in = fails_in

    def _hear(self, event, *arguments):
        self.events.append((event, *arguments))
        if event in self._fails_in:
            raise ConnectionError(f"no server in {event}")

    @property
    def names(self):
        return [event for event, *_ in self.events if event != "on_reply"]


for _event in EVENTS:
    setattr(Heard, _event, lambda self, *arguments, _e=_event: self._hear(_e, *arguments))


def test_a_callback_hears_of_the_whole_run(tmp_path):
    heard = Heard()
    record = simulate(SMALL | {"run-dir": str(tmp_path / "run")}, callbacks=[heard])
    assert heard.names == ["on_run_start", *["on_round_end"] * 3, "on_run_end"]
    by_name = {event: arguments for event, *arguments in heard.events}
    started, settings = by_name["on_run_start"]
    assert started.path == record.path
    assert settings["rounds"] == 2 and settings["run-dir"] == str(record.path)
    reports = [arguments[0] for event, *arguments in heard.events if event == "on_round_end"]
    assert reports == list(record.rounds())
    assert by_name["on_run_end"] == [record.summary()]
    assert ("on_reply", 2, 2) in heard.events


def test_callbacks_that_fail_are_told_of_once_and_the_run_is_the_same(tmp_path):
    calm = simulate(SMALL | {"run-dir": str(tmp_path / "calm")})
    broken, late, well = Heard(EVENTS), Heard(["on_round_end"]), Heard()
    with pytest.warns(RuntimeWarning) as caught:
        record = simulate(
            SMALL | {"run-dir": str(tmp_path / "run")}, callbacks=[broken, late, well]
        )
    texts = [str(w.message) for w in caught if "callback" in str(w.message)]
    assert texts == [
        "callback Heard failed in on_run_start (ConnectionError: no server in on_run_start); "
        "the run goes on without it",
        "callback Heard failed in on_round_end (ConnectionError: no server in on_round_end); "
        "the run goes on without it",
    ]
    # Those that failed hear of the end, so as to close what they have opened.
    assert broken.names == ["on_run_start", "on_run_end"]
    assert late.names == ["on_run_start", "on_round_end", "on_run_end"]
    assert well.names == ["on_run_start", *["on_round_end"] * 3, "on_run_end"]
    assert record.summary()["accuracy"] == calm.summary()["accuracy"]


def test_a_callback_hears_why_a_run_failed(tmp_path):
    heard = Heard()
    settings = SMALL | {"backbone": "mobilenet_v9", "run-dir": str(tmp_path / "run")}
    with pytest.raises(FleetError) as caught:
        simulate(settings, callbacks=[heard])
    assert heard.names == ["on_run_start", "on_run_error"]
    assert heard.events[-1] == ("on_run_error", caught.value)


def test_a_callback_hears_of_every_round_on_record_and_of_the_interrupt(tmp_path):
    heard = Heard()

    def stop(answered, asked):
        if heard.names.count("on_round_end") == 2:
            raise KeyboardInterrupt

    settings = SMALL | {"rounds": 50, "run-dir": str(tmp_path / "run")}
    with pytest.raises(KeyboardInterrupt):
        simulate(settings, on_reply=stop, callbacks=[heard])
    rounds = len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines())
    assert heard.names == ["on_run_start", *["on_round_end"] * rounds, "on_run_error"]
    assert isinstance(heard.events[-1][1], KeyboardInterrupt)
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_an_interrupt_in_a_callback_ends_the_run():
    class Impatient(Callback):
        def on_round_end(self, report):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Callbacks([Impatient()]).on_round_end(None)


def test_a_callback_that_hears_nothing_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback = Callback()
        callback.on_run_start(None, {})
        callback.on_reply(1, 2)
        callback.on_round_end(None)
        callback.on_run_end({})
        callback.on_run_error(ValueError())


def test_a_tracker_that_there_is_not_is_refused_before_the_run(tmp_path):
    arguments = ["simulate", "--log-to", "comet", "--run-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "unknown tracker 'comet'; known: tensorboard[:FOLDER], mlflow[:EXP" in result.output
    assert not (tmp_path / "run").exists()
