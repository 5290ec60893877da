"""Replies that no honest client sends: a function for each fault, from what a good one would be."""

import dataclasses
import io
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fleet.codec import EncodedArrays, Payload, encode
from fleet.message import (
    LOST_VERSION,
    Enrolment,
    write_bytes,
    write_enrolment,
    write_metrics,
    write_update,
)
from fleet.plan import UpdatePlan

METRICS = {"num-examples": 12, "blocks": 5, "loss": 0.5, "peak-bytes": 1000, "seconds": 1.5}
TEN_MB_OF_TEXT = "Traceback! \x1b[2J " * 600_000
TWO_MB = np.zeros(2_000_000, np.uint8)
HONEST_NODE = 50  # whom a forger says that it is

Reply = RecordDict | Message | list | None


@dataclass
class Attack:
    """What a hostile client has at hand as it answers.

    Attributes:
        message: that it answers.
        name: its own.
        plan, codec: the run's.
        arrays: tensors of a good update.
        best: the same, encoded.
        rng: what else it decides by.
        overheard: tokens of the messages that hostile clients were sent before: name → tokens.
    """

    message: Message
    name: str
    plan: UpdatePlan
    codec: str
    arrays: dict[str, np.ndarray]
    best: Payload
    rng: np.random.Generator
    overheard: dict[str, list[str]]

    @property
    def token(self) -> str:
        return self.message.content["task"]["token"]

    def payload(self, plan: UpdatePlan | None = None, **tensors: np.ndarray) -> Payload:
        if plan is None and not tensors:
            return self.best
        plan = plan or self.plan
        arrays = {**self.arrays, **{n.replace("__", "."): a for n, a in tensors.items()}}
        return encode({s.name: arrays[s.name] for s in plan.specs}, plan, self.codec)

    def good(self, payload: Payload | None = None, **metrics) -> RecordDict:
        """A good reply, but for what is given."""
        return write_update(payload or self.payload(), METRICS | metrics, self.token)

    def with_data(self, data: bytes) -> RecordDict:
        return self.good(dataclasses.replace(self.payload(), data=data))

    def with_header(self, **header) -> RecordDict:
        content = self.good()
        content["header"] = ConfigRecord(dict(content["header"]) | header)
        return content

    def with_packed(self, array: Array) -> RecordDict:
        content = self.good()
        content["tensors"] = ArrayRecord({"packed": array})
        return content

    def pick(self, *options):
        return options[self.rng.integers(len(options))]

    def tensor(self, *roles: str) -> str:
        names = [s.name for s in self.plan.specs if not roles or s.role in roles]
        return names[self.rng.integers(len(names))]


# --- who says so


def no_token(a: Attack) -> Reply:
    content = a.good()
    del content["header"]["token"]
    return content


def invented_token(a: Attack) -> Reply:
    return a.with_header(token=a.rng.bytes(16).hex())


def foreign_token(a: Attack) -> Reply:
    others = [tokens[-1] for name, tokens in a.overheard.items() if name != a.name]
    return a.with_header(token=a.pick(*others, a.rng.bytes(16).hex()))


def stale_token(a: Attack) -> Reply:
    """Its own, of an earlier message; before there is one, as good as none."""
    return a.with_header(token=a.pick(*a.overheard[a.name][:-1], "0" * 32))


def token_of_another_kind(a: Attack) -> Reply:
    return a.with_header(token=a.pick(7, 0.5, [a.token], b"\xff", a.token.upper() + "é" * 9000))


def forged_sender(a: Attack) -> Reply:
    reply = Message(foreign_token(a), reply_to=a.message)
    reply.metadata.__dict__["_src_node_id"] = HONEST_NODE
    return reply


def replayed(a: Attack) -> Reply:
    """A bad reply, and a good one behind it."""
    return [_reply(a, a.good(**{"num-examples": -1})), _reply(a, a.good())]


def duplicated(a: Attack) -> Reply:
    return [_reply(a, RecordDict()) for _ in range(a.rng.integers(2, 9))]


