"""Whole process against whole process: config/shakespeare_char.py and nanoGPT's CPU recipe on the same text.

    python bench/race.py --nanogpt=../nanoGPT --input=tinyshakespeare.txt

nanoGPT runs the CPU recipe of its README: 4 layers, 4 heads, 128 wide, block 64, batch 12, 2000 iterations, no dropout.
Both prepare their data first, untimed, from the same file. Then they take turns, and the clock runs from the start of
the interpreter to its end, which includes imports, evaluations, checkpoints and (ours) the plot.
"""
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from thimble import configurator
from thimble.files import UserError

# its README's recipe for a laptop, which goes on top of config/train_shakespeare_char.py
RECIPE = ("--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 "
          "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()


@dataclass(frozen=True)
class Config:
    nanogpt: str = ""               # folder of a clone of nanoGPT
    input: str = ""                 # tinyshakespeare, as a text file
    rounds: int = 3                 # runs of each


def timed(command, cwd):
    """(seconds that the whole process took, its output). UserError if it failed."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(map(str, command))} failed: {reason}")
    return seconds, done.stdout


def race(text, peer, work, rounds):
    """Prepare both, then run them in turns -> (our seconds, nanoGPT's seconds), lists of `rounds`."""
    shutil.copy(text, peer / "data/shakespeare_char/input.txt")
    timed([sys.executable, "data/shakespeare_char/prepare.py"], peer)
    timed([sys.executable, ROOT / "prepare/shakespeare.py", f"--input={text}", "--name=race", f"--data_dir={work}"],
          work)
    ours = []
    theirs = []
    for i in range(rounds):
        run_dir = work / str(i)
        seconds, _ = timed([sys.executable, ROOT / "train.py", ROOT / "config/shakespeare_char.py", "--device=cpu",
                            f"--dataset={work / 'race'}", f"--out_dir={run_dir}"], work)
        ours.append(seconds)
        seconds, out = timed([sys.executable, "train.py", "config/train_shakespeare_char.py", *RECIPE], peer)
        theirs.append(seconds)

        record = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        sampled = re.findall(r"step 2000: train loss [\d.]+, val loss ([\d.]+)", out)
        their_loss = sampled[-1] if sampled else "?"
        ratio = ours[-1] / theirs[-1]
        print(f"round {i + 1}: ours {ours[-1]:6.2f} s, val loss {record['val_loss']:.4f} over {record['val_tokens']:,} "
              f"characters   nanoGPT {theirs[-1]:6.2f} s, val loss {their_loss} (sampled)   "
              f"ratio {ratio:.4f} = 1/{1 / ratio:.1f}", flush=True)
    return ours, theirs


def main(cfg):
    clone = Path(cfg.nanogpt).resolve()
    text = Path(cfg.input).resolve()
    if not (clone / "train.py").is_file() or not text.is_file():
        raise UserError("give --nanogpt=FOLDER of a clone and --input=FILE, the text of tinyshakespeare")
    for package in ("requests", "torch"):  # nanoGPT's prepare script imports requests
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the race needs {package}: pip install {package}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        peer = work / "nanoGPT"  # a copy: it writes its data and its checkpoint into itself
        shutil.copytree(clone, peer, ignore=shutil.ignore_patterns(".git"))
        ours, theirs = race(text, peer, work, cfg.rounds)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"median: ours {statistics.median(ours):.2f} s, nanoGPT {statistics.median(theirs):.2f} s, "
          f"ratio {ratio:.4f} = 1/{1 / ratio:.1f}")


if __name__ == "__main__":
    configurator.run(main, Config)
