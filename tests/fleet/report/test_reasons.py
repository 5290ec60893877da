"""Reasons in short, held against what the code that refuses really says."""

import ast
import re
from pathlib import Path

import pytest

import fleet
import strategies
from fleet.report.reasons import KINDS, in_short


def texts_in(folder):
    """All texts of a package's modules, 7 for what they have filled in."""
    for path in sorted(Path(folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (n.value if isinstance(n, ast.Constant) else "7" for n in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_kind_is_one_that_the_code_gives():
    folders = Path(fleet.__file__).parent / "codec", Path(strategies.__file__).parent
    said = [text for folder in folders for text in texts_in(folder)]
    said += [f"reply of 7 carries {text}" for text in said if len(text) < 20]  # what is filled in
    assert [p for p in KINDS if not any(re.search(p, text) for text in said)] == []


@pytest.mark.parametrize(
    ("reason", "short"),
    [
        (
            "update is 41.2 long, the median of those who train the same tensors is 4.1; above 5 "
            "times that clipped_mean leaves it out",
            "much longer than the others' updates",
        ),
        ("blocks.3.w holds NaN or infinity; lower the learning rate", "not finite"),
        ("loss must be a finite number, got nan", "not finite"),
        (
            "evaluation: accuracy must be from 0 to 1, got 1.5",
            "impossible loss or measurement",
        ),
        (
            "round abandoned: with this round's updates w would hold NaN or infinity; the model "
            "stays.",
            "round abandoned",
        ),
        ("head.w has shape (3, 4), plan 0f3aa27b expects (2,); run the server's plan",
         "not of the server's plan"),
        # Of no kind that is known: the first clause.
        ("the disk is full, free 7 MiB; or buy another", "the disk is full"),
        ("KeyError: 'blocks.3.w'", "KeyError: 'blocks.…w'"),
        ("cannot read /data/12 (denied): try", "cannot read /data/…"),
        ("evaluation: no images", "evaluation: no images"),
        ("; ", "; "),
    ],
)  # fmt: skip
def test_a_reason_in_short(reason, short):
    assert in_short(reason) == short
