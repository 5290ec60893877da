import dataclasses

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from fleet.codec import encode
from fleet.errors import UpdateError
from fleet.message import write_metrics, write_update
from strategies.gate import MAX_EXAMPLES, admit, admit_evaluation

METRICS = {
    "num-examples": 12,
    "blocks": 5,
    "loss": 0.5,
    "peak-bytes": 1000,
    "seconds": 1.5,
    "temperature-celsius": 51.0,
}
WEIGHT, MEAN, VAR = "blocks.4.conv.weight", "blocks.4.bn.running_mean", "blocks.4.bn.running_var"


def arrays_of(plan, seed=0):
    rng = np.random.default_rng(seed)
    return {
        spec.name: np.square(rng.normal(size=spec.shape)).astype(np.float32) for spec in plan.specs
    }


@pytest.fixture
def reply(toy_plan):
    """A good reply of the whole plan; arguments change its metrics, tensors or parts."""

    def build(plan=toy_plan, tensors=None, metrics=None, parts=None):
        arrays = arrays_of(plan) | (tensors or {})
        content = write_update(encode(arrays, plan), METRICS | (metrics or {}))
        return RecordDict(dict(content) | (parts or {}))

    return build


@pytest.mark.parametrize("blocks", range(6))
def test_an_update_of_any_sub_plan_is_admitted(toy_plan, reply, blocks):
    narrow = toy_plan.narrow(blocks)
    update = admit(reply(narrow), "pi-1", toy_plan)
    arrays = arrays_of(narrow)
    statistics = {spec.name for spec in narrow.specs if spec.is_statistic}
    assert update.plan == narrow
    assert update.delta.keys() == arrays.keys() - statistics
    assert update.statistics.keys() == statistics
    for name, array in arrays.items():
        assert_array_equal((update.delta | update.statistics)[name], array)


def test_metrics_reach_the_update(toy_plan, reply):
    update = admit(reply(), "pi-1", toy_plan)
    assert (update.client, update.num_examples, update.loss) == ("pi-1", 12, 0.5)
    assert (update.peak_bytes, update.seconds) == (1000, 1.5)
    assert update.metrics == {"temperature-celsius": 51.0}


def test_a_foreign_plan_is_refused(toy_plan, reply):
    foreign = dataclasses.replace(toy_plan, weights_digest="1" * 64)
    text = f"update is of plan {foreign.digest[:8]}, which is no sub-plan of {toy_plan.digest[:8]}"
    with pytest.raises(UpdateError, match=text):
        admit(reply(foreign), "pi-1", toy_plan)


def test_a_plan_wider_than_the_servers_is_refused(toy_plan, reply):
    with pytest.raises(UpdateError, match="which is no sub-plan of"):
        admit(reply(toy_plan), "pi-1", toy_plan.narrow(3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [WEIGHT, MEAN])
def test_values_that_are_not_finite_are_refused(toy_plan, reply, name, value):
    array = arrays_of(toy_plan)[name]
    array.flat[-1] = value
    with pytest.raises(UpdateError, match=f"{name} holds NaN or infinity; lower the learning rate"):
        admit(reply(tensors={name: array}), "pi-1", toy_plan)


def test_a_negative_variance_is_refused(toy_plan, reply):
    variance = np.array([1, 1, -0.5, 1], np.float32)
    with pytest.raises(UpdateError, match=f"{VAR} holds a negative variance, -0.5"):
        admit(reply(tensors={VAR: variance}), "pi-1", toy_plan)


def test_a_zero_variance_and_a_negative_mean_are_admitted(toy_plan, reply):
    tensors = {VAR: np.zeros(4, np.float32), MEAN: -np.ones(4, np.float32)}
    admit(reply(tensors=tensors), "pi-1", toy_plan)


def test_a_shape_that_would_broadcast_is_refused(toy_plan, reply):
    layout = dict(reply()["layout"])
    layout["shapes"] = [s.replace("[4, 3]", "[3]") for s in layout["shapes"]]
    with pytest.raises(
        UpdateError, match=r"blocks.0.conv.weight has shape \(3,\), plan .* \(4, 3\)"
    ):
        admit(reply(parts={"layout": ConfigRecord(layout)}), "pi-1", toy_plan)


@pytest.mark.parametrize("count", [0, -9, 2.5, 12.0, MAX_EXAMPLES + 1, 2**62])
def test_a_weight_that_is_no_count_is_refused(toy_plan, reply, count):
    text = f"num-examples must be a whole number from 1 to {MAX_EXAMPLES}, got {count}"
    with pytest.raises(UpdateError, match=text):
        admit(reply(metrics={"num-examples": count}), "pi-1", toy_plan)
    with pytest.raises(UpdateError, match=text):
        admit_evaluation(write_metrics({"num-examples": count, "loss": 1.0, "accuracy": 0.5}))


def test_a_boolean_weight_is_refused(toy_plan, reply):
    content = reply()
    dict.__setitem__(content["metrics"].__dict__["_data"], "num-examples", True)  # past its check
    with pytest.raises(UpdateError, match=r"num-examples must be a whole number .*, got True"):
        admit(content, "pi-1", toy_plan)


@pytest.mark.parametrize("key", ["num-examples", "loss", "peak-bytes", "seconds"])
def test_a_missing_metric_is_refused(toy_plan, reply, key):
    metrics = {name: value for name, value in METRICS.items() if name != key}
    with pytest.raises(UpdateError, match=f"{key} must be .*, got None"):
        admit(reply(parts={"metrics": MetricRecord(metrics)}), "pi-1", toy_plan)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["loss", "peak-bytes", "seconds"])
