import logging
import tomllib

import numpy as np
import pytest
from safetensors.numpy import load_file

from fleet.errors import ConfigError, FleetError
from simulations import Callback, simulate
from simulations.attacks import hostile_clients

pytestmark = pytest.mark.usefixtures("quick_runs")

SMALL = {
    "backbone": "mobilenet_v3_small",
    "weights": "none",
    "clients": 2,
    "rounds": 1,
    "train-examples": 60,
    "test-examples": 30,
    "image-size": 32,
    "local-epochs": 1,
    "blocks": "0,1",
}
PRETRAINED = SMALL | {"backbone": "efficientnet_lite0", "weights": "default"}


def test_a_run_reports_its_rounds_in_order_and_its_replies(tmp_path):
    rounds, replies = [], []
    simulate(
        SMALL | {"run-dir": str(tmp_path / "run")},
        on_round=lambda report: rounds.append(report.server_round),
        on_reply=lambda answered, asked: replies.append((answered, asked)),
    )
    assert rounds == [0, 1]
    assert replies[-2:] == [(1, 2), (2, 2)]


def test_a_run_leaves_records_model_and_page(tmp_path):
    record = simulate(SMALL | {"run-dir": str(tmp_path / "run")})
    names = {path.name for path in record.path.iterdir()}
    assert names == {
        "config.toml",
        "rounds.jsonl",
        "summary.json",
        "model.safetensors",
        "report.html",
        "checkpoints",
    }


def test_a_run_directory_that_holds_a_run_is_refused_and_kept(tmp_path):
    (tmp_path / "config.toml").write_text("kept")
    with pytest.raises(ConfigError, match="holds a run already; name another"):
        simulate(SMALL | {"run-dir": str(tmp_path)})
    assert (tmp_path / "config.toml").read_text() == "kept"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"blocks": "17"}, "blocks is 17, mobilenet_v3_small has 11; choose 0 to 11"),
        ({"clients": 100}, "60 examples cannot be dealt out to 100 clients; use fewer"),
        ({"strategy": "fedsgd"}, "unknown strategy fedsgd; known: fedavg, fedavgm, fedadam"),
        ({"clients": 1}, "min-clients is 2, and the fleet has 1 clients; lower it, or raise"),
        ({"sampled": 5}, "sampled is 5, and the fleet has 2 clients; lower it"),
        ({"goal": 5}, "goal is 5, and the fleet has 2 clients; lower it"),
        ({"min-updates": 5}, "min-updates is 5, and the fleet has 2 clients; lower it"),
        ({"quorum": 5}, "quorum is 5, and the fleet has 2 clients; lower it"),
        ({"rule": "krum:1"}, "rule krum:1 needs the updates of 5 clients, and clients is 2; raise"),
        (
            {"evaluation": "clients", "validation-fraction": 0.0},
            "evaluation is left to the clients, and validation-fraction is 0; raise it",
        ),
        ({"data": "a" * 300}, "data 'aaa.*' is neither a known name nor a path here"),
        ({"weights": "a" * 300}, "no weights file aaa"),
        ({"data": "~nobody-here/x"}, "data ~nobody-here/x begins with a home, and there is no"),
        ({"weights": "~nobody-here/x"}, "weights ~nobody-here/x begins with a home, and there"),
        ({"data": " "}, "data is empty; name one"),
        ({"weights": ""}, "weights is empty; name one"),
        ({"seed": 2**63}, r"seed must lie in \[0, 2\^63\), got 9223372036854775808"),
        ({"blocks": [1, 3]}, r'blocks must be text, such as "1,3,5"; got the list \[1, 3\]'),
        ({"backbone": "torchvision:resnet18", "weights": "none"}, "no inverted-residual blocks"),
        ({"data": "nowhere"}, "data 'nowhere' is neither a known name nor a path here"),
    ],
)
def test_what_the_user_can_mend_is_said_before_anything_is_written(tmp_path, settings, text):
    with pytest.raises(FleetError, match=text):
        simulate(SMALL | settings | {"run-dir": str(tmp_path / "run")})
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


class Heard:
    def on_round_end(self, report):
        pass


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"settings": "x"}, "settings must be a mapping from names to values, .*; got 'x'$"),
        ({"settings": ["rounds"]}, r"settings must be a mapping .*; got \['rounds'\]$"),
        ({"settings": {1: 2, "x": 3}}, "^unknown setting 1; fleet simulate --help lists"),
        ({"callbacks": Callback()}, "callbacks must be a list of simulations.Callback, got <.*li"),
        (
            {"callbacks": [Callback(), Heard()]},
            "^callback <.*Heard .* has no on_run_start, on_reply, on_run_end, on_run_error; let",
        ),
        ({"callbacks": "mlflow"}, "^callback 'm' has no on_run_start, .*from simulations.Callback"),
    ],
)
def test_what_is_given_in_a_wrong_form_is_said_with_the_right_one(given, text):
    with pytest.raises(ConfigError, match=text):
        simulate(**given)


