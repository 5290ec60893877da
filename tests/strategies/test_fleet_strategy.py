import dataclasses

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from numpy.testing import assert_allclose, assert_array_equal

from fleet.codec import decode, encode
from fleet.config import default_settings, read_config
from fleet.errors import PlanError
from fleet.evaluation import Evaluation
from fleet.message import (
    Enrolment,
    content_bytes,
    read_task,
    refusal,
    write_enrolment,
    write_metrics,
    write_update,
)
from fleet.state import TrainableState
from strategies.fleet_strategy import FleetStrategy
from strategies.sampling import Roster
from strategies.server_opt import adam, sgd
from tests import reference

BLOCKS = {"pi-0": 1, "pi-1": 3, "pi-2": 5, "pi-3": 0}


def trained(update, **metrics):
    """The reply that holds a client's update."""
    numbers = {
        "num-examples": update.num_examples,
        "blocks": update.plan.blocks,
        "loss": update.loss,
        "peak-bytes": update.peak_bytes,
        "seconds": update.seconds,
    }
    arrays = dict(update.delta) | dict(update.statistics)
    return write_update(encode(arrays, update.plan), numbers | metrics)


def fixed_evaluation(state):
    return Evaluation(1, 0.5, 0.25)


@pytest.fixture
def initial(toy_plan):
    rng = np.random.default_rng(99)
    arrays = {s.name: np.square(rng.normal(size=s.shape)) for s in toy_plan.specs}
    return TrainableState(toy_plan, {n: a.astype(np.float32) for n, a in arrays.items()})


@pytest.fixture
def updates(toy_plan, random_update):
    """Function of a seed → client → its update, of unequal plans."""

    def build(seed=0, blocks=BLOCKS):
        rng = np.random.default_rng(seed)
        return {
            name: dataclasses.replace(
                random_update(name, toy_plan.narrow(k), rng), loss=1.0 + k, peak_bytes=100 * k
            )
            for name, k in blocks.items()
        }

    return build


@pytest.fixture
def run(scripted_grid, initial):
    """Run a strategy against clients: name → function of a message to its reply.

    Returns the strategy, which holds state and reports, and the messages sent and received.
    """

    def run(clients, rounds=1, optimizer=None, evaluate=fixed_evaluation, **settings):
        received = []

        def node(name, answer):
            def reply(message):
                if message.metadata.message_type == "query":
                    return write_enrolment(Enrolment(name, 10, ("cat", "dog")))
                reply = answer(message)
                received.append(reply)
                return reply

            return reply

        grid = scripted_grid({10 + i: node(*pair) for i, pair in enumerate(clients.items())})
        settings = {"rounds": rounds, "min-clients": 1} | settings
        config = read_config(default_settings() | settings).federation
        strategy = FleetStrategy(
            initial,
            ("cat", "dog"),
            Roster(grid, timeout=1),
            config,
            0,
            "00ff00ff00ff00ff",
            optimizer or sgd(),
            evaluate=evaluate,
        )
        strategy.run(grid)
        sent = [m for m in grid.sent if m.metadata.message_type != "query"]
        return strategy, sent, [r for r in received if r is not None]

    return run


def answers(updates):
    return {name: lambda message, u=update: trained(u) for name, update in updates.items()}


def statistics_of(updates, initial):
    """What the oracle pools, and the old value of what nobody trained."""
    expected = {}
    for spec in (s for s in initial.plan.specs if s.role == "mean"):
        names = spec.name, spec.name.replace("running_mean", "running_var")
        having = [u for u in updates.values() if spec.name in u.statistics]
        pooled = (initial.tensors[name] for name in names)
        if having:
            pooled = reference.pooled_statistics(
                *([u.statistics[name] for u in having] for name in names),
                [u.num_examples for u in having],
            )
        expected |= zip(names, pooled, strict=True)
    return expected


@pytest.mark.parametrize("seed", range(5))
def test_unequal_plans_come_together_as_the_oracle_says(run, updates, initial, seed):
    updates = updates(seed)
    strategy, _, _ = run(answers(updates))
    deltas = reference.weighted_mean(updates.values())
    expected = {name: initial.tensors[name] + delta for name, delta in deltas.items()}
    expected |= statistics_of(updates, initial)
    assert strategy.state.tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert_allclose(strategy.state.tensors[name], array, rtol=1e-6, atol=1e-6)


def test_what_nobody_trained_stays_bit_for_bit(run, updates, initial, toy_plan):
    strategy, _, _ = run(answers(updates(blocks={"pi-0": 1, "pi-1": 2})), optimizer=adam())
    for spec in toy_plan.specs:
        same = strategy.state.tensors[spec.name].tobytes() == initial.tensors[spec.name].tobytes()
        assert same == (spec.depth > 2)


