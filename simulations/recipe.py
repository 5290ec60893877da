"""What a comparison compares: rows of settings, axes that are crossed with them, and seeds.

A recipe is a TOML file or a mapping of the same form:

    title = "Strategies"            # of the page
    seeds = 3                       # 0, 1 and 2; or a list of them
    target = 0.9                    # accuracy that rounds and bytes are counted to
    columns = ["accuracy", "seconds"]
    within = ["partition"]          # a row is held against the first with the same values

    [settings]                      # of every run
    rounds = 5

    [vary]                          # every value with every other
    partition = ["iid", "dirichlet:0.1"]

    [[rows]]                        # settings that belong together, crossed with what varies
    name = "FedAdam"
    strategy = "fedadam"
    server-learning-rate = 0.01

Everything is optional. What cannot be printed, in the title and in rows' names, becomes �,
for terminals would obey it. Names are those of `fleet simulate`; `codec` sets both links'.
A table [simulation], as a run's config.toml has, counts as a part of [settings]. That
file itself is a recipe of one run, its seed's; so is a file of settings alone.
"""

import csv
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tomli_w

from fleet.config import (
    Value,
    closest_first,
    default_settings,
    describe_settings,
    read_assignment,
    read_config,
    read_value,
    text_settings,
    unknown_setting,
)
from fleet.errors import ConfigError
from fleet.report.names import printable
from simulations.adversity import OF_SIMULATION, Adversity, told_apart
from simulations.launch import ENGINES, check_workers
from strategies.algorithm import algorithm

_BOTH = ("codec-up", "codec-down")  # what `codec` stands for
_PLACED = {  # settings that a comparison gives itself
    "seed": "use seeds",
    "run-dir": "every run has a folder of its own below that of the comparison",
    "state-dir": "what clients remember lies with their run",
    "resume": "the same command goes on with what is there",
}
_OF_A_RUN = ("versions", "machine")  # what a run's config.toml has beside settings
_KEYS = ("title", "seeds", "target", "columns", "within", "settings", "simulation", "vary", "rows")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What all runs of a row have in common.

    Attributes:
        name: of the row.
        settings: the whole run configuration but seed and folders.
        engine: that of `simulate`.
        workers: that of `simulate`; no result depends on it.
        adversity: what is set of attack, hostile and drop.
        group: values of what rows are compared within.
    """

    name: str
    settings: Mapping[str, Value]
    engine: str
    workers: int | str
    adversity: Mapping[str, str | float]
    group: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A comparison that is still to be run; see the module for what it holds."""

    title: str
    seeds: Sequence[int]
    target: float | None
    columns: tuple[str, ...]
    within: tuple[str, ...]
    settings: Mapping[str, Value]
    vary: Mapping[str, tuple[Value, ...]]
    rows: tuple[tuple[str, Mapping[str, Value]], ...]

    @property
    def num_cells(self) -> int:
        """Runs: rows times values of every axis times seeds; nothing is expanded for it."""
        axes = math.prod(len(values) for values in self.vary.values())
        return max(1, len(self.rows)) * axes * len(self.seeds)

    def as_toml(self) -> str:
        """The recipe as a file of its own."""
        facts = {
            "title": self.title,
            "seeds": len(self.seeds) if isinstance(self.seeds, range) else list(self.seeds),
            **({} if self.target is None else {"target": self.target}),
            "columns": list(self.columns),
            "within": list(self.within),
            "settings": dict(self.settings),
            "vary": {key: list(values) for key, values in self.vary.items()},
            "rows": [{"name": name, **row} for name, row in self.rows],
        }
        return tomli_w.dumps({key: value for key, value in facts.items() if value not in ([], {})})

    def variants(self) -> list[Variant]:
        """A row each, rows as they come and the last axis fastest.

        Raises:
            ConfigError: for settings that will not do, naming the row.
        """
        defaults = default_settings()
        return [
            self._variant(name, row, dict(zip(self.vary, values, strict=True)), defaults)
            for name, row in self.rows or (("", {}),)
            for values in itertools.product(*self.vary.values())
        ]

    def _variant(
        self, name: str, row: Mapping[str, Value], varied: Mapping[str, Value], defaults: Mapping
    ) -> Variant:
        words = ([name] if name else []) + [f"{k}={_word(value)}" for k, value in varied.items()]
        name = ", ".join(words) or "as set"
        given = _both_links(self.settings) | _both_links(row) | _both_links(varied)
        told = {key: given.pop(key) for key in OF_SIMULATION if key in given}
        engine, workers = told.pop("engine", "local"), told.pop("workers", 1)
        try:
            if engine not in ENGINES:
                raise ConfigError(unknown("engine", engine, ENGINES))
            check_workers(workers, engine)
            config = read_config(defaults | given)
            algorithm(config.federation, seed=0, clients=config.federation.clients)
            settings = config.as_settings()
            adversity = Adversity.of(told)
            adversity.check_fleet(settings["clients"], engine)
        except ConfigError as error:
            raise ConfigError(f"row {name}: {error}") from error
        return Variant(
            name=name,
            settings={key: value for key, value in settings.items() if key not in _PLACED},
            engine=engine,
            workers=workers,
            adversity=adversity.as_table(),
            group=group_of(self.within, settings, engine, workers, adversity),
        )


