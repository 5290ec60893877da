"""Rules as a run's settings spell them."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fleet.errors import ConfigError
from strategies.aggregation import Aggregate, Rule, rule, weighted_mean
from strategies.aggregation.coordinatewise import trimmed_mean
from strategies.aggregation.geometric_median import geometric_median
from strategies.aggregation.mean import clipped_mean
from strategies.aggregation.selection import multi_krum

OWN = """
import numpy as np
from strategies.aggregation import combine_by_tensor, stateless, weighted_mean

def unweighted_median(updates):
    return combine_by_tensor(updates, lambda copies, counts: np.median(copies, axis=0))

ready = stateless(weighted_mean)
number = 3

def forgetful(updates):
    return None
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(OWN)
    (tmp_path / "broken_rules.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def updates(unequal):
    return unequal(np.random.default_rng(0), blocks=(5, 5, 3, 3, 5, 5, 1))


def once(own, updates):
    return own.aggregate(updates, own.init())[0]


@pytest.mark.parametrize(
    ("spec", "expected"),
    (
        ("clipped_mean:0.5", clipped_mean(0.5)),
        ("clipped_mean:2", clipped_mean(2.0)),
        ("clipped_mean", clipped_mean(None)),
        ("trimmed_mean:0.4", trimmed_mean(0.4)),
        ("multi_krum:2", multi_krum(2)),
        ("geometric_median:2", geometric_median(2, seed=7)),
    ),
)
def test_the_number_behind_the_colon_is_the_rules_own(updates, spec, expected):
    ours, theirs = once(rule(spec, seed=7), updates), once(expected, updates)
    for name, array in theirs.delta.items():
        assert_array_equal(ours.delta[name], array)


def test_a_function_of_the_users_own_is_a_rule(updates, own_module):
    ours, builtin = once(rule("my_rules:unweighted_median"), updates), once(rule("median"), updates)
    for name, array in builtin.delta.items():
        assert_allclose(ours.delta[name], array, rtol=1e-6, atol=1e-7)


def test_a_rule_of_the_users_own_takes_quorum_and_coverage_too(updates, own_module):
    assert isinstance(rule("my_rules:ready"), Rule)
    ours = once(rule("my_rules:ready+coverage:0.5", quorum=5), updates)
    builtin = once(rule("mean+coverage:0.5", quorum=5), updates)
    assert ours.delta.keys() == builtin.delta.keys() < weighted_mean(updates).delta.keys()
    for name, array in builtin.delta.items():
        assert_array_equal(ours.delta[name], array)


@pytest.mark.parametrize(
    ("spec", "text"),
    (
        ("trimed_mean", "unknown rule trimed_mean; known are mean, clipped_mean, median, "),
        ("krumm:2", "unknown rule krumm:2; known are mean, .* and MODULE:NAME for your own"),
        ("", "unknown rule ; known are"),
        ("mean:3", "rule mean takes no number, got mean:3; write mean"),
        ("krum", "rule krum needs its number of hostile clients; write krum:2"),
        ("krum:some", "rule krum:some: some is no number; write one behind the colon"),
        ("clipped_mean:", "rule clipped_mean:: nothing is no number"),
        ("krum:1.5", "krum's number of hostile clients must be a whole number"),
        ("trimmed_mean:0.5", "trimmed_mean's fraction per side must be .* below 0.5, got 0.5"),
        ("mean+cover", r"unknown suffix \+cover; known are \+coverage and \+coverage:POWER"),
        ("mean+coverage:", r"rule mean\+coverage:: nothing is no number"),
        ("mean+coverage:-1", "coverage's power must be above 0 and finite, got -1"),
        (
            "no_such_module:rule",
            r"cannot import rule no_such_module:rule \(ModuleNotFoundError: .*",
        ),
        ("my_rules:absent", r"cannot import rule my_rules:absent \(AttributeError: .*PYTHONPATH"),
        ("broken_rules:rule", r"cannot import rule broken_rules:rule \(ZeroDivisionError"),
        (
            "my_rules:number",
            "rule my_rules:number is int, neither a Rule nor a function of updates",
        ),
        (
            "os:getcwd",
            "rule os:getcwd is builtin_function_or_method, neither a Rule nor a function",
        ),
    ),
)
def test_what_is_no_rule_is_refused_with_the_way_out(own_module, spec, text):
    with pytest.raises(ConfigError, match=text):
        rule(spec)


def test_a_function_that_returns_no_aggregate_is_refused(updates, own_module):
    with pytest.raises(ConfigError, match="rule forgetful returned NoneType, not an Aggregate; re"):
        once(rule("my_rules:forgetful"), updates)


def test_a_rule_of_two_functions_carries_its_state(updates):
    def aggregate(updates, state):
        return Aggregate({}, {}, {}), {"rounds": state["rounds"] + len(updates)}

    counting = Rule(lambda: {"rounds": 0}, aggregate)
    _, state = counting.aggregate(updates, counting.init())
    _, state = counting.aggregate(updates, state)
    assert state == {"rounds": 2 * len(updates)}
