import dataclasses
import pickle
import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from fleet.codec import encode
from fleet.errors import UpdateError
from fleet.message import content_bytes, write_metrics, write_update
from strategies.gate import MAX_EXAMPLES, MAX_MAGNITUDE, Gate
from strategies.tokens import Tokens

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


def spend_any(client, token):
    """A gate's `spend` that takes every token."""


def admit(content, client, plan, codec="float32"):
    return Gate(plan, codec, spend_any).admit(content, client, content_bytes(content))


def admit_evaluation(content):
    gate = Gate(None, "float32", spend_any)
    return gate.admit_evaluation(content, "pi-1", content_bytes(content))


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
        assert_array_equal({**update.delta, **update.statistics}[name], array)


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


def float32s(*arrays):
    """Float32 arrays as a reply's tensors, without what the plan says of them."""
    return {
        "tensors": ArrayRecord({f"t{i}": Array(array) for i, array in enumerate(arrays)})
        if len(arrays) > 1
        else ArrayRecord({"packed": Array(arrays[0])})
    }


def test_a_reply_cannot_name_its_own_tensors(toy_plan, reply):
    arrays = list(arrays_of(toy_plan).values())
    with pytest.raises(
        UpdateError, match=r"tensors hold \['t0', 't1', 't2'\], not one array named"
    ):
        admit(reply(parts=float32s(*arrays)), "pi-1", toy_plan)
    for key in ("names", "shapes"):
        header = ConfigRecord(dict(reply()["header"]) | {key: ["[3]"]})
        with pytest.raises(UpdateError, match=f"unknown {key} in the header"):
            admit(reply(parts={"header": header}), "pi-1", toy_plan)
    with pytest.raises(UpdateError, match="unknown record more"):
        admit(reply(parts={"more": ConfigRecord({"x": 1})}), "pi-1", toy_plan)


def test_another_dtype_or_shape_of_the_bytes_is_refused(toy_plan, reply):
    flat = np.concatenate([a.ravel() for a in arrays_of(toy_plan).values()])
    with pytest.raises(UpdateError, match=r"packed is float32 of shape .*, not a row of uint8"):
        admit(reply(parts=float32s(flat)), "pi-1", toy_plan)
    with pytest.raises(UpdateError, match=r"packed is uint8 of shape \(2, 2\), not a row"):
        admit(reply(parts=float32s(np.zeros((2, 2), np.uint8))), "pi-1", toy_plan)


@pytest.mark.parametrize("missing", ["head.weight", WEIGHT])
def test_a_tensor_too_few_a_tensor_too_many_or_one_that_would_broadcast_is_refused(
    toy_plan, reply, missing
):
    def of_shapes(specs):
        """A reply that claims the plan and whose bytes are those of other shapes."""
        other = dataclasses.replace(toy_plan, specs=tuple(specs))
        content = reply(other)
        content["header"]["plan-digest"] = toy_plan.digest
        return content

    fewer = [spec for spec in toy_plan.specs if spec.name != missing]
    more = [*toy_plan.specs, dataclasses.replace(toy_plan.specs[0], name="stem.weight")]
    narrow = [
        dataclasses.replace(spec, shape=(3,)) if spec.name == missing else spec
        for spec in toy_plan.specs
    ]
    for specs in (fewer, more, narrow):
        with pytest.raises(UpdateError, match="bytes"):
            admit(of_shapes(specs), "pi-1", toy_plan)


def test_a_reply_in_another_codec_than_the_runs_is_refused(toy_plan, reply):
    with pytest.raises(UpdateError, match="codec float32, the run's codec-up is int8; run the"):
        admit(reply(), "pi-1", toy_plan, codec="int8")


def test_an_oversize_reply_is_refused_before_anything_else_is_read(toy_plan, reply):
    content = reply(parts={"tensors": ArrayRecord({"x": Array(np.zeros(300_000, np.uint8))})})
    gate = Gate(toy_plan, "int4", lambda client, token: pytest.fail("read on"))
    with pytest.raises(UpdateError, match=r"reply has 3\d+ bytes, no honest one has more than \d+"):
        gate.admit(content, "pi-1", content_bytes(content))


def test_a_reply_with_a_thousand_metrics_is_refused(toy_plan, reply):
    metrics = {f"m{i}": 1 for i in range(100)}
    with pytest.raises(UpdateError, match="reply has 106 metrics, 64 at most are read"):
        admit(reply(metrics=metrics), "pi-1", toy_plan)


@pytest.fixture
def guarded(toy_plan, reply):
    """A gate with tokens, and a function of client and token to its answer."""
    tokens = Tokens()
    gate = Gate(toy_plan, "float32", tokens.spend)

    def answer(client, token):
        content = reply(parts={})
        content["header"]["token"] = token
        return gate.admit(content, client, content_bytes(content))

    return tokens, answer


def test_a_token_admits_one_reply_of_its_own_client(guarded):
    tokens, answer = guarded
    token = tokens.issue("pi-1", 3)
    with pytest.raises(UpdateError, match="reply of pi-2 carries the token of pi-1; it is forged"):
        answer("pi-2", token)
    assert answer("pi-1", token).client == "pi-1"
    with pytest.raises(UpdateError, match="its token of round 3, which is spent or over; it is a"):
        answer("pi-1", token)


def test_a_token_of_an_earlier_round_is_void(guarded):
    tokens, answer = guarded
    stale = tokens.issue("pi-1", 3)
    fresh = tokens.issue("pi-1", 4)
    with pytest.raises(UpdateError, match="its token of round 3, which is spent or over"):
        answer("pi-1", stale)
    answer("pi-1", fresh)


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("", "carries no token"),
        ("ab" * 16, "carries an unknown token"),
        ("1-1-" + "ab" * 16, "carries an unknown token"),
        ("1-" + "9" * 10_000, "carries an unknown token"),
    ],
)
def test_a_reply_without_its_token_is_refused(guarded, token, text):
    tokens, answer = guarded
    tokens.issue("pi-1", 1)
    with pytest.raises(UpdateError, match=f"reply of pi-1 {text}; run the same version"):
        answer("pi-1", token)


