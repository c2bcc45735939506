"""Whole process against whole process: config/shakespeare_char.py and nanoGPT's CPU recipe on the same text.

    python bench/race.py --nanogpt=../nanoGPT --input=tinyshakespeare.txt

nanoGPT's recipe is that of its README: 4 layers, 4 heads, 128 wide, block 64, batch 12, 2000 iterations, no dropout.
Both prepare their data first, untimed, from the same file; then they take turns, and the clock runs from the start of
the interpreter to its end, with imports, evaluations, checkpoints and (ours) the plot.
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

RECIPE = ("--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 "
          "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()


@dataclass(frozen=True)
class Config:
    nanogpt: str = ""               # folder of a clone of nanoGPT
    input: str = ""                 # tinyshakespeare, as a text file
    rounds: int = 3                 # times that each runs


def timed(command, cwd):
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command))} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return seconds, done.stdout


def main(cfg):
    theirs, text = Path(cfg.nanogpt).resolve(), Path(cfg.input).resolve()
    if not (theirs / "train.py").is_file() or not text.is_file():
        raise UserError("give --nanogpt=FOLDER of a clone and --input=FILE, the text of tinyshakespeare")
    for package in ("requests", "torch"):                  # nanoGPT's prepare script imports requests
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the race needs {package}: pip install {package}")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        peer = work / "nanoGPT"
        shutil.copytree(theirs, peer, ignore=shutil.ignore_patterns(".git"))
        shutil.copy(text, peer / "data/shakespeare_char/input.txt")
        timed([sys.executable, "data/shakespeare_char/prepare.py"], peer)
        timed([sys.executable, ROOT / "prepare/shakespeare.py", f"--input={text}", "--name=race",
               f"--data_dir={work}"], work)
        seconds = {"ours": [], "nanoGPT": []}
        for i in range(cfg.rounds):
            ours, _ = timed([sys.executable, ROOT / "train.py", ROOT / "config/shakespeare_char.py", "--device=cpu",
                             f"--dataset={work / 'race'}", f"--out_dir={work / str(i)}"], work)
            record = json.loads((work / str(i) / "metrics.jsonl").read_text().splitlines()[-1])
            nano, out = timed([sys.executable, "train.py", "config/train_shakespeare_char.py", *RECIPE], peer)
            sampled = re.findall(r"step 2000: train loss [\d.]+, val loss ([\d.]+)", out)
            seconds["ours"].append(ours)
            seconds["nanoGPT"].append(nano)
            print(f"round {i + 1}: ours {ours:6.2f} s, val loss {record['val_loss']:.4f} over {record['val_tokens']:,} "
                  f"characters   nanoGPT {nano:6.2f} s, val loss {sampled[-1] if sampled else '?'} (sampled)   "
                  f"ratio {ours / nano:.4f} = 1/{nano / ours:.1f}", flush=True)
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    ours, nano = (statistics.median(s) for s in seconds.values())
    print(f"median: ours {ours:.2f} s, nanoGPT {nano:.2f} s, ratio {ratio:.4f} = 1/{1 / ratio:.1f}")


if __name__ == "__main__":
    configurator.run(main, Config)
