"""Updates that count how they are read."""

import dataclasses
from collections import Counter
from collections.abc import Mapping

import pytest


class _Read(Mapping):
    """Arrays that are copied at each access, as those that lie on a disk are."""

    def __init__(self, client, arrays, reads):
        self._client, self._arrays, self._reads = client, arrays, reads

    def __getitem__(self, name):
        self._reads[self._client, name] += 1
        return self._arrays[name].copy()

    def __iter__(self):
        return iter(self._arrays)

    def __len__(self):
        return len(self._arrays)


@pytest.fixture
def lazily():
    """Function of updates → the same, read lazily, and (client, tensor) → times read."""

    def build(updates):
        reads = Counter()
        return [
            dataclasses.replace(
                u,
                delta=_Read(u.client, u.delta, reads),
                statistics=_Read(u.client, u.statistics, reads),
            )
            for u in updates
        ], reads

    return build


@pytest.fixture
def poisoned():
    """Function (update, factor) → the update with its delta and its statistics multiplied."""

    def build(update, delta=1.0, statistics=1.0):
        return dataclasses.replace(
            update,
            delta={name: array * delta for name, array in update.delta.items()},
            statistics={name: array * statistics for name, array in update.statistics.items()},
        )

    return build
