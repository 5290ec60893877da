"""Who was refused, and why."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from fleet.report.grid import Grid
from fleet.report.history import History, Line
from fleet.report.names import labels, lines_in, printable
from fleet.report.reasons import in_short
from fleet.report.style import (
    COLOURS,
    MARKERS,
    QUIET,
    Picture,
    new_figure,
    plain_axes,
    styled,
)

_MOST_CLIENTS = 20  # rows of the picture
_MOST_ROWS = 50  # of the table
_MOST_KINDS = 5  # colours; the rest is drawn as one
_MOST_MARKS = 1500  # beyond, the marks are a bitmap inside the picture
_LABEL = 18  # characters of a line of a name
_REASON = 50  # of a line of a reason, which has two
_MOST_REFUSED = 20  # rows of a comparison's table
_WORDS = 300  # of a reason in the table
_OTHER = "other reasons"


def refusals_by_round(history: History) -> Picture | None:
    """A row a client, a mark where it was refused; None if nobody was."""
    if not history.refused:
        return None
    from matplotlib.ticker import MaxNLocator

    times = Counter(name for _, name, _ in history.refused)
    clients = [name for name, _ in _ranked(times)[:_MOST_CLIENTS]]
    kinds = _kinds(in_short(why) for _, _, why in history.refused)
    place = {name: number for number, name in enumerate(clients)}
    with styled():
        figure = new_figure(0.9 + 0.2 * len(clients) + 0.19 * _lines(kinds))
        axes = figure.subplots()
        plain_axes(axes)
        for number, kind in enumerate(kinds):
            at = [
                (server_round, place[name])
                for server_round, name, why in history.refused
                if name in place and _group(in_short(why), kinds) == kind
            ]
            axes.plot(
                [x for x, _ in at], [y for _, y in at], ls="", ms=6, mew=0,
                marker="X" if kind == _OTHER else MARKERS[number],
                color=QUIET if kind == _OTHER else COLOURS[number],
                rasterized=len(history.refused) > _MOST_MARKS,
            )  # fmt: skip
        axes.set_yticks(range(len(clients)), labels(clients, _LABEL))
        axes.set(xlabel="round", ylim=(len(clients) - 0.5, -0.5))
        axes.set_xlim(-0.5, history.last_round + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        _legend(figure, axes.lines, kinds)
    others = len(times) - len(clients)
    return Picture(
        "refusals",
        "Refused, by client and round",
        "A mark: what the client sent in that round, or that it sent nothing, did not count."
        + (f" The {len(clients)} most often refused of {len(times)}." if others else ""),
        f"{len(history.refused)} refusals of {len(times)} clients: {_counted(history)}.",
        figure,
    )


def refusals_by_row(lines: Sequence[Line]) -> Picture | None:
    """Refusals in % of the messages that asked for an update, a bar a row; None if none."""
    if not any(run.refused for line in lines for run in line.runs):
        return None
    counts = [
        Counter(in_short(why) for run in line.runs for _, _, why in run.refused) for line in lines
    ]
    asked = [sum(run.asked for run in line.runs) for line in lines]
    kinds = _kinds(kind for count in counts for kind in count.elements())
    shares = [
        {
            kind: 100 * sum(n for k, n in count.items() if _group(k, kinds) == kind) / max(1, all_)
            for kind in kinds
        }
        for count, all_ in zip(counts, asked, strict=True)
    ]
    names = labels([line.name for line in lines], _LABEL, lines=2)
    with styled():
        height = 0.26 if lines_in(names) == 1 else 0.36
        figure = new_figure(0.9 + height * len(lines) + 0.19 * _lines(kinds))
        axes = figure.subplots()
        plain_axes(axes, grid="x")
        left = [0.0] * len(lines)
        bars = []
        for number, kind in enumerate(kinds):
            widths = [share[kind] for share in shares]
            colour = QUIET if kind == _OTHER else COLOURS[number]
            bars.append(
                axes.barh(range(len(lines)), widths, 0.7, left, color=colour, edgecolor="white")
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(lines)), names, linespacing=1)
        axes.set(xlabel="refused, of those asked (%)", ylim=(len(lines) - 0.5, -0.5))
        _legend(figure, bars, kinds)
    return Picture(
        "refusals",
        "Refused, and why",
        "Refusals in % of the messages that asked for an update, all seeds together.",
        "; ".join(
            f"{line.name}: {sum(share.values()):.1f} %"
            for line, share in zip(lines, shares, strict=True)
        )
        + ".",
        figure,
    )


def refusals_grid(history: History) -> Grid | None:
    """A row a client and kind of reason, the most frequent first; None if nobody was refused."""
    rounds: dict[tuple[str, str], list[int]] = {}
    example: dict[tuple[str, str], str] = {}
    for server_round, name, why in history.refused:
        key = name, in_short(why)
        rounds.setdefault(key, []).append(server_round)
        example[key] = why
    if not rounds:
        return None
    order = sorted(rounds, key=lambda key: (-len(rounds[key]), key))
    rows = [
        (key[0], str(len(rounds[key])), ranges(rounds[key]), _cut(example[key]))
        for key in order[:_MOST_ROWS]
    ]
    note = "The reason as it was the last time."
    if hidden := len(order) - len(rows):
        note += f" {hidden} more rows are not shown; fleet report --format json has them."
    return Grid("Refused", ("client", "times", "rounds", "reason"), rows, note, named=True)


def most_refused(lines: Sequence[Line]) -> Grid | None:
    """A row a line and client, the most often refused first; None if nobody was refused."""
    times: Counter[tuple[int, str]] = Counter()
    sent: Counter[tuple[int, str]] = Counter()
    kinds: dict[tuple[int, str], Counter[str]] = {}
    for number, line in enumerate(lines):
        for run in line.runs:
            sent.update({(number, name): rounds for name, rounds in run.reached.items()})
            for _, name, why in run.refused:
                times[number, name] += 1
                kinds.setdefault((number, name), Counter())[in_short(why)] += 1
    if not times:
        return None
    order = sorted(times, key=lambda key: (-times[key], key))
    rows = [
        (
            lines[key[0]].name,
            key[1],
            f"{times[key]} of {sent[key]}",
            _cut("; ".join(f"{kind} ({n} ×)" for kind, n in _ranked(kinds[key]))),
        )
        for key in order[:_MOST_REFUSED]
    ]
    note = (
        "Rounds in which the client was refused, of those in which it was sent something or "
        "replied; all seeds together."
    )
    if hidden := len(order) - len(rows):
        note += f" {hidden} more rows are not shown."
    return Grid("Who was refused", ("row", "client", "rounds", "why"), rows, note, named=True)


def ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as `1–3, 7`; of many the first and the last."""
    runs: list[list[int]] = []
    for number in sorted({*numbers}):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(a) if a == b else f"{a}–{b}" for a, b in runs]
    return ", ".join(words if len(words) <= 6 else [*words[:3], "…", *words[-2:]])


