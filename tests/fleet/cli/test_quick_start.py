import gc

import pytest

from fleet.cli.quick_start import collecting_once_begun


@pytest.fixture(autouse=True)
def as_before():
    was_on, frozen = gc.isenabled(), gc.get_freeze_count()
    yield
    if not frozen:
        gc.unfreeze()
    (gc.enable if was_on else gc.disable)()


def cycle() -> None:
    """Leave one to the collector."""
    ring: list = []
    ring.append(ring)


def test_nothing_is_collected_before_a_command_is_at_its_work():
    gc.enable()
    with collecting_once_begun() as begun:
        assert not gc.isenabled()
        before = gc.get_freeze_count()
        begun()
        assert gc.isenabled() and gc.get_freeze_count() > before
        frozen = gc.get_freeze_count()
        begun()
        assert gc.get_freeze_count() == frozen  # what came since is not left out
        gc.collect()
        assert gc.collect() == 0
        cycle()
        assert gc.collect() == 1


def test_a_command_that_fails_before_leaves_the_collector_on():
    gc.enable()
    with pytest.raises(ZeroDivisionError), collecting_once_begun():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_a_collector_that_somebody_has_put_off_stays_so():
    gc.disable()
    with collecting_once_begun() as begun:
        begun()
        assert not gc.isenabled()
    assert not gc.isenabled()
