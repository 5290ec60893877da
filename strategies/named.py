"""Parts of a run that are the user's own, by the name of a Python module."""

import importlib
from typing import Any

from fleet.errors import ConfigError


def import_named(where: str, kind: str = "") -> Any:
    """What `package.module:name` means.

    Args:
        kind: what an error calls it: `rule`.

    Raises:
        ConfigError: if there is no such module, or no such name in it.
    """
    module, _, name = where.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module does as it is imported
        named = f"{kind} {where}" if kind else where
        raise ConfigError(
            f"cannot import {named} ({type(error).__name__}: {error}); write package.module:name, "
            f"with the package where Python finds it (PYTHONPATH)"
        ) from error