def to_no_message(a: Attack) -> Reply:
    reply = Message(a.good(), reply_to=a.message)
    reply.metadata.__dict__["_reply_to_message_id"] = a.pick("", "0", "9" * 5000, "ab" * 32)
    return reply


# --- what it is an update of


def wrong_weights(a: Attack) -> Reply:
    return a.good(a.payload(dataclasses.replace(a.plan, weights_digest="1" * 64)))


def wrong_digest(a: Attack) -> Reply:
    return a.with_header(**{"plan-digest": a.pick("", "0" * 64, a.plan.digest[:-1], "𝕏" * 5000, 3)})


def another_codec(a: Attack) -> Reply:
    names = {"float16", "float32", "int8", "topk:0.2+int4", "topk:0.1" + "0" * 20_000 + "1"}
    return a.with_header(codec=a.pick(*sorted(names - {a.codec})))


def unknown_codec(a: Attack) -> Reply:
    return a.with_header(codec=a.pick("", "zip", "topk:nan", "+" * 9000, "topk:1e400+int4", ["x"]))


def narrower_than_it_says(a: Attack) -> Reply:
    narrow = a.payload(a.plan.narrow(int(a.rng.integers(0, 5))))
    return a.good(dataclasses.replace(narrow, plan_digest=a.plan.digest))


# --- names and records


def a_tensor_too_few_too_many_or_of_a_shape_that_broadcasts(a: Attack) -> Reply:
    specs, at = list(a.plan.specs), int(a.rng.integers(len(a.plan.specs)))
    spec = specs[at]
    match a.rng.integers(3):
        case 0:
            del specs[at]
        case 1:
            specs.insert(at, dataclasses.replace(spec, name="stem.weight"))
        case _:
            specs[at] = dataclasses.replace(spec, shape=(*spec.shape[1:], 1))
    plan = dataclasses.replace(a.plan, specs=tuple(specs))
    arrays = {s.name: np.resize(a.arrays.get(s.name, np.ones(1, "f4")), s.shape) for s in specs}
    payload = encode(arrays, plan, "float32")
    return a.good(dataclasses.replace(payload, codec=a.codec, plan_digest=a.plan.digest))


def extra_record(a: Attack) -> Reply:
    more = a.pick(ConfigRecord({"x": 1}), MetricRecord({"x": 1}), ArrayRecord({"x": _array()}))
    return RecordDict({**a.good(), a.pick("more", "", "tensors.", "x" * 9000): more})


def extra_array(a: Attack) -> Reply:
    content = a.good()
    arrays = {"packed": content["tensors"]["packed"], a.pick("x", "", "y" * 9000): _array()}
    content["tensors"] = ArrayRecord(arrays)
    return content


def renamed_array(a: Attack) -> Reply:
    content = a.good()
    name = a.pick("Packed", "arr_0", "", a.tensor())
    content["tensors"] = ArrayRecord({name: content["tensors"]["packed"]})
    return content


def header_key(a: Attack) -> Reply:
    return a.with_header(**{a.pick("names", "shapes", "k" * 9000): ["[3]"]})


def missing_record(a: Attack) -> Reply:
    content = a.good()
    del content[a.pick("tensors", "header", "metrics")]
    return content


def record_of_another_kind(a: Attack) -> Reply:
    content = a.good()
    kinds = (ConfigRecord({"codec": 1}), MetricRecord({"codec": [1, 2]}), ArrayRecord({}))
    name = a.pick("tensors", "header", "metrics")
    return RecordDict(
        {**content, name: a.pick(*(k for k in kinds if type(k) is not type(content[name])))}
    )


# --- values


def not_finite(a: Attack) -> Reply:
    value = a.pick(np.nan, np.inf, -np.inf)
    name = a.tensor()
    if a.codec == "float32":
        array = a.arrays[name].copy()
        array.flat[a.rng.integers(array.size)] = value
        return a.good(a.payload(**{name.replace(".", "__"): array}))
    return a.with_data(_poisoned(a, name, value))


