import dataclasses
import errno
import gc
import json
import math
import re
import time
import tomllib

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from fleet.errors import ConfigError
from fleet.records import (
    ClientReport,
    RoundReport,
    RunRecord,
    recorded_beside,
    summarise,
    to_json,
)

FILES = ("config.toml", "rounds.jsonl", "summary.json", "model.safetensors", "report.html")


def client(**changes):
    values = {"name": "pi-01", "blocks": 3, "num_examples": 5, "loss": 0.5, "peak_bytes": 7}
    return ClientReport(**values | {"seconds": 1.0} | changes)


def report(server_round=1, **changes):
    return RoundReport(**{"server_round": server_round, "accuracy": 0.5, "loss": 1.0} | changes)


def strict(text):
    """Parse JSON as RFC 8259 has it, without Python's NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def record(tmp_path):
    return RunRecord.create(str(tmp_path / "run"), {})


# Folders


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [RunRecord.reserve, lambda run_dir: RunRecord.create(run_dir, {})])
def test_a_folder_with_any_file_of_a_run_is_refused_and_left_alone(tmp_path, name, make):
    (tmp_path / name).write_text("theirs")
    text = f"run directory {tmp_path} holds a run already; name another with run-dir, or remove it"
    with pytest.raises(ConfigError, match=re.escape(text)):
        make(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "theirs"


def test_a_folder_with_other_files_is_taken(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert RunRecord.create(str(tmp_path), {}).config_path.is_file()


def test_of_two_runs_that_reserved_one_folder_one_is_refused(tmp_path, monkeypatch):
    first = RunRecord.create(str(tmp_path / "run"), {"seed": 1})
    content = first.config_path.read_bytes()
    # The second looked before the first wrote.
    monkeypatch.setattr(RunRecord, "reserve", lambda run_dir: RunRecord(first.path))
    with pytest.raises(ConfigError, match="holds a run already; name another with run-dir"):
        RunRecord.create(str(first.path), {"seed": 2})
    assert first.config_path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x" * 300, "File name too long"),
        ("a-file", "Not a directory"),
        ("null\0byte", "null byte"),
    ],
)
@pytest.mark.parametrize("make", [RunRecord.reserve, lambda run_dir: RunRecord.create(run_dir, {})])
def test_a_name_that_cannot_be_a_folder_is_refused(tmp_path, name, text, make):
    (tmp_path / "a-file").touch()
    with pytest.raises(ConfigError, match=f"cannot write run directory .*{text}") as caught:
        make(str(tmp_path / name))
    assert str(caught.value).endswith("; name another with run-dir")


def test_a_long_name_in_a_folder_that_is_not_there_yet_is_refused_on_creation(tmp_path):
    with pytest.raises(ConfigError, match="File name too long; name another with run-dir"):
        RunRecord.create(str(tmp_path / "runs" / ("x" * 300)), {})


def test_a_run_without_a_name_is_called_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = RunRecord.reserve("").path
    assert path.parent == tmp_path / "runs"
    assert path.name.startswith(time.strftime("%Y"))
    assert not path.parent.exists()


# Rounds


def test_rounds_come_back_as_they_went(record):
    written = [
        report(0, accuracy=None, loss=None),
        report(1, clients=(client(metrics={"celsius": 51.5}),), refused={"pi-02": "a\nb"}),
        report(2, coverage={"head.weight": 2}, bytes_up=3, seconds=0.25),
    ]
    for one in written:
        record.add_round(one)
    assert list(record.rounds()) == written


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_every_file(record, value):
    loss = client(loss=value, metrics={"celsius": value})
    record.add_round(report(loss=value, train_loss=value, clients=(loss,)))
    record.write_summary({"loss": value, "rounds": 1})
    line = strict(record.rounds_path.read_text())
    assert (line["loss"], line["train_loss"], line["accuracy"]) == (None, None, 0.5)
    assert line["clients"][0]["loss"] is None
    assert line["clients"][0]["metrics"] == {"celsius": None}
    assert strict(record.summary_path.read_text()) == {"loss": None, "rounds": 1}
    assert next(record.rounds()).loss is None


def test_json_of_finite_values_is_that_of_the_standard_library():
    value = {"a": [1, 2.5, None, True, "ü"], "b": {"c": (1e300, -0.0)}}
    assert to_json(value, indent=2) == json.dumps(value, indent=2)


def test_a_line_that_is_still_being_written_is_left_out(record):
    record.add_round(report(1))
    with record.rounds_path.open("a") as file:
        file.write('{"server_round": 2, "accu')
    assert [one.server_round for one in record.rounds()] == [1]


def damaged(**changes):
    """A round's line with keys changed; `...` removes one."""
    values = {**vars(report(2)), "clients": []} | changes
    return json.dumps({key: value for key, value in values.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"", "Expecting value"),
        (b'{"server_round": 2, "accu', "Unterminated string"),
        (b"\xff\xfe\xfd", "codec can't decode"),
        (b"\0\0\0\0", "Expecting value|codec can't decode"),
        (b"[1, 2]", r"expected a JSON object, got \[1, 2\]"),
        (damaged(colour="red"), "unknown colour; known: server_round, accuracy, loss"),
        (damaged(server_round=...), "missing server_round; known: server_round, accuracy"),
        (damaged(accuracy=..., loss=...), "missing accuracy, loss; known: server_round"),
        (damaged(clients=3), "clients must be a list, got 3"),
        (damaged(refused=[]), r"refused must be an object, got \[\]"),
        (damaged(asked="pi"), "asked must be a list, got 'pi'"),
        (damaged(bytes_by_client={"pi": 3}), "bytes_by_client.pi must be a list of 2, got 3"),
        (damaged(bytes_by_client={"pi": [3]}), r"must be a list of 2, got \[3\]"),
        (
            damaged(accuracy_by_client={"pi": [3]}),
            r"accuracy_by_client.pi must be a list of 2, got \[3\]",
        ),
        (damaged(clients=["pi"]), r"clients\[0\] must be an object with name, .* got 'pi'"),
        (damaged(clients=[{"name": "pi"}]), r"clients\[0\] missing blocks, num_.*; known: name"),
        (damaged(accuracy="x"), "accuracy must be a number or null, got 'x'"),
        (damaged(loss=True), "loss must be a number or null, got True"),
        (damaged(server_round=1.5), "server_round must be a whole number, got 1.5"),
        (damaged(bytes_up=None), "bytes_up must be a whole number, got None"),
        (damaged(seconds=[1]), r"seconds must be a number, got \[1\]"),
        (damaged(stepped=1), "stepped must be true or false, got 1"),
        (damaged(asked=["pi", 3]), r"asked\[1\] must be text, got 3"),
        (damaged(refused={"pi": 3}), "refused.pi must be text, got 3"),
        (damaged(coverage={"w": "all"}), "coverage.w must be a whole number, got 'all'"),
        (damaged(bytes_by_role={"up": {"bias": "3"}}), "bytes_by_role.up.bias must be a whole"),
        (
            damaged(bytes_by_client={"pi": [1, "x"]}),
            r"bytes_by_client.pi\[1\] must be a whole number, got 'x'",
        ),
        (
            damaged(clients=[vars(client()), vars(client(metrics={"heat": "hot"}))]),
            r"clients\[1\].metrics.heat must be a number or null, got 'hot'",
        ),
        (damaged(accuracy="x" * 999), "got 'x{79}; remove"),  # no screenful of it
    ],
)
def test_a_garbled_line_is_named_by_file_and_number(record, line, text):
    record.add_round(report(1))
    with record.rounds_path.open("ab") as file:
        file.write(line + b"\n")
    record.add_round(report(3))
    where = re.escape(f"{record.rounds_path}, line 2, is not a round: ")
    with pytest.raises(ConfigError, match=f"{where}.*({text})") as caught:
        list(record.rounds())
    assert str(caught.value).endswith("; remove the line, or repeat the run")


