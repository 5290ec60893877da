"""A round reads what was before it, whatever a killed attempt at it has left."""

import itertools

import numpy as np
import pytest

from clients.memory import ClientMemory
from clients.round_memory import RoundMemory
from fleet.errors import ConfigError


@pytest.fixture
def memory(tmp_path):
    return ClientMemory(tmp_path / "state", "0f", "pi-1")


def value(remembered):
    return None if remembered is None else int(remembered.tensors["x"])


def write(memory, part, number):
    memory.write(part, {"x": np.array(number)}, {"n": str(number)})


def test_a_round_does_not_see_what_it_writes(memory):
    first = RoundMemory(memory, 1)
    write(first, "norms", 1)
    assert first.read("norms") is None
    second = RoundMemory(memory, 2)
    assert value(second.read("norms")) == 1
    assert second.read("norms").facts == {"n": "1"}
    write(second, "norms", 2)
    assert value(second.read("norms")) == 1
    assert value(RoundMemory(memory, 9).read("norms")) == 2


def test_evaluation_sees_its_rounds_training_and_the_next_round_sees_both(memory):
    write(RoundMemory(memory, 1), "version", 1)
    evaluation = RoundMemory(memory, 1, evaluates=True)
    assert value(evaluation.read("version")) == 1
    write(evaluation, "version", 2)
    assert value(RoundMemory(memory, 1).read("version")) is None
    assert list(map(value, RoundMemory(memory, 2).history("version"))) == [2, 1]


def test_two_older_ones_are_kept_and_parts_do_not_mix(memory):
    for number in range(1, 8):
        write(RoundMemory(memory, number), "norms", number)
    write(RoundMemory(memory, 7), "norms-too", 70)
    assert list(map(value, RoundMemory(memory, 99).history("norms"))) == [7, 6, 5]
    assert sorted(memory.parts()) == [
        *("norms-000010", "norms-000012", "norms-000014", "norms-too-000014")
    ]


def test_a_server_that_goes_back_two_rounds_finds_what_was_before_them(memory):
    for number in range(1, 8):
        write(RoundMemory(memory, number), "norms", number)
    again = RoundMemory(memory, 6)
    assert value(again.read("norms")) == 5
    write(again, "norms", 60)
    assert value(RoundMemory(memory, 7).read("norms")) == 60


@pytest.mark.parametrize("written", list(itertools.product([False, True], repeat=3)))
def test_an_attempt_that_wrote_some_parts_changes_nothing(memory, written):
    parts = ("version", "feedback", "norms")
    for part in parts:
        write(RoundMemory(memory, 4), part, 4)
    for part, was in zip(parts, written, strict=True):
        if was:
            write(RoundMemory(memory, 5), part, -1)
    again = RoundMemory(memory, 5)
    assert [value(again.read(part)) for part in parts] == [4, 4, 4]
    for part in parts:
        write(again, part, 5)
    assert [value(RoundMemory(memory, 6).read(part)) for part in parts] == [5, 5, 5]


def test_a_damaged_one_is_passed_over(memory, tmp_path, caplog):
    for number in (1, 2):
        write(RoundMemory(memory, number), "norms", number)
    (newest,) = tmp_path.rglob("norms-000004.safetensors")
    newest.write_bytes(b"torn")
    assert value(RoundMemory(memory, 3).read("norms")) == 1
    assert f"dropped {newest}, which is damaged" in caplog.text


def test_a_folder_that_cannot_be_read_is_told_with_the_way_out(tmp_path):
    (tmp_path / "state").write_text("")
    memory = ClientMemory(tmp_path / "state", "0f", "pi-1")
    text = r"cannot read .*state/0f/.*: Not a directory; make it readable .* set state-dir to ano"
    with pytest.raises(ConfigError, match=text):
        RoundMemory(memory, 1).read("norms")
