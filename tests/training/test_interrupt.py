"""The first Ctrl-C asks, the second one stops; what they do to a training run is in training/test_train.py."""

import os
import signal
import threading

import pytest

from minilora.training.interrupt import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert not stop.made
        os.kill(os.getpid(), number)
        assert stop.made
        assert "once more: stop at once" in capsys.readouterr().err
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_signals_are_left_alone():
    """A server may train in a thread, where Python refuses signal handlers."""
    made = []

    def body():
        with StopRequest() as stop:
            made.append(stop.made)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert made == [False]
