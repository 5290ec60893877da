import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import Ridge, RidgeClassifier, RidgeClassifierCV, RidgeCV

from fleet.backbones import load_backbone
from fleet.closed_form import fit_ridge, moments_of, solve, step_exponent, total
from fleet.data import load_data
from fleet.errors import ConfigError, UpdateError
from fleet.features import FeatureSource
from fleet.mobiletl import TransferModel
from fleet.plan import make_plan

SHAPES = [(60, 16), (200, 30), (25, 40)]  # images, features: more of the one and of the other


@pytest.fixture
def drawn(random_codes, moments_from):
    """Function (seed, images, features) → moments, and what they are of: features and labels."""

    def build(seed, images, features, exponent=-1):
        codes, labels = random_codes(seed, images, features)
        return moments_from(codes, labels, exponent=exponent), codes * 2.0**exponent, labels

    return build


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(
        torch.tensor(logits).double(), torch.tensor(labels)
    ).item()


@pytest.mark.parametrize("alpha", [0.01, 1.0, 300.0])
@pytest.mark.parametrize(("images", "features"), SHAPES)
def test_the_fit_is_scikit_learn_s(images, features, alpha, drawn):
    moments, x, y = drawn(0, images, features)
    ours, theirs = fit_ridge(moments, alpha), Ridge(alpha).fit(x, np.eye(4)[y])
    assert_allclose(ours.weight, theirs.coef_, rtol=1e-6, atol=1e-9)
    assert_allclose(ours.bias, theirs.intercept_, rtol=1e-6, atol=1e-8)
    weight, bias = solve(moments, alpha)
    predicted = RidgeClassifier(alpha).fit(x, y).predict(x)
    assert_array_equal((x @ weight.T + bias).argmax(axis=1), predicted)


def test_no_ridge_at_all_is_least_squares(drawn):
    moments, x, y = drawn(0, 25, 40)
    fit = fit_ridge(moments, 0.0)
    centred = x - x.mean(axis=0)
    assert_allclose(fit.weight, (np.linalg.pinv(centred) @ np.eye(4)[y]).T, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("images", "features"), SHAPES)
def test_generalised_cross_validation_follows_its_formula(seed, images, features, drawn):
    moments, x, y = drawn(seed, images, features)
    targets, strengths = np.eye(4)[y], np.logspace(-2, 3, 20)
    with_ones = np.c_[x, np.ones(images)]

    def brute_force(alpha):
        penalty = alpha * np.diag(np.r_[np.ones(features), 0])
        hat = with_ones @ np.linalg.solve(with_ones.T @ with_ones + penalty, with_ones.T)
        residual = np.square(targets - hat @ targets).sum()
        return images * residual / (images - np.trace(hat)) ** 2, np.trace(hat)

    for alpha in strengths:
        fit = fit_ridge(moments, alpha)
        assert_allclose((fit.gcv, fit.degrees), brute_force(alpha), rtol=1e-6)
    chosen = fit_ridge(moments)
    assert chosen.gcv <= min(brute_force(alpha)[0] for alpha in strengths) * 1.01


@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_strength_is_as_good_as_leave_one_out_s(seed, drawn):
    """Errors of images left out one by one, by brute force, at our choice and at the best."""
    moments, x, y = drawn(seed, 80, 30)
    strengths = np.logspace(-3, 4, 60)
    search = RidgeCV(strengths, store_cv_results=True).fit(x, np.eye(4)[y])
    errors = search.cv_results_.mean(axis=(0, 1))
    ours = np.interp(np.log(fit_ridge(moments).ridge), np.log(strengths), errors)
    assert ours < 1.02 * errors.min()


def test_fewer_images_than_features_do_not_mislead_the_choice(drawn):
    """With next to no ridge such a fit has no residual at all."""
    moments = drawn(0, 25, 40)[0]
    fit = fit_ridge(moments)
    assert fit.ridge > 0.1 and fit.degrees < 24
    assert fit_ridge(moments, 1e-6).gcv > fit.gcv


def test_a_class_that_nobody_has_is_never_predicted_and_not_at_infinity(random_codes, moments_from):
    codes, labels = random_codes(0, 50)
    labels = np.where(labels == 2, 0, labels)
    weight, bias = solve(moments_from(codes, labels, classes=6))
    assert not weight[[2, 4, 5]].any()
    assert_allclose(bias[[2, 4, 5]], -np.log(50), rtol=1e-6)
    rng = np.random.default_rng(0)
    anything = rng.normal(0, 100, (1000, 16))
    assert set((anything @ weight.T + bias).argmax(axis=1)) <= {0, 1, 3}


def test_moments_of_one_class_or_one_image_have_a_head(random_codes, moments_from):
    codes, _ = random_codes(0, 20)
    for number in (1, 20):
        weight, bias = solve(moments_from(codes[:number], np.full(number, 3)))
        assert np.isfinite(weight).all() and np.isfinite(bias).all()
        assert (codes @ weight.T + bias).argmax(axis=1).tolist() == [3] * 20


def test_faults_are_named(drawn, moments_from):
    moments = drawn(0, 60, 16)[0]
    for ridge in (-1.0, np.nan, np.inf):
        with pytest.raises(ConfigError, match="ridge must be at least 0 and finite, got"):
            solve(moments, ridge)
    with pytest.raises(UpdateError, match="moments are of no image; a head needs some"):
        solve(moments_from(np.zeros((0, 3)), np.zeros(0, int)))


@pytest.fixture(scope="module")
def pretrained():
    """Features of digits under the packaged weights, as moments of three clients and as floats."""
    torch.set_num_threads(1)
    backbone = load_backbone("efficientnet_lite0", num_classes=10, image_size=64)
    model = TransferModel(backbone, make_plan(backbone, method="head"))
    data = {
        "train": load_data("digits", "train", limit=150, seed=0),
        "test": load_data("digits", "test", limit=100, seed=0),
    }
    x: dict[str, np.ndarray] = {}
    for split, images in data.items():
        source = FeatureSource(model, images, backbone.preprocessing)
        rows = [features for features, _ in source.batches(20)]  # those of a head-only plan
        assert torch.equal(backbone.head(rows[0]), model.from_features(rows[0]))
        x[split] = torch.cat(rows).double().numpy()
    moments = total(
        moments_of(model, data["train"].subset(share), backbone.preprocessing, exponent)
        for exponent in [step_exponent(backbone)]
        for share in np.array_split(np.arange(150), [40, 100])
    )
    return moments, x, {split: images.labels for split, images in data.items()}


def test_the_head_of_real_features_is_as_good_as_scikit_learn_s_of_unrounded_ones(pretrained):
    moments, x, y = pretrained
    weight, bias = solve(moments)
    ours = ((x["test"] @ weight.T + bias).argmax(axis=1) == y["test"]).mean()
    theirs = RidgeClassifierCV(np.logspace(-1, 5, 25)).fit(x["train"], y["train"])
    assert ours > 0.7  # chance: 0.1
    assert ours >= theirs.score(x["test"], y["test"]) - 0.02


def test_the_scale_is_near_the_best_one_for_images_left_out(pretrained):
    moments, x, y = pretrained
    weight, bias = solve(moments)
    logits = x["test"] @ weight.T + bias
    of_scales = [cross_entropy(s * logits, y["test"]) for s in np.logspace(-1.5, 1.5, 61)]
    assert cross_entropy(logits, y["test"]) < min(of_scales) + 0.03
    assert cross_entropy(logits, y["test"]) < 0.7
