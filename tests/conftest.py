import itertools
import os
import random
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the suite is about a CPU, and must give the same anywhere
# Models this small are slower with more threads (test_contract.py on 2 cores: 9.9 s instead of 7.7, and twice the CPU
# time). Tests about threads set how many they want.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the counts of bench/reliability.py instead of the quick ones")
    parser.addoption("--score", help="only the tests of this row of the scorecard, e.g. A1")


def pytest_collection_modifyitems(config, items):
    row = config.getoption("--score")
    if row is None:
        return
    chosen = [item for item in items if any(row in mark.args for mark in item.iter_markers("score"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture
def count(request):
    """`count(quick, full)`: how often a test of the scorecard tries something, in the suite and with --full."""
    full = request.config.getoption("--full")

    def choose(quick, at_full):
        return at_full if full else quick

    return choose


@pytest.fixture
def lean(monkeypatch):
    """Runs without what takes longer than a tiny one and is no part of its result: the machine's speed, the curve."""
    from thimble import machine, runlog

    monkeypatch.setattr(machine, "matmul_rate", lambda *_: 1e11)
    monkeypatch.setattr(runlog, "plot", lambda *_: None)


@pytest.fixture
def score(record_property):
    """`score(held, tried, figures="")`: what bench/reliability.py writes into its table for this test; then assert."""

    def record(held, tried, figures=""):
        record_property("held", held)
        record_property("tried", tried)
        record_property("figures", figures)

    return record


def forked(work):
    """Start work() in a fork, where all is imported that is imported here: a Python of its own takes 2 s for that.

    -> a function that waits for the end and returns (exit code, what was printed, what was printed as an error).
    """
    out = tempfile.TemporaryFile("w+")
    err = tempfile.TemporaryFile("w+")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            import torch
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            torch.set_num_threads(1)  # the threads of a pool do not survive a fork
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # nor do these
            warnings.simplefilter("default")  # no errors, as those of pytest are
            for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", kind)
            work()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def finish():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        printed = []
        for file in (out, err):
            with file:
                file.seek(0)
                printed.append(file.read())
        return code, *printed

    return finish


def command(script, *flags, cwd=ROOT):
    """What `python SCRIPT FLAGS` does, in a fork -> what subprocess.run returns of it."""
    def work():
        os.chdir(cwd)
        sys.argv = [script, *map(str, flags)]
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return subprocess.CompletedProcess(script, *forked(work)())


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small byte-level dataset that a tiny model can learn: sentences from a handful of words."""
    from prepare.text import prepare

    rng = random.Random(0)
    words = "the cat dog sat ran on under a mat tree and slept".split()
    text = "\n".join(" ".join(rng.choices(words, k=8)) + "." for _ in range(600))
    return prepare(lambda: iter([text]), "toy", "made by the tests", "byte", data_dir=tmp_path_factory.mktemp("data"))


def prose(n_words, seed=0):
    """Words of 300 made-up ones, in lines and sentences."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioustrnl", k=rng.randint(1, 8))) for _ in range(300)]
    return "".join(rng.choice(words) + rng.choice("     \n.") for _ in range(n_words))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Two untrained models over one text, one of bytes and one of a BPE; folder of both."""
    from dataclasses import asdict

    import torch

    import model
    from prepare.text import prepare
    from thimble import checkpoint
    from thimble.tokenizer import load_tokenizer

    root = tmp_path_factory.mktemp("runs")
    text = "\n".join(f"the {a} {b} sat on a {c}." for a, b, c in itertools.product(
        "big red old wet".split(), "cat dog hen fox".split(), "mat hat bed".split()))
    (root / "text.txt").write_text(text)
    for name, kind in (("byte", "byte"), ("bpe", "bpe")):
        folder = prepare(lambda: iter([text]), name, "tests", kind, vocab_size=300, data_dir=root / "data")
        tokenizer = load_tokenizer(folder)
        torch.manual_seed(0)
        m = model.Model(model.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.vocab_size, block_size=32))
        with torch.no_grad():
            for p in m.parameters():
                p += 0.1 * torch.randn_like(p)
        meta = {"arch": "model", "model_config": asdict(m.config), "dataset": {"path": str(folder)}}
        for step in (0, 5):
            checkpoint.save(root / name, step, m.state_dict(), None, meta, folder / "tokenizer.json", best=step == 5)
    return root


@pytest.fixture(scope="session")
def floors(runs):
    """The four speakers that know nothing, beside the BPE model of `runs`."""
    from evaluate import Config, training_text
    from tasks.speaker import Speaker
    from tasks.speaker import floors as floors_beside

    speaker = Speaker(runs / "bpe", Config())
    return floors_beside(speaker, training_text(speaker, Config()))
