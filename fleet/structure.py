"""The anatomy of a mobile CNN: a chain of steps, some of them inverted residuals.

Nothing here knows a model's name. A block is an inverted residual if its
leaves read conv → norm → activation …, depthwise and pointwise (MobileNetV4's
feed-forward blocks: pointwise only) and pointwise at the end, with at most a
squeeze-excite and a shortcut beside, and if running those leaves in that
order gives what the block itself gives.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx

from fleet.errors import ConfigError

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)
_POOLING = (nn.AdaptiveAvgPool2d, nn.Identity)  # of a squeeze-excite, and what does nothing
_DROP_PATHS = {"DropPath", "StochasticDepth"}  # timm's and torchvision's


@dataclass(frozen=True, eq=False)
class Unit:
    """Conv → norm → activation → squeeze-excite; the last two may be absent."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    activation: nn.Module | None
    squeeze_excite: nn.Module | None

    @property
    def is_depthwise(self) -> bool:
        """One filter a channel."""
        return self.conv.groups == self.conv.in_channels > 1

    @property
    def is_pointwise(self) -> bool:
        """A dense 1×1 convolution."""
        return self.conv.groups == 1 and self.conv.kernel_size == (1, 1)


@dataclass(frozen=True, eq=False)
class InvertedResidual:
    """A block as its parts; the parameters stay those of the model."""

    name: str  # the module's name in the model
    module: nn.Module
    units: tuple[Unit, ...]
    residual: bool  # the input is added to the output
    drop_path: nn.Module | None  # drops the branch of a residual while training


@dataclass(frozen=True, eq=False)
class UnknownBlock:
    """A block that is no inverted residual; stock autograd trains it."""

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Step:
    """One step of the chain that a model is: its input is the step before."""

    name: str
    forward: Callable[[Tensor], Tensor]
    module: nn.Module | None  # None: a function without state, such as flatten
    block: InvertedResidual | UnknownBlock | None = None


def trace(model: nn.Module) -> tuple[Step, ...]:
    """Read a model as a chain of steps, its inverted residuals recognised.

    Other blocks above the first of them are `UnknownBlock`s, of which one
    warning tells. The model is left in eval mode.

    Raises:
        ConfigError: if it holds no inverted residual, or is no plain chain.
    """
    model.eval()
    blocks = {block.module: block for block in _find_blocks(model)}
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no inverted-residual blocks, which this project "
            f"trains; choose a mobile CNN such as mobilenet_v2 or efficientnet_lite0"
        )
    steps = _with_unknown_blocks(model, tuple(_chain(model, blocks)))
    probe = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y = probe
        for step in steps:
            y = step.forward(y)
        if not _alike(y, model(probe)):
            raise ConfigError(
                f"{type(model).__name__} is not the chain of steps that it looks like"
            )
    return steps


def _with_unknown_blocks(model: nn.Module, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Above the first block that we know, "the top k" must not skip any other."""
    first = next(i for i, step in enumerate(steps) if step.block)
    marked = [*steps[:first], *(_marked(step) for step in steps[first:])]
    unknown = [step.name for step in marked if isinstance(step.block, UnknownBlock)]
    if unknown:
        _warn(
            f"{type(model).__name__} has {len(unknown)} blocks that are no inverted residuals "
            f"({', '.join(unknown[:3])}{', …' if unknown[3:] else ''}): stock autograd trains "
            f"these, and keeps more"
        )
    return tuple(marked)


def _marked(step: Step) -> Step:
    """A step with several convs is a block, if none that we know."""
    if step.block is not None or step.module is None:
        return step
    convs = sum(isinstance(part, nn.Conv2d) for part in step.module.modules())
    return replace(step, block=UnknownBlock(step.name, step.module)) if convs > 1 else step


@cache  # once a process: every client of a simulation may read the same model
def _warn(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def parts_of(steps: tuple[Step, ...]) -> Iterator[InvertedResidual | Unit | Step]:
    """Steps at the grain of the method: blocks, units, and what is neither."""
    rest = list(steps)
    while rest:
        if isinstance(rest[0].block, InvertedResidual):
            yield rest.pop(0).block
            continue
        unit, length = _leading_unit(rest)
        if unit is not None:
            yield unit
            del rest[:length]
        else:
            yield rest.pop(0)


def _leading_unit(steps: list[Step]) -> tuple[Unit | None, int]:
    """The unit that the first steps make up, and how many they are.

    torchvision's conv, norm and activation are steps of their own; timm's are
    two, or one.
    """
    for length in (3, 2, 1):
        modules = [step.module for step in steps[:length]]
        if len(modules) == length and None not in modules:
            units = _parse_units([leaf for module in modules for leaf in _leaves(module)])
            if units is not None and len(units) == 1:
                return units[0], length
    return None, 0


def _find_blocks(model: nn.Module) -> list[InvertedResidual]:
    """Innermost modules that read and run as an inverted residual."""
    found: list[InvertedResidual] = []
    for name, module in model.named_modules():
        if module is model or isinstance(module, nn.Sequential):
            continue
        block = _match(name, module)
        if block is not None:
            found.append(block)
    names = [block.name for block in found]
    return [b for b in found if not any(n.startswith(f"{b.name}.") for n in names)]


def _match(name: str, module: nn.Module) -> InvertedResidual | None:
    leaves = list(_leaves(module))
    drop_paths = [leaf for leaf in leaves if type(leaf).__name__ in _DROP_PATHS]
    units = _parse_units([leaf for leaf in leaves if leaf not in drop_paths])
    if units is None or len(units) < 2 or len(drop_paths) > 1:
        return None
    has_depthwise = any(unit.is_depthwise for unit in units)
    if not units[-1].is_pointwise or not (has_depthwise or all(u.is_pointwise for u in units)):
        return None
    residual = _adds_input(module, units)
    if residual is None:
        return None
    return InvertedResidual(name, module, units, residual, drop_paths[0] if drop_paths else None)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Working parts of a module in order of registration; idle ones are left out."""
    if isinstance(module, nn.BatchNorm2d):
        yield module
        # timm keeps the activation inside the norm
        for child in module.children():
            yield from _leaves(child)
    elif _is_squeeze_excite(module):
        yield module
    elif isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0):
        return
    elif _is_leaf(module) or next(module.parameters(False), None) is not None:
        yield module
    else:
        for child in module.children():
            yield from _leaves(child)


