"""What pictures and pages show, against figures worked out by hand; hostile names and odd runs."""

import dataclasses
import html.parser
import itertools
import math
import re
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest

from fleet.errors import ConfigError
from fleet.records import ClientReport, RoundReport, RunRecord
from fleet.report import write_comparison, write_page
from fleet.report.beside import Outcome, accuracy_by_row
from fleet.report.curves import by_bytes, by_round, place_labels
from fleet.report.files import write_files
from fleet.report.grid import Grid
from fleet.report.history import (
    History,
    Line,
    block_of,
    blocks_of,
    kind_of,
    read_history,
    read_line,
)
from fleet.report.memory import by_memory, pareto_front
from fleet.report.pictures import NAMES, comparison_pictures, run_pictures
from fleet.report.refused import most_refused, refusals_by_round
from fleet.report.rows import Row

MIB = 2**20
EVIL = "<script>alert(1)</script>&\"'$x_1$ " + "z" * 300


def _client(name):
    return ClientReport(name=name, blocks=1, num_examples=5, loss=0.5, peak_bytes=MIB, seconds=1.0)


def report(number, accuracy, **more):
    facts = {"bytes_up": 3 * MIB, "bytes_down": MIB, "peak_client_bytes": 5 * MIB} if number else {}
    return RoundReport(server_round=number, accuracy=accuracy, loss=1.0, **(facts | more))


@pytest.fixture
def write_run(tmp_path):
    """Function of rounds and a name → the record that holds them."""

    def write(rounds, name="run"):
        record = RunRecord.create(str(tmp_path / name), {"rounds": len(rounds)})
        for each in rounds:
            record.add_round(each)
        return record

    return write


@pytest.fixture
def rows(write_run):
    """Two rows of two seeds, and a failed seed."""
    runs = {
        f"{name}{seed}": write_run(
            [report(n, 0.1 + step * n + 0.02 * seed) for n in range(4)], f"{name}{seed}"
        )
        for name, step in (("slow", 0.1), ("fast", 0.2))
        for seed in range(2)
    }
    return [
        Row("slow", {0: runs["slow0"], 1: runs["slow1"]}),
        Row("fast", {0: runs["fast0"], 1: runs["fast1"]}, {2: "ConfigError: no such data"}),
    ]


def texts_of(svg):
    """All that is written in a picture, and its title and description."""
    root = ElementTree.fromstring(svg)
    return [" ".join(e.itertext()) for e in root.iter() if e.tag.endswith(("text", "desc"))]


def test_a_history_adds_up_bytes_and_leaves_out_what_is_not_finite():
    rounds = [report(0, 0.1), report(1, math.nan), report(2, None), report(3, 0.5)]
    history = read_history(rounds)
    assert history.rounds == [0, 3]
    assert history.accuracy == [10.0, 50.0]
    assert history.sent == [0, 3 * 4 * MIB]
    assert history.peak_bytes == 5 * MIB


@pytest.mark.parametrize(
    ("tensor", "block"),
    [
        ("blocks.6.0.bn1.bias", "blocks.6.0"),
        ("features.15.conv.0.0.weight", "features.15"),
        ("classifier.weight", "classifier"),
        ("head", "head"),
    ],
)
def test_a_tensor_is_in_the_block_that_its_path_begins_with(tensor, block):
    assert block_of(tensor) == block


def test_a_block_is_covered_as_its_least_trained_tensor_and_the_head_comes_last():
    coverage = {"blocks.9.w": 3, "blocks.9.b": 1, "blocks.10.w": 2, "head.w": 5}
    clients = tuple(_client(f"pi-{i}") for i in range(5))
    history = read_history([report(1, 0.5, clients=clients, coverage=coverage)])
    assert history.coverage == {1: (5, {"blocks.9": 1, "blocks.10": 2, "head": 5})}
    assert blocks_of([history]) == ["blocks.9", "blocks.10", "head"]


def test_reasons_that_differ_in_figures_are_of_a_kind():
    assert kind_of("no reply within 12.5 s") == kind_of("no reply within 3 s")
    assert kind_of("plan 0f3aa27b41 is unknown") == kind_of("plan 99b0c7dd12 is unknown")
    assert kind_of("holds NaN") != kind_of("too long")


def test_the_front_is_what_no_point_beats():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(p) for p in rng.integers(0, 6, (12, 2))]
        beaten = {
            i
            for i, j in itertools.permutations(range(12), 2)
            if points[j] != points[i]
            and points[j][0] <= points[i][0]
            and points[j][1] >= points[i][1]
        }
        assert set(pareto_front(points)) == set(range(12)) - beaten


