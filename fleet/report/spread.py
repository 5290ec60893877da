"""How far the clients' own accuracies lie apart, where clients evaluate."""

from collections.abc import Sequence

import numpy as np

from fleet.report.history import History, Line
from fleet.report.names import labels
from fleet.report.style import (
    COLOURS,
    Picture,
    new_figure,
    plain_axes,
    styled,
)

# What stands on a page in place of the picture.
NOT_MEASURED = (
    "How accuracy differs from client to client is not on record: it was measured on held-out "
    "images of the server's. Where the setting evaluation is clients, each client measures it on "
    "validation images of its own."
)
_MOST_DOTS = 200  # a row; of more clients the box alone is drawn
_LABEL = 20  # characters of a row's name, which has two lines
_GOLDEN = 0.618034  # multiples of it, modulo 1, are spread evenly: dots beside their row


def spread_by_round(history: History) -> Picture | None:
    """Clients' accuracies by round; None if no client told any."""
    if not history.client_accuracy:
        return None
    from matplotlib.ticker import MaxNLocator

    rounds = sorted(history.client_accuracy)
    shares = np.array(
        [np.quantile(history.client_accuracy[r], (0, 0.25, 0.5, 0.75, 1)) for r in rounds]
    )
    lowest, quarter, median, three, highest = shares.T
    with styled():
        figure = new_figure(3.3)
        axes = figure.subplots()
        plain_axes(axes)
        blue = COLOURS[0]
        if len(rounds) == 1:
            axes.vlines(rounds, lowest, highest, color=blue, lw=1.2)
            axes.vlines(rounds, quarter, three, color=blue, lw=7, alpha=0.4)
        axes.fill_between(rounds, lowest, highest, color=blue, alpha=0.15, lw=0)
        axes.fill_between(rounds, quarter, three, color=blue, alpha=0.3, lw=0)
        axes.plot(rounds, median, "o-", color=blue, ms=4, markevery=max(1, len(rounds) // 12))
        places = [(lowest[-1], "worst"), (median[-1], "median"), (highest[-1], "best")]
        if highest[-1] - lowest[-1] > 15:
            for height, word in places:
                axes.annotate(
                    word, (rounds[-1], height), (6, 0), textcoords="offset points", va="center"
                )
        axes.set(xlabel="round", ylabel="accuracy of a client (%)", ylim=(-3, 103))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    return Picture(
        "client-accuracy",
        "Accuracy of each client",
        "The global model on each client's own validation images. Line: median client. Dark: the "
        "middle half of the clients. Light: from the worst client to the best.",
        f"In round {rounds[-1]}, {len(history.client_accuracy[rounds[-1]])} clients: worst "
        f"{lowest[-1]:.1f} %, a quarter below {quarter[-1]:.1f} %, median {median[-1]:.1f} %, a "
        f"quarter above {three[-1]:.1f} %, best {highest[-1]:.1f} %.",
        figure,
    )


def spread_by_row(lines: Sequence[Line]) -> Picture | None:
    """Clients' accuracies in the last evaluated round, a row a line, all seeds together."""
    rows = [(line.name, values) for line in lines if len(values := _last(line))]
    if not rows:
        return None
    with styled():
        figure = new_figure(0.9 + 0.36 * len(rows))
        axes = figure.subplots()
        plain_axes(axes, grid="x")
        for place, (_, values) in enumerate(rows):
            lowest, quarter, median, three, highest = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
            blue = COLOURS[0]
            if len(values) <= _MOST_DOTS:
                beside = (np.arange(len(values)) * _GOLDEN % 1 - 0.5) * 0.5
                axes.plot(values, place + beside, "o", ms=3, color=blue, alpha=0.35, mew=0)
            axes.hlines(place, lowest, highest, color=blue, lw=1)
            axes.hlines(place, quarter, three, color=blue, lw=5, alpha=0.45)
            axes.vlines(median, place - 0.3, place + 0.3, color="#222222", lw=2)
        names = labels([name for name, _ in rows], _LABEL, lines=2)
        axes.set_yticks(range(len(rows)), names, linespacing=1)
        axes.set(xlabel="accuracy of a client (%)", xlim=(-2, 102), ylim=(len(rows) - 0.5, -0.5))
    return Picture(
        "client-accuracy",
        "Accuracy of each client",
        "The global model on each client's own validation images after the last round, clients of "
        "all seeds together. Upright: median. Thick: the middle half. Thin: from worst to best.",
        "; ".join(
            f"{name}: {len(v)} clients, worst {v.min():.1f} %, median {np.median(v):.1f} %, best "
            f"{v.max():.1f} %"
            for name, v in rows
        )
        + ".",
        figure,
    )


def _last(line: Line) -> np.ndarray:
    told = [run.client_accuracy for run in line.runs if run.client_accuracy]
    last = [accuracies[max(accuracies)] for accuracies in told]
    return np.sort(np.concatenate(last)) if last else np.array([])
