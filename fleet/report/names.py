"""Names that a picture has room for: what all of them share goes, never what tells them apart."""

import textwrap
from collections.abc import Callable, Sequence
from itertools import takewhile

_BETWEEN = ", "  # parts of a row's name
_AFTER = " ,=:/_-."  # a shared beginning ends behind one of these, a shared end before one


def labels(names: Sequence[str], most: int, lines: int = 1) -> list[str]:
    """Names as a picture writes them; different ones stay different.

    They stay as they are if each fits into a line. Else all lose what they share, as much
    as is needed: parts that are the same in every name, a part's `setting=`, a common
    beginning and end. What is still too long is cut where names are told apart.

    Args:
        most: characters of a line.
        lines: of a name at most.
    """
    shown = [printable(name) for name in names]
    if all(len(name) <= most for name in shown):
        return shown

    def fits(name: str) -> bool:
        broken = _broken(name, most)
        return len(broken) <= lines and all(len(line) <= most for line in broken)

    for shorten in (without_shared, _without_settings, _without_ends):
        shorter = shorten(shown)
        if all(shorter) and len({*shorter}) == len({*shown}):
            shown = shorter
        if all(map(fits, shown)):
            break
    else:
        shown = _cut(shown, most * lines, fits)
    return ["\n".join((_broken if fits(name) else _pieces)(name, most)) for name in shown]


def printable(text: str) -> str:
    """Text without what a terminal would obey or a page would turn round: � in its place."""
    return "".join(c if c.isprintable() else "�" for c in text)


def lines_in(shown: Sequence[str]) -> int:
    """The most lines that any label has."""
    return max((1 + name.count("\n") for name in shown), default=1)


def without_shared(names: Sequence[str]) -> list[str]:
    """Names of as many parts each, without the parts that are the same in all."""
    rows = _parts(names)
    kept = [column for column in zip(*rows, strict=True) if len({*column}) > 1] if rows else []
    return [_BETWEEN.join(row) for row in zip(*kept, strict=True)] if kept else list(names)


def _without_settings(names: Sequence[str]) -> list[str]:
    """Names of as many parts each, without the `setting=` that all have at the same place."""
    columns = []
    for column in zip(*_parts(names), strict=True):
        keys = {part.partition("=")[0] for part in column}
        shared = len(keys) == 1 and all("=" in part for part in column)
        columns.append([part.partition("=")[2] if shared else part for part in column])
    return [_BETWEEN.join(row) for row in zip(*columns, strict=True)] if columns else list(names)


def _parts(names: Sequence[str]) -> list[list[str]]:
    """Each name's; nothing where there is a single name, or not all have as many."""
    parts = [name.split(_BETWEEN) for name in names]
    return parts if len(names) > 1 and len({*map(len, parts)}) == 1 else []


def _without_ends(names: Sequence[str]) -> list[str]:
    """Names without a beginning and an end that all of them have, whole words of it."""
    if len(names) < 2:
        return list(names)
    head = _beginning(names)
    while head and head[-1] not in _AFTER:
        head = head[:-1]
    tail = _beginning([name[len(head) :][::-1] for name in names])[::-1]
    while tail and tail[0] not in _AFTER:
        tail = tail[1:]
    head, tail = (end if len(end) > 1 else "" for end in (head, tail))  # … is no shorter
    return [
        ("…" if head else "") + name[len(head) : len(name) - len(tail)] + ("…" if tail else "")
        for name in names
    ]


def _beginning(names: Sequence[str]) -> str:
    """What all begin with."""
    same = takewhile(lambda letters: len({*letters}) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)


def _cut(names: Sequence[str], most: int, fits: Callable[[str], bool]) -> list[str]:
    """Names of at most so many characters, cut at the place that leaves most of them different."""
    middle = most // 2
    best: list[str] = []
    for head in sorted(range(most), key=lambda head: abs(head - middle)):
        tail = most - 1 - head
        cut = [n if fits(n) else f"{n[:head]}…{n[max(head, len(n) - tail) :]}" for n in names]
        if len({*cut}) > len({*best}):
            best = cut
    if len({*best}) == len({*names}):
        return best
    return [f"{i} {name[: most - 1 - len(str(i))]}" for i, name in enumerate(best, start=1)]


def _broken(name: str, most: int) -> list[str]:
    """A name in lines, broken between words; a longer word has a longer line."""
    return textwrap.wrap(name, most, break_long_words=False, break_on_hyphens=False) or [name]


def _pieces(name: str, most: int) -> list[str]:
    """A name in lines, broken anywhere."""
    return [name[i : i + most] for i in range(0, len(name), most)]
