import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the suite is about a CPU, and must give the same anywhere


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
