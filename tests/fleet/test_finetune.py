"""Fine-tuning as a library user does: the model that comes back is the model that went in."""

import copy
import io
import re
from functools import cache

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import models
from torchvision.datasets import FakeData, ImageFolder

import fleet
from fleet.backbones import Preprocessing, load_backbone
from fleet.data import load_data, of_dataset
from fleet.errors import ConfigError, FleetError, UpdateError
from fleet.evaluation import evaluate
from fleet.planner import MIB

SMALL = dict(image_size=32, epochs=1)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "train").subset(range(48))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.mobilenet_v3_small(num_classes=10)


def test_model_is_the_one_that_went_in_and_its_keys_are_its_own(model, digits):
    before = copy.deepcopy(model.state_dict())
    fitted = fleet.fit(model, digits, blocks=2, **SMALL)
    assert fitted.model is model and list(model.state_dict()) == list(before)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed and changed <= fitted.plan.by_name.keys()


def test_flags_of_a_model_come_back_as_they_were(model, digits):
    model.features.requires_grad_(False)
    fleet.fit(model, digits, blocks=1, **SMALL)
    assert not any(p.requires_grad for p in model.features.parameters())
    assert all(p.requires_grad for p in model.classifier.parameters())


def test_fitted_model_is_saved_exported_and_loaded_as_before(model, digits):
    fitted = fleet.fit(model, digits, blocks=1, **SMALL)
    x = fitted.transform(digits.read(0))[None]
    assert x.shape == (1, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = models.mobilenet_v3_small(num_classes=10).eval()
    again.load_state_dict(torch.load(file))
    with torch.inference_mode():
        assert_close(again(x), expected, rtol=1e-4, atol=1e-4)
        scripted = torch.jit.trace(model, x)
        assert_close(scripted(x), expected, rtol=1e-4, atol=1e-4)
        exported = torch.export.export(model, (x,)).module()
        assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)


def test_head_of_other_classes_is_replaced(digits):
    model = models.mobilenet_v3_small(num_classes=1000)
    fitted = fleet.fit(model, digits, blocks=1, **SMALL)
    assert model.classifier[-1].out_features == 10 == len(fitted.classes)


def test_timm_model_tells_its_own_preprocessing(digits):
    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    fitted = fleet.fit(model, digits, blocks=1, **SMALL)
    told = model.pretrained_cfg
    assert (fitted.preprocessing.mean, fitted.preprocessing.std) == (told["mean"], told["std"])
    assert fitted.preprocessing.interpolation == told["interpolation"]


def test_preprocessing_may_be_told(model, digits):
    own = Preprocessing(48, (0.5,) * 3, (0.25,) * 3, "bicubic")
    fitted = fleet.fit(model, digits, blocks=1, preprocessing=own, epochs=1)
    assert fitted.preprocessing == own and fitted.transform(digits.read(0)).shape == (3, 48, 48)


def test_backbone_by_name_learns_digits():
    data, test = load_data("digits", "train", limit=300), load_data("digits", "test", limit=100)
    told = []
    fitted = fleet.fit(
        "efficientnet_lite0", data, blocks=2, image_size=48, on_epoch=lambda *x: told.append(x)
    )
    assert evaluate(fitted.model, test, fitted.preprocessing).accuracy > 0.6
    assert [epoch for epoch, _ in told] == [0, 1, 2]
    assert fitted.losses == tuple(loss for _, loss in told) and told[2][1] < told[0][1]


BUDGETS = (8, 12, 24)  # MiB


@pytest.fixture(scope="module")
def fitted_within(digits):
    """Function (budget in MiB) → what was fitted within it, once for all tests."""

    @cache
    def fit(budget_mib):
        return fleet.fit(
            "efficientnet_lite0",
            digits,
            budget_mib=budget_mib,
            settings={"weights": "none", "batch-size": 8},
            **SMALL,
        )

    return fit


@pytest.mark.parametrize("budget_mib", BUDGETS)
def test_training_stays_within_the_budget(fitted_within, budget_mib):
    """By more than a tenth it is not allowed to be missed; the next larger plan would."""
    fitted = fitted_within(budget_mib)
    assert fitted.peak_bytes <= 1.02 * budget_mib * MIB
    assert fitted.peak_bytes > 0.4 * budget_mib * MIB


