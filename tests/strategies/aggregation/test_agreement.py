"""Who is left out for wrong labels: against loops, calculus, and clients that train."""

import dataclasses
import math
from statistics import median

import numpy as np
import pytest

from fleet.plan import TensorSpec
from fleet.state import ClientUpdate, TrainableState
from strategies.aggregation import rule
from strategies.aggregation.agreement import contradicting
from strategies.algorithm import compose
from strategies.server_opt import sgd
from tests.many import many
from tests.plans import plan_of, random_state
from tests.plans import toy_plan as with_bias

CLASSES, FEATURES = 6, 20


@pytest.fixture
def plan():
    """A head alone."""
    return plan_of(
        TensorSpec(name="head.weight", shape=(CLASSES, FEATURES), role="weight", depth=0),
        TensorSpec(name="head.bias", shape=(CLASSES,), role="bias", depth=0),
        blocks=0,
    )


def update_of(client, plan, rows, by, num_examples=100):
    delta = {"head.weight": np.float32(rows), "head.bias": np.float32(by)}
    return ClientUpdate(
        client=client,
        plan=plan,
        delta=delta,
        statistics={},
        num_examples=num_examples,
        loss=1.0,
        peak_bytes=0,
        seconds=0.0,
    )


def state_of(plan, weight, bias=None):
    bias = np.zeros(len(weight)) if bias is None else bias
    return TrainableState(plan, {"head.weight": np.float32(weight), "head.bias": np.float32(bias)})


def cosines(updates, weight):
    """The definition, a number at a time."""
    classes, features = range(len(weight)), range(len(weight[0]))
    means, rows_of = [], {}
    for update in updates:
        rows, by = (update.delta[name].tolist() for name in ("head.weight", "head.bias"))
        squares = math.fsum(b * b for b in by)
        means.append([math.fsum(by[c] * rows[c][d] for c in classes) / squares for d in features])
        rows_of[update.client] = rows, by
    middle = [median(column) for column in zip(*means, strict=True)]
    centre = [math.fsum(weight[c][d] for c in classes) / len(weight) for d in features]
    found = {}
    for client, (rows, by) in rows_of.items():
        pairs = [
            (rows[c][d] - by[c] * middle[d], weight[c][d] - centre[d])
            for c in classes
            for d in features
        ]
        lengths = math.fsum(a * a for a, _ in pairs) * math.fsum(b * b for _, b in pairs)
        found[client] = math.fsum(a * b for a, b in pairs) / math.sqrt(lengths)
    return found


@many("seed", range(20))
def test_who_is_left_out_has_a_cosine_below_the_bound(plan, seed):
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(CLASSES, FEATURES))
    weight = 0.05 * (own + 3 * rng.normal(size=FEATURES))  # all classes are about as likely
    updates = [
        update_of(
            f"pi-{i}",
            plan,
            (0.6 - 0.3 * (i % 4)) * own + rng.normal(size=own.shape),
            rng.normal(size=CLASSES),
        )
        for i in range(8)
    ]
    state = state_of(plan, weight)
    expected = cosines(updates, state.tensors["head.weight"].tolist())
    middle = sorted(expected.values())[3]  # of eight, the lower one
    bound = max(middle, 0) / 2 - 0.1
    low = {client for client, cosine in expected.items() if cosine < bound}
    assert 0 < len(low) <= 4  # else nothing is compared
    found = contradicting(updates, state)
    assert found == {
        client: f"update of head.weight has a cosine of {expected[client]:.2f} with what the "
        f"model knows, the median is {middle:.2f}; below {bound:.2f} clipped_mean leaves it out: "
        f"are its labels right?"
        for client in low
    }
    assert contradicting(updates[::-1], state) == found


def loss(weight, bias, features, labels):
    logits = features @ weight.T + bias
    return (np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]).mean()


def gradient(weight, bias, features, labels):
    errors = np.exp(features @ weight.T + bias)
    errors /= errors.sum(axis=1, keepdims=True)
    errors[np.arange(len(labels)), labels] -= 1
    return errors.T @ features / len(labels), errors.mean(axis=0)


