"""Every setting of a run: its type, its meaning, and what values it takes.

Defaults live in one place, `[tool.flwr.app.config]` of pyproject.toml, where
Flower reads them too. `flwr run --run-config` and `fleet simulate` take the
same names.
"""

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fleet.codec.names import GRAMMAR as CODECS
from fleet.codec.names import parse_codec
from fleet.errors import ConfigError
from fleet.plan import METHODS, STASHES

Value = str | int | float | bool

AUGMENTATIONS = ("none", "crop", "flip", "flip+crop")
CACHES = ("off", "float16", "int8")
MOMENTUM_DTYPES = ("float32", "bfloat16")
WEIGHTS = ("default", "imagenet", "none")  # or a path
SCHEDULES = ("constant", "cosine")
STRATEGIES = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "feddyn")
OBJECTIVES = ("plain", "fedprox", "feddyn")
SAMPLERS = ("shuffled", "balanced")


def setting(key: str, help: str) -> Any:
    """A dataclass field that is read from the run configuration's `key`."""
    return field(metadata={"key": key, "help": help})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they lie over the clients."""

    source: str = setting(
        "data", "built-in name, hf:NAME, a parquet file or folder, or an ImageFolder directory"
    )
    partition: str = setting("partition", "iid, dirichlet:ALPHA or classes:PER_CLIENT")
    train_examples: int = setting("train-examples", "training images of the fleet; 0: all")
    test_examples: int = setting("test-examples", "held-out images of the server; 0: all")
    validation_fraction: float = setting(
        "validation-fraction", "share of a client's images kept for its own validation"
    )
    skip_unreadable: bool = setting("skip-unreadable", "leave unreadable images out")

    def __post_init__(self) -> None:
        _check_named("data", self.source)
        _check_at_least(0, "train-examples", self.train_examples)
        _check_at_least(0, "test-examples", self.test_examples)
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(
                f"validation-fraction must lie in [0, 1), got {self.validation_fraction}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which pretrained model."""

    backbone: str = setting("backbone", "torchvision or timm model made of inverted residuals")
    weights: str = setting("weights", "default, imagenet, none, or a .safetensors or .pth file")
    image_size: int = setting("image-size", "pixels a side")

    def __post_init__(self) -> None:
        _check_named("backbone", self.backbone)
        _check_named("weights", self.weights)
        _check_at_least(32, "image-size", self.image_size)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What trains of it."""

    method: str = setting("method", f"what trains: {', '.join(METHODS)}")
    blocks: str = setting("blocks", "top blocks to train; several (1,3,5) are dealt out in turn")
    train_tail: bool = setting("train-tail", "train what lies between last block and head too")
    local_norms: bool = setting(
        "local-norms", "shifts, scales and statistics of norms train, but stay on their device"
    )

    def __post_init__(self) -> None:
        _check_one_of("method", self.method, METHODS)
        _ = self.choices

    @property
    def choices(self) -> tuple[int, ...]:
        """Numbers of blocks, in the order in which clients get them."""
        try:
            choices = tuple(int(k) for k in str(self.blocks).split(","))
        except ValueError:
            choices = (-1,)
        if min(choices) < 0:
            raise ConfigError(
                f"blocks must be whole numbers of at least 0, such as 3 or 1,3,5; got {self.blocks}"
            )
        return choices

    def blocks_of(self, partition_id: int) -> int:
        """The number of blocks of one simulated client."""
        return self.choices[partition_id % len(self.choices)]


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What training may take of a device's memory."""

    mib: str = setting(
        "budget-mib",
        "memory that a client's training may take beyond the model: off, auto (what the device "
        "has free), or MiB; several (16,64) are dealt out in turn",
    )
    reserve_mib: float = setting("reserve-mib", "free memory that auto leaves to everything else")

    def __post_init__(self) -> None:
        if not 0 <= self.reserve_mib < math.inf:
            raise ConfigError(f"reserve-mib must be at least 0 and finite, got {self.reserve_mib}")
        _ = self.choices

    @property
    def choices(self) -> tuple[float | str, ...]:
        """`off`, `auto` or MiB, in the order in which clients get them."""
        return tuple(budget(choice) for choice in self.mib.split(","))

    def of(self, partition_id: int) -> float | str:
        """The budget of one simulated client."""
        return self.choices[partition_id % len(self.choices)]


