"""What a device trains: the update plan, its tensors and its digest.

The server decides the widest plan of a run. A device that cannot afford it
trains a narrower one: the same plan cut to fewer blocks. Both sides derive
the tensors from their own backbone and compare digests, so a plan travels as
a few words and a mismatch is found before any tensor is read.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from fleet.errors import PlanError

if TYPE_CHECKING:
    import torch.nn as nn

    from fleet.backbones import Backbone
    from fleet.structure import Step

Method = Literal["mobiletl", "head", "shifts", "blocks", "full"]
METHODS: tuple[str, ...] = get_args(Method)

# What MobileTL keeps of a block for backward. `published`: the paper's sign masks and every
# conv's input. `float32`, `bfloat16`, `int8`: the activations' inputs, so rounded.
# `recompute`: the block's input alone.
Stash = Literal["recompute", "int8", "bfloat16", "float32", "published"]
STASHES: tuple[str, ...] = get_args(Stash)

Role = Literal["weight", "bias", "shift", "scale", "mean", "var"]
STATISTICS: tuple[Role, ...] = ("mean", "var")  # pooled over clients, never stepped
NORM_ROLES: tuple[Role, ...] = ("shift", "scale", *STATISTICS)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor that trains and travels."""

    name: str  # its key in the backbone model's state_dict
    shape: tuple[int, ...]
    role: Role
    depth: int  # 0: head and tail; j: the j-th block counted from the top
    dtype: str = "float32"

    @property
    def is_statistic(self) -> bool:
        """True for running means and variances of trained norms."""
        return self.role in STATISTICS

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in float32."""
        size = 4
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """Which tensors of which backbone train, by which method.

    Attributes:
        backbone: name of the architecture.
        preprocessing: what happens to an image before the model, as plain values.
        step_digests: step of the model → digest of its pretrained tensors.
        weights_digest: one digest over `step_digests` and `preprocessing`.
        method: one of `METHODS`.
        blocks: k, how many inverted-residual blocks train, counted from the top.
        train_tail: whether what lies between the last block and the head trains.
        specs: the tensors that travel, in the order of the model's state_dict.
        local_norms: whether norms train and stay on the device.
        local_specs: of these, the tensors that train; they are not in `specs`.
    """

    backbone: str
    preprocessing: Mapping[str, Any]
    step_digests: Mapping[str, str]
    weights_digest: str
    method: Method
    blocks: int
    train_tail: bool
    specs: tuple[TensorSpec, ...]
    local_norms: bool = False
    local_specs: tuple[TensorSpec, ...] = ()

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all of the plan, the weights digest inside."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        """Tensor name → spec, of what travels."""
        return {spec.name: spec for spec in self.specs}

    @cached_property
    def trained(self) -> dict[str, TensorSpec]:
        """Tensor name → spec, of all that trains, whether it travels or not."""
        return self.by_name | {spec.name: spec for spec in self.local_specs}

    @property
    def head(self) -> tuple[str, str] | None:
        """Names of the classifier's weight and bias, the last two; None where it has no bias."""
        last = self.specs[-2:]
        if [(spec.role, len(spec.shape)) for spec in last] == [("weight", 2), ("bias", 1)]:
            return last[0].name, last[1].name
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that travel in float32, without any header."""
        return sum(spec.nbytes for spec in self.specs)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values; what `digest` is taken over."""
        plan = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for field in _DERIVED:
            plan[field] = [dataclasses.asdict(spec) for spec in getattr(self, field)]
        # Through JSON and back, so that it equals a plan that travelled.
        return json.loads(json.dumps(plan, default=dict))

    def narrow(self, blocks: int) -> "UpdatePlan":
        """The same plan cut to its top `blocks` blocks: a sub-plan.

        Raises:
            PlanError: if the plan has fewer blocks, or cannot be cut at all.
        """
        if blocks == self.blocks:
            return self
        if self.method == "full":
            raise PlanError("method full trains the whole model and has no narrower plan")
        if not 0 <= blocks < self.blocks:
            raise PlanError(
                f"a sub-plan of {blocks} blocks is outside the plan's 0 to {self.blocks}; "
                f"raise the run's blocks or lower the device's"
            )
        specs = {
            field: tuple(spec for spec in getattr(self, field) if spec.depth <= blocks)
            for field in _DERIVED
        }
        return dataclasses.replace(self, blocks=blocks, **specs)

    @cached_property
    def sub_plans(self) -> dict[str, "UpdatePlan"]:
        """Digest → plan, for this plan and every narrower one."""
        narrowest = self.blocks if self.method == "full" else 0
        plans = (self.narrow(k) for k in range(narrowest, self.blocks + 1))
        return {plan.digest: plan for plan in plans}

    def check_same(self, other: Mapping[str, Any]) -> None:
        """Compare with a plan that arrived as `summary`.

        Raises:
            PlanError: naming every field that differs, with both values.
        """
        mine = self.summary()
        if mine == other:
            return
        raise PlanError(
            "this device's backbone does not match the server's plan: "
            + "; ".join(_differences(mine, other))
        )

    def summary(self) -> dict[str, Any]:
        """The plan without its specs, which each side derives: what travels."""
        return dict(self._summary)

    @cached_property
    def _summary(self) -> dict[str, Any]:
        plan = self.as_dict()
        for field in _DERIVED:
            del plan[field]
        return plan | {"digest": self.digest}


_DERIVED = ("specs", "local_specs")  # fields that each side makes from its own backbone


