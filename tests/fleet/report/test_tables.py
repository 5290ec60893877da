import html.parser
import io
import re
from dataclasses import replace

from rich.console import Console

from fleet.records import ClientReport, RoundReport
from fleet.report import Grid, as_html, as_text, tables


def grid(rounds, title):
    (found,) = [one for one in tables(rounds) if one.title == title]
    return found


def drawn(grid):
    console = Console(file=io.StringIO(), width=80)
    console.print(as_text(grid))
    return console.file.getvalue()


def many(count):
    """A round of so many clients, every second at k = 5."""
    clients = tuple(
        ClientReport(
            name=f"pi-{number:03}",
            blocks=1 + 4 * (number % 2),
            num_examples=1,
            loss=0.0,
            peak_bytes=0,
            seconds=0.0,
        )
        for number in range(count)
    )
    names = tuple(client.name for client in clients)
    return RoundReport(
        server_round=1,
        accuracy=None,
        loss=None,
        clients=clients,
        asked=names,
        stepped=True,
        bytes_by_client=dict.fromkeys(names, (2**20, 2**21)),
    )


def test_the_tables_fit_a_terminal_of_eighty_columns(rounds):
    grids = tables(rounds, title="run")
    assert [one.title for one in grids] == [
        "run",
        "Who took part",
        "Shares by k",
        "Bytes by what they are",
    ]
    for one in grids:
        text = drawn(one)
        for column in one.columns:
            assert column in text
        assert "…" not in text


def test_who_took_part_is_a_row_a_client(rounds):
    found = grid(rounds, "Who took part")
    assert found.columns == (
        *("client", "k", "asked", "counted", "refused", "late"),
        *("share %", "up MiB", "down MiB", "full"),
    )
    assert found.rows == [
        ("pi-01", "1", "3", "2", "1", "0", "66.7", "3.00", "3.00", "1"),
        ("pi-02", "3", "2", "1", "1", "0", "50.0", "3.00", "3.00", "1"),
        ("pi-03", "–", "2", "0", "1", "1", "0.0", "1.00", "2.00", "1"),
    ]
    assert found.note.endswith("Replies that came after their round and were dropped: 1.")
    assert "dropped" not in grid(rounds[:2], "Who took part").note


def test_many_clients_are_a_row_for_each_k():
    assert len(grid([many(30)], "Who took part").rows) == 30
    found = grid([many(31)], "Who took part")
    assert found.columns[:2] == ("k", "clients")
    assert found.rows == [
        ("1", "16", "16", "16", "0", "0", "100.0", "16.00", "32.00", "0"),
        ("5", "15", "15", "15", "0", "0", "100.0", "15.00", "30.00", "0"),
    ]
    assert found.note.endswith("--format json has every client.")


def killed(report, *names):
    """The same round, before which these clients' trainings were killed for memory."""
    metrics = {"killed-before": 1, "memory-limit-bytes": 2**24}
    clients = (replace(c, metrics=metrics) if c.name in names else c for c in report.clients)
    return replace(report, clients=tuple(clients))


def test_a_device_that_was_killed_for_memory_is_seen():
    rounds = [killed(many(2), "pi-001"), killed(many(2), "pi-001"), many(2)]
    found = grid(rounds, "Who took part")
    assert found.columns[-1] == "killed"
    assert [(row[0], row[-1]) for row in found.rows] == [("pi-000", "0"), ("pi-001", "2")]
    assert "the device plans smaller from there on" in found.note
    assert "killed" in drawn(found) and "…" not in drawn(found)
    many_rows = grid([killed(many(31), "pi-001", "pi-003", "pi-004")], "Who took part").rows
    assert [(row[0], row[-1]) for row in many_rows] == [("1", "1"), ("5", "2")]


def test_where_nobody_was_killed_there_is_no_such_column(rounds):
    assert "killed" not in grid(rounds, "Who took part").columns
    assert "killed" not in grid(rounds, "Who took part").note


def test_a_k_that_counts_for_less_than_its_share_is_seen(rounds):
    assert grid(rounds, "Shares by k").rows == [
        ("1", "1", "33.3", "42.9", "66.7", "2.00"),
        ("3", "1", "33.3", "28.6", "33.3", "1.00"),
        ("–", "1", "33.3", "28.6", "0.0", "0.00"),
    ]


def test_a_fleet_of_one_k_has_no_shares_to_compare():
    one_k = replace(many(4), clients=tuple(replace(c, blocks=3) for c in many(4).clients))
    assert [one.title for one in tables([one_k])] == ["", "Who took part"]


def test_bytes_of_each_role_stand_with_their_share_of_the_link(rounds):
    found = grid(rounds[1:2], "Bytes by what they are")
    assert found.rows == [
        ("weight", "2,000", "66.7", "750", "44.1"),
        ("bias", "40", "1.3", "0", "0.0"),
        ("var", "0", "0.0", "250", "14.7"),
        ("headers", "960", "32.0", "700", "41.2"),
        ("all", "3,000", "100.0", "1,700", "100.0"),
    ]


def test_an_abandoned_round_is_marked_in_its_row_alone(rounds):
    found = tables(rounds)[0]
    assert [row[0] for row in found.rows] == ["0", "1", "2", "3*"]
    assert found.note == "* abandoned: too few updates counted, and the model stayed as it was."
    assert tables(rounds[:3])[0].note == ""


def test_an_older_record_has_dashes_for_what_it_does_not_tell(old_rounds):
    grids = tables(old_rounds)
    assert [one.title for one in grids] == ["", "Who took part", "Shares by k"]
    assert grids[1].rows[0] == ("pi-01", "1", "3", "2", "1", "0", "66.7", "–", "–", "–")
    assert [row[0] for row in grids[0].rows] == ["0", "1", "2", "3*"]


def test_a_run_before_its_first_round_has_an_empty_table():
    (found,) = tables([])
    assert found.rows == []
    assert "acc. %" in drawn(found)
    assert "<th scope=col>acc. %</th>" in as_html(found)


def test_a_name_is_markup_nowhere():
    name = "[red]<b>pi[/red]"
    named = Grid("[bold]t", ("client", "k"), [(name, "1")], "[i]n", named=True)
    text = drawn(named)
    assert name in text and "[bold]t" in text and "[i]n" in text
    shown = []
    parser = html.parser.HTMLParser()
    parser.handle_data = shown.append
    parser.feed(as_html(named))
    assert shown == ["[bold]t", "client", "k", name, "1", "[i]n"]


def test_every_table_of_a_page_scrolls_by_itself(rounds):
    for one in tables(rounds):
        assert len(re.findall("<div class=wide [^>]*><table", as_html(one))) == 1
        assert as_html(one).count("<table") == 1
