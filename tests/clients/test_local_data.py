from dataclasses import replace

import numpy as np
import pytest

from clients.local_data import local_data, relabel
from fleet.config import default_settings, read_config
from fleet.data import load_data
from fleet.errors import ConfigError


def config(**settings):
    settings = {key.replace("_", "-"): value for key, value in settings.items()}
    return read_config(default_settings() | {"train-examples": 200} | settings).data


def partitions(config, count=4, seed=0):
    return [
        local_data({"partition-id": i, "num-partitions": count}, config, seed) for i in range(count)
    ]


def pixels(images):
    return [np.asarray(images.read(i)).tobytes() for i in range(len(images))]


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.5"])
def test_partitions_deal_out_the_fleets_images(spec):
    settings = config(partition=spec)
    shares = [part for pair in partitions(settings) for part in pair]
    fleet = load_data("digits", "train", limit=200)
    assert sum(map(len, shares)) == 200
    assert sorted(p for share in shares for p in pixels(share)) == sorted(pixels(fleet))


def test_a_fraction_of_each_partition_validates():
    for training, validation in partitions(config(partition="iid", validation_fraction=0.2)):
        assert (len(training), len(validation)) == (40, 10)
    for _, validation in partitions(config(validation_fraction=0.0)):
        assert len(validation) == 0


def test_a_partition_is_the_same_every_time_and_another_for_another_seed():
    first, again = partitions(config()), partitions(config())
    assert pixels(first[1][0]) == pixels(again[1][0])
    assert pixels(first[1][0]) != pixels(partitions(config(), seed=1)[1][0])


def test_a_device_brings_its_own_images(image_folder):
    folder = image_folder("cat", "dog")
    node = {"data": folder, "partition-id": 0, "num-partitions": 4}
    training, validation = local_data(node, config(), seed=0)
    assert training.classes == validation.classes == ("cat", "dog")
    both = pixels(training) + pixels(validation)
    assert len(set(both)) == len(both) == 20
    assert len(training) > len(validation) > 0


@pytest.mark.parametrize("node", [{}, {"partition-id": 0}, {"num-partitions": 3}])
def test_a_client_without_data_is_told_what_to_give_it(node):
    with pytest.raises(ConfigError, match='knows no data: give its node configuration data="/path'):
        local_data(node, config(), seed=0)


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"data {tmp_path}/none does not exist"):
        local_data({"data": f"{tmp_path}/none"}, config(), seed=0)


def test_labels_are_mapped_by_name(image_folder):
    images = load_data(image_folder("cat", "dog"), "train")
    server = ("ant", "dog", "bee", "cat")
    relabelled = relabel(images, server)
    assert relabelled.classes == server
    names = [images.classes[label] for label in images.labels]
    assert [server[label] for label in relabelled.labels] == names
    assert set(names) == {"cat", "dog"}
    assert pixels(relabelled) == pixels(images)


def test_equal_classes_need_no_mapping(image_folder):
    images = load_data(image_folder("cat", "dog"), "train")
    assert relabel(images, ("cat", "dog")) is images


def test_classes_that_the_server_does_not_know_are_named(image_folder):
    images = load_data(image_folder("cat", "dog", "yak"), "train")
    text = "has classes dog, yak, which the server does not know; it knows ant, cat"
    with pytest.raises(ConfigError, match=text):
        relabel(images, ("ant", "cat"))
    with pytest.raises(ConfigError, match=r"has classes yak, which .*; move these folders away"):
        relabel(replace(images), ("dog", "cat"))


@pytest.mark.parametrize("number", [-1, 3])
def test_a_partition_that_there_is_not_is_refused(number):
    config = read_config(default_settings()).data
    node = {"partition-id": number, "num-partitions": 3}
    with pytest.raises(ConfigError, match=f"partition-id is {number}, num-partitions is 3"):
        local_data(node, config, 0)
