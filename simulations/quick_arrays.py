"""Flower's arrays, written and read without working out their headers anew each time.

An array in a message is the bytes of an `.npy` file. Flower has NumPy write and
parse its header, Python source, for every array of every message: for the
tensors of a small model that takes many times as long as the numbers do, and
shapes and dtypes are the same in every round.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from flwr.app import Array
from flwr.common.constant import SType

_MAGIC = b"\x93NUMPY\x01\x00"
_START = len(_MAGIC) + 2  # of the header, behind its own length

_flowers_from_numpy = Array.from_numpy_ndarray.__func__
_flowers_numpy = Array.numpy


@contextmanager
def quick_arrays() -> Iterator[None]:
    """In the block `Array` writes the same bytes, and reads the same arrays, in less time."""
    Array.from_numpy_ndarray, Array.numpy = classmethod(_from_numpy), _numpy
    try:
        yield
    finally:
        Array.from_numpy_ndarray = classmethod(_flowers_from_numpy)
        Array.numpy = _flowers_numpy


def _from_numpy(cls: type[Array], ndarray: np.ndarray) -> Array:
    plain = type(ndarray) is np.ndarray and ndarray.flags.c_contiguous
    if not plain or ndarray.dtype.hasobject:
        return _flowers_from_numpy(cls, ndarray)
    data = b"".join((_header(ndarray.dtype, ndarray.shape), ndarray.tobytes()))
    return Array(dtype=_name(ndarray.dtype), shape=ndarray.shape, stype=SType.NUMPY, data=data)


def _numpy(array: Array) -> np.ndarray:
    data = array.data
    if array.stype == SType.NUMPY and data.startswith(_MAGIC):
        start = _START + int.from_bytes(data[len(_MAGIC) : _START], "little")
        known = _layout(data[:start])
        if known is not None:
            dtype, shape = known
            if len(data) == start + math.prod(shape) * dtype.itemsize:
                return np.frombuffer(data, dtype, offset=start).reshape(shape).copy()
    return _flowers_numpy(array)


_name = lru_cache(maxsize=64)(str)  # of a dtype, which NumPy puts together anew each time


@lru_cache(maxsize=512)  # packed updates differ in length
def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What NumPy puts before the numbers of such an array, if they lie in order."""
    file = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


@lru_cache(maxsize=512)  # packed updates differ in length
def _layout(header: bytes) -> tuple[np.dtype, tuple[int, ...]] | None:
    """Dtype and shape of an array that lies in order and holds numbers; None: leave it to NumPy."""
    file = io.BytesIO(header)
    try:
        np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception:  # a dozen kinds, which Flower's own reading raises again
        return None
    if fortran_order or dtype.hasobject or not dtype.itemsize or not math.prod(shape):
        return None
    return dtype, shape
