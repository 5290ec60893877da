"""Versions of the server's state: what a client holds, and the steps from there to the newest.

A client that holds an older version is sent the encoded steps since, not the
state. Every client that follows them comes to the same state, bit for bit.
What a step leaves out is in the next one, as each starts from what the
clients hold and not from what the server meant. Version 0 is the pretrained
model itself, which every device has: no first download is needed.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleet.codec.names import parse_codec
from fleet.codec.payload import Payload, decode, encode
from fleet.errors import UpdateError
from fleet.plan import UpdatePlan
from fleet.state import Arrays, TrainableState

FULL_STATE = "float32"  # a state that must come out bit for bit


@dataclass(frozen=True)
class Download:
    """What brings a client to the newest version.

    Attributes:
        versions: of the states before, between and after the payloads; of the
            newest alone, if the one payload is that state itself.
        payloads: steps, the oldest first.
    """

    versions: tuple[str, ...]
    payloads: tuple[Payload, ...]

    @property
    def is_full_state(self) -> bool:
        """Whether it takes no held version to use this."""
        return len(self.versions) == len(self.payloads) == 1

    @property
    def nbytes(self) -> int:
        """Size of all payloads."""
        return sum(payload.nbytes for payload in self.payloads)


class Versions:
    """The server's side: the newest version, and the steps that lead to it.

    Steps are kept for as long as all of them are smaller than the state; a
    client that holds an older version is sent the state.

    Args:
        initial: version 0.
        codec: of the steps. With `float32` every download is the state itself.
    """

    def __init__(self, initial: TrainableState, codec: str) -> None:
        self.state = initial
        self._codec = codec
        self._versions = [version_of(initial)]
        self._steps: list[Payload] = []

    @property
    def newest(self) -> str:
        """The version that a download leads to."""
        return self._versions[-1]

    def advance(self, target: TrainableState, seed: Sequence[int]) -> None:
        """Make the newest version what is closest to `target` that the codec can say.

        Args:
            target: of the same plan.
            seed: of stochastic rounding.
        """
        if all((target.tensors[n] == a).all() for n, a in self.state.tensors.items()):
            return
        if parse_codec(self._codec) == parse_codec(FULL_STATE):
            self.state = target
            self._versions = [version_of(target)]
            return
        plan = target.plan
        update = {
            s.name: target.tensors[s.name] - (0 if s.is_statistic else self.state.tensors[s.name])
            for s in plan.specs
        }
        step = encode(update, plan, self._codec, seed)
        self.state = moved(self.state, decode(step, plan))
        self._steps.append(step)
        self._versions.append(version_of(self.state))
        while sum(s.nbytes for s in self._steps) > plan.nbytes:
            del self._steps[0], self._versions[0]

    def snapshot(self) -> dict[str, Any]:
        """All that it holds, as plain values and arrays."""
        steps = [(step.codec, bytes(step.data)) for step in self._steps]
        return {
            "state": dict(self.state.tensors),
            "versions": list(self._versions),
            "steps": steps,
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Be as when the snapshot was taken, under the same plan."""
        plan = self.state.plan
        self.state = TrainableState(plan, snapshot["state"])
        self._versions = list(snapshot["versions"])
        self._steps = [Payload(codec, plan.digest, data) for codec, data in snapshot["steps"]]

    def download(self, held: str | None) -> Download:
        """What brings a client from the version that it holds to the newest.

        Args:
            held: that version; None: none.
        """
        if held in self._versions:
            start = self._versions.index(held)
            return Download(tuple(self._versions[start:]), tuple(self._steps[start:]))
        return Download((self.newest,), (encode(self.state.tensors, self.state.plan, FULL_STATE),))


def follow(download: Download, plan: UpdatePlan, held: Iterable[TrainableState]) -> TrainableState:
    """The client's side: the newest version.

    Args:
        download: as it came.
        plan: of all these states.
        held: states that are there to start from, the newest first; asked for
            only as far as they are needed.

    Raises:
        UpdateError: if a payload is damaged, or comes to another version than
            the server's.
        UnknownVersion: if no held state is one that the steps lead on from.
    """
    newest = download.versions[-1]
    if download.is_full_state:
        state = TrainableState(plan, decode(download.payloads[0], plan))
        return _checked(state, newest)
    for state in held:
        version = version_of(state)
        if version in download.versions:
            for step in download.payloads[download.versions.index(version) :]:
                state = moved(state, decode(step, state.plan))
            return _checked(state, newest)
    raise UnknownVersion(
        f"this device holds no version from which the server's {len(download.payloads)} steps "
        f"lead to {newest}; it will be sent the whole state"
    )


class UnknownVersion(UpdateError):
    """A client cannot follow steps: it holds none of the versions that they start from."""


def moved(state: TrainableState, update: Arrays) -> TrainableState:
    """A state after an update: deltas added, running statistics replaced."""
    by_name = state.plan.by_name
    tensors = {
        name: update[name] if by_name[name].is_statistic else array + update[name]
        for name, array in state.tensors.items()
    }
    return TrainableState(state.plan, tensors)


def version_of(state: TrainableState) -> str:
    """Sixteen hexadecimal digits of SHA-256 over a state's bits."""
    digest = hashlib.sha256(state.plan.digest.encode())
    for spec in state.plan.specs:
        digest.update(np.ascontiguousarray(state.tensors[spec.name], "<f4"))
    return digest.hexdigest()[:16]


def _checked(state: TrainableState, version: str) -> TrainableState:
    if version_of(state) != version:
        raise UpdateError(
            f"the state received is version {version_of(state)}, the server's is {version}; "
            f"it changed on the way, or the server runs another version of this program"
        )
    return state
