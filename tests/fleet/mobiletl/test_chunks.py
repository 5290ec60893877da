"""Chunks cover the batch, each image once, and grow as maps shrink."""

import pytest
import torch

from fleet.mobiletl.chunks import chunks, images_in_chunk


@pytest.mark.parametrize("length", [0, 1, 2, 7, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_chunks_cover_every_image_once_and_in_order(length, size):
    parts = [list(range(length))[part] for part in chunks(length, size)]
    assert [i for part in parts for i in part] == list(range(length))
    assert all(len(part) == size for part in parts[:-1])
    assert all(0 < len(part) <= size for part in parts)


@pytest.mark.parametrize(
    ("size", "images"), [((14, 14), 2), ((7, 7), 8), ((7, 14), 4), ((112, 112), 1), ((1, 1), 392)]
)
def test_chunk_has_as_many_images_as_fit_and_at_least_one(size, images):
    assert images_in_chunk(torch.empty(3, 5, *size)) == images


def test_pooled_features_are_maps_of_one_pixel():
    assert images_in_chunk(torch.empty(3, 5)) == images_in_chunk(torch.empty(3, 5, 1, 1))