def test_larger_budgets_train_more_blocks(fitted_within):
    blocks = [fitted_within(budget).plan.blocks for budget in BUDGETS]
    assert blocks == sorted(set(blocks))


def test_blocks_are_an_upper_bound_under_a_budget(model, digits):
    fitted = fleet.fit(model, digits, blocks=2, budget_mib=500, **SMALL)
    assert fitted.plan.blocks == 2


def test_settings_are_those_of_simulations(model, digits):
    fitted = fleet.fit(
        model, digits, blocks=1, settings={"batch-size": 24, "stash": "int8"}, **SMALL
    )
    assert (fitted.batch_size, fitted.stash) == (24, "int8")
    for settings, text in (
        ({"learning_rate": 1.0}, "fit has no use for a setting learning_rate; known: augmentation"),
        ({"rounds": 3}, "fit has no use for a setting rounds; known: augmentation, batch-size"),
        ({"blocks": "2"}, "setting blocks is the argument blocks of fit"),
        ({"local-epochs": 2}, "setting local-epochs is the argument epochs of fit"),
    ):
        with pytest.raises(ConfigError, match=text):
            fleet.fit(model, digits, settings=settings, **SMALL)


def test_loss_that_is_not_finite_leaves_the_last_good_epoch(model, digits):
    """The third epoch's images are made to be NaN."""
    states = []

    def poison(epoch, loss):
        states.append(copy.deepcopy(model.state_dict()))
        if epoch == 1:
            model.classifier[0].weight.data.fill_(torch.nan)

    weight = model.classifier[0].weight.detach().clone()
    with pytest.raises(
        UpdateError,
        match=r"loss is nan at step \d+ of \d+, counted from 0, with learning rate 0\.02; lower "
        r"learning-rate; the model is as it was after epoch 1",
    ):
        fleet.fit(model, digits, blocks=2, image_size=32, epochs=4, on_epoch=poison,
                  settings={"cache": "off"})  # fmt: skip
    model.classifier[0].weight.data.copy_(weight)  # not part of the plan: the test broke it
    assert len(states) == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, states[1][name]), name


def test_diverging_from_the_first_step_leaves_the_model_as_it_was(model, digits):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UpdateError, match=r"the model is as it was before training"):
        fleet.fit(
            model, digits, blocks=2, settings={"learning-rate": 1e30, "cache": "off"}, **SMALL
        )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def test_torchvision_s_data_sets_are_taken(image_folder):
    model = models.mobilenet_v3_small()
    fitted = fleet.fit(model, ImageFolder(image_folder), blocks=1, **SMALL)
    assert fitted.classes == ("cat", "dog")


def test_paths_are_taken(image_folder):
    fitted = fleet.fit(models.mobilenet_v3_small(), image_folder, blocks=1, **SMALL)
    assert fitted.classes == ("cat", "dog")


def test_data_set_without_targets_is_read_for_them():
    data = of_dataset(FakeData(12, (3, 8, 8), num_classes=3))
    assert len(data) == 12 and set(data.labels) <= {0, 1, 2}
    assert data.read(0).size == (8, 8)


class Pairs:
    def __init__(self, *pairs, **attributes):
        self.pairs = pairs
        self.__dict__ |= attributes

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i]