def group_of(
    within: Sequence[str],
    settings: Mapping[str, Value],
    engine: str,
    workers: int | str,
    adversity: Adversity,
) -> tuple[str, ...]:
    """The values of what rows are compared within."""
    whole = {**settings, "engine": engine, "workers": workers, **vars(adversity)}
    whole["codec"] = f"{whole['codec-up']} {whole['codec-down']}"
    return tuple(str(whole[key]) for key in within)


def recipe_of(values: Mapping[str, Any], columns: Sequence[str]) -> Recipe:
    """A recipe, checked as far as its form goes.

    Args:
        values: as the TOML file of a recipe holds them.
        columns: those that there are.

    Raises:
        ConfigError: naming what is not known, and what is, the closest first.
    """
    values = in_tables(values)
    for key in values:
        if key not in _KEYS:
            name = closest_first(str(key), [*_KEYS, *_names()])[0]
            table = f"; {name} goes below [settings]" if name not in _KEYS else ""
            raise ConfigError(unknown("key", key, _KEYS) + table)
    title = values.get("title", "Comparison")
    if not isinstance(title, str) or not title.strip():
        raise ConfigError(f"title must be text, got {title!r}")
    settings, simulation, vary = (_table(values, key) for key in ("settings", "simulation", "vary"))
    if others := sorted(simulation.keys() - {*OF_SIMULATION}):
        raise ConfigError(
            f"[simulation] has {', '.join(others)}; known: {', '.join(OF_SIMULATION)}"
        )
    own, told = told_apart(settings, simulation, "recipe")
    settings = own | told
    axes = {key: _axis(key, choices) for key, choices in vary.items()}
    rows = tuple(_rows(values.get("rows", [])))
    for name, row in rows:
        if twice := sorted(_both_links(row).keys() & _both_links(axes).keys()):
            raise ConfigError(f"{twice[0]} is in row {name} and in vary; leave one of them out")
    for where, table in (("settings", settings), ("vary", axes), *rows):
        _check_names(where, table)
        if "workers" in table and table is not settings:
            raise ConfigError(
                f"{where}: workers is for all runs, as it changes none of their results; put it "
                f"into settings"
            )
    return Recipe(
        title=printable(title.strip()),
        seeds=_seeds(values.get("seeds", 1)),
        target=_target(values.get("target")),
        columns=_listed("column", values.get("columns", []), columns),
        within=_listed("setting", values.get("within", []), _names(), "within: "),
        settings=settings,
        vary=axes,
        rows=rows,
    )


