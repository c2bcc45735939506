"""A found wiring beside random ones, a plain MLP of as many parameters, and counted n-grams of the same tokens.

    python bench/cerebros.py --found=runs/search_cerebros/best                      # three seeds each, 2000 steps
    python bench/cerebros.py --found=runs/search_cerebros/best --max_steps=200 --seeds=0   # a quick look

Everything but the wiring is that of the found run, trained anew by the recipe of phase two. The scores are those of the
reloaded checkpoints. Runs that are there already are not trained again.
"""
import json
import math
import statistics
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cerebros  # noqa: E402
import checkpoint  # noqa: E402
import configurator  # noqa: E402
import train  # noqa: E402
from configurator import UserError  # noqa: E402


@dataclass(frozen=True)
class Config:
    found: str = "runs/search_cerebros/best"  # run folder of the found wiring
    recipe: str = str(ROOT / "config/cerebros_bible.py")  # how each is trained
    dataset: str = ""               # another than the recipe's
    max_steps: int = 0              # 0: the recipe's
    seeds: tuple[int, ...] = (0, 1, 2)  # of the weights, and of the random wirings
    out_dir: str = "runs/bench_cerebros"

    def __post_init__(self):
        if not self.seeds or self.max_steps < 0:
            raise ValueError(f"seeds={self.seeds} must name at least one, max_steps={self.max_steps} not be negative")


def size(config):
    with torch.device("meta"):
        return sum(p.numel() for p in cerebros.Model(config).parameters())


def chain(config, neurons):
    """The wiring of a plain MLP: one unit a level, the first reads the whole window, each other the one below."""
    top = config.n_rank or config.n_embd
    levels = [[{"neurons": top if k > config.n_layer else neurons, "places": [*range(config.window)] if k == 1 else [],
                "units": [[k - 1, 0]] if k > 1 else []}] for k in range(1, config.n_layer + 2)]
    return replace(config, wiring=json.dumps(levels))


def mlp(config):
    """The plain MLP whose size is nearest to that of `config`."""
    low, high = 1, 1
    while size(chain(config, high)) < size(config):
        high *= 2
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if size(chain(config, middle)) < size(config) else (low, middle)
    return min((chain(config, n) for n in (max(1, low - 1), low)), key=lambda c: abs(size(c) - size(config)))


def ngrams(dataset):
    """Nats per token of unigrams, bigrams and trigrams of tokens, interpolated Witten-Bell as in prepare/text.py."""
    train_ids, val, V = np.asarray(dataset.train, np.int64), np.asarray(dataset.val, np.int64), dataset.vocab_size
    p, scores = np.full(len(val), 1 / V), []
    for n in (1, 2, 3):
        def keys(ids, n, skip=0):
            """One number for each n tokens in a row, from the first on that has `skip` before it."""
            out = np.zeros(len(ids) - n + 1 - skip, np.int64)
            for i in range(n):
                out = out * V + ids[i:len(ids) - n + 1 - skip + i]
            return out

        def look(table, counts, wanted):
            at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
            return np.where(table[at] == wanted, counts[at], 0)

        grams, counts = np.unique(keys(train_ids, n), return_counts=True)
        contexts, first = np.unique(grams // V, return_index=True)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(grams)))
        wanted = keys(val, n)
        total, kind = look(contexts, totals, wanted // V), look(contexts, kinds, wanted // V)
        lower = p[n - 1:]
        p = p.copy()
        p[n - 1:] = np.where(total, (look(grams, counts, wanted) + kind * lower) / np.maximum(total + kind, 1), lower)
        scores.append(float(-np.log(p[1:]).mean()))        # the first token is no target of the models
    return dict(zip(("unigrams", "bigrams", "trigrams"), scores, strict=True))


def score(cfg, config, out_dir):
    """Train `config` unless it is done -> nats per token of the best checkpoint, read again and evaluated."""
    keys = {f.name for f in fields(config)} - {"vocab_size"}
    values = {k: getattr(config, k) for k in keys} | {"out_dir": str(out_dir)}
    values |= {"dataset": cfg.dataset, "prepare": ""} if cfg.dataset else {}
    values |= {"max_steps": cfg.max_steps, "eval_every": max(1, cfg.max_steps // 4),
               "warmup_steps": min(50, cfg.max_steps // 10)} if cfg.max_steps else {}
    one = configurator.load(train.Config, cfg.recipe, **values, seed=int(out_dir.name.rpartition("-")[2]), prompts=())
    if not (out_dir / "latest").exists():
        train.train(one)
    elif checkpoint.load_run(out_dir).meta["step"] < one.max_steps:
        train.train(replace(one, resume=True))
    saved, dataset = checkpoint.load_run(out_dir, "best"), train.open_dataset(one)
    dtype = getattr(torch, saved.meta["environment"]["dtype"])
    device = torch.device(saved.meta["environment"]["device"])
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    loss = train.evaluate(checkpoint.load_model(saved).to(device), dataset, device, autocast)["val_loss"]
    told = saved.meta["state"]["record"]["val_loss"]
    if loss != told:
        print(f"note: {out_dir} reported {told}, its checkpoint scores {loss}", file=sys.stderr)
    return loss


def main(cfg):
    saved = checkpoint.load(cfg.found, which="best")
    if saved.meta["arch"] != "cerebros":
        raise UserError(f"--found={cfg.found} is a {saved.meta['arch']}, not a cerebros: name a run of one")
    found = configurator.from_flat(cerebros.Config, saved.meta["model_config"])
    recipe = configurator.load(train.Config, cfg.recipe, **({"dataset": cfg.dataset} if cfg.dataset else {}))
    dataset, results, sizes = train.open_dataset(recipe), {}, {}
    for seed in cfg.seeds:
        random = replace(found, wiring="", wiring_seed=10_000 + seed)  # the same ranges, another draw
        for name, config in (("found wiring", found), ("random wiring", random), ("plain MLP", mlp(found))):
            out_dir = Path(cfg.out_dir) / f"{name.replace(' ', '_')}-{seed}"
            results.setdefault(name, []).append(score(cfg, config, out_dir))
            sizes.setdefault(name, []).append(size(config))
    per_byte = len(dataset.val) / dataset.val_bytes / math.log(2)
    print(f"\n{dataset.path}, validation\n  {'':<16}{'perplexity':>11}{'bits/byte':>11}{'spread':>9}{'parameters':>13}")
    for name, nats in ngrams(dataset).items():
        print(f"  {name:<16}{math.exp(nats):>11.2f}{nats * per_byte:>11.4f}")
    for name, nats in results.items():
        spread = (max(nats) - min(nats)) * per_byte
        print(f"  {name:<16}{math.exp(statistics.mean(nats)):>11.2f}{statistics.mean(nats) * per_byte:>11.4f}"
              f"{spread:>9.4f}{statistics.mean(sizes[name]):>13,.0f}")


if __name__ == "__main__":
    configurator.run(main, Config)
