import html.parser
import io
import re

import pytest
from rich.console import Console

from fleet.errors import ConfigError
from fleet.records import ClientReport, RoundReport, RunRecord
from fleet.report import (
    accuracy_picture,
    refusals,
    round_line,
    rounds_table,
    run_values,
    write_page,
)

MIB = 2**20


def rounds():
    client = ClientReport(
        name="pi-01", blocks=3, num_examples=5, loss=0.5, peak_bytes=MIB, seconds=1.0
    )
    return [
        RoundReport(server_round=0, accuracy=0.1, loss=2.3),
        RoundReport(
            server_round=1,
            accuracy=0.5,
            loss=1.25,
            bytes_up=3 * MIB,
            bytes_down=2 * MIB,
            peak_client_bytes=MIB,
            seconds=1.5,
            clients=(client,),
            refused={"pi-02": "Traceback\n<b>ValueError</b>: bad"},
        ),
        RoundReport(server_round=2, accuracy=None, loss=None),
    ]


@pytest.fixture
def record(tmp_path):
    record = RunRecord(tmp_path)
    for report in rounds():
        record.add_round(report)
    return record


def test_the_line_of_a_round_gives_every_figure_with_its_unit():
    assert round_line(rounds()[1], 2) == (
        "round 1/2: accuracy 50.0 %, loss 1.250, up 3.00 MiB, down 2.00 MiB, "
        "client peak 1.0 MiB, 1.5 s, 1 clients, 1 refused"
    )


def test_the_table_fits_a_terminal_of_eighty_columns():
    console = Console(file=io.StringIO(), width=80)
    console.print(rounds_table(rounds()))
    text = console.file.getvalue()
    assert "peak MiB" in text
    assert "…" not in text


def test_what_was_not_measured_is_a_dash_not_a_zero():
    assert "accuracy – %, loss –" in round_line(rounds()[2], 2)


def test_a_refusal_is_one_line_with_round_client_and_reason():
    assert refusals(rounds()) == ["round 1: pi-02: <b>ValueError</b>: bad"]


def test_the_page_is_one_file_that_names_the_refused_and_escapes_what_they_said(record):
    write_page(record)
    page = record.page_path.read_text()
    assert "&lt;b&gt;ValueError" in page
    assert "<svg" in page
    loads = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: loads.extend(
        value for key, value in attributes if key in ("src", "href") and "#" not in value
    )
    parser.feed(page)
    assert loads == []  # nothing comes from elsewhere


def test_the_picture_names_every_run(record, tmp_path):
    other = RunRecord(tmp_path / "other")
    other.path.mkdir()
    for report in rounds():
        other.add_round(report)
    assert accuracy_picture([record, other]).count('<g id="axes_') == 2


def test_a_page_that_cannot_be_written_is_an_error_with_the_way_out(record):
    record.page_path.mkdir()
    text = (
        f"cannot write page {record.page_path}: Is a directory; make it writable, then run: fleet"
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        write_page(record)


def test_the_values_of_a_run_under_way_are_the_totals_so_far(record):
    values = run_values(record)
    assert (values["ended"], values["rounds"], values["refused"]) == (False, 2, 1)
    assert values["bytes_up"] == 3 * MIB
    assert [one["server_round"] for one in values["per_round"]] == [0, 1, 2]
    assert values["per_round"][1]["clients"][0]["name"] == "pi-01"


def test_the_values_of_a_run_that_has_ended_are_its_summary_and_its_rounds(record):
    record.write_summary({"accuracy": 0.5, "strategy": "fedavg"})
    values = run_values(record)
    assert len(values.pop("per_round")) == 3
    assert values == {"accuracy": 0.5, "strategy": "fedavg", "ended": True}


def test_a_seventh_run_is_drawn_too(record):
    assert accuracy_picture([record] * 7).count("M ") > accuracy_picture([record] * 6).count("M ")
