"""Arrays are Flower's own, byte for byte and number for number; only sooner."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from simulations.quick_arrays import quick_arrays

RNG = np.random.default_rng(0)
ARRAYS = {
    "matrix": RNG.standard_normal((4, 3), np.float32),
    "scalar": np.array(2.5, np.float64),
    "one": np.array([7], np.int64),
    "bools": np.array([True, False, True]),
    "bytes": RNG.integers(0, 256, 1000, np.uint8),
    "half": np.arange(6, dtype=np.float16).reshape(1, 2, 3),
    "big-endian": np.arange(5, dtype=">i4"),
    "empty": np.zeros((0, 3), np.float32),
    "columns": np.asfortranarray(RNG.standard_normal((4, 3), np.float32)),
    "strided": np.arange(12.0).reshape(3, 4)[:, ::2],
    "records": np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
    "texts": np.array(["a", "bcd"]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_written_and_read_as_flower_does(name):
    flowers = Array(ARRAYS[name])
    expected = flowers.numpy()
    with quick_arrays():
        ours = Array(ARRAYS[name])
        read = ours.numpy()
    assert ours == flowers  # dtype, shape and bytes
    assert (read.dtype, read.shape, read.strides) == (
        (expected.dtype, expected.shape, expected.strides)
    )
    assert np.array_equal(read, expected)
    assert read.flags.writeable
    assert not np.shares_memory(read, np.frombuffer(ours.data, np.uint8))


def test_a_state_dict_comes_back_bit_for_bit():
    state = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict()
    state["columns"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with quick_arrays():
        back = ArrayRecord(state).to_torch_state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def damaged():
    data = Array(ARRAYS["matrix"]).data
    yield "cut short", data[:-4]
    yield "of another version", data[:6] + b"\x02\x00" + data[8:]
    yield "without a header", b"no array"
    yield "with a header that is none", data[:20] + b"(" * 30 + data[50:]
    yield "of objects", data.replace(b"<f4", b"|O8")


@pytest.mark.parametrize(("what", "data"), list(damaged()))
def test_what_is_no_array_is_refused_as_flower_does(what, data):
    array = Array("float32", (4, 3), "numpy.ndarray", data)
    errors = []
    for _ in range(2):
        with pytest.raises(Exception) as caught:
            array.numpy()
        errors.append((type(caught.value), str(caught.value)))
    with quick_arrays(), pytest.raises(errors[0][0]) as caught:
        array.numpy()
    assert str(caught.value) == errors[0][1], what


def test_an_array_that_is_no_numpy_array_is_refused_as_flower_does():
    with quick_arrays(), pytest.raises(TypeError, match="Unsupported serialization type"):
        Array("float32", (1,), "torch.tensor", Array(np.zeros(1, np.float32)).data).numpy()
    with quick_arrays(), pytest.raises(AssertionError, match="Expected NumPy ndarray"):
        Array.from_numpy_ndarray([1.0])


def test_flowers_own_is_back_after_the_block():
    before = Array.numpy, Array.from_numpy_ndarray
    with pytest.raises(KeyError), quick_arrays():
        assert Array.numpy is not before[0]
        raise KeyError
    assert (Array.numpy, Array.from_numpy_ndarray) == before
