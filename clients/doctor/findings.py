"""What a check finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

OK, WARNING, PROBLEM, UNKNOWN = STATES = ("ok", "warning", "problem", "unknown")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        check: what was looked at.
        state: ok; warning: works, but not as well as it could; problem: this
            blocks; unknown: could not be seen.
        fact: what was seen.
        remedy: what to do about it; empty where nothing needs doing.
    """

    check: str
    state: str
    fact: str
    remedy: str = ""


def problem(check: str, error: object, remedy: str = "") -> Finding:
    """An error as a finding: what is after its last semicolon is the way out.

    Args:
        check: what was looked at.
        error: or its text.
        remedy: of one that names none.
    """
    fact, _, told = str(error).rpartition("; ")
    return Finding(check, PROBLEM, fact or told, told if fact else remedy)


def report(findings: Sequence[Finding]) -> dict[str, object]:
    """What `--format json` prints: `ready`, how many findings of each state, and all of them."""
    counts = {state: sum(f.state == state for f in findings) for state in STATES}
    return {
        "ready": not counts[PROBLEM],
        "counts": counts,
        "findings": [asdict(finding) for finding in findings],
    }


def verdict(findings: Sequence[Finding]) -> str:
    """The last line: what blocks, in words."""
    blocking = [f.check for f in findings if f.state == PROBLEM]
    warnings = sum(f.state == WARNING for f in findings)
    noted = f"; {warnings} warning{'s' if warnings > 1 else ''}" if warnings else ""
    if blocking:
        return f"Not ready: {', '.join(dict.fromkeys(blocking))}{noted}."
    return f"Nothing blocks{noted}."
