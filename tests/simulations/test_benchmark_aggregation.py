"""The benchmark's replies in files are those that were written, and add up to what was asked."""

import numpy as np
from numpy.testing import assert_array_equal

from simulations.benchmark_aggregation import ReplyFile, measure, tensor_shapes, write_replies


def test_tensors_of_many_sizes_add_up():
    shapes = tensor_shapes(10_000, 40)
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    assert sum(sizes) == 10_000 and len(sizes) == 40
    assert max(sizes) > 50 * min(sizes)


def test_a_reply_in_a_file_reads_back_tensor_by_tensor(tmp_path):
    shapes = {"a": (2, 3), "b": (4,), "c": ()}
    write_replies(tmp_path, 2, 11)
    values = np.fromfile(tmp_path / "00001", np.float32)
    reply = ReplyFile(tmp_path / "00001", shapes)
    assert list(reply) == ["a", "b", "c"] and len(reply) == 3
    assert_array_equal(reply["a"], values[:6].reshape(2, 3))
    assert_array_equal(reply["b"], values[6:10])
    assert reply["c"] == values[10]


def test_a_rule_is_measured(tmp_path):
    write_replies(tmp_path, 5, 1000)
    for name in ("mean", "clipped_mean", "np.mean(np.stack)"):
        seconds, cpu, grew, peak = measure(name, tmp_path, 5, tensor_shapes(1000, 4))
        assert 0 < seconds < 60 and cpu >= 0 and 0 <= grew <= peak