def test_labels_keep_their_order_and_distance():
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = rng.random(6)
        placed = place_labels(wanted, 0.1, 0.02, 0.98)
        ordered = [placed[i] for i in np.argsort(wanted)]
        assert min(np.diff(ordered)) >= 0.1 - 1e-9
        assert min(placed) >= 0.02 - 1e-9 and max(placed) <= 0.98 + 1e-9


def test_lines_are_means_over_seeds_with_bands_between_the_extremes(rows):
    lines = [read_line(row) for row in rows]
    for picture, unit, last in (
        (by_round(lines), "round", "3"),
        (by_bytes(lines), "MiB sent, up and down", "12"),
    ):
        described = texts_of(picture.svg())
        assert f"slow: from 11.0 % to 41.0 % at {last}; " in " ".join(described)
        assert f"fast: from 11.0 % to 71.0 % at {last}." in " ".join(described)
        assert "accuracy (%)" in described and unit in described
        axes = picture.figure.axes[0]
        bands = [collection.get_paths()[0].vertices for collection in axes.collections]
        assert [(round(b[:, 1].min(), 6), round(b[:, 1].max(), 6)) for b in bands] == [
            (10.0, 42.0),
            (10.0, 72.0),
        ]


def test_memory_is_drawn_with_its_front(rows):
    picture = by_memory([read_line(row) for row in rows])
    assert "Pareto front: fast: 71.0 % with 5.0 MiB. Others: slow: 41.0 % with 5.0 MiB." in (
        picture.description
    )


def test_a_name_in_the_memory_picture_lies_on_no_line_of_the_front():
    runs = [History([1], [accuracy], [1], 1, peak) for accuracy, peak in ((60, 5e6), (80, 20e6))]
    lines = [Line(name, [run]) for name, run in zip(("head", "mobiletl"), runs, strict=True)]
    picture = by_memory(lines)
    assert "seed" not in picture.caption  # of one seed there is no lowest
    axes = picture.figure.axes[0]
    (front,) = (line for line in axes.lines if line.get_drawstyle() == "steps-post")
    (left, low), (right, high) = axes.transData.transform(front.get_xydata())
    for text in axes.texts:
        box = text.get_window_extent()
        assert not (box.y0 < low < box.y1 and box.x1 > left and box.x0 < right), text.get_text()
        assert not (box.x0 < right < box.x1 and box.y1 > low and box.y0 < high), text.get_text()


def test_a_name_in_the_memory_picture_is_crossed_by_no_error_bar():
    lines = [
        Line(name, [History([1], [accuracy + off], [1], 1, peak) for off in (-15, 15)])
        for name, accuracy, peak in (("head", 60, 5e6), ("shifts", 62, 5.6e6), ("full", 70, 9e6))
    ]
    picture = by_memory(lines)
    assert "Upright lines: lowest to highest seed" in picture.caption
    axes = picture.figure.axes[0]
    bars = [axes.transData.transform(bar) for bar in axes.collections[0].get_segments()]
    assert len(bars) == 3
    for text in axes.texts:
        box = text.get_window_extent()
        for (x, low), (_, high) in bars:
            crossed = box.x0 < x < box.x1 and box.y0 < high and box.y1 > low
            assert not crossed, text.get_text()


NAN = math.nan


@pytest.mark.parametrize("first", [80.0, NAN])
def test_each_row_is_drawn_beside_the_first_of_its_group(first):
    outcomes = [
        Outcome("no attack, rule=mean", "rule=mean", first, 2.0),
        Outcome("no attack, rule=median", "rule=median", 70.0, NAN),
        Outcome("nan, rule=mean", "rule=mean", 20.0, 30.0),
        Outcome("nan, rule=median", "rule=median", 65.0, 1.0),
    ]
    picture = accuracy_by_row(outcomes)
    mean, median = picture.figure.axes
    assert [axes.get_title(loc="left") for axes in (mean, median)] == ["rule=mean", "rule=median"]
    assert sorted(text.get_text() for text in mean.get_yticklabels()) == ["nan", "no attack"]
    for axes, values in ((mean, [first, 20.0]), (median, [70.0, 65.0])):
        upright = [line for line in axes.lines if len(line.get_xdata()) == 2]
        points = [line for line in axes.lines if line.get_marker() in ("o", "D")]
        known = [value for value in values if value == value]
        assert [float(line.get_xdata()[0]) for line in points] == known
        assert [line.get_xdata()[0] for line in upright] == known[: len(known) - 1]
        diamonds = [line.get_marker() == "D" for line in points]
        assert diamonds == ([True, False] if len(known) == 2 else [False])
    bars = [c.get_segments()[0][:, 0].tolist() for c in mean.collections]
    assert [0.0, 50.0] in bars  # an interval ends where accuracies do
    missing = "Without an accuracy: no attack, rule=mean."
    assert (missing in picture.caption) == (first != first)
    assert "rule=median: no attack 70.0 %, nan 65.0 %." in picture.description


