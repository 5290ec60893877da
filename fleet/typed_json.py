"""JSON objects as dataclasses, every value held against the type of its field."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

_T = TypeVar("_T")
_Reader = Callable[[Any], Any]

_NOUNS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}


def from_json(kind: type[_T], value: Any) -> _T:
    """A dataclass of what `json.loads` made of an object.

    Args:
        kind: its fields are int, float, bool or str, these or None, a dataclass, a tuple of
            any length or a fixed one, or a mapping from names. What has a default may be
            missing.

    Raises:
        ValueError: naming the field, what it must be and what it is.
    """
    try:
        return _reader(kind)(value)
    except _Misfit as misfit:
        raise ValueError(str(misfit)) from None


class _Misfit(Exception):
    """A fault, and the way to it, which grows on the way out: nothing is built where all fits."""

    def __init__(self, fault: str) -> None:
        self.fault, self.path = fault, ""

    def below(self, step: str) -> "_Misfit":
        dot = "." if self.path and not self.path.startswith("[") else ""
        self.path = f"{step}{dot}{self.path}"
        return self

    def __str__(self) -> str:
        return f"{self.path} {self.fault}".strip()


@cache
def _reader(kind: Any) -> _Reader:
    """From JSON's value to that of a type."""
    if is_dataclass(kind):
        return _object_reader(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple:
        if inner[-1] is ...:
            return _list_reader(_reader(inner[0]))
        return _fixed_list_reader([_reader(each) for each in inner])
    if origin is Mapping:
        return _mapping_reader(_reader(inner[1]))
    return _plain_reader(inner or (kind,))


def _plain_reader(kinds: tuple[type, ...]) -> _Reader:
    # JSON has one kind of number: 3 is a float too. A bool is none, though Python's is an int.
    taken = {*kinds, int} if float in kinds else {*kinds}
    wanted = " or ".join(_NOUNS[kind] for kind in kinds)

    def read(value: Any) -> Any:
        if type(value) not in taken:
            raise _Misfit(f"must be {wanted}, got {value!r:.80}")
        return value

    return read


def _object_reader(kind: Any) -> _Reader:
    readers = {one.name: _reader(one.type) for one in fields(kind)}
    needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    known = ", ".join(readers)

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Misfit(f"must be an object with {known}, got {value!r:.80}")
        for fault, names in (
            ("unknown", [name for name in value if name not in readers]),
            ("missing", [name for name in needed if name not in value]),
        ):
            if names:
                raise _Misfit(f"{fault} {', '.join(names)}; known: {known}")
        return kind(**{name: _below(name, readers[name], item) for name, item in value.items()})

    return read


def _list_reader(reader: _Reader) -> _Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise _Misfit(f"must be a list, got {value!r:.80}")
        return tuple(_below(number, reader, item) for number, item in enumerate(value))

    return read


def _fixed_list_reader(readers: list[_Reader]) -> _Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(readers):
            raise _Misfit(f"must be a list of {len(readers)}, got {value!r:.80}")
        pairs = enumerate(zip(readers, value, strict=True))
        return tuple(_below(number, reader, item) for number, (reader, item) in pairs)

    return read


def _mapping_reader(reader: _Reader) -> _Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _Misfit(f"must be an object, got {value!r:.80}")
        return {name: _below(name, reader, item) for name, item in value.items()}

    return read


def _below(step: str | int, reader: _Reader, value: Any) -> Any:
    try:
        return reader(value)
    except _Misfit as misfit:
        raise misfit.below(f"[{step}]" if isinstance(step, int) else step) from None