def _kinds(reasons: Iterable[str]) -> list[str]:
    """The most frequent kinds; the rest, if there is any, as one."""
    ranked = _ranked(Counter(reasons))
    kinds = [kind for kind, _ in ranked[:_MOST_KINDS]]
    return [*kinds, _OTHER] if len(ranked) > len(kinds) else kinds


def _group(kind: str, kinds: Sequence[str]) -> str:
    return kind if kind in kinds else _OTHER


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _legend(figure, handles, kinds: Sequence[str]) -> None:
    figure.legend(
        handles,
        # Matplotlib leaves out what begins with an underscore.
        [_wrapped(kind).replace("_", " _", kind[:1] == "_") for kind in kinds],
        loc="outside lower left",
        fontsize=10.5,
        frameon=False,
        handlelength=1.2,
        handletextpad=0.5,
        labelspacing=0.3,
        borderpad=0.2,
    )


def _wrapped(kind: str) -> str:
    """A reason in up to two lines, cut between words."""
    kind = printable(" ".join(kind.split()))
    return textwrap.fill(kind, _REASON, max_lines=2, placeholder=" …", break_on_hyphens=False)


def _lines(kinds: Sequence[str]) -> int:
    """Of a legend."""
    return sum(1 + _wrapped(kind).count("\n") for kind in kinds)


def _counted(history: History) -> str:
    counts = Counter(in_short(why) for _, _, why in history.refused)
    return "; ".join(f"{n} × {kind}" for kind, n in _ranked(counts)[:_MOST_KINDS])


def _cut(reason: str) -> str:
    return reason if len(reason) <= _WORDS else f"{reason[: _WORDS - 1]}…"
