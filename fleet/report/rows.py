"""What a comparison shows: rows, each of several runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleet.records import RunRecord


@dataclass(frozen=True)
class Row:
    """One configuration of a comparison.

    Attributes:
        name: as tables and pictures label it.
        runs: seed → its run, which ended well.
        failed: seed → why there is none.
    """

    name: str
    runs: Mapping[int, RunRecord]
    failed: Mapping[int, str] = field(default_factory=dict)