def test_equal_plans_are_flowers_fedavg_but_for_pooled_variances(
    run, updates, initial, flower_round
):
    updates = updates(blocks=dict.fromkeys(BLOCKS, 5))
    strategy, _, _ = run(answers(updates))
    replies = [
        {name: initial.tensors[name] + delta for name, delta in update.delta.items()}
        | dict(update.statistics)
        for update in updates.values()
    ]
    counts = [update.num_examples for update in updates.values()]
    flowers = flower_round(FedAvg(), 1, dict(initial.tensors), replies, counts)
    assert flowers.keys() == strategy.state.tensors.keys()
    for name, array in flowers.items():
        if name.endswith("running_var"):
            assert (strategy.state.tensors[name] > array).all()
        else:
            assert_allclose(strategy.state.tensors[name], array, rtol=1e-5, atol=1e-6)


def test_statistics_never_go_through_the_optimiser(run, updates, initial):
    updates = updates()
    for optimizer in (adam(), sgd(0.1, momentum=0.9)):
        strategy, _, _ = run(answers(updates), rounds=2, optimizer=optimizer)
        assert not any("running" in name for name in strategy._optimizer_state)
        for name, array in statistics_of(updates, initial).items():
            assert_allclose(strategy.state.tensors[name], array, rtol=1e-6)


def test_every_client_is_sent_the_state_of_the_round(run, updates, initial):
    strategy, sent, _ = run(answers(updates()), rounds=2)
    states = []
    for i, message in enumerate(sent):
        task, payload = read_task(message.content)
        assert task.server_round == 1 + i // len(BLOCKS)
        assert (task.classes, task.plan) == (("cat", "dog"), strategy.plan.summary())
        states.append(decode(payload, strategy.plan))
    assert len(states) == 2 * len(BLOCKS)
    for name, array in initial.tensors.items():
        assert_array_equal(states[0][name], array)
        assert (states[-1][name] != array).any()


def test_every_message_names_the_run(run, updates):
    _, sent, _ = run(answers(updates(0)), rounds=2, evaluate=None)
    assert {m.metadata.message_type for m in sent} == {"train", "evaluate"}
    assert {read_task(m.content)[0].run for m in sent} == {"00ff00ff00ff00ff"}


def test_only_the_sampled_clients_are_asked(run, updates):
    strategy, sent, _ = run(answers(updates()), rounds=3, sampled=2)
    assert len(sent) == 6
    cohorts = [{c.name for c in report.clients} for report in strategy.reports[1:]]
    assert all(len(cohort) == 2 for cohort in cohorts)
    again, _, _ = run(answers(updates()), rounds=3, sampled=2)
    assert cohorts == [{c.name for c in report.clients} for report in again.reports[1:]]


HOSTILE = {
    "NaN": (lambda u: u.delta["head.weight"].fill(np.nan), "head.weight holds NaN or infinity"),
    "count": (lambda u: object.__setattr__(u, "num_examples", -9), "num-examples must be a whole"),
    "plan": (
        lambda u: object.__setattr__(
            u, "plan", dataclasses.replace(u.plan, weights_digest="1" * 64)
        ),
        "which is no sub-plan of",
    ),
}


