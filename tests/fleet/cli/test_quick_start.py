import gc

import pytest

from fleet.cli.quick_start import collecting_once_begun


@pytest.fixture(autouse=True)
def as_before():
    was_on = gc.isenabled()
    yield
    (gc.enable if was_on else gc.disable)()


def test_nothing_is_collected_before_a_command_is_at_its_work():
    gc.enable()
    with collecting_once_begun() as begun:
        assert not gc.isenabled()
        begun()
        assert gc.isenabled()
        begun()
        assert gc.isenabled()


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