def test_a_line_of_an_older_version_takes_defaults_for_what_it_lacks(record):
    then = [
        *("server_round", "accuracy", "loss", "train_loss", "bytes_up", "bytes_down"),
        *("peak_client_bytes", "seconds", "clients", "refused", "coverage"),
    ]
    for one in (report(0), report(1, clients=(client(),), bytes_up=3), report(2, seconds=0.5)):
        values = vars(one) | {"clients": [vars(each) for each in one.clients]}
        with record.rounds_path.open("a") as file:
            file.write(to_json({key: values[key] for key in then}) + "\n")
    # A round with updates has stepped, also where nobody wrote it down.
    assert list(record.rounds()) == [
        report(0),
        report(1, clients=(client(),), bytes_up=3, stepped=True),
        report(2, seconds=0.5),
    ]
    assert [one.abandoned for one in record.rounds()] == [False, False, True]


def test_a_summary_counts_who_was_late_full_states_and_abandoned_rounds():
    rounds = [
        report(0, full_state=("a",)),
        report(1, late=("a", "b"), full_state=("a", "b"), stepped=True),
        report(2, late=("c",)),
    ]
    summary = summarise(rounds)
    assert (summary["late"], summary["full_states"], summary["abandoned_rounds"]) == (3, 3, 1)