def make_plan(
    backbone: "Backbone",
    *,
    method: str,
    blocks: int = 0,
    train_tail: bool = False,
    local_norms: bool = False,
) -> UpdatePlan:
    """What a method trains of a backbone.

    Args:
        backbone: with the head of the task.
        method: `mobiletl` trains convs and, of norms, the shifts, the last norm
            of a block in full; `shifts` the norms' shifts; `blocks` all of the
            top blocks; `full` all of the model; `head` the classifier alone.
            Every method trains the head.
        blocks: k, counted from the top; `head` and `full` have no use for it.
        train_tail: train what lies between the last block and the head too.
        local_norms: norms train, but stay on the device.

    Raises:
        PlanError: for an unknown method, or more blocks than there are.
    """
    if method not in METHODS:
        raise PlanError(f"unknown method {method}; known: {', '.join(METHODS)}")
    count = len(backbone.blocks)
    blocks = {"head": 0, "full": count}.get(method, blocks)
    if not 0 <= blocks <= count:
        raise PlanError(f"blocks is {blocks}, {backbone.name} has {count}; choose 0 to {count}")
    depths = _depths(backbone, method, blocks, train_tail)
    order = {name: i for i, name in enumerate(backbone.model.state_dict())}
    specs = [
        spec
        for step in backbone.steps
        if step.name in depths and step.module is not None
        for spec in _specs(
            step.name, step.module, _method_of(step, backbone, method), depths[step.name]
        )
    ]
    specs.sort(key=lambda spec: order[spec.name])
    return UpdatePlan(
        backbone=backbone.name,
        preprocessing=dataclasses.asdict(backbone.preprocessing),
        step_digests=backbone.step_digests,
        weights_digest=backbone.weights_digest,
        method=method,
        blocks=blocks,
        train_tail=train_tail or method == "full",
        specs=tuple(spec for spec in specs if not (local_norms and spec.role in NORM_ROLES)),
        local_norms=local_norms,
        local_specs=tuple(spec for spec in specs if local_norms and spec.role in NORM_ROLES),
    )


def agreed_plan(backbone: "Backbone", summary: Mapping[str, Any]) -> UpdatePlan:
    """The plan whose summary the server sent, derived from a backbone of one's own.

    Raises:
        PlanError: if it is not the server's, naming what differs.
    """
    plan = make_plan(
        backbone,
        method=str(summary.get("method")),
        blocks=int(summary.get("blocks", 0)),
        train_tail=bool(summary.get("train_tail")),
        local_norms=bool(summary.get("local_norms")),
    )
    plan.check_same(summary)
    return plan


def _method_of(step: "Step", backbone: "Backbone", method: str) -> str:
    """The method by which a plan's method trains one step."""
    from fleet.structure import UnknownBlock  # here, as configuration needs no PyTorch

    if step is backbone.steps[-1]:
        return "head"
    return "blocks" if method == "mobiletl" and isinstance(step.block, UnknownBlock) else method


def _depths(backbone: "Backbone", method: str, blocks: int, train_tail: bool) -> dict[str, int]:
    """Step that trains → its depth: how many blocks a plan needs to reach it."""
    steps = backbone.steps
    if method == "full":
        return {step.name: 0 for step in steps}
    depths = {steps[-1].name: 0}
    last_block = max(i for i, step in enumerate(steps) if step.block)
    if train_tail and method != "head":
        depths |= {step.name: 0 for step in steps[last_block + 1 :]}
    from_top = [block.name for block in reversed(backbone.blocks)]
    return depths | {name: j for j, name in enumerate(from_top[:blocks], start=1)}


def _specs(step: str, module: "nn.Module", method: str, depth: int) -> Iterator[TensorSpec]:
    """The tensors of one step that a method trains."""
    norms = [name for name, part in module.named_modules() if _is_norm(part)]
    for name, part in module.named_modules():
        for key, tensor in (
            *part.named_parameters(recurse=False),
            *part.named_buffers(recurse=False),
        ):
            role = _ROLES.get((_is_norm(part), key))
            if role is None or not _method_trains(method, role, is_last=name in norms[-1:]):
                continue
            full_name = ".".join(filter(None, (step, name, key)))
            yield TensorSpec(name=full_name, shape=tuple(tensor.shape), role=role, depth=depth)


_ROLES: dict[tuple[bool, str], Role] = {  # (is a norm, parameter) → role
    (False, "weight"): "weight",
    (False, "bias"): "bias",
    (True, "weight"): "scale",
    (True, "bias"): "shift",
    (True, "running_mean"): "mean",
    (True, "running_var"): "var",
}


def _is_norm(module: "nn.Module") -> bool:
    return hasattr(module, "running_var")


def _method_trains(method: str, role: Role, is_last: bool) -> bool:
    """Whether a method trains a tensor of a step that it trains.

    `is_last`: the tensor is part of the step's last norm.
    """
    if method in ("full", "blocks"):
        return True
    if method == "shifts":
        return role == "shift"
    return role in ("weight", "bias", "shift") or is_last


def _differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    lines = []
    for field in ("backbone", "method", "blocks", "train_tail", "local_norms"):
        if mine[field] != other.get(field):
            lines.append(f"{field} is {mine[field]} here, {other.get(field)} in the plan")
    for field, noun in (("preprocessing", ""), ("step_digests", "weights of ")):
        theirs = other.get(field, {})
        for key in sorted(mine[field].keys() | theirs.keys()):
            here, there = mine[field].get(key, "absent"), theirs.get(key, "absent")
            if here != there:
                lines.append(f"{noun}{key} is {here} here, {there} in the plan")
    if len(lines) > 6:
        lines[6:] = [f"and {len(lines) - 6} more"]
    return lines or ["the tensors it derives differ; run the same version on both sides"]
