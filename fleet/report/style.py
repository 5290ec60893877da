"""How every picture looks, and its way into SVG and PNG.

A picture is 4.6 in wide: on a phone a point of its letters is a pixel, so nothing
is set smaller than 9. The same run gives the same bytes: no dates, no random ids.
"""

import contextlib
import html
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fleet.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.6  # inches
TEXT, QUIET, RULE = "#222222", "#595959", "#d9d9d9"

# Okabe and Ito's colours, told apart by colour-blind readers; lines differ in their
# dashes and points in their shape as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (3, 1)), (0, (8, 2, 2, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")

_RC = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the reader's own letters
    "svg.hashsalt": "fleet",
    "text.parse_math": False,  # a client's name may hold a dollar
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 9.5,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": QUIET,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Picture:
    """A figure with the words that go with it.

    Attributes:
        name: of its files, without an ending.
        title: what it shows.
        caption: how to read it.
        description: what there is to see, for who does not see it.
        figure: matplotlib's.
    """

    name: str
    title: str
    caption: str
    description: str
    figure: "Figure"

    def svg(self) -> str:
        """One element, that can stand in a page beside other pictures' or alone in a file."""
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with styled():
            self.figure.savefig(buffer, format="svg", dpi=200, metadata=nothing)
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        # Only in tags: text between them is the users'.
        text = re.sub(r"<[a-zA-Z][^<>]*>", lambda tag: self._with_own_ids(tag.group()), text)
        opening, rest = text.split(">", 1)
        return (
            f'{opening} role="img" aria-labelledby="{self.name}-title {self.name}-desc">'
            f'<title id="{self.name}-title">{_xml(self.title)}</title>'
            f'<desc id="{self.name}-desc">{_xml(self.description)}</desc>{rest}'
        )

    def png(self) -> bytes:
        """The same at 200 dots an inch."""
        buffer = io.BytesIO()
        with styled():
            self.figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
        return buffer.getvalue()

    def _with_own_ids(self, tag: str) -> str:
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", tag)


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw and save in the house style, whatever the user's own settings are.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'fleet-mobiletl[sim]'") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        # Of a name in a script that the PNG's letters lack; the SVG has the reader's letters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(height: float, width: float = WIDTH) -> "Figure":
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain_axes(axes: "Axes", grid: str = "both") -> None:
    """Axes with as little ink as needed."""
    axes.grid(axis=grid, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def byte_unit(largest: float) -> tuple[float, str]:
    """Bytes of the unit in which the largest is read best, and its name."""
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if largest >= size:
            return size, name
    return 1, "bytes"


def _xml(text: str) -> str:
    return html.escape("".join(c if c.isprintable() else " " for c in text))
