"""What machine.py measures."""
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
