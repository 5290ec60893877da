"""What a rule is: two pure functions, as a server optimiser is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fleet.errors import ConfigError
from fleet.state import Arrays, ClientUpdate, TrainableState

# Nested mappings of names to float64 arrays and ints, so that it can be checkpointed.
RuleState = Mapping[str, Any]


@dataclass(frozen=True)
class Aggregate:
    """What a round's updates amount to.

    Attributes:
        delta: tensor name → float64 step for the server optimiser; only tensors
            that as many clients trained as the quorum asks for.
        statistics: combined running means and variances, float64, under the same quorum.
        coverage: tensor name → how many clients trained it, quorum reached or not; those
            that are left out do not count.
        left_out: client → why its update counted for nothing.
    """

    delta: Arrays
    statistics: Arrays
    coverage: Mapping[str, int]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A way to make one update of many, which may remember something between rounds.

    Attributes:
        init: the state before the first round.
        aggregate: (updates, state) → (aggregate, state). At most one update per client,
            in any order; the given state is not changed. `delta` and `statistics` of an
            update may be read from disk or decoded at each access: ask for each
            tensor of each client seldom, and hold those of one name at a time.
        least_clients: of how many updates it keeps what it promises; fewer are
            aggregated all the same.
        screen: (updates, the model that they were made from) → client → why its update is
            not to be aggregated; never all of them. Updates are in order of the clients' names.
    """

    init: Callable[[], RuleState]
    aggregate: Callable[[Sequence[ClientUpdate], RuleState], tuple[Aggregate, RuleState]]
    least_clients: int = 1
    screen: Callable[[Sequence[ClientUpdate], TrainableState], Mapping[str, str]] = (
        lambda updates, state: {}
    )


def stateless(
    function: Callable[[Sequence[ClientUpdate]], Aggregate], *, least_clients: int = 1
) -> Rule:
    """A rule that remembers nothing, from a function of updates to their aggregate.

    The rule raises ConfigError if the function returns anything else.
    """

    def aggregate(updates: Sequence[ClientUpdate], state: RuleState) -> tuple[Aggregate, RuleState]:
        result = function(updates)
        if not isinstance(result, Aggregate):
            name = getattr(function, "__name__", repr(function))
            raise ConfigError(
                f"rule {name} returned {type(result).__name__}, not an Aggregate; "
                f"return what combine_by_tensor does"
            )
        return result, state

    return Rule(dict, aggregate, least_clients)
