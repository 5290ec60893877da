import pytest
import torch

from fleet.config import default_settings, describe_settings, read_config
from fleet.errors import ConfigError
from fleet.optim import SGD


def changed(**settings):
    return default_settings() | {key.replace("_", "-"): value for key, value in settings.items()}


def test_the_projects_defaults_are_a_valid_configuration():
    config = read_config(default_settings())
    assert config.data.source == "digits"
    assert config.model.backbone == "efficientnet_lite0"
    assert config.plan.choices == (1, 3, 5)


def test_settings_survive_reading_and_writing():
    settings = changed(blocks="0,2", seed=7, evaluation="clients", round_timeout=2.5)
    assert read_config(settings).as_settings() == settings


def test_every_default_lands_under_its_own_name():
    probes = {
        bool: lambda value: not value,
        int: lambda value: value + 33,
        float: lambda value: value / 2 + 0.125,
    }
    for key, kind, _ in describe_settings():
        if kind is str:
            continue
        needs = {
            "views": {"augmentation": "flip"},
            "local-norms": {"evaluation": "clients"},
            "resume": {"run-dir": "runs/first"},
        }
        value = probes[kind](default_settings()[key])
        settings = default_settings() | needs.get(key, {}) | {key: value}
        assert read_config(settings).as_settings() == settings


def test_defaults_and_descriptions_name_the_same_settings():
    described = {key: (kind, help) for key, kind, help in describe_settings()}
    assert described.keys() == default_settings().keys()
    assert all(help for _, help in described.values())
    assert {k: type(v) for k, v in default_settings().items()} == {
        key: kind for key, (kind, _) in described.items()
    }


def test_an_unknown_setting_is_refused_with_those_that_look_like_it_and_how_to_see_all():
    settings = len(default_settings())
    more = "which fleet simulate --help lists$"
    text = rf"unknown setting epochs; known: local-epochs and {settings - 1} more, {more}"
    with pytest.raises(ConfigError, match=text):
        read_config(changed(epochs=3))
    with pytest.raises(ConfigError, match=f"known: clients, min-clients and {settings - 2} more"):
        read_config(changed(client=3))
    text = f"unknown setting foo; fleet simulate --help lists the {settings} that there are"
    with pytest.raises(ConfigError, match=text):
        read_config(changed(foo=3))


@pytest.mark.parametrize("key", default_settings())
def test_a_missing_setting_is_named(key):
    settings = default_settings()
    del settings[key]
    with pytest.raises(ConfigError, match=f"setting {key} is missing"):
        read_config(settings)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("rounds", 2.0, r"rounds must be int, got 2.0 \(float\)"),
        ("rounds", "2", r"rounds must be int, got '2' \(str\)"),
        ("rounds", True, r"rounds must be int, got True \(bool\)"),
        ("momentum", False, r"momentum must be float, got False \(bool\)"),
        ("momentum", "0.9", r"momentum must be float, got '0.9' \(str\)"),
        ("train-tail", 1, r"train-tail must be bool, got 1 \(int\)"),
        ("data", True, r"data must be str, got True \(bool\)"),
        (
            "soft-temperature",
            "hot",
            r"got 'hot' \(str\); it is: °C of the processor, up to 150, at",
        ),
        ("blocks", [1, 3], r'blocks must be text, such as "1,3,5"; got the list \[1, 3\]'),
        ("blocks", 1.5, r"blocks must be whole numbers of at least 0, such as 3 .*; got 1.5"),
    ],
)
def test_a_value_of_another_type_is_refused(key, value, text):
    with pytest.raises(ConfigError, match=text):
        read_config(changed(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("train-examples", -1, "train-examples must be at least 0, got -1"),
        ("test-examples", -1, "test-examples must be at least 0, got -1"),
        ("validation-fraction", 1.0, r"validation-fraction must lie in \[0, 1\), got 1.0"),
        ("validation-fraction", -0.1, r"validation-fraction must lie in \[0, 1\), got -0.1"),
        ("validation-fraction", float("nan"), "validation-fraction must lie in"),
        ("image-size", 31, "image-size must be at least 32, got 31"),
        ("method", "lora", "unknown method lora; known: mobiletl, head, shifts, blocks, full"),
        ("local-epochs", 0, "local-epochs must be at least 1, got 0"),
        ("batch-size", 0, "batch-size must be at least 1, got 0"),
        ("weight-decay", -0.1, "weight-decay must be at least 0 and finite, got -0.1"),
        ("weight-decay", float("nan"), "weight-decay must be at least 0 and finite, got nan"),
        (
            "stash",
            "float16",
            "unknown stash float16; known: recompute, int8, bfloat16, float32, published",
        ),
        ("device", "tpu", "unknown device tpu; known: auto, cpu, cuda, mps"),
        (
            "device",
            "cuda:first",
            "device cuda:first has no such number; name one like cuda:0, or cu",
        ),
        (
            "device",
            "auto:1",
            "device auto:1 has no such number; name one like cuda:0, or auto alone",
        ),
        ("learning-rate", 0.0, "learning-rate must be above 0 and finite, got 0.0"),
        ("learning-rate", float("nan"), "learning-rate must be above 0 and finite, got nan"),
        ("learning-rate", float("inf"), "learning-rate must be above 0 and finite, got inf"),
        ("momentum", 1.0, r"momentum must lie in \[0, 1\), got 1.0"),
        ("momentum", -0.1, r"momentum must lie in \[0, 1\), got -0.1"),
        ("clients", 0, "clients must be at least 1, got 0"),
        ("rounds", 0, "rounds must be at least 1, got 0"),
        ("min-clients", 0, "min-clients must be at least 1, got 0"),
        ("sampled", -1, "sampled must be at least 0, got -1"),
        ("goal", -1, "goal must be at least 0, got -1"),
        ("min-updates", 0, "min-updates must be at least 1, got 0"),
        ("quorum", 0, "quorum must be at least 1, got 0"),
        (
            "codec-up",
            "zip",
            "codec-up: unknown codec zip; known: float32, float16, int8, int4, topk:SHARE",
        ),
        (
            "codec-down",
            "topk:2",
            "codec-down: topk in codec topk:2 must keep a share above 0",
        ),
        (
            "server-learning-rate",
            -1.0,
            "server-learning-rate must be at least 0 and finite, got -1.0",
        ),
        ("sampler", "fair", "unknown sampler fair; known: shuffled, balanced"),
        ("objective", "scaffold", "unknown objective scaffold; known: plain, fedprox, feddyn"),
        ("objective-strength", 0.0, "objective-strength must be above 0 and finite, got 0.0"),
        ("objective-strength", -1.0, "objective-strength must be above 0 and finite, got -1.0"),
        ("objective-strength", float("nan"), "objective-strength must be above 0 and finite"),
        ("objective-strength", float("inf"), "objective-strength must be above 0 and finite"),
        ("objective", "feddyn", "objective is feddyn and strategy is fedavg; feddyn is both or n"),
        ("strategy", "feddyn", "objective is plain and strategy is feddyn; feddyn is both or nei"),
        ("local-norms", True, "local-norms is on and evaluation is server, .*evaluation to client"),
        ("evaluation", "nobody", "unknown evaluation nobody; known: server, clients"),
        ("round-timeout", 0.0, "round-timeout must be above 0 seconds, got 0.0"),
        ("seed", -1, r"seed must lie in \[0, 2\^63\), got -1"),
    ],
)
def test_a_value_out_of_range_is_refused(key, value, text):
    with pytest.raises(ConfigError, match=text):
        read_config(changed(**{key: value}))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"goal": 6, "sampled": 5}, "goal is 6 and sampled is 5; a round never has so many"),
        ({"min-updates": 6, "sampled": 5}, "min-updates is 6 and sampled is 5; a round never has"),
        ({"quorum": 4, "goal": 3, "sampled": 5}, "quorum is 4 and goal is 3; a round never has"),
        (
            {"objective": "feddyn", "strategy": "feddyn", "rule": "median"},
            "strategy is feddyn and rule is median; its clients and server add up the same",
        ),
        (
            {"objective": "feddyn", "strategy": "feddyn", "rule": "mean", "quorum": 2},
            "strategy is feddyn and quorum is 2; its clients count updates that a quorum leaves",
        ),
    ],
)
def test_settings_that_cannot_go_together_are_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        read_config(default_settings() | settings)