def huge(a: Attack) -> Reply:
    """Finite, and far too large for anything to be reckoned with them."""
    name = a.tensor()
    array = np.full_like(a.arrays[name], a.pick(3e38, 1e30, 1.1e15))
    return a.good(a.payload(**{name.replace(".", "__"): array}))


def negative_variance(a: Attack) -> Reply:
    name = a.tensor("var")
    return a.good(a.payload(**{name.replace(".", "__"): -np.ones_like(a.arrays[name])}))


# --- bytes


def cut_or_padded(a: Attack) -> Reply:
    data = a.payload().data
    at = int(a.rng.integers(len(data)))
    return a.with_data(
        a.pick(data[:at], data[:at] + data[at + 1 :], data + a.rng.bytes(at + 1), b"")
    )


def noise(a: Attack) -> Reply:
    length = int(a.rng.integers(60_000))
    return a.with_data(a.rng.bytes(length + (length == len(a.payload().data))))


def inflation_bomb(a: Attack) -> Reply:
    """Seventy bytes that inflate to seventy thousand, where twelve numbers belong."""
    name = "blocks.4.conv.weight"
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = packer.compress(bytes(60_000)) + packer.flush()
    head = {"topk": np.array([12, len(bomb)], "<u4").tobytes()}.get(a.codec[:4], bytes(12))
    return a.with_data(_replaced(a, name, head + bomb))


