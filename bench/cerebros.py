"""A found wiring beside random ones, plain MLPs of as many parameters, and counted n-grams of the same tokens.

    python bench/cerebros.py --found=runs/search_cerebros/best                      # three seeds each
    python bench/cerebros.py --found=runs/search_cerebros/best --max_steps=200 --seeds=0   # a quick look

All have the found one's window, embedding and head, and are trained anew by the recipe of phase two. Every size is that
of the found one: the neurons of all units are scaled. The scores are those of the reloaded checkpoints, and must be the
reported ones. Runs that are there already are not trained again.
"""
import json
import math
import statistics
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cerebros
import search
import train
from thimble import checkpoint, configurator, load
from thimble.files import UserError
from thimble.ngrams import trigrams, witten_bell


@dataclass(frozen=True)
class Config:
    found: str = "runs/search_cerebros/best"  # run folder of the found wiring
    recipe: str = str(ROOT / "config/cerebros_bible.py")  # how each is trained
    space: str = str(ROOT / "config/search_cerebros.py")  # what random wirings are drawn from
    models: tuple[str, ...] = ("found wiring", "random wiring", "plain MLP", "MLP of 8 tokens", "found, redrawn")
    dataset: str = ""               # another than the recipe's
    max_steps: int = 0              # in one cycle; 0: the recipe's
    seeds: tuple[int, ...] = (0, 1, 2)  # of weights and batches, and of the random wirings
    out_dir: str = "runs/bench_cerebros"

    def __post_init__(self):
        if wrong := set(self.models) - set(Config.models):
            raise ValueError(f"models={wrong.pop()}: there are {', '.join(Config.models)}")
        if not self.seeds or self.max_steps < 0:
            raise ValueError(f"seeds={self.seeds} must name at least one, max_steps={self.max_steps} not be negative")


def size(config):
    with torch.device("meta"):
        return sum(p.numel() for p in cerebros.Model(config).parameters())


def sized(config, levels, n):
    """`config` with this wiring, the neurons of its units scaled so that it has nearly n parameters."""
    def scaled(factor):
        wiring = [[unit | {"neurons": max(1, round(factor * unit["neurons"]))} for unit in level] for level in levels]
        return replace(config, wiring=json.dumps([*wiring[:-1], levels[-1]]))

    low, high = 0.0, 64.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if size(scaled(middle)) < n else (low, middle)
    return scaled(low)


def chain(config, n_places):
    """The wiring of a plain MLP: a unit a level, the first reads the newest places, each other the one below."""
    first = {"neurons": 100, "places": [*range(config.window - n_places, config.window)], "units": []}
    more = [{"neurons": 100, "places": [], "units": [[k, 0]]} for k in range(1, config.n_layer)]
    return [[unit] for unit in (first, *more, {"neurons": config.n_rank or config.n_embd, "places": [],
                                               "units": [[config.n_layer, 0]]})]


def from_space(found, recipe, seed):
    """`found` with every setting of the graph drawn from the space of a search."""
    study = search.optuna_module().create_study(sampler=search.optuna_module().samplers.RandomSampler(seed))
    trial, settings = study.ask(), configurator.load(search.Config, recipe)
    drawn = {key: suggest(trial) for key, suggest in search.parse_space(settings).items()}
    shape = {"n_embd", "n_rank", "window", "act", "dropout"}  # not of the graph
    keys = {f.name for f in fields(found)} & set(drawn) - shape
    return replace(found, wiring="", **{key: drawn[key] for key in keys})


def ngrams(dataset):
    """Nats per token of n-gram models of the dataset's tokens, whose text the networks read."""
    train_counts = trigrams(dataset.train, dataset.vocab_size)
    val_counts = trigrams(dataset.val, dataset.vocab_size)
    bits = witten_bell(train_counts, val_counts, dataset.vocab_size)
    return {name: n * math.log(2) for name, n in zip(("unigrams", "bigrams", "trigrams"), bits, strict=True)}


def score(cfg, config, out_dir):
    """Train `config` unless it is done -> nats per token of the best checkpoint, read again and evaluated."""
    keys = {f.name for f in fields(config)} - {"vocab_size"}
    values = {k: getattr(config, k) for k in keys} | {"out_dir": str(out_dir)}
    values |= {"dataset": cfg.dataset, "prepare": ""} if cfg.dataset else {}
    warmup = cfg.max_steps // 10
    values |= {"max_steps": cfg.max_steps, "eval_every": max(1, cfg.max_steps // 2), "warmup_steps": warmup,
               "restart_steps": cfg.max_steps - warmup} if cfg.max_steps else {}
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
        raise UserError(f"{out_dir} reported {told}, its checkpoint scores {loss}: remove it and run this again")
    return loss


def main(cfg):
    saved = load.read(cfg.found, which="best")
    if saved.meta["arch"] != "cerebros":
        raise UserError(f"--found={cfg.found} is a {saved.meta['arch']}, not a cerebros: name a run of one")
    found = configurator.from_flat(cerebros.Config, saved.meta["model_config"])
    recipe = configurator.load(train.Config, cfg.recipe, **({"dataset": cfg.dataset} if cfg.dataset else {}))
    dataset, results, sizes = train.open_dataset(recipe), {}, {}
    for seed in cfg.seeds:
        redrawn, random = replace(found, wiring="", wiring_seed=10_000 + seed), from_space(found, cfg.space, seed)
        built = {"found wiring": found, "random wiring": sized(random, cerebros.draw_wiring(random), size(found)),
                 "plain MLP": sized(found, chain(found, found.window), size(found)),
                 "MLP of 8 tokens": sized(found, chain(found, min(8, found.window)), size(found)),
                 "found, redrawn": sized(redrawn, cerebros.draw_wiring(redrawn), size(found))}
        for name in cfg.models:
            out_dir = Path(cfg.out_dir) / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
            results.setdefault(name, []).append(score(cfg, built[name], out_dir))
            sizes.setdefault(name, []).append(size(built[name]))
    per_byte = 1 / dataset.bytes_per_token("val") / math.log(2)  # nats per token -> bits per byte
    print(f"\n{dataset.path}, validation\n  {'':<16}{'perplexity':>11}{'bits/byte':>11}{'spread':>9}{'parameters':>13}")
    for name, nats in ngrams(dataset).items():
        print(f"  {name:<16}{math.exp(nats):>11.2f}{nats * per_byte:>11.4f}")
    for name, nats in results.items():
        spread = (max(nats) - min(nats)) * per_byte
        print(f"  {name:<16}{math.exp(statistics.mean(nats)):>11.2f}{statistics.mean(nats) * per_byte:>11.4f}"
              f"{spread:>9.4f}{statistics.mean(sizes[name]):>13,.0f}")


if __name__ == "__main__":
    configurator.run(main, Config)
