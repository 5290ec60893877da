import dataclasses

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from numpy.testing import assert_allclose, assert_array_equal

from fleet.codec import UnknownVersion, decode, encode, follow, version_of
from fleet.config import default_settings, read_config
from fleet.errors import ConfigError, PlanError, UpdateError
from fleet.evaluation import Evaluation
from fleet.message import (
    Enrolment,
    content_bytes,
    read_state,
    read_task,
    refusal,
    write_enrolment,
    write_metrics,
    write_update,
)
from fleet.state import TrainableState
from strategies.aggregation import MEAN, Aggregate, Rule, rule
from strategies.algorithm import Algorithm, compose
from strategies.fleet_strategy import FleetStrategy
from strategies.flower_errors import reason_of
from strategies.sampling import Roster
from strategies.server_opt import adam, sgd
from strategies.spool import Spool
from tests import reference

BLOCKS = {"pi-0": 1, "pi-1": 3, "pi-2": 5, "pi-3": 0}
SILENT = "no reply within 0.5 s; logs/supernode.log in the device's state may say why"


def trained(update, codec="float32", **metrics):
    """The reply that holds a client's update."""
    numbers = {
        "num-examples": update.num_examples,
        "blocks": update.plan.blocks,
        "loss": update.loss,
        "peak-bytes": update.peak_bytes,
        "seconds": update.seconds,
    }
    arrays = dict(update.delta) | dict(update.statistics)
    return write_update(encode(arrays, update.plan, codec), numbers | metrics)