def budget(value: Value) -> float | str:
    """`off`, `auto` or a number of MiB.

    Raises:
        ConfigError: for anything else.
    """
    if str(value).strip() in ("off", "auto"):
        return str(value).strip()
    try:
        mib = float(value)
    except ValueError:
        mib = math.nan
    if not 0 < mib < math.inf:
        raise ConfigError(
            f"budget-mib must be off, auto or a number of MiB above 0, such as 64; got {value}"
        )
    return mib


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """When a real device holds back; a simulated one never does."""

    soft_temperature: float = setting(
        "soft-temperature",
        "°C of the processor, up to 150, at which a device pauses until 5 °C cooler; 0: never",
    )
    least_battery: float = setting(
        "least-battery",
        "% of charge below which a device that is not charging declines to train; 0: never",
    )

    def __post_init__(self) -> None:
        for key, most in (("soft_temperature", 150), ("least_battery", 100)):
            value = getattr(self, key)  # a device's own configuration may hold anything
            if type(value) not in (int, float) or not 0 <= value <= most:
                raise ConfigError(
                    f"{key.replace('_', '-')} must be a number from 0 to {most}, got {value!r}"
                )


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """One client's round."""

    epochs: int = setting("local-epochs", "passes over a client's images a round")
    batch_size: int = setting("batch-size", "examples a step")
    sampler: str = setting(
        "sampler",
        f"of an epoch's images: {', '.join(SAMPLERS)} (as many, with replacement, every class of "
        f"the client's equally likely)",
    )
    learning_rate: float = setting("learning-rate", "of the clients' SGD")
    schedule: str = setting(
        "schedule",
        f"of the learning rate over a local training: {', '.join(SCHEDULES)} (falls to nought)",
    )
    momentum: float = setting("momentum", "of the clients' SGD")
    momentum_dtype: str = setting(
        "momentum-dtype", f"of its buffers: {', '.join(MOMENTUM_DTYPES)} (stochastically rounded)"
    )
    weight_decay: float = setting("weight-decay", "of the clients' SGD, on weights alone")
    stash: str = setting("stash", f"what mobiletl keeps for backward: {', '.join(STASHES)}")
    device: str = setting("device", "auto, cpu, cuda or mps")

    def __post_init__(self) -> None:
        _check_at_least(1, "local-epochs", self.epochs)
        _check_at_least(1, "batch-size", self.batch_size)
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"weight-decay must be at least 0 and finite, got {self.weight_decay}"
            )
        _check_one_of("sampler", self.sampler, SAMPLERS)
        _check_one_of("stash", self.stash, STASHES)
        _check_one_of("schedule", self.schedule, SCHEDULES)
        _check_one_of("momentum-dtype", self.momentum_dtype, MOMENTUM_DTYPES)
        kind, colon, number = self.device.partition(":")
        _check_one_of("device", kind, ("auto", "cpu", "cuda", "mps"))
        if colon and (kind == "auto" or not re.fullmatch("[0-9]{1,3}", number)):
            raise ConfigError(
                f"device {self.device} has no such number; name one like cuda:0, or {kind} alone"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning-rate must be above 0 and finite, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1), got {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """How images pass the frozen half of the model."""

    cache: str = setting(
        "cache", f"precision in which the frozen part's output is kept on disk: {', '.join(CACHES)}"
    )
    cache_mib: float = setting("cache-mib", "room for it on the disk, all runs together")
    cache_dir: str = setting(
        "cache-dir", "where it lies; empty: $FLEET_CACHE or ~/.cache/fleet/features"
    )
    augmentation: str = setting("augmentation", f"of training images: {', '.join(AUGMENTATIONS)}")
    views: int = setting(
        "views", "different views of a training image, the image itself among them"
    )

    def __post_init__(self) -> None:
        _check_one_of("cache", self.cache, CACHES)
        _check_one_of("augmentation", self.augmentation, AUGMENTATIONS)
        _check_at_least(1, "views", self.views)
        if not 0 <= self.cache_mib < math.inf:
            raise ConfigError(f"cache-mib must be at least 0 and finite, got {self.cache_mib}")
        if (self.views > 1) != (self.augmentation != "none"):
            raise ConfigError(
                f"views is {self.views} and augmentation is {self.augmentation}; several views "
                f"need an augmentation, and an augmentation several views"
            )


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """The rounds."""

    clients: int = setting("clients", "clients to simulate; real fleets have as many as connect")
    rounds: int = setting("rounds", "rounds to run")
    sampled: int = setting("sampled", "clients that train in a round; 0: all")
    min_clients: int = setting("min-clients", "clients to wait for before a round")
    round_timeout: float = setting("round-timeout", "seconds after which a round goes on")
    goal: int = setting("goal", "admitted updates that end a round early; 0: wait for all asked")
    min_updates: int = setting("min-updates", "admitted updates below which the model stays")
    codec_up: str = setting("codec-up", f"of clients' updates: {CODECS}")
    codec_down: str = setting(
        "codec-down", "of the server's steps, as codec-up; float32 sends the state each time"
    )
    head_start: bool = setting(
        "head-start", "solve for the first head by ridge regression, as round 0"
    )
    rule: str = setting(
        "rule", "how a round's updates become one: mean, clipped_mean, … (see README)"
    )
    quorum: int = setting("quorum", "clients that must have trained a tensor for it to move")
    strategy: str = setting(
        "strategy", f"server optimiser: {', '.join(STRATEGIES)}; or package.module:name of your own"
    )
    server_learning_rate: float = setting(
        "server-learning-rate", "of the server optimiser; 0: its own default"
    )
    server_momentum: float = setting("server-momentum", "of fedavgm")
    objective: str = setting(
        "objective",
        f"what clients minimise: {', '.join(OBJECTIVES)} (which needs strategy feddyn)",
    )
    objective_strength: float = setting(
        "objective-strength", "weight of the proximal term of fedprox and feddyn"
    )
    evaluation: str = setting(
        "evaluation", "server: on held-out images there; clients: on their validation images"
    )

    def __post_init__(self) -> None:
        for key in ("clients", "rounds", "min_clients"):
            _check_at_least(1, key.replace("_", "-"), getattr(self, key))
        _check_at_least(0, "sampled", self.sampled)
        for key in ("goal", "min_updates", "quorum"):
            _check_at_least(int(key != "goal"), key.replace("_", "-"), getattr(self, key))
        for key in ("codec_up", "codec_down"):
            try:
                parse_codec(getattr(self, key))
            except ConfigError as error:
                raise ConfigError(f"{key.replace('_', '-')}: {error}") from error
        self._check_cohort()
        if ":" not in self.strategy:  # package.module:name
            _check_one_of("strategy", self.strategy, STRATEGIES)
        _check_one_of("objective", self.objective, OBJECTIVES)
        if (self.objective == "feddyn") != (self.strategy == "feddyn"):
            raise ConfigError(
                f"objective is {self.objective} and strategy is {self.strategy}; feddyn is both "
                f"or neither, as either half alone leads elsewhere"
            )
        if self.strategy == "feddyn" and self.rule.partition("+")[0] != "mean":
            raise ConfigError(
                f"strategy is feddyn and rule is {self.rule}; its clients and server add up the "
                f"same updates only under rule mean"
            )
        if self.strategy == "feddyn" and self.quorum > 1:
            raise ConfigError(
                f"strategy is feddyn and quorum is {self.quorum}; its clients count updates that "
                f"a quorum leaves out: set quorum to 1"
            )
        if not 0 < self.objective_strength < math.inf:
            raise ConfigError(
                f"objective-strength must be above 0 and finite, got {self.objective_strength}"
            )
        if not 0 <= self.server_learning_rate < math.inf:
            raise ConfigError(
                f"server-learning-rate must be at least 0 and finite, "
                f"got {self.server_learning_rate}"
            )
        _check_one_of("evaluation", self.evaluation, ("server", "clients"))
        if not self.round_timeout > 0:
            raise ConfigError(f"round-timeout must be above 0 seconds, got {self.round_timeout}")

    def _check_cohort(self) -> None:
        """A round that could never end well is said before it begins."""
        for key in ("goal", "min_updates", "quorum"):
            for limit in ("sampled", "goal"):
                most, value = getattr(self, limit), getattr(self, key)
                if key != limit and 0 < most < value:
                    raise ConfigError(
                        f"{key.replace('_', '-')} is {value} and {limit} is {most}; a round never "
                        f"has so many updates: lower the one, or raise the other"
                    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run."""

    data: DataConfig
    model: ModelConfig
    plan: PlanConfig
    local: LocalConfig
    budget: BudgetConfig
    device: DeviceConfig
    features: FeatureConfig
    federation: FederationConfig
    seed: int = setting("seed", "decides partition, sampling and the order of images")
    run_dir: str = setting("run-dir", "where records go; empty: a new folder in runs/")
    resume: bool = setting("resume", "go on from the checkpoint in run-dir")
    state_dir: str = setting(
        "state-dir",
        "where a client remembers a run between rounds; empty: $FLEET_STATE or "
        "~/.local/state/fleet, in a simulation the run's own folder",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in [0, 2^63), got {self.seed}")
        if self.resume and not self.run_dir:
            raise ConfigError("resume is on and run-dir is empty; name the run's folder")
        self._check_local_norms()
        self._check_pull()

    def _check_local_norms(self) -> None:
        """A server that evaluated would do so with norms that no client trains with."""
        if self.plan.local_norms and self.federation.evaluation != "clients":
            raise ConfigError(
                f"local-norms is on and evaluation is {self.federation.evaluation}, which has "
                f"none of the devices' norms; set evaluation to clients, or local-norms to false"
            )

    def _check_pull(self) -> None:
        """On a term of curvature μ, SGD with momentum β diverges from a step of 2·(1 + β)/μ on."""
        if self.federation.objective == "plain":
            return
        rate, strength = self.local.learning_rate, self.federation.objective_strength
        limit = 2 * (1 + self.local.momentum)
        if rate * strength >= limit:
            raise ConfigError(
                f"learning-rate {rate:g} times objective-strength {strength:g} is "
                f"{rate * strength:.4g}, and training diverges from {limit:g} on; lower either"
            )

    def as_settings(self) -> dict[str, Value]:
        """Key → value, as the run configuration names them."""
        return {key: _follow(self, path) for key, path, _ in _settings(RunConfig)}


def read_config(settings: Mapping[str, Value]) -> RunConfig:
    """Check a complete run configuration and give it types.

    Raises:
        ConfigError: for a missing or unknown key (listing the known ones), a
            value of the wrong type, or one out of range.
    """
    known = {key: field for key, _, field in _settings(RunConfig)}
    if unknown := sorted(map(str, settings.keys() - known.keys())):
        raise ConfigError(unknown_setting(unknown[0], known))
    if missing := sorted(known.keys() - settings.keys()):
        raise ConfigError(f"setting {missing[0]} is missing; start from default_settings()")
    values = {key: _typed(key, settings[key], known[key]) for key in known}
    return _build(RunConfig, values)


def closest_first(word: str, known: Iterable[str]) -> list[str]:
    """Names, those that look most like the word first."""
    return sorted(known, key=lambda name: -difflib.SequenceMatcher(None, word, name).ratio())


def unknown_setting(key: str, known: Iterable[str]) -> str:
    """What an error says of a setting that there is not; there are too many to name them all."""
    known = list(known)
    near = difflib.get_close_matches(key, known)
    if not near:
        return f"unknown setting {key}; fleet simulate --help lists the {len(known)} that there are"
    return (
        f"unknown setting {key}; known: {', '.join(near)} and {len(known) - len(near)} more, which "
        f"fleet simulate --help lists"
    )


def read_toml(path: Path) -> dict[str, Any]:
    """A recipe's file.

    Raises:
        ConfigError: if it cannot be read, or is not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not TOML: {error}") from error


def read_assignment(
    text: str, option: str = "--set", of_text: Collection[str] = ()
) -> tuple[str, Value]:
    """`KEY=VALUE` of a command line, the value as `read_value` reads it.

    Args:
        of_text: keys whose values are text.

    Raises:
        ConfigError: if there is no `=`, and as `read_value`.
    """
    key, equals, written = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"{option} takes KEY=VALUE, got {text!r}")
    return key, read_value(written, f"{option} {key}", is_text=key in of_text)


def read_value(written: str, where: str, is_text: bool = False) -> Value:
    """A number, true or false, or else text, with quotes or without.

    Whether a setting takes it is for `read_config` to say.

    Args:
        is_text: whether it is text whatever it looks like: nan, 1 and true too.

    Raises:
        ConfigError: for a list or a table; for a time, where that is no text.
    """
    try:
        value = tomllib.loads(f"value = {written}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return written.strip()
    if is_text and not isinstance(value, str | list | dict):
        return written.strip()
    if not isinstance(value, Value):
        raise ConfigError(f"{where} takes text, a number, true or false; got {written}")
    return value


def default_settings() -> dict[str, Value]:
    """`[tool.flwr.app.config]` of the project's own pyproject.toml."""
    here = Path(__file__).resolve().parent
    # Beside the package in a checkout or an app bundle, inside it in a wheel.
    path = next(p for p in (here.parent / "pyproject.toml", here / "pyproject.toml") if p.is_file())
    return tomllib.loads(path.read_text())["tool"]["flwr"]["app"]["config"]


def describe_settings() -> list[tuple[str, type, str]]:
    """Key, type and meaning of every setting."""
    return [(key, field.type, field.metadata["help"]) for key, _, field in _settings(RunConfig)]


def text_settings() -> frozenset[str]:
    """Keys of the settings that are text."""
    return frozenset(key for key, kind, _ in describe_settings() if kind is str)


def _settings(section: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple, Any]]:
    """Key, path of attributes and field of every setting below a section."""
    for entry in fields(section):
        if dataclasses.is_dataclass(entry.type):
            yield from _settings(entry.type, (*path, entry.name))
        else:
            yield entry.metadata["key"], (*path, entry.name), entry


def _follow(config: Any, path: tuple[str, ...]) -> Value:
    for name in path:
        config = getattr(config, name)
    return config


def _build(section: type, values: Mapping[str, Value]) -> Any:
    return section(
        **{
            entry.name: _build(entry.type, values)
            if dataclasses.is_dataclass(entry.type)
            else values[entry.metadata["key"]]
            for entry in fields(section)
        }
    )


def _typed(key: str, value: Value, entry: Any) -> Value:
    """A value for a setting's field."""
    wanted = entry.type
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is str and type(value) in (int, float):  # blocks=3 and blocks="1,3" both come
        return str(value)
    if key == "blocks" and isinstance(value, list):
        raise ConfigError(f'blocks must be text, such as "1,3,5"; got the list {value}')
    if type(value) is not wanted:
        raise ConfigError(
            f"{key} must be {wanted.__name__}, got {value!r} ({type(value).__name__}); it is: "
            f"{entry.metadata['help']}"
        )
    return value


def _check_named(key: str, value: str) -> None:
    if not value.strip():
        raise ConfigError(f"{key} is empty; name one")


def _check_at_least(least: float, key: str, value: float) -> None:
    if not value >= least:
        raise ConfigError(f"{key} must be at least {least}, got {value}")


def _check_one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"unknown {key} {value}; known: {', '.join(known)}")
