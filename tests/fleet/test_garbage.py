"""The collector is kept still for a while, and is as it was before after it."""

import gc
import weakref

import pytest

from fleet.garbage import frozen, importing


class Node:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self):
        self.me = self


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


def test_frozen_objects_are_looked_through_after_the_block_and_new_ones_in_it():
    gc.collect()
    before = weakref.ref(Node())
    with frozen():
        new = weakref.ref(Node())
        gc.collect()
        assert before() is not None and new() is None
    gc.collect()
    assert before() is None
    assert not gc.get_freeze_count()


def test_what_somebody_else_has_frozen_is_theirs_to_undo():
    gc.freeze()
    try:
        with frozen(), frozen():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
