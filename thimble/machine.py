"""The machine at hand: device, speed, memory, compiling, signals."""
import contextlib
import ctypes
import math
import os
import signal
import threading
import time

import torch

from thimble import checkpoint, data
from thimble.files import UserError


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"--device={name} does not work here: {str(e).splitlines()[0]}; try --device=cpu") from None
    return torch.device(name)


def keep_freed_memory():
    """Tell glibc's malloc to keep what is freed for the next step.

    It returns large blocks to the system, which has to zero every page of them again: a quarter of a training step
    with a vocabulary of 4096 (docs/log.md). Elsewhere than with glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                     # M_MMAP_MAX: no blocks of their own for large arrays
        mallopt(-1, -1)                                    # M_TRIM_THRESHOLD: never shrink the heap


def matmul_rate(device, dtype):
    """FLOP/s of a large square matmul, the best of three: what this machine can do, and the 100 % of our MFU."""
    n = 4096 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()                               # .item() waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def compiled(model, dataset, cfg, device, autocast):
    """torch.compile, tried out on one batch; where it fails, one line and the plain model."""
    print("compiling the model", flush=True)
    random_state = checkpoint.random_state()
    try:
        fast = torch.compile(model)
        micro = cfg.micro_batch_size or cfg.batch_size
        x, y = data.batch(dataset.train, 0, micro, cfg.model.block_size, cfg.seed)
        with autocast:
            loss = fast(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))[1]
        loss.backward()
    except Exception as e:                                 # whatever the compiler trips over, training must go on
        print(f"torch.compile does not work here ({str(e).strip().splitlines()[0]}): going on without", flush=True)
        fast = model
    for p in model.parameters():
        p.grad = None
    checkpoint.set_random_state(random_state)
    return fast


@contextlib.contextmanager
def catch_signals():
    """A list that gets the number of a SIGINT or SIGTERM, so that the step and any save in progress end first."""
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handler(number, _):
        caught.append(number)
        os.write(2, b"\nstopping after this step: saving, please wait\n")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)