def test_a_folder_without_a_run_has_no_rounds_to_give(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run: there is no config\.toml in it"):
        list(RunRecord(tmp_path).rounds())


def test_rounds_that_cannot_be_read_are_named(record, monkeypatch):
    record.add_round(report())

    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    text = f"cannot read {record.rounds_path}: Permission denied; make it readable"
    with pytest.raises(ConfigError, match=re.escape(text)):
        list(record.rounds())


def test_who_follows_reads_each_line_once_and_whole(record):
    seen, position = [], 0
    for number in range(3):
        record.add_round(report(server_round=number))
        with record.rounds_path.open("a") as file:
            file.write('{"server_round"')  # the next, half written
        for found, behind in record.rounds_from(position):
            seen.append(found.server_round)
            position = behind
        text = record.rounds_path.read_text()
        assert position == text.rindex("\n") + 1
        record.rounds_path.write_text(text[:position])
    assert seen == [0, 1, 2]


# Summary


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"accuracy": 0.5, "lo', "Unterminated string"),
        (b"", "Expecting value"),
        (b"\xff\xfe\xfd", "codec can't decode"),
        (b"3", "expected a JSON object, got 3"),
    ],
)
def test_a_damaged_summary_is_named(record, content, text):
    record.summary_path.write_bytes(content)
    where = re.escape(f"{record.summary_path} is not a summary: ")
    with pytest.raises(ConfigError, match=f"{where}.*{text}.*repeat the run"):
        record.summary()


def test_a_record_that_lost_its_rounds_is_damaged(record):
    for number in range(3):
        record.add_round(report(number))
    record.check_whole()  # under way
    record.write_summary(summarise(record.rounds()))
    record.check_whole()
    lines = record.rounds_path.read_bytes().splitlines(keepends=True)
    for content, has in (
        (None, "has no round"),
        (b"", "has no round"),
        (lines[0][:100], "has no round"),
        (lines[0], "ends with round 0"),
        (b"".join(lines)[:-1], "ends with round 1"),
    ):
        record.rounds_path.unlink(missing_ok=True)
        if content is not None:
            record.rounds_path.write_bytes(content)
        text = (
            f"{record.rounds_path} is damaged: it {has}, and summary.json beside it says 2 rounds; "
            f"copy it again, remove summary.json to see the rounds alone, or repeat the run"
        )
        with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
            record.check_whole()
    record.summary_path.unlink()  # the way out
    record.check_whole()


def test_a_summary_whose_rounds_are_no_number_is_damaged(record):
    record.add_round(report(0))
    record.write_summary({"rounds": "2"})
    text = "is not a summary: rounds must be a whole number, got '2'; copy it again, remove"
    with pytest.raises(ConfigError, match=re.escape(f"{record.summary_path} {text}")):
        record.check_whole()


def test_a_run_that_has_not_ended_has_no_summary(record):
    record.add_round(report())
    with pytest.raises(ConfigError, match="has no summary yet: it wrote 1 rounds"):
        record.summary()


# A full disk


def write_round(record):
    record.add_round(report())


def write_summary(record):
    record.write_summary({"rounds": 2})


def save_model(record):
    record.save_model({"w": torch.ones(2)}, {})


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_round, "rounds.jsonl"),
        (write_summary, "summary.json"),
        (save_model, "model.safetensors"),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_file(record, monkeypatch, write, name):
    monkeypatch.setattr("os.fsync", full_disk)
    text = f"cannot write {record.path / name}: No space left on device; free space"
    with pytest.raises(ConfigError, match=re.escape(text)):
        write(record)


@pytest.mark.parametrize("write", [write_round, write_summary, save_model])
def test_a_folder_that_is_gone_is_an_error_that_names_the_file(record, write):
    record.config_path.unlink()
    record.path.rmdir()
    with pytest.raises(ConfigError, match=f"cannot write {re.escape(str(record.path))}/.*; free"):
        write(record)


@pytest.mark.parametrize("write", [write_summary, save_model])
@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_file_that_cannot_be_replaced_stays_as_it_was(record, monkeypatch, write, step):
    record.write_summary({"rounds": 1})
    record.save_model({"w": torch.zeros(2)}, {"backbone": "old"})
    before = {path.name: path.read_bytes() for path in record.path.iterdir()}
    monkeypatch.setattr(step, full_disk)
    with pytest.raises(ConfigError, match="No space left on device"):
        write(record)
    assert {path.name: path.read_bytes() for path in record.path.iterdir()} == before


# Model


