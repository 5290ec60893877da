"""The tables of a run."""

from collections.abc import Iterable, Sequence

from fleet.records import RoundReport
from fleet.report.covered import coverage_grid
from fleet.report.grid import Grid
from fleet.report.history import History, read_history
from fleet.report.participation import Group, Part, by_blocks, participation, share
from fleet.report.refused import refusals_grid
from fleet.report.rounds import COLUMNS, MIB, round_cells
from fleet.report.traffic import bytes_by_role

# More clients than that are no longer seen at a glance.
_MOST_ROWS = 30


def tables(rounds: Iterable[RoundReport], title: str = "") -> list[Grid]:
    """A run's tables: rounds first; the others as far as the record tells of them.

    Args:
        title: of the rounds' table.
    """
    rounds = list(rounds)
    parts = participation(rounds)
    groups = by_blocks(parts)
    grids = [_rounds(rounds, title)]
    if parts:
        late_replies = sum(report.late_replies for report in rounds)
        grids.append(_who_took_part(parts, groups, late_replies))
    if len(groups) > 1:
        grids.append(_shares(groups))
    roles = bytes_by_role(rounds)
    if roles["up"]:
        grids.append(_roles(roles["up"], roles["down"]))
    return grids


def all_tables(rounds: Sequence[RoundReport], history: History | None = None) -> list[Grid]:
    """The same, who trained what, and who was refused; for a page and for files.

    Args:
        history: of these rounds, where it is there already.
    """
    history = history or read_history(rounds)
    others = coverage_grid(history), refusals_grid(history)
    return [*tables(rounds, "Rounds"), *(grid for grid in others if grid)]


def _rounds(rounds: Sequence[RoundReport], title: str) -> Grid:
    """A line a round; a star at one that was abandoned."""
    rows = []
    for report in rounds:
        number, *cells = round_cells(report)
        rows.append((number + "*" * report.abandoned, *cells))
    note = "* abandoned: too few updates counted, and the model stayed as it was."
    return Grid(title, COLUMNS, rows, note if any(report.abandoned for report in rounds) else "")


def _who_took_part(parts: Sequence[Part], groups: Sequence[Group], late_replies: int) -> Grid:
    """A row a client, or a row for each k where clients are many."""
    columns = ("asked", "counted", "refused", "late", "share %", "up MiB", "down MiB", "full")
    note = (
        "k: blocks trained, where an update told. share: of the times asked, those that counted. "
        "full: rounds in which the whole state was sent, not steps to it."
    )
    if late_replies:
        note += f" Replies that came after their round and were dropped: {late_replies}."
    killed = any(part.killed for part in parts)
    if killed:
        columns += ("killed",)
        note += (
            " killed: rounds before which training had been ended for want of memory; the device "
            "plans smaller from there on."
        )
    if len(parts) <= _MOST_ROWS:
        rows = [(part.name, _blocks(part), *_counts(part, killed)) for part in parts]
        return Grid("Who took part", ("client", "k", *columns), rows, note, named=True)
    rows = [(_blocks(group), str(group.clients), *_counts(group, killed)) for group in groups]
    note += " --format json has every client."
    return Grid("Who took part", ("k", "clients", *columns), rows, note)


def _counts(part: Part | Group, killed: bool) -> tuple[str, ...]:
    told = part.bytes_down > 0  # older records do not
    return (
        str(part.asked),
        str(part.counted),
        str(part.refused),
        str(part.late),
        _percent(share(part.counted, part.asked)),
        f"{part.bytes_up / MIB:.2f}" if told else "–",
        f"{part.bytes_down / MIB:.2f}" if told else "–",
        str(part.full_states) if told else "–",
        *([str(part.killed)] if killed else []),
    )


def _shares(groups: Sequence[Group]) -> Grid:
    rows = [
        (
            _blocks(group),
            str(group.clients),
            _percent(group.share_of_fleet),
            _percent(group.share_of_asked),
            _percent(group.share_of_counted),
            _ratio(group.share_of_counted, group.share_of_fleet),
        )
        for group in groups
    ]
    return Grid(
        "Shares by k",
        ("k", "clients", "fleet %", "asked %", "counted %", "counted ÷ fleet"),
        rows,
        "fleet: of the clients that were sent anything. asked differs from it by the luck of the "
        "draw, counted from asked by who is refused or late; below 1 these clients count for less "
        "than they are many.",
    )


def _roles(up: dict[str, int], down: dict[str, int]) -> Grid:
    all_up, all_down = sum(up.values()), sum(down.values())
    rows = [
        (
            role,
            f"{up[role]:,}",
            _percent(share(up[role], all_up)),
            f"{down[role]:,}",
            _percent(share(down[role], all_down)),
        )
        for role in up
    ]
    total = ("all", f"{all_up:,}", _percent(share(1, 1)), f"{all_down:,}", _percent(share(1, 1)))
    return Grid(
        "Bytes by what they are",
        ("tensors", "up bytes", "up %", "down bytes", "down %"),
        [*rows, total],
        "An update that was refused is all headers.",
        named=True,
    )


def _blocks(part: Part | Group) -> str:
    return "–" if part.blocks is None else str(part.blocks)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _ratio(value: float | None, whole: float | None) -> str:
    return f"{value / whole:.2f}" if value is not None and whole else "–"
