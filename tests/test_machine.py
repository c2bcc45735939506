"""What machine.py measures."""
import os
import signal
import threading

import pytest
import torch

from thimble import machine


def test_matmul_rate_by_hand(monkeypatch):
    """Four products of 1024 x 1024 in 4, 2, 1 and 3 seconds: 2 * 1024^3 operations in the fastest."""
    times = iter([0.0, 4.0, 10.0, 12.0, 20.0, 21.0, 30.0, 33.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(times))
    assert machine.matmul_rate(torch.device("cpu"), torch.float32) == 2 * 1024**3
    assert next(times, None) is None


def test_the_faster_dtype_is_chosen(monkeypatch):
    for rates, fastest in (((1.0, 2.0), "bfloat16"), ((2.0, 1.0), "float32")):
        given = dict(zip((torch.float32, torch.bfloat16), rates, strict=True))
        monkeypatch.setattr(machine, "matmul_rate", lambda device, dtype, given=given: given[dtype])
        assert machine.fastest_dtype(torch.device("cpu")) == fastest


def test_signals_are_caught_and_given_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with machine.catch_signals() as caught:
        assert caught == []
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert caught == [signal.SIGTERM, signal.SIGUSR1]
    assert before == {number: signal.getsignal(number) for number in before}


@pytest.mark.parametrize("handler, is_caught", [(signal.SIG_IGN, False), (signal.SIG_DFL, True)])
def test_a_run_started_by_nohup_outlives_its_terminal(handler, is_caught):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with machine.catch_signals() as caught:
            assert (signal.getsignal(signal.SIGHUP) != handler) == is_caught
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGHUP)
            assert caught == [signal.SIGHUP] * is_caught
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_catches_nothing():
    found = []

    def enter():
        with machine.catch_signals() as caught:
            found.append(caught)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [[]]