@many("seed", range(5))
def test_a_step_along_the_head_is_what_makes_it_more_sure(seed):
    """⟨−gradient, W⟩ is minus the loss's derivative by a factor on the logits about the mean."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(CLASSES, FEATURES))
    weight -= weight.mean(axis=0)
    bias = rng.normal(size=CLASSES)
    features, labels = rng.normal(size=(50, FEATURES)), rng.integers(CLASSES, size=50)
    middle = rng.normal(size=FEATURES)
    rows, by = gradient(weight, bias, features, labels)
    agreement = -((rows - np.outer(by, middle)) * weight).sum()

    def scaled(factor):
        """The loss where features are measured from `middle`, and only what is beyond grows."""
        return loss(factor * weight, bias + weight @ middle, features - middle, labels)

    assert scaled(1) == pytest.approx(loss(weight, bias, features, labels))
    assert agreement == pytest.approx(-(scaled(1.001) - scaled(0.999)) / 0.002, rel=1e-5)


class Fleet:
    """Clients that train a linear head on clouds of points about a common mean far from 0."""

    def __init__(self, seed, hostile=(), held=None):
        self.rng = np.random.default_rng(seed)
        self.centres = self.rng.normal(size=(CLASSES, FEATURES)) + 2
        self.hostile, self.held = hostile, held
        self.weight, self.bias = np.zeros((CLASSES, FEATURES)), np.zeros(CLASSES)
        # What clients hold, as Dirichlet(0.3) deals it out.
        self.parts = self.rng.dirichlet([0.3] * CLASSES, size=10)

    def _images(self, i):
        parts = self.parts[i] if self.held is None else self.held(i)
        labels = self.rng.choice(CLASSES, size=200, p=parts)
        points = self.centres[labels] + 0.7 * self.rng.normal(size=(200, FEATURES))
        return points, CLASSES - 1 - labels if i in self.hostile else labels

    def updates(self, plan):
        for i in range(10):
            (points, labels), weight, bias = self._images(i), self.weight.copy(), self.bias.copy()
            for start in range(0, 200, 20):
                batch = slice(start, start + 20)
                rows, by = gradient(weight, bias, points[batch], labels[batch])
                weight, bias = weight - 0.05 * rows, bias - 0.05 * by
            yield update_of(f"pi-{i}", plan, weight - self.weight, bias - self.bias)

    def left_out(self, plan, rounds=12):
        """Clients that are, round by round; the others' mean is the next head."""
        for _ in range(rounds):
            updates = list(self.updates(plan))
            state = state_of(plan, self.weight, self.bias)
            found = contradicting(updates, state)
            kept = [update.delta for update in updates if update.client not in found]
            self.weight = self.weight + np.mean([delta["head.weight"] for delta in kept], axis=0)
            self.bias = self.bias + np.mean([delta["head.bias"] for delta in kept], axis=0)
            yield set(found)


@many("seed", range(10))
def test_clients_that_train_on_wrong_labels_are_left_out_and_honest_ones_are_not(plan, seed):
    first, *others = Fleet(seed, hostile=(2, 5, 7)).left_out(plan)
    assert first == set()  # a head of 0 knows nothing
    assert all(found <= {"pi-2", "pi-5", "pi-7"} for found in others)
    assert others[-1] == {"pi-2", "pi-5", "pi-7"}  # once the head has learnt


@many("seed", range(10))
def test_without_wrong_labels_nobody_is_left_out(plan, seed):
    assert not set().union(*Fleet(seed).left_out(plan))


@many("seed", range(10))
def test_who_alone_holds_a_class_is_heard_in_most_rounds(plan, seed):
    def held(i):
        parts = np.eye(CLASSES)[CLASSES - 1] if i == 0 else np.append(np.ones(CLASSES - 1), 0)
        return parts / parts.sum()

    found = list(Fleet(seed, held=held).left_out(plan))
    assert set().union(*found) <= {"pi-0"}
    assert len([clients for clients in found if clients]) <= 4