def test_an_unknown_engine_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown engine cloud; known: local, flower"):
        simulate(SMALL, engine="cloud")


def test_both_engines_end_with_the_same_tensors(tmp_path, one_ray):
    # With clients that remember what they hold and what they left out.
    settings = SMALL | {"rounds": 3, "codec-up": "topk:0.1+int4", "codec-down": "int8"}
    runs = {
        engine: simulate(settings | {"run-dir": str(tmp_path / engine)}, engine=engine)
        for engine in ("local", "flower")
    }
    local, flower = (load_file(record.model_path) for record in runs.values())
    assert local.keys() == flower.keys()
    assert all((local[name] == flower[name]).all() for name in local)
    for one, other in zip(*(record.rounds() for record in runs.values()), strict=True):
        assert one.refused == other.refused == {}
        for link, roles in one.bytes_by_role.items():
            theirs = other.bytes_by_role[link]
            # A header grows with the digits of a client's measurements.
            assert abs(roles.pop("headers", 0) - theirs.pop("headers", 0)) < 50
            assert roles == theirs


@pytest.mark.parametrize(
    ("settings", "adversity", "numbers"),
    [
        # Clients that remember what they hold and what they left out, and a lossy network.
        ({"codec-up": "topk:0.1+int4", "codec-down": "int8"}, {"drop": 0.3}, (1, 3)),
        # Feddyn's memory is kept as that of the codecs is.
        pytest.param(
            *({"objective": "feddyn", "strategy": "feddyn", "rule": "mean"}, {}, (1, 3)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *({"head-start": True, "goal": 3}, {"attack": "label_flip", "hostile": 0.5}, (1, 3)),
            marks=pytest.mark.slow,
        ),
        (
            {"evaluation": "clients", "validation-fraction": 0.2},
            {"attack": "alie", "hostile": 0.5},
            (1, 3),
        ),
    ],
    ids=["codecs and drops", "feddyn", "head start, goal and flipped labels", "forged replies"],
)
def test_any_number_of_workers_ends_with_the_same_tensors(settings, adversity, numbers, tmp_path):
    fleet = {"clients": 4, "rounds": 2, "train-examples": 120, "learning-rate": 0.005}
    records = [
        simulate(
            SMALL | fleet | settings | {"run-dir": str(tmp_path / str(workers))},
            workers=workers,
            **adversity,
        )
        for workers in numbers
    ]
    one, *others = (load_file(record.model_path) for record in records)
    assert any(array.any() for array in one.values())
    for other in others:
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one)
    first, *rest = (list(record.rounds()) for record in records)
    for rounds in rest:
        for ours, theirs in zip(first, rounds, strict=True):
            for fact in ("accuracy", "loss", "train_loss", "asked", "refused", "late", "coverage"):
                assert getattr(ours, fact) == getattr(theirs, fact)


def test_flowers_engine_has_no_workers_of_ours(tmp_path):
    text = "workers is 2, and engine flower has processes of its own; leave workers out"
    with pytest.raises(ConfigError, match=text):
        simulate(SMALL | {"run-dir": str(tmp_path / "run")}, engine="flower", workers=2)


@pytest.mark.slow
def test_a_run_that_fails_on_flower_says_why(tmp_path, one_ray):
    settings = SMALL | {"run-dir": str(tmp_path / "run"), "backbone": "mobilenet_v9"}
    with pytest.raises(
        FleetError, match=r"the run on Flower failed: .*unknown backbone mobilenet_v9"
    ):
        simulate(settings, engine="flower")


UNLIKE = PRETRAINED | {
    "clients": 3,
    "rounds": 2,
    "train-examples": 90,
    "partition": "classes:4",
    "learning-rate": 0.005,
    "blocks": "1,0,1",
}
OBJECTIVES = {
    "fedprox": {"objective": "fedprox", "objective-strength": 1.0},
    "feddyn": {
        "objective": "feddyn",
        "strategy": "feddyn",
        "rule": "mean",
        "objective-strength": 0.1,
    },
    "feddyn, two of three": {
        "objective": "feddyn",
        "strategy": "feddyn",
        "rule": "mean",
        "objective-strength": 0.1,
        "sampled": 2,
        "codec-up": "int8",
    },
    "local norms": {"local-norms": True, "evaluation": "clients", "validation-fraction": 0.2},
    "balanced": {"sampler": "balanced"},
}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return simulate(UNLIKE | {"run-dir": str(tmp_path_factory.mktemp("plain") / "run")})