def test_tokens_are_not_to_be_guessed():
    tokens, others = Tokens(), Tokens()
    issued = [tokens.issue(f"pi-{i}", 1) for i in range(50)]
    codes = {token.rpartition("-")[2] for token in issued}
    assert len(codes) == 50
    assert all(len(code) == 32 for code in codes)
    assert {len(tokens.issue("pi-1", r)) for r in (1, 10, 10_000)} == {52}
    assert not codes & {others.issue(f"pi-{i}", 1).rpartition("-")[2] for i in range(50)}


def test_nothing_is_remembered_of_a_token_and_it_is_known_for_ever(guarded):
    tokens, answer = guarded
    first = tokens.issue("pi-1", 1)
    answer("pi-1", first)
    held = len(pickle.dumps(vars(tokens)))
    for server_round in range(2, 20_000):
        tokens.spend("pi-1", tokens.issue("pi-1", server_round))
    assert abs(len(pickle.dumps(vars(tokens))) - held) < 10
    with pytest.raises(UpdateError, match="its token of round 1, which is spent or over"):
        answer("pi-1", first)


@pytest.mark.parametrize("change", [lambda t: f"1{t[1:]}", lambda t: f"{t}0", lambda t: t[:-1]])
def test_a_token_is_of_its_own_round_alone(guarded, change):
    tokens, answer = guarded
    token = tokens.issue("pi-1", 1)
    with pytest.raises(UpdateError, match="carries an unknown token"):
        answer("pi-1", change(token))
    answer("pi-1", token)


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
    ("key", "value", "text"),
    [
        ("loss", 1e308, "loss must be from -1e.30 to 1e.30, got 1e.308"),
        ("peak-bytes", -1, "peak-bytes must be from 0 to 9.0072e.15, got -1"),
        ("peak-bytes", 1e300, "peak-bytes must be from 0 to"),
        ("seconds", -0.5, "seconds must be from 0 to 1e.09, got -0.5"),
    ],
)
def test_a_metric_out_of_range_is_refused(toy_plan, reply, key, value, text):
    with pytest.raises(UpdateError, match=text):
        admit(reply(metrics={key: value}), "pi-1", toy_plan)


@pytest.mark.parametrize("accuracy", [-0.1, 1.5])
def test_an_accuracy_out_of_range_is_refused(accuracy):
    with pytest.raises(UpdateError, match=f"accuracy must be from 0 to 1, got {accuracy}"):
        admit_evaluation(write_metrics({"num-examples": 3, "loss": 1.0, "accuracy": accuracy}))


def test_a_metric_of_a_long_name_is_refused(toy_plan, reply):
    text = "metric x{64} has a name of 65 characters, 64 at most are taken; shorten it"
    with pytest.raises(UpdateError, match=text):
        admit(reply(metrics={"x" * 65: 1}), "pi-1", toy_plan)
    assert admit(reply(metrics={"x" * 64: 1}), "pi-1", toy_plan).metrics["x" * 64] == 1


@pytest.mark.parametrize("name", ["", "\x1b[2J", "a\nb"])
def test_a_metric_whose_name_a_terminal_would_obey_is_refused(toy_plan, reply, name):
    text = re.escape(f"a metric is called {name!r}; name it in printable characters")
    with pytest.raises(UpdateError, match=text):
        admit(reply(metrics={name: 1}), "pi-1", toy_plan)


@pytest.mark.parametrize("value", [1.1e15, -3e38])
@pytest.mark.parametrize("name", [WEIGHT, MEAN, VAR])
def test_values_with_which_nothing_can_be_reckoned_are_refused(toy_plan, reply, name, value):
    array = arrays_of(toy_plan)[name]
    array.flat[-1] = value
    text = rf"{name} holds a number of magnitude {abs(value):.2g}.*, at most 1e\+15 is taken"
    with pytest.raises(UpdateError, match=text.replace("e+", r"e\+")):
        admit(reply(tensors={name: array}), "pi-1", toy_plan)


def test_the_largest_that_is_taken_has_a_finite_square():
    assert np.isfinite(np.square(np.float32(MAX_MAGNITUDE)) * np.float32(10**8))


def test_the_name_of_a_codec_cannot_fill_the_record(toy_plan, reply):
    content = reply()
    content["header"]["codec"] = "topk:0.1" + "0" * 20_000 + "1"
    with pytest.raises(UpdateError) as error:
        admit(content, "pi-1", toy_plan)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "parts",
    [
        {"tensors": MetricRecord({"packed": 1})},
        {"tensors": ArrayRecord({"packed": Array(np.zeros(4, np.float32))})},
        {"tensors": ArrayRecord({"packed": Array("uint8", (3,), "numpy.ndarray", b"\x80\x04")})},
        {"header": MetricRecord({"codec": 1})},
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
    st.dictionaries(st.sampled_from(["codec", "plan-digest", "token", "names"]), words).map(
        ConfigRecord
    ),
    st.dictionaries(st.sampled_from(["packed", "x"]), array_parts).map(ArrayRecord),
)
edits = {
    "header": st.dictionaries(st.sampled_from(["codec", "plan-digest", "token", "names"]), words),
    "metrics": st.dictionaries(st.sampled_from(list(METRICS)), numbers),
}


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    replaced=st.dictionaries(st.sampled_from(["tensors", "header", "metrics"]), records),
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
