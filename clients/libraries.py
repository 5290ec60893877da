"""The libraries that a ClientApp trains with, without PyTorch's compiler.

torchvision and timm import `torch._dynamo` for two functions that matter where something
is compiled, and it brings Triton, SymPy and hundreds of modules of its own: a third of
what a process has resident that is ready to train, and half of the time that it takes
to get ready. Nothing here compiles. So while these libraries are imported, a small
module stands in its place, with these two functions; whoever asks for anything else,
then or later, gets the real one.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

_COMPILER = "torch._dynamo"


def import_without_compiler(name: str) -> None:
    """Import a module, and of the compiler only what it uses as it is imported.

    With the compiler after all, if this process has it already or the module needs more.

    Raises:
        ImportError: as `import` does.
    """
    if _COMPILER not in sys.modules:
        try:
            with _compiler_aside():
                importlib.import_module(name)
            return
        except ImportError:  # it needs a part of the compiler, or is not there at all
            pass
    importlib.import_module(name)


@contextmanager
def _compiler_aside() -> Iterator[None]:
    """Let modules stand in for the compiler until the block ends."""
    package, utils = (_StandIn(name) for name in (_COMPILER, f"{_COMPILER}.utils"))
    package.__path__ = []
    package.utils = utils
    package.disable = _disable
    utils.is_compile_supported = _is_compile_supported
    modules = {module.__name__: module for module in (package, utils)}
    sys.modules |= modules
    try:
        yield
    finally:
        _remove(modules)


def _remove(stand_ins: dict[str, ModuleType]) -> None:
    for name, module in stand_ins.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    if isinstance(vars(torch).get("_dynamo"), _StandIn):
        del torch._dynamo


class _StandIn(ModuleType):
    """Gives what it does not have from the module whose name it bears."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of the import system: this is not the module
            raise AttributeError(name)
        _remove({n: m for n, m in sys.modules.items() if isinstance(m, _StandIn)})
        return getattr(importlib.import_module(self.__name__), name)


def _disable(
    function: Callable | None = None, *arguments: Any, **keywords: Any
) -> Callable[..., Any]:
    """As `torch.compiler.disable` of what is never compiled: the function itself."""
    return (lambda decorated: decorated) if function is None else function


def _is_compile_supported(device_type: Any) -> bool:
    return importlib.import_module(f"{_COMPILER}.utils").is_compile_supported(device_type)
