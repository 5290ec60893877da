"""What a simulated fleet has against it: hostile clients and a network that loses replies."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fleet.errors import ConfigError
from simulations.attacks import FORMS, read_attack

# What a simulation is told beside a run's configuration: recipes name it among the
# settings or in a table [simulation].
OF_ADVERSITY = ("attack", "hostile", "drop")
OF_SIMULATION = ("engine", "workers", *OF_ADVERSITY)


def told_apart(
    settings: Mapping[str, Any], simulation: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the run itself, and what only its simulation is told.

    Args:
        settings: of both kinds.
        simulation: the table of that name.
        where: both are, for the error.

    Raises:
        ConfigError: for a name that is in both.
    """
    own = {key: value for key, value in settings.items() if key not in OF_SIMULATION}
    told = {key: value for key, value in settings.items() if key in OF_SIMULATION}
    if twice := sorted(told.keys() & simulation.keys()):
        raise ConfigError(
            f"{where} has {twice[0]} = {told[twice[0]]!r} among its settings and "
            f"{twice[0]} = {simulation[twice[0]]!r} in [simulation]; leave one of them out"
        )
    return own, told | dict(simulation)


@dataclass(frozen=True, kw_only=True)
class Adversity:
    """Settings that only a simulation has.

    Attributes:
        attack: what hostile clients do, as `read_attack` reads it; empty: there are none.
        hostile: share of the clients that are hostile.
        drop: probability that a reply to a train message is lost.

    Raises:
        ConfigError: for a value that is out of range, or one of attack and hostile
            without the other.
    """

    attack: str = ""
    hostile: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.attack, str):
            raise ConfigError(f"attack must be text, got {self.attack!r}; known: {FORMS}")
        if self.attack:
            read_attack(self.attack)
        _check_share("hostile", self.hostile, "[0, 1]", math.nextafter(1, 2))
        _check_share("drop", self.drop, "[0, 1)", 1)
        if self.attack and not self.hostile:
            raise ConfigError(
                f"attack is {self.attack} and hostile is {self.hostile}, so nobody attacks; "
                f"raise hostile, or leave attack out"
            )
        if self.hostile and not self.attack:
            raise ConfigError(
                f"hostile is {self.hostile} and no attack says what they do; "
                f"name one, or leave hostile out; known: {FORMS}"
            )

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Adversity":
        """As a recipe's table names them.

        Raises:
            ConfigError: for an unknown name too.
        """
        if unknown := [name for name in table if name not in OF_ADVERSITY]:
            raise ConfigError(
                f"[simulation] has {', '.join(unknown)}; known: {', '.join(OF_ADVERSITY)}"
            )
        return cls(**table)

    def as_table(self) -> dict[str, str | float]:
        """What is set; empty for a fleet of honest clients on a network that loses nothing."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value}

    def check_fleet(self, clients: int, engine: str) -> None:
        """What is only wrong for some fleets and engines.

        Raises:
            ConfigError: if it is.
        """
        if self.as_table() and engine != "local":
            raise ConfigError(
                f"engine {engine} cannot simulate {' and '.join(self.as_table())}; "
                f"use engine local, or leave that out"
            )
        if self.hostile and not round(self.hostile * clients):
            raise ConfigError(
                f"hostile is {self.hostile}, which of {clients} clients is none; "
                f"raise it, or raise clients"
            )


def _check_share(name: str, value: Any, interval: str, below: float) -> None:
    if type(value) not in (int, float) or not 0 <= value < below:
        raise ConfigError(f"{name} must be a number in {interval}, got {value!r}")
