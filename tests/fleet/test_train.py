"""The local loop: it learns, it repeats itself, and it says what is wrong."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fleet.backbones import load_backbone
from fleet.config import FeatureConfig, LocalConfig
from fleet.data import ImageBatches, load_data, visiting_order
from fleet.errors import ConfigError, UpdateError
from fleet.evaluation import evaluate
from fleet.measure import allocator_peak
from fleet.mobiletl import TransferModel
from fleet.objective import Proximal, fedprox
from fleet.plan import make_plan
from fleet.state import capture
from fleet.train import pick_device, train_locally

CONFIG = dict(
    epochs=1,
    batch_size=8,
    sampler="shuffled",
    learning_rate=0.05,
    schedule="constant",
    momentum=0.9,
    momentum_dtype="float32",
    weight_decay=0.0,
    stash="recompute",
    device="cpu",
)


def config(**changes):
    return LocalConfig(**CONFIG | changes)


@pytest.fixture
def digits():
    return load_data("digits", "train", limit=40)


@pytest.fixture
def make_model(random_backbone):
    """Function (method, name) → (model, preprocessing), the same each time."""

    def build(method="mobiletl", name="mobilenet_v3_small", image_size=32):
        backbone = random_backbone(name, num_classes=10, image_size=image_size)
        model = TransferModel(backbone, make_plan(backbone, method=method, blocks=2))
        return model, backbone.preprocessing

    return build


def states_equal(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "method",
    [
        "mobiletl",
        # `shifts` is mobiletl with less, the others train as PyTorch does by itself, and every
        # method below as a plain loop does.
        *(pytest.param(method, marks=pytest.mark.slow) for method in ("shifts", "blocks", "head")),
    ],
)
def test_digits_are_learnt(method):
    backbone = load_backbone("efficientnet_lite0", num_classes=10, image_size=64)
    model = TransferModel(backbone, make_plan(backbone, method=method, blocks=2))
    data = load_data("digits", "train", limit=200)
    before = evaluate(model, data.subset(range(20)), backbone.preprocessing)
    result = train_locally(
        model,
        data,
        backbone.preprocessing,
        config(epochs=2, batch_size=16, learning_rate=0.005),
        seed=0,
    )
    after = evaluate(model, data.subset(range(60)), backbone.preprocessing)
    assert before.loss == pytest.approx(np.log(10), abs=1e-4)  # the head starts at even odds
    assert after.loss < 1 and after.accuracy > 0.7
    assert result.num_examples == 200 and after.loss < result.loss < before.loss
    assert result.seconds > 0 and result.peak_bytes > 0


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("mobiletl", "mobilenet_v3_small"),
        ("full", "efficientnet_b0"),
        pytest.param("full", "mobilenet_v2", marks=pytest.mark.slow),  # its dropout the other has
    ],
)
def test_same_seed_gives_the_same_model_dropout_included(make_model, digits, method, name):
    def run(seed, generator_seed):
        torch.manual_seed(generator_seed)  # must not matter
        model, preprocessing = make_model(method, name)
        data = digits.subset(range(8))
        result = train_locally(model, data, preprocessing, config(batch_size=4), seed)
        return model, result.loss

    (first, loss), (second, same_loss), (other, _) = run([0, 3], 1), run([0, 3], 2), run([0, 4], 1)
    assert states_equal(first, second) and loss == same_loss
    assert not states_equal(first, other)


@pytest.mark.parametrize("trims", [True, False])
def test_memory_goes_back_to_the_system_between_steps_if_it_is_to(
    trims, make_model, digits, monkeypatch
):
    trimmed = []
    monkeypatch.setattr("fleet.train.trim", lambda: trimmed.append(True))
    model, preprocessing = make_model("head")
    data = digits.subset(range(8))
    train_locally(model, data, preprocessing, config(batch_size=4), seed=0, trims=trims)
    assert any(trimmed) == trims


def test_training_leaves_the_global_generator_alone(make_model, digits):
    model, preprocessing = make_model("full")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train_locally(model, digits.subset(range(4)), preprocessing, config(), seed=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("momentum", "sampler"),
    [
        *((0.0, "shuffled"), (0.9, "balanced")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((0.0, "balanced"), (0.9, "shuffled"))
        ),
    ],
)
def test_training_is_a_plain_loop_with_torchs_optimiser(make_model, digits, momentum, sampler):
    model, preprocessing = make_model()
    settings = config(epochs=2, batch_size=16, momentum=momentum, sampler=sampler)
    result = train_locally(model, digits, preprocessing, settings, seed=5)
    same, _ = make_model()
    optimizer = torch.optim.SGD(same.trainable_parameters(), lr=0.05, momentum=momentum)
    rng, losses = np.random.default_rng(5), []
    for _ in range(2):
        order = visiting_order(digits.labels, sampler, rng)
        for x, y in ImageBatches(digits, preprocessing, 16, order):
            optimizer.zero_grad()
            loss = F.cross_entropy(same(x), y)
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(y)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-4)
    for name, tensor in same.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_training_follows_an_evaluation(make_model, digits):
    (fresh, preprocessing), (evaluated, _) = make_model(), make_model()
    evaluate(evaluated, digits, preprocessing)
    for model in (fresh, evaluated):
        train_locally(model, digits, preprocessing, config(), seed=0)
    assert states_equal(fresh, evaluated)


def test_mobiletl_peaks_below_stock_autograd(make_model, digits):
    peaks = {}
    for method in ("mobiletl", "blocks", "full"):
        model, preprocessing = make_model(method, "mobilenet_v2", image_size=64)
        data = digits.subset(range(8))
        peaks[method] = train_locally(model, data, preprocessing, config(), seed=0).peak_bytes
    assert peaks["mobiletl"] < peaks["blocks"] < peaks["full"]


def test_data_without_images_is_refused(make_model, digits):
    model, preprocessing = make_model()
    with pytest.raises(ConfigError, match="digits has no training images for this client"):
        train_locally(model, digits.subset([]), preprocessing, config(), seed=0)


@pytest.mark.parametrize("method", ["mobiletl", "blocks", "full"])
def test_single_image_without_statistics_is_refused(make_model, digits, method):
    model, preprocessing = make_model(method, image_size=32)
    with pytest.raises(ConfigError, match="a batch of one image of 32 pixels is too little to tra"):
        train_locally(model, digits.subset([0]), preprocessing, config(), seed=0)


def test_single_image_with_pixels_enough_trains(make_model, digits):
    model, preprocessing = make_model(image_size=64)
    result = train_locally(model, digits.subset([0]), preprocessing, config(), seed=0)
    assert result.num_examples == 1


def test_loss_that_is_not_finite_ends_the_training(make_model, digits):
    model, preprocessing = make_model("full")
    with pytest.raises(
        UpdateError,
        match=r"loss is (nan|inf) at step [1-9]\d* of 5, counted from 0, with learning rate 1e\+20",
    ):
        train_locally(model, digits, preprocessing, config(learning_rate=1e20), seed=0)


def test_gradient_that_is_not_finite_does_not_reach_its_parameter_nor_any_below(make_model, digits):
    """The loss is still finite, the gradient no more."""
    model, preprocessing = make_model("full")
    weight = model.model.classifier[-1].weight
    weight.register_hook(lambda gradient: gradient * torch.inf)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        UpdateError,
        match=r"gradient of shape \(10, 1024\) is not finite at step 0 of 5, counted from 0, with",
    ):
        train_locally(model, digits, preprocessing, config(), seed=0)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= {"model.classifier.3.bias"}


def test_every_step_may_be_held_up_or_ended(make_model, digits):
    """A hook before each step changes nothing, and what it raises ends the training."""
    calls = []
    results = []
    for hook in (lambda: None, lambda: calls.append(1)):
        model, preprocessing = make_model()
        train_locally(model, digits, preprocessing, config(batch_size=16), 0, before_step=hook)
        results.append(model)
    assert len(calls) == config().epochs * -(-len(digits) // 16)
    assert states_equal(*results)

    def too_hot():
        raise ConfigError("too hot")

    model, preprocessing = make_model()
    with pytest.raises(ConfigError, match="too hot"):
        train_locally(model, digits, preprocessing, config(), 0, before_step=too_hot)


def test_every_epoch_is_told_of(make_model, digits):
    model, preprocessing = make_model()
    told = []
    result = train_locally(
        model, digits, preprocessing, config(epochs=3), 0, on_epoch=lambda *pair: told.append(pair)
    )
    assert [epoch for epoch, _ in told] == [0, 1, 2]
    assert np.mean([loss for _, loss in told]) == pytest.approx(result.loss)


def test_peak_has_momentum_in_it(make_model, digits):
    """On the second step it is there all the time."""
    peaks = {}
    for momentum in (0.0, 0.9):
        model, preprocessing = make_model(image_size=32)
        result = train_locally(model, digits, preprocessing, config(momentum=momentum), seed=0)
        peaks[momentum] = result.peak_bytes
    assert peaks[0.9] - peaks[0.0] == pytest.approx(
        sum(p.nbytes for p in model.trainable_parameters()), rel=0.05
    )


@pytest.mark.parametrize("epochs", [1, 2])
def test_peak_has_the_targets_of_a_proximal_term_in_it(make_model, digits, epochs):
    """Also where there is a single step."""
    peaks = {}
    for pulled in (False, True):
        model, preprocessing = make_model(image_size=32)
        proximal = fedprox(capture(model.model, model.plan).tensors, 0.1) if pulled else None
        data = digits.subset(range(8))
        result = train_locally(
            model, data, preprocessing, config(epochs=epochs), seed=0, proximal=proximal
        )
        peaks[pulled] = result.peak_bytes
    sizes = [p.nbytes for p in model.trainable_parameters()]
    # And, while a parameter steps, its direction.
    assert sum(sizes) <= peaks[True] - peaks[False] <= sum(sizes) + max(sizes)


@pytest.mark.parametrize(
    ("method", "number", "precision"),
    [
        *(("head", 40, "int8"), ("head", 3, "float16"), ("mobiletl", 40, "float16")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("head", 40, "float16"), ("head", 3, "int8"), ("mobiletl", 40, "int8"))
        ),
    ],
)
def test_peak_does_not_depend_on_what_is_cached(
    random_backbone, digits, tmp_path, method, number, precision
):
    backbone = random_backbone("mobilenet_v3_small", num_classes=10, image_size=32)
    plan = make_plan(backbone, method=method, blocks=10)  # `mobiletl`: all but the lowest
    features = FeatureConfig(
        cache=precision, cache_mib=64.0, cache_dir=str(tmp_path), augmentation="none", views=1
    )

    def peak(model):
        data, preprocessing = digits.subset(range(number)), backbone.preprocessing
        return train_locally(model, data, preprocessing, config(), 0, features).peak_bytes

    model = TransferModel(backbone, plan)
    cold, warm = peak(model), peak(model)
    assert warm == cold
    assert peak(TransferModel(backbone, plan)) == cold  # as in another process

    # Independently: the frozen part on a couple of images is most of it, at least.
    with allocator_peak() as prefix:
        model.features(torch.zeros(2, 3, 32, 32).to(memory_format=torch.channels_last))
    assert cold >= prefix.bytes


def test_the_stronger_the_pull_the_nearer_training_stays(make_model, digits):
    moved = []
    for strength in (0.0, 1.0, 20.0):
        model, preprocessing = make_model()
        start = capture(model.model, model.plan)
        proximal = fedprox(start.tensors, strength) if strength else None
        settings = config(epochs=2, learning_rate=0.02)
        train_locally(model, digits, preprocessing, settings, seed=0, proximal=proximal)
        delta = capture(model.model, model.plan) - start
        moved.append(
            sum(float(np.square(delta.tensors[name]).sum()) for name in model.trainable_by_name())
        )
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.2 * moved[0]


def test_a_tensor_without_a_target_trains_as_ever(make_model, digits):
    """With one step there is nothing that the others could do to it."""
    ends = []
    for names in ((), ("classifier.3.weight",)):
        model, preprocessing = make_model()
        tensors = capture(model.model, model.plan).tensors
        proximal = Proximal(5.0, {name: tensors[name] + 1 for name in names}) if names else None
        train_locally(
            model, digits.subset(range(8)), preprocessing, config(), seed=0, proximal=proximal
        )
        ends.append(capture(model.model, model.plan).tensors)
    differing = {n for n in ends[0] if not np.array_equal(ends[0][n], ends[1][n])}
    assert differing == {"classifier.3.weight"}


def test_measuring_works_again_after_a_failed_first_step(make_model, digits):
    model, preprocessing = make_model()
    model.model.classifier[-1].weight.data.fill_(torch.nan)
    with pytest.raises(UpdateError, match=r"loss is nan at step 0 of 5, .* learning rate 0\.05"):
        train_locally(model, digits, preprocessing, config(), seed=0)
    with allocator_peak() as peak:
        torch.empty(1000)
    assert peak.bytes >= 4000


def test_auto_picks_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_device_that_is_not_there_is_refused(monkeypatch, name):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f'device {name} is not available here; use device = "au'):
        pick_device(name)


def test_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="unknown device gpu; use auto, cpu, cuda or mps"):
        pick_device("gpu")
