import html.parser
import io

import pytest
from rich.console import Console

from fleet.records import ClientReport, RoundReport, RunRecord
from fleet.report import accuracy_picture, refusals, round_line, rounds_table, write_page

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
