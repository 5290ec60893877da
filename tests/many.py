"""Many quick cases of one property, as one test."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def many(name: str, values: Iterable[Any]) -> Callable[[Callable], Callable]:
    """Run a test with each of these values of an argument; the first that fails is named.

    As `pytest.mark.parametrize`, but one test: pytest takes milliseconds for each of its
    own, often more than the case, in every worker. Cases share what fixtures give.
    """
    values = tuple(values)

    def decorate(test: Callable) -> Callable:
        signature = inspect.signature(test)

        @functools.wraps(test)
        def every(*args: Any, **kwargs: Any) -> None:
            for value in values:
                try:
                    test(*args, **kwargs, **{name: value})
                except Exception as error:
                    error.add_note(f"with {name} = {value!r}")
                    raise

        own = [p for p in signature.parameters.values() if p.name != name]
        assert values and len(own) < len(signature.parameters), f"{test.__name__} has no {name}"
        every.__signature__ = signature.replace(parameters=own)
        return every

    return decorate
