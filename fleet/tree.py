"""Nested plain values ↔ JSON and arrays: how what a strategy remembers is written without pickle.

A tree is made of None, bools, numbers, texts, bytes and NumPy arrays, and of
dicts, lists and tuples of trees. It comes back as it was, bit for bit: numbers
that are not finite, keys that are no texts, a dict's order, NumPy scalars, the
memory order of arrays, and which of them were one and the same.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fleet.errors import CheckpointError

# What safetensors writes; it knows no texts, objects, dates or foreign byte orders.
_DTYPES = {
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
}


def flatten(value: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Part a tree into what JSON holds and its arrays.

    Returns:
        JSON values, in which arrays are named; and name → array, the name being
        the path to where it was first met.

    Raises:
        CheckpointError: naming the first place that holds anything else.
    """
    flattening = _Flattening()
    try:
        return flattening.written(value, ""), flattening.arrays
    except RecursionError as error:
        raise CheckpointError(
            "what is to be kept holds itself, or is nested too deeply; keep it flat"
        ) from error


def unflatten(written: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The tree that `flatten` parted. Its arrays are those given, where that is their order.

    Raises:
        CheckpointError: if it was not written by `flatten`.
    """
    try:
        return _Unflattening(arrays).read(written)
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise CheckpointError(f"this is not a tree that was kept: {error!r:.200}") from error


class _Flattening:
    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._names: dict[int, str] = {}  # id of an array → its name
        self._met: list[Any] = []  # holds them, as the id of what is gone is given out again

    def written(self, value: Any, path: str) -> Any:
        # Exact types: a subclass would come back as its base.
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind is list:
            return [self.written(item, f"{path}/{i}") for i, item in enumerate(value)]
        if kind is tuple:
            return {"tuple": [self.written(item, f"{path}/{i}") for i, item in enumerate(value)]}
        if kind is dict:
            pairs = (
                [self.written(key, f"{path}/{key}"), self.written(item, f"{path}/{key}")]
                for key, item in value.items()
            )
            return {"dict": list(pairs)}
        if kind is bytes:
            return {"bytes": self._named(np.frombuffer(value, np.uint8), value, path)}
        if (kind is np.ndarray or isinstance(value, np.generic)) and value.dtype in _DTYPES:
            if kind is not np.ndarray:
                return {"scalar": self._named(np.asarray(value), value, path)}
            fortran = value.flags.f_contiguous and not value.flags.c_contiguous
            return {"fortran" if fortran else "array": self._named(value, value, path)}
        what = f"{kind.__name__} of {value.dtype}" if hasattr(value, "dtype") else kind.__name__
        raise CheckpointError(
            f"{path or '/'} is a {what}, which a checkpoint cannot hold; keep numbers, texts and "
            f"NumPy arrays of numbers, and dicts, lists and tuples of these"
        )

    def _named(self, array: np.ndarray, source: Any, path: str) -> str:
        """The name under which an array is kept; what was met before is kept once."""
        if id(source) not in self._names:
            name = path or "/"
            while name in self.arrays:  # keys 1 and "1" have one path
                name += "'"
            self.arrays[name] = array
            self._names[id(source)] = name
            self._met.append(source)
        return self._names[id(source)]


class _Unflattening:
    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays
        self._fortran: dict[str, np.ndarray] = {}

    def read(self, written: Any) -> Any:
        if isinstance(written, list):
            return [self.read(item) for item in written]
        if not isinstance(written, dict):
            return written
        ((kind, content),) = written.items()
        if kind == "dict":
            return {self.read(key): self.read(item) for key, item in content}
        if kind == "tuple":
            return tuple(self.read(item) for item in content)
        if kind == "float":
            return float(content)
        if kind == "bytes":
            return self._arrays[content].tobytes()
        if kind == "scalar":
            return self._arrays[content][()]
        if kind == "array":
            return self._arrays[content]
        if kind == "fortran":
            if content not in self._fortran:
                self._fortran[content] = np.asfortranarray(self._arrays[content])
            return self._fortran[content]
        raise ValueError(f"unknown kind {kind}")