def echoing(reply, message):
    """A reply with the token of its message, as a client's has."""
    if isinstance(reply, RecordDict) and isinstance(reply.get("header"), ConfigRecord):
        reply["header"]["token"] = message.content["task"]["token"]
    return reply


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

    Returns the strategy, with its reports, and the messages sent and received.
    """

    def run(clients, rounds=1, optimizer=None, evaluate=fixed_evaluation, rule=MEAN, **settings):
        received = []

        def node(name, answer):
            def reply(message):
                if message.metadata.message_type == "query":
                    return write_enrolment(Enrolment(name, 10, ("cat", "dog")))
                reply = echoing(answer(message), message)
                received.append(reply)
                return reply

            return reply

        grid = scripted_grid({10 + i: node(*pair) for i, pair in enumerate(clients.items())})
        settings = {"rounds": rounds, "min-clients": 1, "round-timeout": 0.5} | settings
        config = read_config(default_settings() | settings).federation
        reports = []
        strategy = FleetStrategy(
            initial,
            ("cat", "dog"),
            Roster(grid, timeout=1),
            config,
            0,
            compose(rule, optimizer or sgd()),
            evaluate=evaluate,
            on_round=reports.append,
            run="00ff00ff00ff00ff",
        )
        strategy.run(grid)
        strategy.reports = reports
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


def test_a_rule_remembers_from_round_to_round(run, updates, initial):
    def aggregate(updates, state):
        step = np.full((2, 4), float(state["round"]))
        return Aggregate({"head.weight": step}, {}, {}), {"round": state["round"] + 1}

    strategy, _, _ = run(answers(updates()), rounds=3, rule=Rule(lambda: {"round": 1}, aggregate))
    moved = strategy.state.tensors["head.weight"] - initial.tensors["head.weight"]
    assert_allclose(moved, 1 + 2 + 3, rtol=1e-5)


def test_whom_the_rule_leaves_out_is_refused_with_its_reason(run, updates):
    def aggregate(updates, state):
        return dataclasses.replace(MEAN.aggregate(updates, {})[0], left_out={"pi-2": "odd"}), state

    strategy, _, _ = run(answers(updates()), rounds=2, rule=Rule(dict, aggregate))
    for report in strategy.reports[1:]:
        assert report.refused == {"pi-2": "odd"}
        assert [client.name for client in report.clients] == ["pi-0", "pi-1", "pi-3"]
        assert report.stepped


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
        of_optimizer = strategy._memory[1]
        assert of_optimizer
        assert not any("running" in name for name in of_optimizer)
        for name, array in statistics_of(updates, initial).items():
            assert_allclose(strategy.state.tensors[name], array, rtol=1e-6)


def test_every_client_is_sent_the_state_of_the_round(run, updates, initial):
    strategy, sent, _ = run(answers(updates()), rounds=2)
    states = []
    for i, message in enumerate(sent):
        task = read_task(message.content)
        assert task.server_round == 1 + i // len(BLOCKS)
        assert (task.classes, task.plan) == (("cat", "dog"), strategy.plan.summary())
        download = read_state(message.content, strategy.plan.digest)
        assert download.is_full_state
        states.append(decode(download.payloads[0], strategy.plan))
    assert len(states) == 2 * len(BLOCKS)
    for name, array in initial.tensors.items():
        assert_array_equal(states[0][name], array)
        assert (states[-1][name] != array).any()


def test_every_message_names_the_run(run, updates):
    _, sent, _ = run(answers(updates(0)), rounds=2, evaluate=None)
    assert {m.metadata.message_type for m in sent} == {"train", "evaluate"}
    assert {read_task(m.content).run for m in sent} == {"00ff00ff00ff00ff"}


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
    assert "pi-0 carries no token" in strategy.reports[1].refused["pi-0"]


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
    strategy, _, _ = run(clients)
    assert strategy.reports[1].refused == {
        "pi-0": "weights of stem differ",
        "pi-1": SILENT,
        "pi-2": "the device is offline: it was not heard of for about a minute",
    }
    assert [client.name for client in strategy.reports[1].clients] == ["pi-3"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Error(3, "Message Unavailable"), "lost on its way: the device, or its link, was gone"),
        (Error(4, "Reply Message Unavailable"), "lost on its way: the reply came, and was"),
        (Error(2, "ZeroDivisionError"), "ZeroDivisionError"),
        (Error(8), "error without a reason"),
    ],
)
def test_what_flower_says_of_a_lost_reply_is_put_in_words(error, reason):
    assert reason_of(error).startswith(reason)


def test_a_reply_counts_for_whom_was_asked_whoever_it_claims_to_be_from(run, updates):
    updates = updates()

    def forged(message):
        reply = Message(echoing(trained(updates["pi-0"]), message), reply_to=message)
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
    assert before.accuracy_by_client == {}
    assert after.accuracy_by_client == {
        "pi-0": (1, 0.0),
        "pi-1": (3, 1.0),
        "pi-2": (6, 0.5),
        "pi-3": (10, 1.0),
    }
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
    assert report.accuracy_by_client.keys() == BLOCKS.keys() - {"pi-1"}


def test_no_evaluation_at_all_leaves_the_round_without_one(run, updates):
    clients = evaluating(answers(updates()), dict.fromkeys(BLOCKS))
    strategy, _, _ = run(clients, evaluate=None)
    assert strategy.reports[1].accuracy is None
    assert strategy.reports[1].refused.keys() == BLOCKS.keys()


def test_who_still_trains_is_not_asked_to_evaluate(run, updates):
    clients = answers(updates()) | {"pi-1": lambda message: None}
    evaluations = dict.fromkeys(BLOCKS, scores(5, 1.0, 0.5))
    strategy, sent, _ = run(evaluating(clients, evaluations), evaluate=None)
    asked = [message for message in sent if message.metadata.message_type == "evaluate"]
    assert len(asked) == len(BLOCKS) - 1
    report = strategy.reports[1]
    assert report.refused == {"pi-1": SILENT}
    assert report.accuracy_by_client.keys() == BLOCKS.keys() - {"pi-1"}


def test_with_a_goal_the_round_goes_on_without_the_rest(run, updates):
    strategy, _, _ = run(answers(updates()), rounds=6, goal=2)
    for report in strategy.reports[1:]:
        assert len(report.clients) == len(report.late) == 2
        assert {*report.asked} == {*BLOCKS} == {c.name for c in report.clients} | {*report.late}
        assert not report.refused
    # Nobody is left out for its name: whom the order put last changes.
    assert len({report.late for report in strategy.reports[1:]}) > 1


def test_refused_replies_do_not_count_towards_the_goal(run, updates):
    clients = answers(updates()) | {"pi-0": lambda message: RecordDict()}
    strategy, _, _ = run(clients, goal=3)
    assert len(strategy.reports[1].clients) == 3


def test_late_replies_are_dropped_and_counted(run, updates):
    strategy, _, _ = run(answers(updates()), rounds=3, goal=2)
    # The toy grid answers whoever looks, so the two that were not waited for come next round.
    assert [report.late_replies for report in strategy.reports[1:]] == [0, 2, 2]


def test_with_too_few_updates_the_round_is_abandoned_and_the_model_stays(run, updates, initial):
    clients = answers(updates()) | {"pi-0": lambda message: None, "pi-1": lambda message: None}
    strategy, sent, _ = run(clients, rounds=2, **{"min-updates": 3})
    for report in strategy.reports[1:]:
        assert not report.stepped
        assert len(report.clients) == 2
        assert report.refused.keys() == {"pi-0", "pi-1"}
        assert not report.coverage
    for name, array in initial.tensors.items():
        assert strategy.state.tensors[name].tobytes() == array.tobytes()
    # Nothing of it came into the model, so nothing is acknowledged.
    assert {read_task(message.content).acknowledged for message in sent} == {0}


def test_clients_learn_which_of_their_updates_counted(run, updates):
    clients = answers(updates()) | {"pi-0": lambda message: None}
    _, sent, _ = run(clients, rounds=2)
    seen = [(m.metadata.dst_node_id - 10, read_task(m.content).acknowledged) for m in sent]
    assert {pair for pair in seen[:4]} == {(i, 0) for i in range(4)}
    assert {pair for pair in seen[4:]} == {(0, 0), (1, 1), (2, 1), (3, 1)}


def test_a_second_reply_and_one_to_no_message_are_dropped_by_name(run, updates):
    updates = updates()

    def twice(message):
        first, second = (echoing(trained(updates["pi-0"]), message) for _ in range(2))
        stray = Message(trained(updates["pi-0"]), reply_to=message)
        stray.metadata.__dict__["_reply_to_message_id"] = "77"
        return [*(Message(content, reply_to=message) for content in (first, second)), stray]

    once, _, _ = run(answers(updates))
    strategy, _, _ = run(answers(updates) | {"pi-0": twice})
    assert strategy.reports[1].refused == {
        "pi-0 (again)": "reply to no message that waits for one; dropped",
        "unknown sender": "reply to no message that waits for one; dropped",
    }
    for name, array in once.state.tensors.items():
        assert strategy.state.tensors[name].tobytes() == array.tobytes()


def following(updates, initial):
    """Clients that keep the version that they are sent, and what they are sent."""
    held, downloads = {}, []

    def client(name):
        def answer(message):
            download = read_state(message.content, initial.plan.digest)
            downloads.append((name, download))
            try:
                known = [held[name]] if name in held else [initial]
                held[name] = follow(download, initial.plan, known)
            except UnknownVersion as error:
                return refusal(error, message)
            return trained(updates[name], codec="int8")

        return answer

    return {name: client(name) for name in updates}, held, downloads


def test_with_a_codec_down_clients_follow_in_steps_bit_for_bit(run, updates, initial):
    clients, held, downloads = following(updates(), initial)
    strategy, _, _ = run(clients, rounds=4, **{"codec-up": "int8", "codec-down": "float16"})
    newest = strategy._outbox.versions.state.tensors
    last = {client.name for client in strategy.reports[4].clients}
    states = {name: state for name, state in held.items() if name in last}
    assert len({version_of(state) for state in states.values()}) == 1
    assert all(not download.is_full_state for _, download in downloads)
    # What clients hold is what the server means, to within the codec's last step.
    for name, array in strategy.state.tensors.items():
        scale = np.abs(array - initial.tensors[name]).max() + 1e-6
        assert np.abs(newest[name] - array).max() <= scale


def test_a_client_that_holds_nothing_is_sent_the_state_and_the_report_says_so(
    run, updates, initial
):
    clients, held, _ = following(updates(), initial)
    held["pi-2"] = initial * 2.0  # another model than the server's
    strategy, _, _ = run(clients, rounds=3, **{"codec-up": "int8", "codec-down": "int8"})
    reports = strategy.reports[1:]
    assert "holds no version from which" in reports[0].refused["pi-2"]
    assert [report.full_state for report in reports] == [(), ("pi-2",), ()]
    assert "pi-2" in {client.name for client in reports[1].clients}


def test_bytes_are_told_by_client_and_by_role(run, updates, initial):
    strategy, sent, _ = run(answers(updates()))
    report = strategy.reports[1]
    assert {name: down for name, (_, down) in report.bytes_by_client.items()} == {
        f"pi-{m.metadata.dst_node_id - 10}": content_bytes(m.content) for m in sent
    }
    assert sum(up for up, _ in report.bytes_by_client.values()) == report.bytes_up
    assert sum(report.bytes_by_role["up"].values()) == report.bytes_up
    assert sum(report.bytes_by_role["down"].values()) == report.bytes_down
    sizes = {}
    for update in updates().values():
        for spec in update.plan.specs:
            sizes[spec.role] = sizes.get(spec.role, 0) + spec.nbytes
    assert {r: n for r, n in report.bytes_by_role["up"].items() if r != "headers"} == sizes


def test_updates_that_together_overflow_leave_the_model_and_the_run(run, updates, initial):
    def overflow(updates, memory):
        """A rule by which finite updates come to more than float32 holds."""
        aggregate, memory = MEAN.aggregate(updates, memory)
        delta = {n: np.full_like(a, 1e39) for n, a in aggregate.delta.items()}
        return dataclasses.replace(aggregate, delta=delta), memory

    rule = Rule(MEAN.init, overflow)
    with np.errstate(over="ignore"):
        strategy, _, _ = run(answers(updates()), rounds=2, rule=rule)
    for report in strategy.reports[1:]:
        assert not report.stepped
        assert report.refused.keys() == BLOCKS.keys()
        assert "would hold NaN or infinity; the model stays" in report.refused["pi-0"]
    for name, array in initial.tensors.items():
        assert strategy.state.tensors[name].tobytes() == array.tobytes()


def test_one_clients_absurd_loss_does_not_end_the_run(run, updates):
    evaluations = dict.fromkeys(BLOCKS, scores(5, 1.0, 0.5)) | {"pi-1": scores(10**7, 1e308, 0.5)}
    strategy, _, _ = run(evaluating(answers(updates()), evaluations), evaluate=None)
    assert strategy.reports[1].loss == 1.0
    assert strategy.reports[1].refused == {
        "pi-1": "evaluation: loss must be from 0 to 1e+30, got 1e+308"
    }


def test_a_refused_update_and_a_refused_evaluation_are_both_on_record(run, updates):
    updates = updates()
    updates["pi-1"].delta["head.weight"][0, 0] = np.nan
    evaluations = dict.fromkeys(BLOCKS, scores(5, 1.0, 0.5)) | {"pi-1": None, "pi-2": None}
    strategy, _, _ = run(evaluating(answers(updates), evaluations), evaluate=None)
    assert strategy.reports[1].refused == {
        "pi-1": f"head.weight holds NaN or infinity; lower the learning rate; evaluation: {SILENT}",
        "pi-2": f"evaluation: {SILENT}",
    }


def test_a_full_disk_refuses_the_update_and_the_round_goes_on(run, updates, monkeypatch):
    def full(self, data):
        raise UpdateError("no place on the server")

    monkeypatch.setattr(Spool, "keep", full)
    strategy, _, _ = run(answers(updates()), rounds=2)
    for report in strategy.reports[1:]:
        assert report.refused == dict.fromkeys(BLOCKS, "no place on the server")
        assert not report.stepped


def test_what_no_check_foresaw_is_refused_too(run, updates, monkeypatch):
    def broken(content):
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr("strategies.gate.read_update", broken)
    strategy, _, _ = run(answers(updates()))
    reason = "reply cannot be read (ZeroDivisionError('unforeseen'))"
    assert strategy.reports[1].refused == dict.fromkeys(BLOCKS, reason)


def test_text_that_is_no_text_is_refused(run, updates):
    def answer(message):
        reply = trained(updates()["pi-0"])
        reply["header"]["codec"] = "\ud800"  # half a character, which cannot even be counted
        return reply

    strategy, _, _ = run(answers(updates()) | {"pi-0": answer})
    assert "reply cannot be read (" in strategy.reports[1].refused["pi-0"]
    assert len(strategy.reports[1].clients) == len(BLOCKS) - 1


def test_an_algorithm_that_cannot_step_abandons_the_round_with_its_reason(run, updates, initial):
    def fail(updates, state):
        raise UpdateError("these updates come to nothing")

    strategy, _, _ = run(answers(updates()), rounds=2, rule=Rule(dict, fail))
    for report in strategy.reports[1:]:
        assert not report.stepped
        assert set(report.refused.values()) == {"round abandoned: these updates come to nothing"}
    for name, array in initial.tensors.items():
        assert strategy.state.tensors[name].tobytes() == array.tobytes()


def test_a_fault_of_a_users_own_rule_is_told_as_such(run, updates):
    with pytest.raises(
        ConfigError,
        match=r"the strategy failed in round 1 on 4 updates \(ZeroDivisionError: .*mend",
    ):
        run(answers(updates()), rule=Rule(dict, lambda updates, state: 1 / 0))


def test_a_step_that_returns_no_step_is_told(run, updates, monkeypatch):
    nothing = Algorithm(lambda state: None, lambda updates, state, memory: None)
    monkeypatch.setattr(f"{__name__}.compose", lambda rule, optimizer: nothing)
    with pytest.raises(ConfigError, match="the strategy's step returned NoneType, not a strat"):
        run(answers(updates()))


def test_with_equal_plans_another_device_is_refused_and_the_others_go_on(run, updates, monkeypatch):
    real = compose(MEAN, sgd())
    equal = Algorithm(real.init, real.step, equal_plans=True)
    monkeypatch.setattr(f"{__name__}.compose", lambda rule, optimizer: equal)
    strategy, _, _ = run(answers(updates()))
    report = strategy.reports[1]
    assert [client.name for client in report.clients] == ["pi-2"]
    assert "update is of 3 blocks, the run's strategy needs the same 5 of" in report.refused["pi-1"]


def test_a_round_in_which_no_tensor_met_the_quorum_has_not_stepped(run, updates):
    strategy, _, _ = run(answers(updates()), rule=rule("mean", quorum=9))
    assert strategy.reports[1].clients and not strategy.reports[1].stepped


def test_an_error_that_comes_too_late_is_in_the_log_by_name_and_printable(run, updates, caplog):
    def dies(message):
        return Message(Error(8, "its process died\x1b[2J (exit code 1)"), reply_to=message)

    clients = answers(updates())
    run({name: dies for name in clients} | {"pi-0": clients["pi-0"]}, rounds=6, goal=1)
    told = {r.getMessage() for r in caplog.records if "too late" in r.getMessage()}
    assert told
    assert told <= {
        f"pi-{i} answered too late: its process died[2J (exit code 1)" for i in (1, 2, 3)
    }


def test_bytes_of_late_replies_count(run, updates):
    strategy, _, received = run(answers(updates()), rounds=3, goal=2)
    late = strategy.reports[2]
    assert late.late_replies == 2
    # Four replies to round 1 and two of round 2 have come by then; the others come later.
    assert strategy.reports[1].bytes_up + late.bytes_up == sum(map(content_bytes, received[:6]))