def test_whole_numbers_serve_as_floats():
    config = read_config(changed(learning_rate=1, round_timeout=60))
    assert type(config.local.learning_rate) is float
    assert config.federation.round_timeout == 60.0


@pytest.mark.parametrize("blocks", [3, "3"])
def test_one_number_of_blocks_is_for_all_clients(blocks):
    plan = read_config(changed(blocks=blocks)).plan
    assert [plan.blocks_of(i) for i in range(3)] == [3, 3, 3]


def test_several_numbers_of_blocks_are_dealt_out_in_turn():
    plan = read_config(changed(blocks="1,3,5")).plan
    assert [plan.blocks_of(i) for i in range(7)] == [1, 3, 5, 1, 3, 5, 1]


@pytest.mark.parametrize("blocks", ["", "1,,3", "-1", "1,-3", "all", "1.5", -1])
def test_blocks_that_are_no_numbers_are_refused(blocks):
    with pytest.raises(ConfigError, match=f"blocks must be whole numbers.*; got {blocks}$"):
        read_config(changed(blocks=blocks))


def test_feddyn_is_chosen_by_both_its_names():
    config = read_config(changed(objective="feddyn", strategy="feddyn", rule="mean")).federation
    assert (config.objective, config.strategy) == ("feddyn", "feddyn")


def test_a_pull_at_which_training_diverges_is_refused():
    """On μ/2·p², SGD with momentum 0.9 is stable below learning-rate·μ = 2·(1 + 0.9)."""
    read_config(changed(learning_rate=0.5, objective="fedprox", objective_strength=7.5))
    read_config(changed(learning_rate=0.5, objective_strength=7.6))  # not in use
    text = "learning-rate 0.5 times objective-strength 7.6 is 3.8, and training diverges from 3.8"
    with pytest.raises(ConfigError, match=text):
        read_config(changed(learning_rate=0.5, objective="fedprox", objective_strength=7.6))
    for strength, grows in ((7.5, False), (7.7, True)):
        p = torch.ones(1, requires_grad=True)
        sgd = SGD([p], 0.5, 0.9, proximal=strength, targets=[torch.zeros(1)])
        for _ in range(300):
            p.grad = torch.zeros(1)
            sgd.step()
        assert (p.abs().item() > 1) is grows


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [
        ("soft-temperature", -1.0, 150),
        ("soft-temperature", 151.0, 150),
        ("soft-temperature", float("nan"), 150),
        ("least-battery", -0.5, 100),
        ("least-battery", 100.5, 100),
    ],
)
def test_when_a_device_holds_back_is_a_number_within_reason(key, value, most):
    with pytest.raises(ConfigError, match=f"{key} must be a number from 0 to {most}, got {value}"):
        read_config(default_settings() | {key: value})