IMAGE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        (7, "data is a int, which has no length or no items; give a data set of (PIL image"),
        (Pairs(), "Pairs has no examples; give it some"),
        (Pairs((torch.zeros(3, 4, 4), 0)), "item 0 of Pairs is (Tensor, int), expected a pair of"),
        (Pairs(IMAGE, IMAGE), "item 0 of Pairs is a Image, expected a pair of PIL image and label"),
        (Pairs((IMAGE, 0), (IMAGE, 10**9)), "Pairs has 2 examples and labels up to 1000000000; nu"),
        (Pairs((IMAGE, 0.5), (IMAGE, 1.0)), "labels of Pairs are float64 of shape (2,), expected"),
        (Pairs((IMAGE, 0), (IMAGE, -1)), "labels of Pairs are int64 of shape (2,), expected 2"),
        (Pairs((IMAGE, 0), targets=[0, 1]), "labels of Pairs are int64 of shape (2,), expected 1"),
        (Pairs((IMAGE, 0), (IMAGE, 0)), "Pairs has 1 classes and labels up to 0; training needs"),
        (Pairs((IMAGE, 0), (IMAGE, 2), classes=["a", "b"]), "Pairs has 2 classes and labels up t"),
    ],
)
def test_data_sets_of_other_things_are_refused(dataset, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        of_dataset(dataset)


def test_model_without_inverted_residuals_is_refused(digits):
    with pytest.raises(FleetError, match="ResNet has no inverted-residual blocks"):
        fleet.fit(models.resnet18(), digits, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"budget_mib": 0.1},
            r"budget-mib 0\.1 is below the floor of \d+\.\d MiB, which the head alon",
        ),
        ({"blocks": 99}, "blocks is 99, MobileNetV3 has 11"),
        ({"blocks": 2.5}, "blocks must be a whole number, got 2.5"),
        ({"budget_mib": float("nan")}, "budget-mib must be off, auto or a number .* got nan"),
        ({"budget_mib": float("inf")}, "budget-mib must be off, auto or a number .* got inf"),
        ({"budget_mib": -3}, "budget-mib must be off, auto or a number .* got -3"),
        ({"budget_mib": 8, "settings": {"batch-size": 1}}, "a batch of 1 at 32 px is too little"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(digits, arguments, text):
    model = models.mobilenet_v3_small(num_classes=1000).train()
    model.features.requires_grad_(False)
    head, flags = model.classifier[3], [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    kind = ConfigError if "budget_mib" in arguments else FleetError
    with pytest.raises(kind, match=text):
        fleet.fit(model, digits, **SMALL, **arguments)
    assert model.classifier[3] is head and model.training and head.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags


def test_budget_may_be_what_is_free(model, digits):
    fitted = fleet.fit(model, digits, blocks=1, budget_mib="auto", **SMALL)
    assert fitted.plan.blocks == 1
    with pytest.raises(ConfigError, match=r"MiB of memory are free here and reserve-mib keeps 10"):
        fleet.fit(model, digits, budget_mib="auto", settings={"reserve-mib": 1e9}, **SMALL)


@pytest.mark.parametrize("rate", [1e3, 1e4, 1e20])
def test_model_that_came_to_nothing_is_never_called_good(digits, rate):
    model = models.mobilenet_v3_small(num_classes=10)
    with pytest.raises(UpdateError, match="the model is as it was") as error:
        fleet.fit(
            model, digits.subset(range(24)), blocks=2, epochs=6, image_size=32,
            settings={"learning-rate": rate, "batch-size": 8},
        )  # fmt: skip
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 32, 32)).isfinite().all(), str(error.value)
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_that_the_caller_turned_off_are_on_inside(model, digits):
    with torch.no_grad():
        fleet.fit(model, digits, blocks=1, **SMALL)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_model_of_another_precision_is_refused(model, digits, dtype):
    with pytest.raises(ConfigError, match=f"as {dtype}, training is in torch.float32; convert"):
        fleet.fit(model.to(dtype), digits, **SMALL)


def test_model_that_is_damaged_is_refused(model, digits):
    model.features[1].block[0][0].weight.data[0] = torch.nan
    with pytest.raises(ConfigError, match=r"values in features.1.block.0.0.weight that are NaN"):
        fleet.fit(model, digits, **SMALL)


def test_model_that_is_none_is_refused(digits):
    with pytest.raises(ConfigError, match="model is a NoneType, expected a torchvision or timm"):
        fleet.fit(None, digits)


def test_package_has_nothing_else_to_offer():
    assert fleet.__all__ == ["export", "fit", "predict"]
    with pytest.raises(AttributeError, match="module 'fleet' has no attribute 'training'"):
        _ = fleet.training


def test_fit_is_the_loop_of_devices(digits):
    """The same model by the parts that a client puts together."""
    from fleet.config import default_settings, read_config
    from fleet.mobiletl import TransferModel
    from fleet.plan import make_plan
    from fleet.train import train_locally

    fitted = fleet.fit(
        "mobilenet_v3_small", digits, blocks=2, settings={"weights": "none"}, **SMALL
    )
    config = read_config(default_settings() | {"local-epochs": 1})
    backbone = load_backbone("mobilenet_v3_small", num_classes=10, image_size=32, weights="none")
    plan = make_plan(backbone, method="mobiletl", blocks=2)
    train_locally(
        TransferModel(backbone, plan),
        digits,
        backbone.preprocessing,
        config.local,
        config.seed,
        config.features,
    )
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(fitted.model.state_dict()[name], tensor), name
