import struct
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fleet.closed_form import Moments, decode_moments, encode_moments
from fleet.closed_form.wire import _checksum, _pivots
from fleet.errors import UpdateError
from tests.many import many


def decode(data, moments, **changes):
    classes, features = moments.class_sums.shape
    expected = {
        "features": features,
        "classes": classes,
        "exponent": moments.exponent,
        "max_examples": 10_000,
    }
    return decode_moments(data, **(expected | changes))


def assert_same(a, b):
    for name in ("gram", "class_sums", "counts", "exponent"):
        assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("images", [1, 2, 7, 30, 100, 500])
@many("seed", range(5))
def test_moments_come_back_to_the_last_bit(seed, images, random_codes, moments_from):
    moments = moments_from(*random_codes(seed, images, features=33))
    assert_same(decode(encode_moments(moments), moments), moments)


def test_moments_of_few_classes_and_of_constant_features_come_back(random_codes, moments_from):
    codes, labels = random_codes(0, 40)
    codes[:, 3], codes[:, 5], codes[:, 6] = 0, 7, codes[:, 7]
    for chosen in (labels, np.full(40, 2), np.where(labels == 1, 3, labels)):
        moments = moments_from(codes, chosen)
        assert_same(decode(encode_moments(moments), moments), moments)
    zeros = moments_from(np.zeros((5, 16)), labels[:5])
    assert_same(decode(encode_moments(zeros), zeros), zeros)


def test_the_largest_codes_of_the_most_images_come_back(moments_from):
    sign = np.where(np.arange(16) % 3, 1, -1)
    one = moments_from(2047.0 * sign[None], [1])
    many = Moments(one.gram * 10**7, one.class_sums * 10**7, one.counts * 10**7, -1)
    assert_same(decode(encode_moments(many), many, max_examples=10**7), many)


@pytest.mark.parametrize("seed", range(5))
def test_a_small_client_sends_rows_of_its_gram_matrix_and_fewer_bytes(
    seed, random_codes, moments_from, monkeypatch
):
    codes, labels = random_codes(seed, 20, features=128)
    moments = moments_from(codes, labels)
    pivots = _pivots(moments.gram, 20)
    assert pivots.sum() == np.linalg.matrix_rank(codes) == 20
    few = encode_moments(moments)
    monkeypatch.setattr("fleet.closed_form.wire._pivots", lambda gram, n: np.ones(128, bool))
    assert len(few) < 0.5 * len(encode_moments(moments))


def test_a_matrix_that_its_rows_do_not_give_back_goes_whole(random_codes, moments_from):
    codes, labels = random_codes(0, 20, features=64)
    moments = moments_from(codes, labels)
    other = moments.gram + np.diag(np.arange(64) % 2)
    assert _pivots(other, 20).all()
    changed = replace(moments, gram=other)
    assert_same(decode(encode_moments(changed), changed), changed)


def test_bytes_are_near_the_entropy_of_what_class_sums_do_not_tell(random_codes, moments_from):
    codes, labels = random_codes(0, 400, features=200)
    moments = moments_from(codes, labels)
    variances = np.diag(moments.within) / 400
    sizes = np.sqrt(400 * np.outer(variances, variances))[np.triu_indices(200, 1)]
    entropy = np.log2(np.maximum(sizes, 1) * np.sqrt(2 * np.pi * np.e)).sum() / 8
    assert len(encode_moments(moments)) < 1.1 * entropy + 1500


def test_every_cut_is_refused_and_no_change_gets_through(random_codes, moments_from):
    moments = moments_from(*random_codes(0, 12))
    data = encode_moments(moments)
    for length in range(len(data)):
        with pytest.raises(UpdateError):
            decode(data[:length], moments)
    for i in range(len(data)):
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(data)
            changed[i] ^= flip
            try:
                assert_same(decode(bytes(changed), moments), moments)  # padding of a row of bits
            except UpdateError:
                continue


@many("seed", range(200))
def test_noise_is_refused(seed, random_codes, moments_from):
    moments = moments_from(*random_codes(0, 12))
    rng = np.random.default_rng(seed)
    kept = int(rng.integers(0, 60))
    noise = encode_moments(moments)[:kept] + rng.bytes(int(rng.integers(0, 400)))
    with pytest.raises(UpdateError):
        decode(noise, moments)


def test_refusals_say_why(random_codes, moments_from):
    moments = moments_from(*random_codes(0, 60))
    data = encode_moments(moments)
    with pytest.raises(UpdateError, match="moments are of version 9, expected 1; run the same"):
        decode(b"\x09" + data[1:], moments)
    with pytest.raises(UpdateError, match=r"in steps of 2\^-1, the server's are of 2\^3"):
        decode(data, moments, exponent=3)
    with pytest.raises(UpdateError, match="1 to 59 together, got 60 with a smallest of"):
        decode(data, moments, max_examples=59)
    with pytest.raises(UpdateError, match="moments have 1 bytes too many"):
        decode(data + b"x", moments)
    with pytest.raises(UpdateError, match="moments end 6 bytes early; they were cut"):
        decode(b"", moments)
    wrong = data[:2] + struct.pack("<I", _checksum(moments.gram) ^ 1) + data[6:]
    with pytest.raises(UpdateError, match="do not match their checksum; they were changed"):
        decode(wrong, moments)


def test_liars_are_refused(random_codes, moments_from):
    moments = moments_from(*random_codes(0, 60))

    def refused(match, **lies):
        with np.errstate(divide="ignore"):
            lying = encode_moments(replace(moments, **lies))
        with pytest.raises(UpdateError, match=match):
            decode(lying, moments)

    refused("from 0 on and 1 to 10000 together", counts=np.array([40, 30, -10, 0]))
    refused("from 0 on and 1 to 10000 together, got 0", counts=np.zeros(4, np.int64))
    refused("squares of features are from", gram=moments.gram * 10**7)
    refused("squares of features are from", gram=-moments.gram)
    refused("sums of features are from", class_sums=moments.class_sums * 10**5)
    shifted = np.array([[1], [-1], [0], [0]]) * 10**5 + moments.class_sums
    refused("sums of a class exceed what its count of images can have", class_sums=shifted)
    refused("features vary by less than nothing within classes", class_sums=3 * moments.class_sums)
    strong = moments.gram.copy()
    strong[2, 7] = strong[7, 2] = 2 * max(strong[2, 2], strong[7, 7])
    refused("features vary by less than nothing within classes", gram=strong)
