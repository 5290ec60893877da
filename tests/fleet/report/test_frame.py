import json
import sys

import numpy as np
import pandas
import pytest

from fleet.errors import ConfigError
from fleet.records import ClientReport, RoundReport, RunRecord
from fleet.report.frame import frame


def client(name):
    return ClientReport(name=name, blocks=1, num_examples=9, loss=1.0, peak_bytes=5, seconds=0.1)


ROUNDS = (
    RoundReport(server_round=0, accuracy=0.1, loss=2.3),
    RoundReport(
        server_round=1,
        accuracy=None,
        loss=float("nan"),
        train_loss=1.5,
        bytes_up=10,
        bytes_down=20,
        peak_client_bytes=5,
        seconds=2.5,
        clients=(client("a"),),
        asked=("a", "b", "c"),
        refused={"b": "shape"},
        late=("c",),
        late_replies=2,
        full_state=("a", "b"),
        stepped=True,
    ),
    RoundReport(server_round=2, accuracy=0.5, loss=1.0, asked=("a",)),
)


def test_a_frame_has_a_row_a_round_and_a_column_a_number(tmp_path):
    record = RunRecord.create(str(tmp_path / "run"), {})
    for report in ROUNDS:
        record.add_round(report)
    table = frame(record)
    assert list(table.index) == [0, 1, 2] and table.index.name == "round"
    # Against the file as pandas itself reads it.
    raw = pandas.read_json(record.rounds_path, lines=True).set_index("server_round")
    for name in ("accuracy", "loss", "train_loss", "bytes_up", "bytes_down", "seconds"):
        np.testing.assert_array_equal(table[name].astype(float), raw[name].astype(float))
    for name in ("asked", "clients", "refused", "late", "full_state"):
        assert list(table[name]) == list(raw[name].map(len)), name
    assert list(table.late_replies) == list(raw.late_replies)
    assert list(table.abandoned) == [0, 0, 1]
    lines = record.rounds_path.read_text().splitlines()
    known = json.loads(lines[0]).keys() | {"abandoned"}
    assert set(table.columns) <= known


def test_a_frame_of_no_rounds_has_the_columns_and_their_types():
    empty, full = frame([]), frame(ROUNDS)
    assert len(empty) == 0
    assert list(empty.columns) == list(full.columns)
    assert (full.dtypes[["accuracy", "loss", "train_loss"]] == "float64").all()
    assert (full.dtypes[["bytes_up", "clients", "abandoned"]] == "int64").all()


def test_a_folder_without_a_run_has_no_frame(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        frame(RunRecord(tmp_path))


def test_without_pandas_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"frames need pandas: pip install 'fleet-mobiletl\[sim"):
        frame(ROUNDS)