def test_a_metric_that_is_not_finite_is_refused(toy_plan, reply, key, value):
    with pytest.raises(UpdateError, match=f"{key} must be a finite number, got {value}"):
        admit(reply(metrics={key: float(value)}), "pi-1", toy_plan)


@pytest.mark.parametrize(
    "parts",
    [
        {"tensors": MetricRecord({"packed": 1})},
        {"tensors": ArrayRecord({"packed": Array(np.zeros(4, np.float32))})},
        {"tensors": ArrayRecord({"packed": Array("uint8", (3,), "numpy.ndarray", b"\x80\x04")})},
        {"layout": MetricRecord({"codec": 1})},
        {"metrics": ConfigRecord({"num-examples": 3})},
        {"metrics": MetricRecord({"loss": [1.0]})},
    ],
)
def test_records_of_the_wrong_kind_are_refused(toy_plan, reply, parts):
    with pytest.raises(UpdateError):
        admit(reply(parts=parts), "pi-1", toy_plan)


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"loss": 1.0, "accuracy": 0.5}, "num-examples must be a whole number"),
        ({"num-examples": 3, "accuracy": 0.5}, "loss must be a finite number, got None"),
        ({"num-examples": 3, "loss": 1.0, "accuracy": float("nan")}, "accuracy must be a finite"),
        ({"num-examples": 3, "loss": float("inf"), "accuracy": 0.5}, "loss must be a finite"),
    ],
)
def test_an_evaluation_that_is_none_is_refused(metrics, text):
    with pytest.raises(UpdateError, match=text):
        admit_evaluation(write_metrics(metrics))


numbers = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.lists(st.integers(0, 9), max_size=2)
)
words = st.one_of(st.text(max_size=8), st.integers(0, 9), st.lists(st.text(max_size=8), max_size=3))
array_parts = st.builds(
    lambda dtype, shape, data: Array(dtype, tuple(shape), "numpy.ndarray", data),
    st.sampled_from(["uint8", "float32", "object"]),
    st.lists(st.integers(0, 400), max_size=2),
    st.binary(max_size=50)
    | st.binary(max_size=50).map(lambda tail: b"\x93NUMPY\x01\x00v\x00" + tail),
)
records = st.one_of(
    st.dictionaries(st.sampled_from([*METRICS, "packed"]), numbers).map(MetricRecord),
    st.dictionaries(st.sampled_from(["codec", "plan-digest", "names", "shapes"]), words).map(
        ConfigRecord
    ),
    st.dictionaries(st.sampled_from(["packed", "x"]), array_parts).map(ArrayRecord),
)
edits = {
    "layout": st.dictionaries(st.sampled_from(["codec", "plan-digest", "names", "shapes"]), words),
    "metrics": st.dictionaries(st.sampled_from(list(METRICS)), numbers),
}


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    replaced=st.dictionaries(st.sampled_from(["tensors", "layout", "metrics"]), records),
    edited=st.fixed_dictionaries({}, optional=edits),
    cut=st.integers(0, 300) | st.none(),
)
def test_no_reply_raises_anything_but_a_refusal(toy_plan, reply, replaced, edited, cut):
    content = reply(parts=replaced)
    for name, changes in edited.items():
        for key, value in changes.items() if name not in replaced else ():
            content[name][key] = value
    if cut is not None and "tensors" not in replaced:
        packed = content["tensors"]["packed"]
        packed.data = packed.data[:cut]
    try:
        update = admit(content, "pi-1", toy_plan)
    except UpdateError:
        return
    assert 1 <= update.num_examples <= MAX_EXAMPLES
    assert all(np.isfinite(array).all() for array in update.delta.values())
