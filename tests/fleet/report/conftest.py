import json

import pytest

from fleet.records import ClientReport, RoundReport, RunRecord

MIB = 2**20


def client(name, blocks):
    return ClientReport(
        name=name, blocks=blocks, num_examples=5, loss=0.5, peak_bytes=MIB, seconds=1.0
    )


@pytest.fixture
def rounds():
    """Three devices; the third never comes through.

    Round 0 is a head start, 1 takes in two of three, 2 goes on without the
    third and has the second only evaluate, 3 is abandoned.
    """
    return [
        RoundReport(
            server_round=0,
            accuracy=0.1,
            loss=2.3,
            bytes_up=3 * MIB,
            asked=("pi-01", "pi-02", "pi-03"),
            refused={"pi-02": "moments hold NaN"},
            stepped=True,
            bytes_by_client={name: (MIB, 100) for name in ("pi-01", "pi-02", "pi-03")},
            bytes_by_role={"up": {"headers": 3 * MIB}, "down": {"headers": 300}},
        ),
        RoundReport(
            server_round=1,
            accuracy=0.5,
            loss=1.25,
            bytes_up=3 * MIB,
            bytes_down=2 * MIB,
            peak_client_bytes=MIB,
            seconds=1.5,
            clients=(client("pi-01", 1), client("pi-02", 3)),
            asked=("pi-01", "pi-02", "pi-03"),
            refused={
                "pi-03": "Traceback\n<b>ValueError</b>: bad",
                "pi-01": "evaluation: loss is NaN",
                "unknown sender": "reply to no message that waits for one; dropped",
            },
            full_state=("pi-03",),
            stepped=True,
            bytes_by_client={
                "pi-01": (MIB, MIB),
                "pi-02": (2 * MIB, MIB),
                "pi-03": (10, 2 * MIB),
                "unknown sender": (7, 0),
            },
            bytes_by_role={
                "up": {"bias": 40, "headers": 960, "weight": 2000},
                "down": {"headers": 700, "var": 250, "weight": 750},
            },
        ),
        RoundReport(
            server_round=2,
            accuracy=None,
            loss=None,
            clients=(client("pi-01", 1),),
            asked=("pi-01", "pi-03"),
            late=("pi-03",),
            stepped=True,
            bytes_by_client={"pi-01": (MIB, MIB), "pi-02": (0, MIB), "pi-03": (0, 0)},
            bytes_by_role={"up": {"weight": 1000}, "down": {}},
        ),
        RoundReport(
            server_round=3,
            accuracy=0.5,
            loss=1.25,
            asked=("pi-01", "pi-02"),
            refused={"pi-01": "no reply within 9 s", "pi-02": "no reply within 9 s"},
            late_replies=1,
            full_state=("pi-01", "pi-02"),
            bytes_by_client={"pi-01": (0, MIB), "pi-02": (0, MIB)},
        ),
    ]


@pytest.fixture
def record(tmp_path, rounds):
    record = RunRecord(tmp_path / "run")
    record.path.mkdir()
    for report in rounds:
        record.add_round(report)
    return record


@pytest.fixture
def old_rounds(tmp_path, rounds):
    """The same as an older version wrote them: without a word of who was asked."""
    record = RunRecord(tmp_path / "old")
    record.path.mkdir()
    new = ("asked", "late", "late_replies", "full_state", "stepped")
    for report in rounds:
        record.add_round(report)
    lines = [json.loads(line) for line in record.rounds_path.read_text().splitlines()]
    for line in lines:
        for key in (*new, "bytes_by_client", "bytes_by_role"):
            del line[key]
    record.rounds_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return list(record.rounds())
