"""Rules by name, as a run's settings spell them."""

import inspect
from collections.abc import Callable, Mapping

from fleet.errors import ConfigError
from strategies.aggregation.centred_clipping import centred_clipping
from strategies.aggregation.coordinatewise import median, trimmed_mean
from strategies.aggregation.coverage import with_coverage_correction, with_quorum
from strategies.aggregation.geometric_median import geometric_median
from strategies.aggregation.mean import clipped_mean, mean
from strategies.aggregation.protocol import Rule, stateless
from strategies.aggregation.selection import krum, multi_krum
from strategies.named import import_named

RULES: Mapping[str, Callable[..., Rule]] = {
    "mean": mean,
    "clipped_mean": clipped_mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "centred_clipping": centred_clipping,
}


def rule(spec: str, *, quorum: int = 1, seed: int = 0) -> Rule:
    """The rule of a run's settings.

    Args:
        spec: NAME or NAME:NUMBER, with a name of `RULES` (`clipped_mean:0.5`, a bound;
            `trimmed_mean:0.2`, a fraction per side; `krum:2` and `multi_krum:2`, hostile
            clients; `geometric_median:2`, a bucket size; `centred_clipping:1.0`, a
            radius), or MODULE:NAME for a rule of the user's own: a `Rule`, or a function
            of updates to an `Aggregate`. `+coverage` or `+coverage:POWER` behind either
            makes the steps of tensors that few train smaller.
        quorum: how many clients must have trained a tensor; below that it stays.
        seed: of what a rule draws at random.

    Raises:
        ConfigError: if there is no such rule, or a number is missing or out of range.
    """
    name, plus, correction = spec.partition("+")
    chosen = with_quorum(_named(name, seed), quorum)
    if not plus:
        return chosen
    suffix, colon, power = correction.partition(":")
    if suffix != "coverage":
        raise ConfigError(
            f"rule {spec}: unknown suffix +{correction}; known are +coverage and +coverage:POWER"
        )
    return with_coverage_correction(chosen, *([_number(spec, power)] if colon else []))


def check_cohort(spec: str, limits: Mapping[str, int]) -> None:
    """Refuse a rule that a run can never give as many updates as it needs.

    Args:
        spec: as `rule` takes it.
        limits: setting → the most updates that it allows a round.

    Raises:
        ConfigError: if one is below the rule's `least_clients`, or as `rule`.
    """
    least = rule(spec).least_clients
    for setting, most in limits.items():
        if most < least:
            raise ConfigError(
                f"rule {spec} needs the updates of {least} clients, and {setting} is {most}; "
                f"raise {setting}, or let the rule reckon with fewer hostile clients"
            )


def _named(spec: str, seed: int) -> Rule:
    name, colon, argument = spec.partition(":")
    if name not in RULES:
        if argument.isidentifier():
            return _imported(spec)
        raise ConfigError(
            f"unknown rule {spec}; known are {', '.join(RULES)}, and MODULE:NAME for your own"
        )
    factory = RULES[name]
    parameters = inspect.signature(factory).parameters
    settings = {"seed": seed} if "seed" in parameters else {}
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if not positional and colon:
        raise ConfigError(f"rule {name} takes no number, got {spec}; write {name}")
    if not colon and positional and positional[0].default is inspect.Parameter.empty:
        raise ConfigError(
            f"rule {name} needs its number of {positional[0].name} clients; write {name}:2"
        )
    return factory(*([_number(spec, argument)] if colon else []), **settings)


def _number(spec: str, text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigError(f"rule {spec}: {text or 'nothing'} is no number; write one behind the colon")


def _imported(spec: str) -> Rule:
    """A rule of the user's own."""
    found = import_named(spec, "rule")
    if isinstance(found, Rule):
        return found
    if callable(found) and _takes_one(found):
        return stateless(found)
    raise ConfigError(
        f"rule {spec} is {type(found).__name__}, neither a Rule nor a function of updates; "
        f"name one of these, or one of {', '.join(RULES)}"
    )


def _takes_one(function: Callable) -> bool:
    """Whether it can be called with the updates and nothing else; taken on trust if unknown."""
    try:
        inspect.signature(function).bind(())
    except TypeError:
        return False
    except ValueError:  # some builtins tell nobody what they take
        pass
    return True