def in_tables(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """As a recipe, what `fleet simulate` takes: a run's config.toml, or settings alone.

    Either is a recipe of one run: with its seed, and its settings but for where it lies.
    What is a recipe is given back as it is.
    """
    is_flat = not values.keys() & {*_KEYS, *_OF_A_RUN} and values.keys() & {*_names(), *_PLACED}
    values = {"settings": dict(values)} if is_flat else values
    if not is_flat and not values.keys() & {*_OF_A_RUN}:
        return values
    own = _table(values, "settings")
    recipe = {key: table for key, table in values.items() if key not in _OF_A_RUN}
    recipe["settings"] = {key: value for key, value in own.items() if key not in _PLACED}
    return ({"seeds": [own["seed"]]} if "seed" in own else {}) | recipe


def parse_setting(text: str) -> tuple[str, Value]:
    """`rounds=5` of a command line.

    Raises:
        ConfigError: for an unknown name, or a value that is none.
    """
    name, value = read_assignment(text, of_text=_of_text())
    _check_names("--set", {name: value})
    return name, value


def parse_axis(text: str) -> tuple[str, list[Value]]:
    """`strategy=fedavg,fedadam` of a command line; `blocks="1,3,5",5` has two values.

    Raises:
        ConfigError: as `parse_setting`.
    """
    name, equals, written = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise ConfigError(f"--vary takes KEY=VALUE,VALUE, got {text!r}")
    _check_names("--vary", {name: written})
    try:
        values = next(csv.reader([written], strict=True), [""])
    except csv.Error as error:
        raise ConfigError(
            f"--vary {name}: cannot read {written} ({error}); a value with commas is one in double "
            f'quotes, as "1,3,5",5'
        ) from error
    is_text = name in _of_text()
    return name, [read_value(value, f"--vary {name}", is_text) for value in values]


def parse_seeds(text: str) -> int | list[int]:
    """`3` is a number of seeds, `0,4,7` is a list of them.

    Raises:
        ConfigError: for anything else.
    """
    try:
        return [int(seed) for seed in text.split(",")] if "," in text else int(text)
    except ValueError as error:
        raise ConfigError(
            f"seeds must be how many, such as 3, or which, such as 0,4,7; got {text}"
        ) from error


def unknown(noun: str, word: Any, known: Iterable[str]) -> str:
    """What an error says of a name that there is not."""
    if noun == "setting":
        return unknown_setting(str(word), known)
    return f"unknown {noun} {word}; known: {', '.join(closest_first(str(word), known))}"


def _names() -> list[str]:
    settings = [key for key, _, _ in describe_settings() if key not in _PLACED]
    return [*settings, *OF_SIMULATION, "codec"]


def _of_text() -> frozenset[str]:
    return text_settings() | {"attack", "engine", "codec"}


def _check_names(where: str, table: Mapping[str, Any]) -> None:
    for key in table:
        if key in _PLACED:
            raise ConfigError(f"{where}: a comparison has no {key}; {_PLACED[key]}")
        if key not in _names():
            raise ConfigError(f"{where}: {unknown('setting', key, _names())}")
    if "codec" in table and (one := [key for key in _BOTH if key in table]):
        raise ConfigError(f"{where}: codec sets {one[0]} too; leave one of them out")


def _both_links(table: Mapping[str, Any]) -> dict[str, Any]:
    """`codec` as the two settings that it stands for."""
    values = {key: value for key, value in table.items() if key != "codec"}
    return values | (dict.fromkeys(_BOTH, table["codec"]) if "codec" in table else {})


def _table(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = values.get(key, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{key} must be a table, got {table!r}")
    return table


def _axis(key: str, choices: Any) -> tuple[Value, ...]:
    if not isinstance(choices, list | tuple) or not choices:
        raise ConfigError(f"vary: {key} must be a list of values, got {choices!r}")
    for i, choice in enumerate(choices):
        if not isinstance(choice, Value):
            raise ConfigError(f"vary: {key} has {choice!r}; each must be text, a number or a bool")
        if _word(choice) in map(_word, choices[:i]):
            raise ConfigError(f"vary: {key} has {_word(choice)} twice; leave one out")
    return tuple(choices)


def _rows(values: Any) -> Iterator[tuple[str, Mapping[str, Value]]]:
    if not isinstance(values, list | tuple):
        raise ConfigError(f"rows must be a list of tables, [[rows]] each; got {values!r}")
    seen: set[str] = set()
    for number, row in enumerate(values, start=1):
        if not isinstance(row, Mapping):
            raise ConfigError(f"row {number} must be a table, got {row!r}")
        name = row.get("name")
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"row {number} needs a name, which is text; got {name!r}")
        name = printable(name)
        if name in seen:
            raise ConfigError(f"two rows are named {name}; rename one")
        seen.add(name)
        yield name, {key: value for key, value in row.items() if key != "name"}


def _seeds(value: Any) -> Sequence[int]:
    if type(value) is int and 0 < value < 2**63:
        return range(value)  # nobody has asked yet whether so many are meant
    if isinstance(value, list | tuple) and value:
        whole = all(type(seed) is int and 0 <= seed < 2**63 for seed in value)
        if whole and len(set(value)) == len(value):
            return tuple(value)
    raise ConfigError(
        f"seeds must be how many, from 1 on, or a list of different ones, from 0 on; got {value!r}"
    )


def _target(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise ConfigError(
            f"target must be an accuracy above 0 and up to 1, such as 0.9; got {value!r}"
        )
    return float(value)


def _listed(noun: str, values: Any, known: Sequence[str], where: str = "") -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{where}{noun}s must be a list of names, got {values!r}")
    for value in values:
        if value not in known:
            raise ConfigError(where + unknown(noun, value, known))
        if list(values).count(value) > 1:
            raise ConfigError(f"{where}{noun}s have {value} twice; leave one out")
    return tuple(values)


def _word(value: Value) -> str:
    """A value as names of rows have it."""
    return str(value).lower() if isinstance(value, bool) else printable(str(value))
