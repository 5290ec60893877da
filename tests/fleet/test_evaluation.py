"""Loss and accuracy against a loop over single images."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fleet.data import load_data, to_tensor
from fleet.errors import ConfigError
from fleet.evaluation import evaluate
from fleet.mobiletl import TransferModel
from fleet.plan import make_plan


@pytest.fixture
def digits():
    return load_data("digits", "test", limit=23)


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_evaluation_is_the_mean_over_single_images(random_backbone, digits, batch_size):
    backbone = random_backbone("mobilenet_v3_small", num_classes=10)
    losses, hits = [], []
    for i, label in enumerate(digits.labels):
        with torch.no_grad():
            image = to_tensor(digits.read(i), backbone.preprocessing)
            logits = backbone.model.eval()(image[None])[0].double().numpy()
        losses.append(np.log(np.exp(logits).sum()) - logits[label])
        hits.append(np.argmax(logits) == label)
    found = evaluate(backbone.model, digits, backbone.preprocessing, batch_size)
    assert found.num_examples == 23
    assert found.accuracy == np.mean(hits)
    assert_close(found.loss, float(np.mean(losses)), rtol=1e-4, atol=1e-4)


def test_evaluation_changes_no_tensor_of_a_model_in_training(random_backbone, digits):
    backbone = random_backbone("mobilenet_v3_small", num_classes=10)
    model = TransferModel(backbone, make_plan(backbone, method="full"))
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    evaluate(model, digits, backbone.preprocessing)
    assert all(torch.equal(t, before[n]) for n, t in backbone.model.state_dict().items())


def test_data_without_images_is_refused(random_backbone, digits):
    backbone = random_backbone("mobilenet_v3_small", num_classes=10)
    with pytest.raises(ConfigError, match="digits has no images to evaluate on; give it some"):
        evaluate(backbone.model, digits.subset([]), backbone.preprocessing)