def test_a_model_comes_back_with_its_facts_and_replaces_the_last(record):
    record.save_model({"w": torch.zeros(2)}, {"backbone": "old"})
    tensors = {"w": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(1, requires_grad=True)}
    record.save_model(tensors, {"backbone": "new", "image_size": "64"})
    read = load_file(record.model_path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with safetensors.safe_open(record.model_path, "pt") as file:
        assert file.metadata() == {"backbone": "new", "image_size": "64"}
    assert {path.name for path in record.path.iterdir()} == {"config.toml", "model.safetensors"}


def test_a_model_is_as_readable_as_the_rest_of_the_run(record):
    record.save_model({"w": torch.zeros(2)}, {})
    record.write_summary({})
    modes = {path.stat().st_mode for path in record.path.iterdir()}
    assert len(modes) == 1


# Runs that go on


def line_of(server_round, **changes):
    return to_json(dataclasses.asdict(report(server_round, **changes)))


@pytest.mark.parametrize("cut", range(0, 60, 7))
@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_whatever_was_written_of_the_rounds_they_end_with_the_one_asked_for(record, last, cut):
    """Of four rounds some are there, and half of a line; round `last` is to be the last."""
    lines = [line_of(n, bytes_up=n) for n in range(4)]
    whole = "".join(f"{line}\n" for line in lines)
    wanted = "".join(f"{line}\n" for line in lines[: last + 1])
    # At least the rounds before it are there: each was seen to the disk before the next began.
    least = sum(len(line) + 1 for line in lines[:last])
    record.rounds_path.write_text(whole[: min(least + 9 * cut, len(whole))])
    record.end_with(lines[last])
    assert record.rounds_path.read_text() == wanted
    record.end_with(lines[last])
    assert record.rounds_path.read_text() == wanted
    record.add_round(report(last + 1))
    assert [r.server_round for r in record.rounds()] == list(range(last + 2))


def test_a_repeated_round_takes_the_place_of_its_line(record):
    for n in range(3):
        record.add_round(report(n))
    record.end_with(line_of(1, bytes_up=7))
    assert [(r.server_round, r.bytes_up) for r in record.rounds()] == [(0, 0), (1, 7)]


def test_rounds_that_were_lost_altogether_begin_with_the_one_asked_for(record):
    record.end_with(line_of(0))
    assert [r.server_round for r in record.rounds()] == [0]


def test_a_line_that_finds_no_room_leaves_the_lines_before_it(record, monkeypatch):
    record.add_round(report(1))
    before = record.rounds_path.read_bytes()

    def half(file, content):
        file.write(content[:20])
        full_disk()

    with monkeypatch.context() as patch:
        patch.setattr("fleet.records._write_all", half)
        with pytest.raises(ConfigError, match=r"No space left on device; free space .* resume"):
            record.add_round(report(2))
    assert record.rounds_path.read_bytes() == before
    record.add_round(report(2))
    assert [r.server_round for r in record.rounds()] == [1, 2]


def test_a_folder_that_is_opened_again_says_what_is_in_force_now(record):
    record.add_round(report(1))
    record.write_summary({"rounds": 1})
    left = record.path / ".model.safetensors.123"  # of a process that was killed
    other = record.path / ".notes.123"
    left.touch()
    other.touch()
    again = RunRecord.reopen(str(record.path), {"rounds": 9})
    settings = tomllib.loads(again.config_path.read_text())["settings"]
    assert settings == {"rounds": 9, "run-dir": str(record.path)}
    assert not record.summary_path.exists() and not left.exists() and other.exists()
    assert len(list(again.rounds())) == 1


def test_a_folder_that_is_not_there_is_made(tmp_path):
    assert RunRecord.reopen(str(tmp_path / "a" / "b"), {}).config_path.is_file()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write run directory .*; name another with run"):
        RunRecord.reopen(str(tmp_path / "file" / "run"), {})


def test_tables_beside_the_settings_are_there_from_the_beginning(tmp_path):
    with recorded_beside({"simulation": {"drop": 0.2}}):
        record = RunRecord.create(str(tmp_path / "run"), {"seed": 1})
    facts = tomllib.loads(record.config_path.read_text())
    assert facts["simulation"] == {"drop": 0.2} and facts["settings"]["seed"] == 1
    assert "simulation" not in RunRecord.create(str(tmp_path / "next"), {}).config_path.read_text()


def test_a_model_that_is_saved_leaves_nothing_to_the_collector_of_cycles(record):
    tensors = {f"w{i}": torch.ones(2) for i in range(50)}
    record.save_model(tensors, {})  # imports
    gc.collect()
    gc.disable()
    try:
        record.save_model(tensors, {})
        assert gc.collect() < len(tensors)
    finally:
        gc.enable()


def test_a_model_of_numbers_that_numpy_lacks_is_saved_too(record):
    tensors = {"w": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "n": torch.tensor(3)}
    record.save_model(tensors, {"backbone": "own"})
    loaded = load_file(record.model_path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["w"].dtype == torch.bfloat16
