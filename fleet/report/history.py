"""What pictures show of a run, gathered in one pass over its rounds."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fleet.records import RoundReport
from fleet.report.rows import Row


@dataclass
class History:
    """One run, as pictures need it.

    Attributes:
        rounds, accuracy, sent: of each round whose accuracy is known: its number,
            the accuracy in %, and the bytes of both links up to its end.
        last_round: the last on record.
        peak_bytes: the largest peak of any client in any round; 0 if none told.
        client_accuracy: round → the clients' accuracies in %, ascending, where clients
            evaluate.
        coverage: round that had updates → how many counted, and block → how many
            trained the least trained tensor of the block.
        asked: messages that were to be answered with an update.
        refused: round, client and reason of all that did not count.
        reached: client → rounds in which it was sent something, or replied.
    """

    rounds: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    last_round: int = 0
    peak_bytes: int = 0
    client_accuracy: dict[int, np.ndarray] = field(default_factory=dict)
    coverage: dict[int, tuple[int, Mapping[str, int]]] = field(default_factory=dict)
    asked: int = 0
    refused: list[tuple[int, str, str]] = field(default_factory=list)
    reached: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Line:
    """A row of a comparison, or one run, before it is drawn.

    Attributes:
        name: as pictures label it.
        runs: its histories, one a seed.
    """

    name: str
    runs: Sequence[History]


def read_line(row: Row) -> Line:
    """The histories of a row's runs; every record is read once.

    Raises:
        ConfigError: if a record is damaged.
    """
    return Line(row.name, [read_history(run.rounds()) for _, run in sorted(row.runs.items())])


def read_history(rounds: Iterable[RoundReport]) -> History:
    """One pass over the rounds; nothing of a report is kept but what is drawn."""
    history, sent = History(), 0
    for report in rounds:
        number = history.last_round = report.server_round
        sent += report.bytes_up + report.bytes_down
        if report.accuracy is not None and math.isfinite(report.accuracy):
            history.rounds.append(number)
            history.accuracy.append(100 * report.accuracy)
            history.sent.append(sent)
        history.peak_bytes = max(history.peak_bytes, report.peak_client_bytes)
        told = [a for _, a in report.accuracy_by_client.values() if a is not None]
        if told:
            history.client_accuracy[number] = 100 * np.sort(np.array(told))
        if report.coverage and report.clients:
            history.coverage[number] = len(report.clients), _by_block(report.coverage)
        history.asked += len(report.asked) if number else 0
        history.refused += [(number, name, last_line(why)) for name, why in report.refused.items()]
        sent_to = (name for name, (_, down) in report.bytes_by_client.items() if down)
        history.reached.update({*report.asked, *report.refused, *sent_to})
    return history


def blocks_of(histories: Iterable[History]) -> list[str]:
    """Blocks that any run trained, the least trained first.

    Who trains a block trains all above it: in this order the head comes last.
    """
    trained: dict[str, int] = {}
    for history in histories:
        for _, counts in history.coverage.values():
            for block, count in counts.items():
                trained[block] = trained.get(block, 0) + count
    return sorted(trained, key=lambda block: (trained[block], _natural(block)))


def block_of(tensor: str) -> str:
    """The part of the model that a tensor is in.

    The first name of its path and the numbers behind it: `blocks.6.0` of
    `blocks.6.0.bn1.bias` in timm, `features.15` in torchvision, `classifier`.
    """
    return re.match(r"[^.]*(?:\.\d+(?=\.))*", tensor).group()


def kind_of(reason: str) -> str:
    """A reason without the figures in it: refusals of a kind are counted together."""
    return re.sub(r"\b[0-9a-f]{8,}\b|[-+]?\d[\d.,]*(?:e[-+]?\d+)?", "…", reason)


def last_line(reason: str) -> str:
    """A traceback says most in its last line."""
    lines = reason.strip().splitlines()
    return lines[-1].strip() if lines else "no reason given"


def _by_block(coverage: Mapping[str, int]) -> dict[str, int]:
    blocks: dict[str, int] = {}
    for tensor, count in coverage.items():
        block = block_of(tensor)
        blocks[block] = min(count, blocks.get(block, count))
    return blocks


def _natural(name: str) -> list[tuple[int, str]]:
    """10 comes after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
