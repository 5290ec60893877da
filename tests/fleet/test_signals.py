import os
import signal
import threading

import pytest

from fleet.signals import ENDING, signals_held


@pytest.fixture
def heard():
    """Signals as they come to a handler of the process."""
    numbers = []
    before = {n: signal.signal(n, lambda number, frame: numbers.append(number)) for n in ENDING}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_waits_until_what_is_held_is_done(heard, number):
    with signals_held():
        os.kill(os.getpid(), number)
        assert heard == []
    assert heard == [number]
    os.kill(os.getpid(), number)
    assert heard == [number] * 2


def test_an_interrupt_is_raised_behind_what_is_held():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with signals_held():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("written")
        steps.append("gone on")
    assert steps == ["written"]


def test_handlers_are_back_after_an_error(heard):
    before = [signal.getsignal(number) for number in ENDING]
    with pytest.raises(OSError, match="full"), signals_held():
        raise OSError("full")
    assert [signal.getsignal(number) for number in ENDING] == before


def test_what_is_ignored_stays_ignored(heard):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals_held():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert heard == []


def test_another_thread_holds_nothing_and_works(heard):
    done = []

    def work():
        with signals_held():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGINT)]