@pytest.mark.parametrize(("spoil", "text"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_reply_is_refused_by_name_and_the_round_goes_on(run, updates, spoil, text):
    all_updates = updates()
    spoil(all_updates["pi-2"])
    strategy, _, _ = run(answers(all_updates))
    report = strategy.reports[1]
    assert report.refused.keys() == {"pi-2"}
    assert text in report.refused["pi-2"]
    honest = {name: u for name, u in updates().items() if name != "pi-2"}
    without, _, _ = run(answers(honest))
    for name, array in without.state.tensors.items():
        assert strategy.state.tensors[name].tobytes() == array.tobytes()


def test_a_reply_of_nothing_is_refused(run, updates):
    clients = answers(updates()) | {"pi-0": lambda message: RecordDict()}
    strategy, _, _ = run(clients)
    assert "no readable payload" in strategy.reports[1].refused["pi-0"]


def test_a_round_of_refusals_changes_no_bit(run, updates, initial):
    updates = updates()
    for update in updates.values():
        update.delta["head.weight"][0, 0] = np.inf
    strategy, _, _ = run(answers(updates), rounds=2, optimizer=adam())
    assert strategy.state.tensors.keys() == initial.tensors.keys()
    for name, array in initial.tensors.items():
        assert strategy.state.tensors[name].tobytes() == array.tobytes()
    for report in strategy.reports[1:]:
        assert report.refused.keys() == BLOCKS.keys()
        assert report.clients == ()
        assert report.train_loss is None


def test_errors_and_silence_are_refused_with_their_reasons(run, updates):
    def from_the_superlink(message):
        reply = Message(Error(5, "node is offline"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    clients = answers(updates()) | {
        "pi-0": lambda message: refusal(PlanError("weights of stem differ"), message),
        "pi-1": lambda message: None,
        "pi-2": from_the_superlink,
    }
    strategy, _, _ = run(clients, **{"round-timeout": 60.0})
    assert strategy.reports[1].refused == {
        "pi-0": "weights of stem differ",
        "pi-1": "no reply within 60 s",
        "pi-2": "node is offline",
    }
    assert [client.name for client in strategy.reports[1].clients] == ["pi-3"]


def test_a_reply_counts_for_whom_was_asked_whoever_it_claims_to_be_from(run, updates):
    updates = updates()

    def forged(message):
        reply = Message(trained(updates["pi-0"]), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 11  # pi-1's
        return reply

    strategy, _, _ = run(answers(updates) | {"pi-0": forged})
    report = strategy.reports[1]
    assert not report.refused
    counts = {client.name: client.num_examples for client in report.clients}
    assert counts == {name: update.num_examples for name, update in updates.items()}


def test_bytes_are_the_sizes_of_what_went_over_the_wire(run, updates):
    strategy, sent, received = run(answers(updates()), rounds=2)
    assert sum(r.bytes_down for r in strategy.reports) == sum(
        content_bytes(m.content) for m in sent
    )
    assert sum(r.bytes_up for r in strategy.reports) == sum(map(content_bytes, received))
    assert strategy.reports[1].bytes_down == strategy.reports[2].bytes_down > 0


def test_bytes_of_refused_replies_count(run, updates):
    updates = updates()
    updates["pi-1"].delta["head.weight"][0, 0] = np.nan
    strategy, _, received = run(answers(updates))
    assert strategy.reports[1].bytes_up == sum(map(content_bytes, received))


def test_a_report_says_who_did_what(run, updates):
    updates = updates()
    clients = answers(updates)
    clients["pi-3"] = lambda message: trained(updates["pi-3"], **{"temperature-celsius": 60.5})
    strategy, _, _ = run(clients)
    before, after = strategy.reports
    assert (before.server_round, before.clients, before.bytes_up) == (0, (), 0)
    assert (after.server_round, after.accuracy, after.loss) == (1, 0.25, 0.5)
    assert [(c.name, c.blocks) for c in after.clients] == sorted(BLOCKS.items())
    assert [c.num_examples for c in after.clients] == [u.num_examples for u in updates.values()]
    assert after.clients[3].metrics == {"temperature-celsius": 60.5}
    assert after.peak_client_bytes == 500
    assert after.coverage == {
        spec.name: sum(k >= spec.depth for k in BLOCKS.values()) for spec in strategy.plan.specs
    }
    total = sum(u.num_examples for u in updates.values())
    mean = sum(u.loss * u.num_examples for u in updates.values()) / total
    assert after.train_loss == pytest.approx(mean)


def test_a_training_loss_of_zero_is_a_number(run, updates):
    zero = {n: dataclasses.replace(u, loss=0.0) for n, u in updates().items()}
    strategy, _, _ = run(answers(zero))
    assert strategy.reports[1].train_loss == 0.0


def evaluating(clients, evaluations):
    """The clients, that answer evaluate messages as given."""

    def both(name):
        def answer(message):
            if message.metadata.message_type == "evaluate":
                reply = evaluations[name]
                return write_metrics(reply) if isinstance(reply, dict) else reply
            return clients[name](message)

        return answer

    return {name: both(name) for name in clients}


def scores(num_examples, loss, accuracy):
    return {"num-examples": num_examples, "loss": loss, "accuracy": accuracy}


def test_clients_evaluation_is_their_mean_by_examples(run, updates):
    evaluations = {
        "pi-0": scores(1, 4.0, 0.0),
        "pi-1": scores(3, 2.0, 1.0),
        "pi-2": scores(6, 1.0, 0.5),
        "pi-3": scores(10, 0.0, 1.0),
    }
    strategy, sent, received = run(evaluating(answers(updates()), evaluations), evaluate=None)
    before, after = strategy.reports
    assert before.accuracy is before.loss is None
    assert after.loss == pytest.approx((4 + 6 + 6 + 0) / 20)
    assert after.accuracy == pytest.approx((0 + 3 + 3 + 10) / 20)
    assert after.bytes_down == sum(content_bytes(message.content) for message in sent)
    assert after.bytes_up == sum(map(content_bytes, received))


@pytest.mark.parametrize(
    "hostile",
    [
        scores(float("inf"), 1.0, 0.5),
        scores(float("nan"), 1.0, 0.5),
        scores(-9, 1.0, 0.5),
        scores(3, float("nan"), 0.5),
        scores(3, 1.0, [0.5, 0.5]),
        {"num-examples": 3},
        RecordDict(),
    ],
)
def test_a_hostile_evaluation_is_refused_by_name(run, updates, hostile):
    evaluations = dict.fromkeys(BLOCKS, scores(5, 1.0, 0.5)) | {"pi-1": hostile}
    strategy, _, _ = run(evaluating(answers(updates()), evaluations), evaluate=None)
    report = strategy.reports[1]
    assert report.refused.keys() == {"pi-1"}
    assert report.refused["pi-1"].startswith("evaluation: ")
    assert (report.loss, report.accuracy) == (1.0, 0.5)


def test_no_evaluation_at_all_leaves_the_round_without_one(run, updates):
    clients = evaluating(answers(updates()), dict.fromkeys(BLOCKS))
    strategy, _, _ = run(clients, evaluate=None)
    assert strategy.reports[1].accuracy is None
    assert strategy.reports[1].refused.keys() == BLOCKS.keys()
