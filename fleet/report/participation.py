"""Who took part: every client's share in the rounds, and that of those who train as many blocks.

A fleet whose weaker devices are seldom asked, often late or always refused ends
with a model of the stronger ones' data. Shares by k show it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fleet.records import RoundReport


@dataclass(frozen=True, kw_only=True)
class Part:
    """One client's part in all rounds that were to train.

    Attributes:
        blocks: k, of its last update that counted; None if none did: no other
            message tells it.
        asked: rounds in which it was to train: as many as counted, refused and late.
        counted: rounds in which its update counted.
        refused: rounds in which its reply, or its absence, did not count.
        late: rounds that went on without it, as their goal was reached.
        bytes_up, bytes_down: of all messages, evaluation and head start included;
            0 down in records of versions that did not keep them.
        full_states: rounds in which it was sent the state itself.
        killed: rounds that counted and before which its training had been ended for
            want of memory; it plans smaller from there on.
    """

    name: str
    blocks: int | None
    asked: int
    counted: int
    refused: int
    late: int
    bytes_up: int
    bytes_down: int
    full_states: int
    killed: int = 0


@dataclass(frozen=True, kw_only=True)
class Group:
    """The clients that train as many blocks.

    Attributes:
        blocks: as in `Part`.
        clients: how many they are.
        asked, counted, refused, late, bytes_up, bytes_down, full_states, killed: sums
            over them.
        share_of_fleet, share_of_asked, share_of_counted: 0…1, of all groups; None if
            there is nothing to share. Alike where nobody is favoured.
    """

    blocks: int | None
    clients: int
    asked: int
    counted: int
    refused: int
    late: int
    bytes_up: int
    bytes_down: int
    full_states: int
    share_of_fleet: float | None
    share_of_asked: float | None
    share_of_counted: float | None
    killed: int = 0


def participation(rounds: Iterable[RoundReport]) -> list[Part]:
    """A part for each client that was sent anything, in order of names.

    Round 0 trains nobody: of it only bytes count. So does an evaluation that was
    refused: the update may have counted nevertheless.
    """
    sums: dict[str, Counter[str]] = {}
    blocks: dict[str, int] = {}
    for report in rounds:
        trained = {client.name: client.blocks for client in report.clients}
        blocks |= trained
        asked = _asked(report) if report.server_round else ()
        for name in asked:
            end = "counted" if name in trained else "late" if name in report.late else "refused"
            sums.setdefault(name, Counter()).update({"asked": 1, end: 1})
        for client in report.clients:
            if client.metrics.get("killed-before"):
                sums.setdefault(client.name, Counter()).update({"killed": 1})
        for name, (up, down) in report.bytes_by_client.items():
            # A sender that nothing was sent to is none of the fleet's.
            if down or name in sums:
                sums.setdefault(name, Counter()).update({"bytes_up": up, "bytes_down": down})
        for name in report.full_state:
            sums.setdefault(name, Counter()).update({"full_states": 1})
    return [
        Part(name=name, blocks=blocks.get(name), **{key: counts[key] for key in _SUMS})
        for name, counts in sorted(sums.items())
    ]


def by_blocks(parts: Sequence[Part]) -> list[Group]:
    """Parts summed up by k, from few blocks to many; clients whose k is unknown last."""
    groups: dict[int | None, list[Part]] = {}
    for part in sorted(parts, key=lambda part: (part.blocks is None, part.blocks)):
        groups.setdefault(part.blocks, []).append(part)
    asked, counted = (sum(getattr(part, key) for part in parts) for key in ("asked", "counted"))
    rows = []
    for blocks, members in groups.items():
        sums = {key: sum(getattr(part, key) for part in members) for key in _SUMS}
        rows.append(
            Group(
                blocks=blocks,
                clients=len(members),
                **sums,
                share_of_fleet=share(len(members), len(parts)),
                share_of_asked=share(sums["asked"], asked),
                share_of_counted=share(sums["counted"], counted),
            )
        )
    return rows


def share(part: int, whole: int) -> float | None:
    """0…1; None of nothing."""
    return part / whole if whole else None


_SUMS = (
    "asked",
    "counted",
    "refused",
    "late",
    "bytes_up",
    "bytes_down",
    "full_states",
    "killed",
)


def _asked(report: RoundReport) -> Sequence[str]:
    """Who was to train. Older records tell only of whom something came of."""
    if report.asked:
        return report.asked
    trained = [client.name for client in report.clients]
    failed = [n for n, why in report.refused.items() if not why.startswith("evaluation: ")]
    return [*trained, *(name for name in failed if name not in trained)]
