"""Aggregation over unequal plans: many clients' updates become one.

Clients train sub-plans of one plan, so their updates carry different sets of
tensor names. Every tensor is therefore combined over the clients that trained
it; what nobody trained is absent from the result and keeps its old value on
the server. `protocol` says what a rule is, `rules` which there are.

Many rules differ only in how they combine the copies of one tensor;
`combine_by_tensor` does the rest:

    def unweighted_median(updates):
        return combine_by_tensor(updates, lambda copies, counts: np.median(copies, axis=0))

Others need whole vectors: `combine_by_group` runs them over every set of tensors
that the same clients trained. Clients are always taken in the order of their
names, and arithmetic is in float64, so that arrival order changes no bit.
"""

from strategies.aggregation.by_group import combine_by_group
from strategies.aggregation.by_tensor import by_coordinate, combine_by_tensor
from strategies.aggregation.mean import MEAN, weighted_mean
from strategies.aggregation.protocol import Aggregate, Rule, RuleState, stateless
from strategies.aggregation.rules import RULES, check_cohort, rule
from strategies.aggregation.statistics import pooled_statistics, robust_statistics

__all__ = [
    "MEAN",
    "RULES",
    "Aggregate",
    "Rule",
    "RuleState",
    "by_coordinate",
    "check_cohort",
    "combine_by_group",
    "combine_by_tensor",
    "pooled_statistics",
    "robust_statistics",
    "rule",
    "stateless",
    "weighted_mean",
]