def opposed(plan, number, of):
    """Updates of which the first few teach the opposite of what the head knows, and that head."""
    rng = np.random.default_rng(0)
    weight = 0.05 * rng.normal(size=(CLASSES, FEATURES))
    signs = [-1] * number + [1] * (of - number)
    updates = [
        update_of(f"pi-{i}", plan, sign * weight, rng.normal(size=CLASSES))
        for i, sign in enumerate(signs)
    ]
    return updates, state_of(plan, weight)


@pytest.mark.parametrize(
    ("number", "of", "left_out"), [(1, 3, 1), (5, 10, 5), (6, 10, 0), (10, 10, 0), (1, 2, 0)]
)
def test_of_two_and_where_most_contradict_nobody_is_left_out(plan, number, of, left_out):
    updates, state = opposed(plan, number, of)
    assert contradicting(updates, state).keys() == {f"pi-{i}" for i in range(left_out)}


def test_who_does_not_move_and_a_head_of_0_divide_by_no_zero(plan):
    updates, state = opposed(plan, 1, 5)
    still = update_of("pi-9", plan, np.zeros((CLASSES, FEATURES)), np.zeros(CLASSES))
    with np.errstate(all="raise"):
        assert contradicting([*updates, still], state).keys() == {"pi-0"}
        assert contradicting([still] * 3, state) == {}
        assert contradicting(updates, state_of(plan, np.zeros((CLASSES, FEATURES)))) == {}


@pytest.mark.parametrize(("logit", "left_out"), [(-1.0, {"pi-0"}), (-5.0, set())])
def test_who_teaches_classes_that_the_model_hardly_names_is_spared(plan, logit, left_out):
    """A logit that is lower by 1 makes 0.4 of an even share, by 5 less than 0.01."""
    updates, state = opposed(plan, 1, 5)
    gains = np.float32([-1, -1, -1, -1, -1, 5])
    updates[0] = dataclasses.replace(updates[0], delta=updates[0].delta | {"head.bias": gains})
    state = state_of(plan, state.tensors["head.weight"], np.append(np.zeros(5), logit))
    assert contradicting(updates, state).keys() == left_out


def test_a_head_without_a_bias_is_not_looked_at(toy_plan, unequal):
    state = random_state(toy_plan, 0)
    updates = unequal(np.random.default_rng(0))
    turned = {"head.weight": -state.tensors["head.weight"]}
    updates[0] = dataclasses.replace(updates[0], delta=updates[0].delta | turned)
    assert toy_plan.head is None and contradicting(updates, state) == {}


@pytest.mark.parametrize("spec", ["clipped_mean", "clipped_mean:100", "clipped_mean+coverage"])
def test_the_default_rule_steps_as_if_they_had_not_answered(random_update, spec):
    """Under unequal plans and a quorum; the record says who and why."""
    plan = with_bias()
    rng, state = np.random.default_rng(0), random_state(plan, 1)
    updates = [random_update(f"pi-{i}", plan.narrow(i % 3), rng) for i in range(9)]
    turned = {"head.weight": -5 * state.tensors["head.weight"]}
    updates[4] = dataclasses.replace(updates[4], delta=updates[4].delta | turned)
    chosen = compose(rule(spec, quorum=2), sgd(1.0))
    found = contradicting(updates, state)
    assert "pi-4" in found
    step = chosen.step(updates, state, chosen.init(state))
    without = [update for update in updates if update.client not in found]
    combine = rule(spec, quorum=2)
    aggregate, _ = combine.aggregate(without, combine.init())
    assert step.left_out == found | aggregate.left_out
    assert step.coverage == aggregate.coverage
    for name, delta in aggregate.delta.items():
        expected = np.float32(state.tensors[name] + delta)
        np.testing.assert_allclose(step.state.tensors[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", ["mean", "median", "krum:1", "centred_clipping"])
def test_other_rules_leave_it_be(plan, spec):
    assert rule(spec).screen(*opposed(plan, 1, 5)) == {}