def header_bomb(a: Attack) -> Reply:
    """An .npy header that claims what would fill the memory, or the stack."""
    data = a.payload().data
    dictionary = a.pick(
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**40},), }}",
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(data) + 1},), }}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f8', 'fortran_order': True, 'shape': (4, 4), }",
        "{'descr': '|V1000000000', 'fortran_order': False, 'shape': (), }",
        "(" * 5000,
        "{" * 200 + "}" * 200,
        "9" * 9000,
        "__import__('os').abort()",
        "",
    ).encode()
    version = a.pick(b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\xff\xff")
    length = a.pick(len(dictionary), 65535, 0)
    npy = b"\x93NUMPY" + version + length.to_bytes(2, "little") + dictionary + data
    return a.with_packed(Array("uint8", (len(data),), "numpy.ndarray", npy))


def pickled(a: Attack) -> Reply:
    objects = np.array([TWO_MB[:9], "x"], dtype=object)
    stream = io.BytesIO()
    np.save(stream, objects, allow_pickle=True)
    data = a.pick(pickle.dumps(objects), stream.getvalue(), b"cos\nabort\n(tR.")
    return a.with_packed(Array(a.pick("uint8", "object"), (2,), a.pick("numpy.ndarray", "x"), data))


def another_dtype_or_shape(a: Attack) -> Reply:
    row = np.frombuffer((a.payload().data * 2)[:400], np.uint8)
    return a.with_packed(
        Array(
            a.pick(row.astype("f4"), row.view("i1"), row.reshape(2, -1), row.view("<u2"), row[:0])
        )
    )


def oversize(a: Attack) -> Reply:
    content = a.with_packed(Array(TWO_MB[: int(a.rng.integers(400_000, len(TWO_MB)))]))
    return a.pick(content, a.with_header(codec="x" * 500_000), a.good(**{"m" * 300_000: 1}))


# --- numbers beside the tensors


def lying_count(a: Attack) -> Reply:
    wrong = (-9, 0, 2.5, 12.0, float("nan"), float("inf"), 2**62, 10_000_001, [12], -(2**63))
    return a.good(**{"num-examples": a.pick(*wrong)})


def boolean_count(a: Attack) -> Reply:
    content = a.good()
    dict.__setitem__(content["metrics"].__dict__["_data"], "num-examples", True)  # past its check
    return content


def wrong_number(a: Attack) -> Reply:
    key = a.pick("loss", "peak-bytes", "seconds")
    return a.good(**{key: a.pick(float("nan"), float("inf"), -float("inf"), 1e308, -1e308)})


def missing_number(a: Attack) -> Reply:
    content = a.good()
    del content["metrics"][a.pick("num-examples", "loss", "peak-bytes", "seconds")]
    return content


def lists_of_metrics(a: Attack) -> Reply:
    return a.good(**{a.pick("loss", "more", "l" * 9000): list(range(a.rng.integers(500)))})


def thousands_of_metrics(a: Attack) -> Reply:
    return a.good(**{f"m{i}": i for i in range(a.pick(66, 500, 3000))})


def absurd_name_of_a_metric(a: Attack) -> Reply:
    return a.good(**{a.pick("x" * 65, "\n" * 9000, "𝕏\x00" * 5000): 1.0})


# --- other replies than updates


def error(a: Attack) -> Reply:
    reason = a.pick(TEN_MB_OF_TEXT, None, "", " \n", "\x1b[2J", "no images\n" * 500)
    return Message(Error(a.pick(0, 2, 5, 100, LOST_VERSION, -1), reason), reply_to=a.message)


def silence(a: Attack) -> Reply:
    return None


def nothing(a: Attack) -> Reply:
    return RecordDict()


def another_type_of_message(a: Attack) -> Reply:
    content = a.pick(
        write_enrolment(Enrolment(a.name, 10, ("cat",))),
        write_metrics({"num-examples": 3, "loss": 0.1, "accuracy": 1.5}, a.token),
        write_bytes(b"moments", a.token),
        a.message.content,
    )
    reply = Message(content, reply_to=a.message)
    reply.metadata.__dict__["_message_type"] = a.pick("query", "query.moments", "system", "")
    return reply


KINDS: dict[str, Callable[[Attack], Reply]] = {
    kind.__name__: kind
    for kind in (
        no_token,
        invented_token,
        foreign_token,
        stale_token,
        token_of_another_kind,
        forged_sender,
        replayed,
        duplicated,
        to_no_message,
        wrong_weights,
        wrong_digest,
        another_codec,
        unknown_codec,
        narrower_than_it_says,
        a_tensor_too_few_too_many_or_of_a_shape_that_broadcasts,
        extra_record,
        extra_array,
        renamed_array,
        header_key,
        missing_record,
        record_of_another_kind,
        not_finite,
        huge,
        negative_variance,
        cut_or_padded,
        noise,
        inflation_bomb,
        header_bomb,
        pickled,
        another_dtype_or_shape,
        oversize,
        lying_count,
        boolean_count,
        wrong_number,
        missing_number,
        lists_of_metrics,
        thousands_of_metrics,
        absurd_name_of_a_metric,
        error,
        silence,
        nothing,
        another_type_of_message,
    )
}


def _array() -> Array:
    return Array(np.ones(3, np.float32))


def _reply(a: Attack, content: RecordDict) -> Message:
    return Message(content, reply_to=a.message)


def _slices(a: Attack) -> dict[str, slice]:
    return EncodedArrays(a.payload(), a.plan)._slices


def _replaced(a: Attack, name: str, data: bytes) -> bytes:
    """A good payload with other bytes in the place of one tensor's."""
    whole, slices = a.payload().data, _slices(a)
    parts = {n: whole[where] for n, where in slices.items()} | {name: data}
    sizes = np.array([len(part) for part in list(parts.values())[:-1]], "<u4").tobytes()
    return sizes + b"".join(parts.values())


def _poisoned(a: Attack, name: str, value: float) -> bytes:
    """A good payload in a codec that rounds, with a number in it that is not finite."""
    data = bytearray(a.payload().data[_slices(a)[name]])
    spec = a.plan.by_name[name]
    if spec.is_statistic:  # float16 behind the exponent
        data[1:3] = np.array([value], "<f2").tobytes()
    elif a.codec.startswith("topk") and len(spec.shape) > 1:  # the range of magnitudes
        start = 8 + int(np.frombuffer(data[4:8], "<u4")[0])
        data[start + 4 : start + 8] = np.array([value], "<f4").tobytes()
    else:  # the peak
        data[:4] = np.array([value], "<f4").tobytes()
    return _replaced(a, name, bytes(data))
