"""The collector is kept still for a while, and is as it was before after it."""

import gc

import pytest

from fleet.garbage import importing


def collections():
    return sum(generation["collections"] for generation in gc.get_stats())


def test_nothing_is_collected_while_modules_are_imported():
    gc.collect()
    with importing():
        before = collections()
        kept = [[] for _ in range(10 * gc.get_threshold()[0])]
        assert collections() == before
    assert gc.isenabled()
    kept += [[] for _ in range(10 * gc.get_threshold()[0])]
    assert collections() > before


def test_a_failed_import_leaves_the_collector_on():
    with pytest.raises(ImportError), importing():
        import no_such_module  # noqa: F401
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with importing():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