@pytest.mark.parametrize(
    ("half_widths", "bars", "words"),
    [
        ((NAN, NAN), 0, "of one seed, so without an interval. Diamond"),
        (
            (2.0, NAN),
            1,
            "mean over seeds. Thick bar: its 95 % interval; a row of one seed has none",
        ),
        ((2.0, 3.0), 2, "mean over seeds. Thick bar: its 95 % interval. Diamond"),
    ],
)
def test_a_caption_speaks_of_intervals_where_there_are(half_widths, bars, words):
    outcomes = [Outcome(f"r{i}", "", 50.0 + i, half) for i, half in enumerate(half_widths)]
    picture = accuracy_by_row(outcomes)
    (axes,) = picture.figure.axes
    thick = [c for c in axes.collections if c.get_linewidth()[0] > 2]
    dotted = [c for c in axes.collections if c.get_linestyle()[0][1]]
    assert len(thick) == bars and len(dotted) == 2
    assert words in picture.caption and ("interval" in words) == ("interval" in picture.caption)
    assert "Dotted: from there to the row's own point, how much it gains or loses." in (
        picture.caption
    )


def test_a_single_row_is_drawn_beside_nothing():
    assert accuracy_by_row([Outcome("a", "", 80.0, 1.0), Outcome("b", "", NAN, NAN)]) is None


@pytest.mark.parametrize("words", [12, 60])
def test_a_reason_in_the_picture_of_refusals_is_cut_between_words(words):
    reason = " ".join(f"word{'abc'[i % 3]}" for i in range(words))
    history = History([1], [50.0], [1], 1, refused=[(1, "pi-1", reason)])
    (legend,) = refusals_by_round(history).figure.legends
    shown = legend.texts[0].get_text()
    assert shown.count("\n") == 1
    ours = shown.split()
    assert ours == reason.split() if words == 12 else ours[-1] == "…"
    assert ours[:-1] == reason.split()[: len(ours) - 1]


def test_who_was_refused_most_is_told_by_row_and_client_of_all_seeds():
    def history(*refused, rounds=10):
        return History(refused=[*refused], reached=Counter({"pi-1": rounds, "pi-2": rounds}))

    nan = [(n, "pi-1", f"w{n} holds NaN or infinity; lower the learning rate") for n in (1, 2)]
    late = (3, "pi-1", "no reply within 9 s")
    lines = [
        Line("a", [history(*nan, late), history(late, rounds=5)]),
        Line("b", [history()]),
        Line("c", [history((1, "pi-2", "odd 7; said at length"))]),
    ]
    grid = most_refused(lines)
    assert grid.columns == ("row", "client", "rounds", "why")
    assert grid.rows == [
        ("a", "pi-1", "4 of 15", "no reply in time (2 ×); not finite (2 ×)"),
        ("c", "pi-2", "1 of 10", "odd … (1 ×)"),
    ]
    assert "all seeds together" in grid.note and "not shown" not in grid.note
    assert most_refused(lines[1:2]) is None
    many = [Line(f"r{i}", [history(*nan[: 1 + i % 2])]) for i in range(23)]
    grid = most_refused(many)
    assert len(grid.rows) == 20 and grid.note.endswith("3 more rows are not shown.")
    assert [row[2] for row in grid.rows] == ["2 of 10"] * 11 + ["1 of 10"] * 9


def test_a_client_is_reached_in_rounds_that_it_was_asked_in_or_sent_something(rounds):
    reached = read_history(rounds).reached
    assert reached == {"pi-01": 4, "pi-02": 4, "pi-03": 3, "unknown sender": 1}


def test_the_same_run_gives_the_same_bytes(rows):
    first, second = (
        [(p.svg(), p.png()) for p in comparison_pictures([read_line(row) for row in rows])[0]]
        for _ in range(2)
    )
    assert first == second


def test_a_comparison_writes_page_and_pictures_and_shows_what_failed(rows, tmp_path):
    folder = tmp_path / "out"
    (folder).mkdir()
    (folder / "coverage.svg").write_text("of an earlier time")
    grid = Grid("Summary", ("row", "accuracy %"), [("slow", "41.0 ± 2.0")], named=True)
    outcomes = [Outcome("slow", "", 42.0, 1.0), Outcome("fast", "", 72.0, 1.0)]
    write_comparison(folder, "Two ways", rows, [grid], outcomes)
    names = {path.name for path in folder.iterdir()}
    drawn = ("accuracy-by-row", "accuracy-by-round", "accuracy-by-bytes", "accuracy-by-memory")
    assert names == {"report.html"} | {f"{n}.{e}" for n in drawn for e in ("svg", "png")}
    page = (folder / "report.html").read_text()
    assert "2 rows, 4 runs, 1 more failed" in page
    assert "41.0 ± 2.0" in page and "ConfigError: no such data" in page
    for name in drawn:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(folder / f"{name}.svg")


