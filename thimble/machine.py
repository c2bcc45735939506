"""The machine at hand: device, speed, memory, compiling, signals."""
import contextlib
import ctypes
import math
import os
import signal
import threading
import time

import torch

from thimble import checkpoint
from thimble.files import UserError, short


def pick_device(name):
    """The torch.device of that name; for "auto" the fastest kind there is. UserError if it does not work here."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # each kind of device has its own
        raise UserError(f"--device={name} does not work here: {short(e, 200)}; try --device=cpu") from None
    return torch.device(name)


def keep_freed_memory():
    """Tell glibc's malloc to keep freed memory for the next step.

    By default it returns large blocks to the system, which then has to zero every page of them again: a quarter of a
    training step with a vocabulary of 4,096 (docs/log.md). Without glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large arrays come from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def matmul_rate(device, dtype):
    """FLOP/s of a large square matmul, the best of four: the peak of this machine, and the 100 % of our MFU."""
    n = 4096 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    fastest = math.inf
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for a GPU
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * n**3 / fastest  # a multiplication and an addition for each of n^3 products


def fastest_dtype(device):
    """"float32" or "bfloat16", measured: many CPUs have no fast bfloat16."""
    rates = {name: matmul_rate(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    return max(rates, key=rates.get)


def compiled(model, x, y, autocast):
    """torch.compile(model) if that works for a forward and a backward pass on x, y (B, T); else the model itself.

    Random states stay as they were. Gradients are left behind.
    """
    print("compiling the model", flush=True)
    random_state = checkpoint.random_state()
    try:
        forward = torch.compile(model)
        with autocast:
            loss = forward(x, y)[1]
        loss.backward()
    except Exception as e:  # whatever trips up the compiler must not end the training
        print(f"torch.compile does not work here ({short(e, 200)}): continuing without it", flush=True)
        forward = model
    checkpoint.set_random_state(random_state)
    return forward


@contextlib.contextmanager
def catch_signals():
    """A list that collects the numbers of the signals that ask for an end, so that a step or a save is completed.

    Those are Ctrl-C, SIGTERM, a closed terminal (SIGHUP) and the advance warning of batch systems (SIGUSR1).
    """
    caught = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield caught
        return

    def handler(number, _):
        caught.append(number)
        # not print(): the signal may have interrupted one
        os.write(2, b"\nstopping after this step: saving, please wait\n")

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows lacks the last two
        if number is None:
            continue
        if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
            continue  # started by nohup, a run outlives its terminal
        before[number] = signal.signal(number, handler)
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)
