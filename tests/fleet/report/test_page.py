import html.parser
import re

import pytest

from fleet.errors import ConfigError
from fleet.report import without_pages, write_page


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


def test_the_page_shows_who_took_part_what_was_sent_and_what_was_abandoned(record):
    write_page(record)
    page = record.page_path.read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == [
        "Accuracy by round",
        "Accuracy by bytes",
        "Refused, by client and round",
        "Rounds",
        "Who took part",
        "Shares by k",
        "Bytes by what they are",
        "Refused",
    ]
    assert "<tr><td class=words>pi-03</td><td>–</td><td>2</td><td>0</td>" in page
    assert "<td>3*</td>" in page and "<p>* abandoned: " in page


def test_a_page_that_cannot_be_written_is_an_error_with_the_way_out(record):
    record.page_path.mkdir()
    text = (
        f"cannot write page {record.page_path}: Is a directory; make it writable, then run: fleet"
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        write_page(record)


def test_a_run_whose_folder_keeps_no_page_has_none_drawn(record, monkeypatch):
    monkeypatch.setattr("fleet.report.page.run_pictures", lambda *_: pytest.fail("drawn"))
    with without_pages():
        write_page(record)
    assert not record.page_path.exists()
    monkeypatch.undo()
    write_page(record)
    assert record.page_path.is_file()
