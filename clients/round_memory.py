"""What a client remembers, as it was before a round, however often the round is repeated.

A server that goes on after it was killed may ask for a round again that this
client has trained already, or half. So each part is written under the round
that wrote it and read as it was before: parts of rounds from the own one on
are not looked at, whether all of them were written or a few.
"""

import re
from collections.abc import Iterator, Mapping

from clients.memory import NO_FACTS, ClientMemory, Remembered
from fleet.state import Arrays

# Beside the newest: a server whose newest checkpoint is damaged goes back two rounds.
OLDER = 2


class RoundMemory:
    """One client's memory in one round: reads what is older, writes what is its own.

    Args:
        memory: of the client and run; `PART-000012` is what round 6 wrote of a part.
        server_round: from 0 on.
        evaluates: whether the round's training is over: evaluation comes after it.
    """

    def __init__(self, memory: ClientMemory, server_round: int, evaluates: bool = False) -> None:
        self._memory = memory
        self._generation = 2 * server_round + evaluates

    def read(self, part: str) -> Remembered | None:
        """What was written last before this round; None if nothing was.

        A damaged file is passed over, with one warning.

        Raises:
            ConfigError: if a file is there and cannot be read.
        """
        return next(self.history(part), None)

    def history(self, part: str) -> Iterator[Remembered]:
        """What was written before this round, the newest first; read as it is asked for.

        Raises:
            ConfigError: as `read`.
        """
        for generation, name in self._names(part):
            if generation < self._generation:
                found = self._memory.read(name)
                if found is not None:
                    yield found

    def write(self, part: str, tensors: Arrays, facts: Mapping[str, str] = NO_FACTS) -> None:
        """Remember a part from the next round on; as `ClientMemory.write`.

        Raises:
            ConfigError: if it cannot be written; what was there before still is.
        """
        self._memory.write(f"{part}-{self._generation:06d}", tensors, facts)
        older = [name for generation, name in self._names(part) if generation < self._generation]
        for name in older[OLDER:]:
            self._memory.forget(name)

    def _names(self, part: str) -> list[tuple[int, str]]:
        """Generations of a part, and the names under which they lie, the newest first."""
        pattern = re.compile(rf"{re.escape(part)}-(\d{{6,}})")
        found = (pattern.fullmatch(name) for name in self._memory.parts())
        return sorted(((int(m[1]), m[0]) for m in found if m), reverse=True)
