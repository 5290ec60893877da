"""Trees come back as they were, or are refused by the place that cannot be kept."""

import json
import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fleet.errors import CheckpointError
from fleet.tree import flatten, unflatten

DTYPES = ("bool", "int8", "uint16", "int64", "float16", "float32", "float64")
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.sampled_from(DTYPES).flatmap(
        lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, min_side=0))
    )
    | st.floats(width=32).map(np.float32)
)
KEYS = st.text() | st.integers() | st.tuples(st.booleans(), st.none())
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


def there_and_back(tree):
    written, named = flatten(tree)
    return unflatten(json.loads(json.dumps(written)), named)


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, np.ndarray | np.generic):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_same(*pair)
    elif isinstance(theirs, float) and math.isnan(theirs):
        assert math.isnan(ours)
    else:
        assert ours == theirs
        assert str(ours) == str(theirs)  # -0.0


@given(TREES)
def test_a_tree_comes_back_as_it_was(tree):
    assert_same(there_and_back(tree), tree)


def test_one_array_in_two_places_is_kept_once_and_is_one_again():
    array = np.arange(3)
    _, named = flatten({"a": array, "b": [array, array.copy()]})
    assert len(named) == 2
    back = there_and_back({"a": array, "b": [array, array.copy()]})
    assert back["a"] is back["b"][0]
    assert back["a"] is not back["b"][1]


def test_the_order_in_memory_stays():
    for array in (np.ones((3, 4)).T, np.asfortranarray(np.ones((3, 4, 5))), np.ones((3, 4))):
        back = there_and_back([array])[0]
        assert back.flags.f_contiguous == array.flags.f_contiguous
        assert back.flags.c_contiguous == array.flags.c_contiguous


def test_arrays_are_named_by_where_they_are():
    _, named = flatten({"algorithm": (None, {"head.weight": {"steps": np.ones(1)}}), 1: np.ones(2)})
    assert list(named) == ["/algorithm/1/head.weight/steps", "/1"]


@dataclass
class Own:
    x: int = 0


REFUSED = {
    "an object": ({"rule": [0, Own()]}, "/rule/1 is a Own, which a checkpoint cannot hold; keep"),
    "a function": ((print,), "/0 is a builtin_function_or_method, which a checkpoint"),
    "a set": ({"a": {1}}, "/a is a set, which"),
    "a subclass": ({"a": OrderedDict()}, "/a is a OrderedDict, which"),
    "a key": ({Own: 1}, "is a type, which"),
    "texts": ({"a": np.array(["x"])}, "/a is a ndarray of <U1, which"),
    "objects": ({"a": np.array([None])}, "/a is a ndarray of object, which"),
    "complex": ({"a": np.complex64(1)}, "/a is a complex64 of complex64, which"),
    "byte order": ({"a": np.ones(1, ">f4")}, "/a is a ndarray of >f4, which"),
    "a generator": (np.random.default_rng(0), "/ is a Generator, which"),
}


@pytest.mark.parametrize(("tree", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_is_refused_by_its_place(tree, text):
    with pytest.raises(CheckpointError, match=text):
        flatten(tree)


def test_what_holds_itself_is_refused():
    tree = []
    tree.append(tree)
    with pytest.raises(CheckpointError, match="holds itself, or is nested too deeply; keep it"):
        flatten(tree)


@pytest.mark.parametrize(
    "written", [{"what": 1}, {}, {"array": "/none"}, {"dict": [1]}, {"a": 1, "b": 2}]
)
def test_what_is_no_tree_is_refused(written):
    with pytest.raises(CheckpointError, match="this is not a tree that was kept"):
        unflatten(written, {})