def _is_squeeze_excite(module: nn.Module) -> bool:
    """Two pointwise convs and nothing that normalises: a gate from pooled features."""
    if _is_leaf(module):
        return False
    parts = _parts(module)
    convs = [m for m in parts if isinstance(m, nn.Conv2d)]
    return (
        len(convs) == 2
        and isinstance(parts[-1], nn.Sigmoid | nn.Hardsigmoid)
        and all(conv.kernel_size == (1, 1) and conv.bias is not None for conv in convs)
        and convs[0].in_channels == convs[1].out_channels
        and not any(isinstance(m, nn.BatchNorm2d) for m in parts)
        and len([m for m in parts if not isinstance(m, _POOLING)]) == 4
    )


def squeeze_excite(module: nn.Module, x: Tensor) -> Tensor:
    """A squeeze-excite, x·s(mean x); x (N, C, H, W)."""
    return x * excitation(module, x.mean((2, 3)))


def excitation(module: nn.Module, means: Tensor) -> Tensor:
    """The factors s (N, C, 1, 1) of a squeeze-excite, from its channels' means (N, C).

    Its convs are of one pixel, and so matrix products.
    """
    squeeze, *between, gate = (m for m in _parts(module) if not isinstance(m, _POOLING))
    (excite,) = (m for m in between if isinstance(m, nn.Conv2d))
    (activation,) = (m for m in between if m is not excite)
    hidden = activation(F.linear(means, squeeze.weight.flatten(1), squeeze.bias))
    return gate(F.linear(hidden, excite.weight.flatten(1), excite.bias))[:, :, None, None]


def _parts(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if _is_leaf(m)]


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _parse_units(leaves: list[nn.Module]) -> tuple[Unit, ...] | None:
    """Group leaves into units; None if they do not read as such."""
    units = []
    rest = list(leaves)
    while rest:
        conv = rest.pop(0)
        if not isinstance(conv, nn.Conv2d) or conv.bias is not None or not rest:
            return None
        norm = rest.pop(0)
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or not norm.affine:
            return None
        activation = rest.pop(0) if rest and isinstance(rest[0], _ACTIVATIONS) else None
        gate = rest.pop(0) if rest and _is_squeeze_excite(rest[0]) else None
        units.append(Unit(conv, norm, activation, gate))
    return tuple(units) or None


def eval_forward(unit: Unit, x: Tensor) -> Tensor:
    """A unit with its running statistics, part by part; x (N, C, H, W)."""
    norm = unit.norm
    x = F.batch_norm(
        unit.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    if unit.activation is not None:
        x = unit.activation(x)
    return x if unit.squeeze_excite is None else squeeze_excite(unit.squeeze_excite, x)


def _adds_input(module: nn.Module, units: tuple[Unit, ...]) -> bool | None:
    """Whether a module is its units in their order (False), or that plus its input (True).

    None if it is neither.
    """
    channels = units[0].conv.in_channels
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            y = x
            for unit in units:
                y = eval_forward(unit, y)
            expected = module(x.clone())
            if _alike(y, expected):
                return False
            return True if y.shape == x.shape and _alike(y + x, expected) else None
    except (RuntimeError, TypeError):  # it takes other inputs than one feature map
        return None
    finally:
        module.train(training)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


class _StepTracer(fx.Tracer):
    """Goes into containers only: every other module is one step."""

    def __init__(self, containers: set[nn.Module]) -> None:
        super().__init__()
        self._containers = containers

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return module not in self._containers


def _chain(model: nn.Module, blocks: dict[nn.Module, InvertedResidual]) -> Iterator[Step]:
    inside = {part for block in blocks for part in block.modules()}
    containers = {
        module
        for module in model.modules()
        if module not in inside
        and (isinstance(module, nn.Sequential) or any(part in blocks for part in module.modules()))
    }
    try:
        graph = _StepTracer(containers).trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{type(model).__name__} cannot be traced: {error}") from error
    nodes = [node for node in graph.nodes if node.op != "output"]
    for previous, node in pairwise(nodes):
        if node.all_input_nodes != [previous]:
            raise ConfigError(
                f"{type(model).__name__} is no plain chain of blocks: {node.name} takes "
                f"{[n.name for n in node.all_input_nodes]}, not only {previous.name}"
            )
        yield _step(model, node, blocks)


def _step(model: nn.Module, node: fx.Node, blocks: dict[nn.Module, InvertedResidual]) -> Step:
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        return Step(node.target, module, module, blocks.get(module))
    if node.op == "call_function":
        return Step(node.name, _bound(node.target, node), None)
    if node.op == "call_method":
        return Step(node.name, _bound(getattr(Tensor, node.target), node), None)
    raise ConfigError(f"{type(model).__name__} has a step of kind {node.op}: {node.name}")


def _bound(function: Callable, node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The function with its constant arguments, the feature map left open."""

    def forward(x: Tensor) -> Tensor:
        args = [x if isinstance(arg, fx.Node) else arg for arg in node.args]
        return function(*args, **node.kwargs)

    return forward
