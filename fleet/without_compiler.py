"""Training without PyTorch's compiler, for as long as nobody asks for it.

torchvision, timm and PyTorch's optimizers import `torch._dynamo` for functions that matter
where something is compiled, and it brings Triton, SymPy and hundreds of modules of its own: a
third of what a process has resident that is ready to train, and half of the time that it
takes to get ready. So a small module stands in its place, with these functions. Whoever asks
for anything else, then or later, gets the real one.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_COMPILER = "torch._dynamo"


@contextmanager
def compiler_aside() -> Iterator[None]:
    """Let modules stand in for the compiler until the block ends, or it is needed itself.

    Does nothing where this process has it already.
    """
    if _COMPILER in sys.modules:
        yield
        return
    package, utils = (_StandIn(name) for name in (_COMPILER, f"{_COMPILER}.utils"))
    package.__path__ = []
    package.utils = utils
    package.disable, package.graph_break = _disable, _graph_break
    utils.is_compile_supported = _is_compile_supported
    sys.modules |= {module.__name__: module for module in (package, utils)}
    finder = _Parts()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _step_back()


def _step_back() -> None:
    """Let nothing stand in for the compiler any more."""
    for name in [n for n, module in sys.modules.items() if isinstance(module, _StandIn)]:
        del sys.modules[name]
    if isinstance(vars(torch).get("_dynamo"), _StandIn):
        del torch._dynamo


class _StandIn(ModuleType):
    """Gives what it does not have from the module whose name it bears."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of the import system: this is not the module
            raise AttributeError(name)
        _step_back()
        return getattr(importlib.import_module(self.__name__), name)


class _Parts(MetaPathFinder):
    """Finds a module of the compiler for which nothing stands in: in the compiler itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        stands_in = isinstance(sys.modules.get(_COMPILER), _StandIn)
        if not stands_in or not name.startswith(f"{_COMPILER}."):
            return None
        _step_back()
        compiler = importlib.import_module(_COMPILER)
        if name in sys.modules:  # by now; it must not be made twice
            return importlib.util.spec_from_loader(name, _Made(sys.modules[name]))
        return PathFinder.find_spec(name, compiler.__path__)


class _Made(Loader):
    """Gives a module that is there."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__
        # Or else Python makes the module anew by it. Some modules let nobody set an attribute.
        vars(module)["__spec__"] = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self._spec


def _disable(
    function: Callable | None = None, *arguments: Any, **keywords: Any
) -> Callable[..., Any]:
    """As `torch.compiler.disable`: until there is a compiler, the function itself.

    PyTorch keeps what this returns for good, so it has to be right afterwards too.
    """
    if function is None:
        return functools.partial(_disable, **keywords)

    @functools.wraps(function)
    def disabled(*given: Any, **named: Any) -> Any:
        compiler = sys.modules.get(_COMPILER)
        if compiler is None or isinstance(compiler, _StandIn):
            return function(*given, **named)
        return compiler.disable(function, *arguments, **keywords)(*given, **named)

    return disabled


def _graph_break(*arguments: Any, **keywords: Any) -> None:
    """As the compiler's own of what is never compiled."""


def _is_compile_supported(device_type: Any) -> bool:
    return importlib.import_module(f"{_COMPILER}.utils").is_compile_supported(device_type)
