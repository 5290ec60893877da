"""A run as values, for scripts."""

from dataclasses import asdict
from typing import Any

from fleet.records import RunRecord, summarise
from fleet.report.participation import by_blocks, participation
from fleet.report.traffic import bytes_by_role


def run_values(record: RunRecord) -> dict[str, Any]:
    """A run as one object: its summary, whether it has ended, and its rounds.

    Returns:
        The keys of `summary.json`, or of the totals so far (`rounds` alone
        before the first); `ended`; `participation`: `clients`, a `Part` each,
        and `by_blocks`, a `Group` each; `bytes_by_role`: link → role → bytes;
        and `per_round`, as in `rounds.jsonl`.

    Raises:
        ConfigError: if there is no run, or its record is damaged.
    """
    rounds = list(record.rounds())
    ended = record.summary_path.is_file()
    so_far = summarise(rounds) if rounds else {"rounds": 0}
    totals = record.summary() if ended else so_far
    parts = participation(rounds)
    return totals | {
        "ended": ended,
        "participation": {
            "clients": [asdict(part) for part in parts],
            "by_blocks": [asdict(group) for group in by_blocks(parts)],
        },
        "bytes_by_role": bytes_by_role(rounds),
        "per_round": [asdict(report) for report in rounds],
    }
