"""Paths as users write them."""

from pathlib import Path

from fleet.errors import ConfigError


def expanded(path: str | Path, what: str) -> Path:
    """A path with `~` and `~user` at its beginning made the home that they stand for.

    Args:
        what: the setting or option that it is of.

    Raises:
        ConfigError: if there is no such user, or this one has no home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0][1:]
        fault = f"there is no user {user}" if user else "this user has no home"
        raise ConfigError(
            f"{what} {path} begins with a home, and {fault}; write the whole path, or ./{path} "
            f"for one of that name here"
        ) from error