@pytest.mark.parametrize("changes", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_run_with_each_choice_of_local_training_ends_well(changes, plain_run, tmp_path):
    record = simulate(UNLIKE | changes | {"run-dir": str(tmp_path / "run")})
    rounds = list(record.rounds())
    assert [len(r.clients) for r in rounds[1:]] == [changes.get("sampled", 3)] * 2
    assert not any(r.refused for r in rounds)
    losses = [r.loss for r in rounds if r.loss is not None]
    assert losses[-1] < losses[0]
    ours, plain = (load_file(r.model_path) for r in (record, plain_run))
    assert any(not np.array_equal(ours[name], plain[name]) for name in ours)
    # What clients remember was of use to this run alone.
    assert not (record.path / "clients").exists()


def test_local_norms_do_not_travel_and_leave_the_servers_as_they_were(plain_run, tmp_path):
    changes = OBJECTIVES["local norms"]
    record = simulate(UNLIKE | changes | {"run-dir": str(tmp_path / "run")})
    head = simulate(UNLIKE | {"blocks": 0, "run-dir": str(tmp_path / "head")})
    ours, plain, start = (load_file(r.model_path) for r in (record, plain_run, head))
    norms = {name.rpartition(".")[0] for name in ours if name.endswith("running_var")}

    def learnt(model):
        """Whether norms, and whether others below the head, are no longer the pretrained."""
        names = {n for n in model if not np.array_equal(model[n], start[n])}
        return {n.rpartition(".")[0] in norms for n in names if "classifier" not in n}

    assert learnt(plain) == {True, False} and learnt(ours) == {False}
    up = [sum(r.bytes_up for r in list(run.rounds())[1:]) for run in (plain_run, record)]
    assert 0 < up[1] < up[0]


def test_clients_memories_stay_where_a_setting_says(tmp_path):
    settings = OBJECTIVES["feddyn"] | {"state-dir": str(tmp_path / "state"), "rounds": 1}
    record = simulate(UNLIKE | settings | {"run-dir": str(tmp_path / "run")})
    kept = (tmp_path / "state").rglob("dynamic-*.safetensors")
    assert len({path.parent for path in kept}) == 3  # clients
    assert not (record.path / "clients").exists()


def test_clients_memories_stay_where_a_run_is_stopped(tmp_path):
    def stop(report):
        if report.server_round:
            raise KeyboardInterrupt

    settings = UNLIKE | OBJECTIVES["feddyn"] | {"run-dir": str(tmp_path / "run")}
    with pytest.raises(KeyboardInterrupt):
        simulate(settings, on_round=stop)
    assert list((tmp_path / "run" / "clients").rglob("dynamic-*.safetensors"))


def test_a_folder_does_not_take_the_place_of_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits" / "cat").mkdir(parents=True)
    (tmp_path / "default").mkdir()
    settings = tomllib.loads(simulate(PRETRAINED).config_path.read_text())["settings"]
    assert (settings["data"], settings["weights"]) == ("digits", "default")


def test_a_run_in_which_nobody_could_train_is_no_success(tmp_path):
    settings = SMALL | {"batch-size": 1, "blocks": "1", "run-dir": str(tmp_path / "run")}
    text = "no client's update was admitted in the only round; 2 times .* a batch of one image"
    with pytest.raises(FleetError, match=text):
        simulate(settings)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_server_that_diverges_stops_with_the_last_good_model(tmp_path):
    settings = PRETRAINED | {"server-learning-rate": 1e30, "run-dir": str(tmp_path / "run")}
    with pytest.raises(FleetError, match=r"loss is (nan|inf) after round 1 with server-learning-r"):
        simulate(settings)
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_flower_s_log_is_as_loud_after_a_run_as_before(tmp_path):
    level = logging.getLogger("flwr").level
    simulate(SMALL | {"run-dir": str(tmp_path / "run")})
    assert logging.getLogger("flwr").level == level


HEAD = PRETRAINED | {"method": "head", "clients": 4, "train-examples": 120}


def test_a_fleet_of_sign_flippers_takes_the_head_from_zero_to_where_it_would_go_and_not(tmp_path):
    honest = simulate(HEAD | {"run-dir": str(tmp_path / "honest")})
    flipped = simulate(
        HEAD | {"run-dir": str(tmp_path / "flipped")}, attack="sign_flip:10", hostile=1.0
    )
    ours, theirs = (load_file(record.model_path) for record in (honest, flipped))
    changed = [name for name in ours if (ours[name] != theirs[name]).any()]
    assert len(changed) == 2  # weight and bias of the head
    for name in changed:
        np.testing.assert_allclose(theirs[name], -10 * ours[name], rtol=1e-5, atol=1e-9)


def test_hostile_replies_that_are_no_numbers_are_refused_and_the_run_goes_on(tmp_path):
    settings = HEAD | {"rounds": 2, "run-dir": str(tmp_path / "run")}
    record = simulate(settings, attack="nan", hostile=0.5)
    _, *rounds = record.rounds()
    hostile = [f"client-{number:04d}" for number in sorted(hostile_clients(4, 0.5, 0))]
    for report in rounds:
        assert sorted(report.refused) == hostile
        assert all("holds NaN or infinity" in reason for reason in report.refused.values())
        assert len(report.clients) == 2
    assert np.isfinite(record.summary()["accuracy"])


@pytest.mark.slow  # whose labels are flipped, and how, is in test_hostile
def test_labels_that_are_flipped_everywhere_are_learnt_flipped(tmp_path):
    settings = HEAD | {"train-examples": 400, "test-examples": 100, "rounds": 3}
    honest, flipped = (
        simulate(settings | {"run-dir": str(tmp_path / name)}, **adversity).summary()["accuracy"]
        for name, adversity in (("h", {}), ("f", {"attack": "label_flip", "hostile": 1.0}))
    )
    assert honest > 0.5
    assert flipped < 0.1  # chance is 0.1; no digit is its own opposite


def test_lost_replies_are_silence_in_the_record_and_cost_no_bytes(tmp_path):
    settings = HEAD | {"rounds": 4, "run-dir": str(tmp_path / "run")}
    record = simulate(settings, drop=0.5)
    _, *rounds = record.rounds()
    lost = [len(report.refused) for report in rounds]
    assert 0 < sum(lost) < 16
    for report in rounds:
        assert len(report.clients) == 4 - len(report.refused)
        assert {*report.refused.values()} <= {"no reply: it was dropped on its way"}
    by_count = {len(report.clients): report.bytes_up for report in rounds}
    sizes = {count: by_count[count] / count for count in by_count if count}
    assert max(sizes.values()) - min(sizes.values()) < 16  # metrics differ in length
    assert by_count.get(0, 0) == 0


def test_what_a_fleet_had_against_it_is_on_record(tmp_path):
    adversity = {"attack": "ipm:0.5", "hostile": 0.25, "drop": 0.1}
    record = simulate(HEAD | {"run-dir": str(tmp_path / "run")}, **adversity)
    written = tomllib.loads(record.config_path.read_text())
    assert written["simulation"] == adversity
    assert written.keys() == {"settings", "versions", "machine", "simulation"}
    assert adversity.items() <= record.summary().items()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"attack": "backdoor", "hostile": 0.2}, "unknown attack 'backdoor'; known: sign_flip:F"),
        ({"attack": "alie"}, "attack is alie and hostile is 0.0, so nobody attacks; raise host"),
        ({"hostile": 0.2}, "hostile is 0.2 and no attack says what they do; name one, or leave h"),
        ({"attack": "nan", "hostile": 1.5}, r"hostile must be a number in \[0, 1\], got 1.5"),
        ({"attack": "nan", "hostile": 0.1}, "hostile is 0.1, which of 2 clients is none; raise it"),
        ({"attack": 3, "hostile": 0.1}, "attack must be text, got 3; known: sign_flip"),
        ({"drop": 1.0}, r"drop must be a number in \[0, 1\), got 1.0"),
        ({"drop": "0.3"}, r"drop must be a number in \[0, 1\), got '0.3'"),
        (
            {"drop": 0.3, "engine": "flower"},
            "engine flower cannot simulate drop; use engine local, or leave that out",
        ),
    ],
)
def test_adversity_that_cannot_be_is_refused_before_anything_is_written(tmp_path, options, text):
    with pytest.raises(ConfigError, match=text):
        simulate(SMALL | {"run-dir": str(tmp_path / "run")}, **options)
    assert not (tmp_path / "run").exists()


def test_a_process_has_one_run_at_a_time(tmp_path):
    def begin_another(report):
        simulate(SMALL | {"run-dir": str(tmp_path / "inside")})

    with pytest.raises(ConfigError, match=r"another run goes on in this process.*wait for it, or"):
        simulate(SMALL | {"run-dir": str(tmp_path / "outside")}, on_round=begin_another)
    assert not (tmp_path / "inside").exists()
    afterwards = simulate(SMALL | {"run-dir": str(tmp_path / "afterwards")})
    assert len([*afterwards.rounds()]) == 2