def test_a_row_whose_every_seed_failed_is_named_and_nothing_is_drawn_of_nothing(tmp_path):
    write_comparison(tmp_path, "None", [Row("bad", {}, {0: "it failed", 1: "again"})], [])
    page = (tmp_path / "report.html").read_text()
    assert "No run ended well; there is nothing to draw." in page
    assert "it failed" in page and "again" in page


def test_names_and_reasons_stay_text(write_run, tmp_path):
    clients = tuple(_client(name) for name in (EVIL, "pi-1"))
    rounds = [
        report(
            n,
            0.2 * n,
            clients=clients,
            asked=(EVIL, "pi-1", "pi-2"),
            refused={EVIL + "2": EVIL},
            coverage={f"{EVIL}.1.w": 1, "head.w": 2},
            bytes_by_client={EVIL: (5, 5), "pi-1": (5, 5)},
            accuracy_by_client={EVIL: (3, 0.5), "pi-1": (3, 0.25)},
        )
        for n in range(3)
    ]
    record = write_run(rounds)
    write_page(record)
    write_comparison(tmp_path / "c", EVIL, [Row(EVIL, {0: record}), Row("b", {0: record})], [])
    for path in (record.page_path, tmp_path / "c" / "report.html"):
        tags = []
        parser = html.parser.HTMLParser()
        parser.handle_starttag = lambda tag, attributes, seen=tags: seen.append(tag)
        parser.feed(path.read_text())
        assert "script" not in tags
        assert "Content-Security-Policy" in path.read_text()
    for path in (tmp_path / "c").glob("*.svg"):
        assert not [e for e in ElementTree.parse(path).iter() if e.tag.endswith("script")]


@pytest.mark.parametrize(
    "rounds",
    [
        [],
        [report(0, 0.1)],
        [report(0, None), report(1, None)],
        [report(0, math.nan), report(1, math.nan)],
    ],
    ids=["none", "one", "not evaluated", "NaN"],
)
def test_a_run_of_little_has_a_page(write_run, rounds):
    record = write_run(rounds)
    if rounds:
        write_page(record)
        assert "<h1>run</h1>" in record.page_path.read_text()
    else:
        assert run_pictures("run", read_history(record.rounds()))[0] == []


def test_many_rounds_and_clients_fit_into_two_megabytes(write_run):
    names = [f"client-{i:04d}" for i in range(1000)]
    coverage = {f"blocks.{i}.w": i + 1 for i in range(5)}
    rounds = [
        report(
            n,
            n / 500,
            clients=tuple(_client(name) for name in names[n % 900 : n % 900 + 10]),
            asked=tuple(names[n % 900 : n % 900 + 11]),
            refused={names[n % 900 + 10]: f"no reply within {n} s"},
            coverage=coverage,
            accuracy_by_client={name: (5, 0.5) for name in names[:10]},
            bytes_by_client={name: (10, 10) for name in names[n % 900 : n % 900 + 11]},
        )
        for n in range(500)
    ]
    record = write_run(rounds)
    write_page(record)
    assert record.page_path.stat().st_size < 2 * MIB


def test_twenty_rows_are_drawn_apart(rows):
    line = read_line(rows[0])
    lines = [dataclasses.replace(line, name=f"row {i}") for i in range(20)]
    picture = by_round(lines)
    written = " ".join(texts_of(picture.svg()))
    assert all(f"row {i}" in written for i in range(20))
    assert len(picture.figure.axes) == 20


def test_each_picture_and_table_of_a_run_is_a_file(record, tmp_path):
    folder = tmp_path / "files"
    write_files(record, folder)
    stems = {path.stem for path in folder.glob("*.svg")}
    assert {"accuracy-by-round", "accuracy-by-bytes", "refusals"} <= stems <= set(NAMES)
    assert {path.stem for path in folder.glob("*.png")} == stems
    tables = {path.stem for path in folder.glob("*.csv")}
    assert tables == {path.stem for path in folder.glob("*.md")}
    assert "who-took-part" in tables


def test_files_that_cannot_be_written_are_an_error_with_the_way_out(record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'file'}")):
        write_files(record, tmp_path / "file")
