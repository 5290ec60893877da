"""Hostile replies by the thousand, through the whole strategy; run as a process of its own.

    python -m tests.strategies.gate_fuzz 25

Prints what it saw as JSON; a claim that does not hold ends it with Hypothesis's
smallest example.
"""

import gc
import json
import logging
import sys
from collections import Counter

import numpy as np
import psutil
from flwr.app import RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet.codec import encode
from fleet.config import default_settings, read_config
from fleet.evaluation import Evaluation
from fleet.message import Enrolment, write_enrolment, write_metrics, write_update
from fleet.plan import UpdatePlan
from fleet.state import TrainableState
from strategies.aggregation import MEAN
from strategies.algorithm import compose
from strategies.fleet_strategy import FleetStrategy
from strategies.sampling import Roster
from strategies.server_opt import sgd
from tests.strategies.conftest import ScriptedGrid, five_blocks
from tests.strategies.hostile import HONEST_NODE, KINDS, METRICS, Attack

CODECS = ("float32", "int8", "int4", "topk:0.1+int4")
ROUNDS = 2
HOSTILE = 50  # clients beside the honest one, so 100 hostile replies a run
SCORES = {"num-examples": 3, "loss": 0.25, "accuracy": 0.75}


def arrays_of(plan: UpdatePlan, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {s.name: np.square(rng.normal(size=s.shape)).astype(np.float32) for s in plan.specs}


def honest(plan: UpdatePlan, codec: str):
    """A client that trains, and evaluates, as it should."""

    def answer(message) -> RecordDict:
        if message.metadata.message_type == "query":
            return write_enrolment(Enrolment("honest", 10, ("cat", "dog")))
        token = message.content["task"]["token"]
        if message.metadata.message_type == "evaluate":
            return write_metrics(SCORES, token)
        seed = message.content["task"]["server-round"]
        return write_update(encode(arrays_of(plan, seed), plan, codec), METRICS, token)

    return answer


def hostile(name: str, kind: str, knows: dict, seen: Counter):
    """A client that enrols as it should, and answers all else by its kind."""
    overheard = knows["overheard"]

    def answer(message):
        if message.metadata.message_type == "query":
            return write_enrolment(Enrolment(name, 10, ("cat", "dog")))
        overheard.setdefault(name, []).append(message.content["task"]["token"])
        seen[message.metadata.message_type] += 1
        seen[kind] += 1
        return KINDS[kind](Attack(message, name, **knows))

    return answer


def run(
    plan: UpdatePlan,
    codec: str,
    kinds=(),
    seed: int = 0,
    seen: Counter | None = None,
    clients_evaluate: bool = True,
):
    """A run of the honest client, with one hostile client of each of these kinds beside it."""
    arrays = arrays_of(plan, 7)
    knows = {
        "plan": plan,
        "codec": codec,
        "arrays": arrays,
        "best": encode(arrays, plan, codec),
        "rng": np.random.default_rng(seed),
        "overheard": {},
    }
    nodes = {HONEST_NODE: honest(plan, codec)}
    for i, kind in enumerate(kinds):
        node = i if i < HONEST_NODE / 2 else HONEST_NODE + i  # some answer before it, some behind
        name = f"{kind}-{i}"
        nodes[node] = hostile(name, kind, knows, seen)
    grid = ScriptedGrid(dict(sorted(nodes.items())))
    grid.answers_at_once = True  # nobody need wait for those who are silent
    own = {"rounds": ROUNDS, "min-clients": 1, "codec-up": codec}
    reports = []
    strategy = FleetStrategy(
        TrainableState(plan, arrays_of(plan, 99)),
        ("cat", "dog"),
        Roster(grid, timeout=1),
        read_config(default_settings() | own).federation,
        0,
        compose(MEAN, sgd()),
        evaluate=None if clients_evaluate else evaluated,
        on_round=reports.append,
        run="00ff00ff00ff00ff",
    )
    strategy.run(grid)
    strategy.reports = reports
    grid.sent.clear()  # what the test keeps is not what the server keeps
    grid._waiting.clear()
    return strategy


def evaluated(state: TrainableState) -> Evaluation:
    return Evaluation(SCORES["num-examples"], SCORES["loss"], SCORES["accuracy"])


def check(strategy: FleetStrategy, kinds, expected: FleetStrategy) -> None:
    for name, array in expected.state.tensors.items():
        assert strategy.state.tensors[name].tobytes() == array.tobytes(), name
    for report in strategy.reports[1:]:
        names = {f"{kind}-{i}" for i, kind in enumerate(kinds)}
        assert report.stepped
        assert [client.name for client in report.clients] == ["honest"]
        assert (report.loss, report.accuracy) == (SCORES["loss"], SCORES["accuracy"])
        again = {f"{name} (again)" for name in names}
        assert names <= report.refused.keys() <= names | again | {"unknown sender"}
        for name, reason in report.refused.items():
            # A client's own words may be few.
            assert (1 if name.startswith("error-") else 5) <= len(reason) <= 2000, (name, reason)
            assert "reply cannot be read" not in reason, (name, reason)  # a check foresaw it


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def fuzz(examples: int, plan: UpdatePlan, codec: str, expected: FleetStrategy, seen: Counter):
    """Runs of all sorts of hostile clients in one codec; what a server keeps of them."""
    kept = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        kinds=st.lists(st.sampled_from(list(KINDS)), min_size=HOSTILE, max_size=HOSTILE),
        seed=st.integers(0, 2**32),
    )
    def one(kinds, seed):
        # In every fourth run clients are asked to evaluate too.
        strategy = run(plan, codec, kinds, seed, seen, clients_evaluate=len(kept) % 4 == 0)
        check(strategy, kinds, expected)
        kept.append((strategy.reports, strategy._tokens))

    one()
    return kept


def main(examples: int) -> None:
    gc.freeze()  # what is imported stays: each collection would look through it
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    for field in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, field, 1)
    plan, seen = five_blocks(), Counter()
    expected = {codec: run(plan, codec) for codec in CODECS}
    for codec in CODECS:  # warm-up: every kind once
        check(run(plan, codec, list(KINDS), 1, Counter()), list(KINDS), expected[codec])
    before = resident()
    # Kept, as by a server that went through all of these rounds.
    kept = [fuzz(examples, plan, codec, expected[codec], seen) for codec in CODECS]
    print(json.dumps({"grown": resident() - before, "runs": sum(map(len, kept)), "seen": seen}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
