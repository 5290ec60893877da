"""ByzFL's aggregators on equal plans."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from strategies.aggregation.centred_clipping import centred_clipping
from strategies.aggregation.coordinatewise import median, trimmed_mean
from strategies.aggregation.geometric_median import geometric_median
from strategies.aggregation.selection import krum, multi_krum
from tests.many import many

SEEDS = range(10)
N = 11

# Krum there counts n − f − 1 neighbours, the paper n − f − 2: its f is one more for the same.
PAIRS = {
    "median": (lambda byzfl: byzfl.Median(), median),
    "trimmed_mean": (lambda byzfl: byzfl.TrMean(f=3), lambda: trimmed_mean(3 / N)),
    "krum": (lambda byzfl: byzfl.Krum(f=4), lambda: krum(3)),
    "multi_krum": (lambda byzfl: byzfl.MultiKrum(f=4), lambda: multi_krum(3, selected=N - 4)),
    "three_weiszfeld_steps": (
        lambda byzfl: byzfl.GeometricMedian(nu=0.1, T=3),
        lambda: geometric_median(smoothing=0.1, iterations=3, tolerance=0.0),
    ),
    "geometric_median": (
        lambda byzfl: byzfl.GeometricMedian(nu=1e-6, T=2000),
        lambda: geometric_median(),
    ),
    "centred_clipping": (
        lambda byzfl: byzfl.CenteredClipping(L=3, tau=2.0),
        lambda: centred_clipping(2.0, momentum=0.0, iterations=3),
    ),
}


@pytest.fixture(scope="module")
def byzfl():
    """Imported when a test runs: it brings a plotting library and takes seconds."""
    return pytest.importorskip("byzfl", reason="byzfl is not installed; it comes with .[test]")


@many("scale", (1.0, 1e-3))
@pytest.mark.parametrize("name", PAIRS)
@many("seed", SEEDS)
def test_two_rounds_come_out_as_byzfls(byzfl, toy_plan, random_update, poisoned, seed, name, scale):
    rng = np.random.default_rng(seed)
    make_theirs, make_own = PAIRS[name]
    theirs, own = make_theirs(byzfl), make_own()
    state = own.init()
    for _ in range(2):
        # Names of one length: ByzFL sums in the order of rows, ours in the order of names.
        updates = [random_update(f"pi-{i:02}", toy_plan, rng) for i in range(N)]
        updates = [poisoned(u, delta=np.float32(scale)) for u in updates]
        updates[3] = poisoned(updates[3], delta=np.float32(-10))
        rows = [np.concatenate([a.ravel() for a in u.delta.values()]) for u in updates]
        expected = theirs(np.stack(rows).astype(np.float64))
        result, state = own.aggregate(updates, state)
        flat = np.concatenate([result.delta[n].ravel() for n in updates[0].delta])
        assert_allclose(flat, expected, rtol=1e-6, atol=1e-7 * scale)
