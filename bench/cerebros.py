"""A found wiring beside random ones, plain MLPs with as many parameters, and n-gram models of the same tokens.

    python bench/cerebros.py --found=runs/search_cerebros/best                      # three seeds each
    python bench/cerebros.py --found=runs/search_cerebros/best --max_steps=200 --seeds=0   # a quick look

All have the window, embedding and head of the found one, and are trained from scratch by the recipe of phase two. All
are of its size: the neurons of all units are scaled. The scores are those of the reloaded checkpoints, and must be the
reported ones. Runs that are complete are not trained again.
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
    dataset: str = ""               # train on another dataset than the recipe's
    max_steps: int = 0              # in one cycle; 0: the recipe's
    seeds: tuple[int, ...] = (0, 1, 2)  # of weights and batches, and of the random wirings
    out_dir: str = "runs/bench_cerebros"

    def __post_init__(self):
        configurator.check(self)
        for name in self.models:
            if name not in Config.models:
                raise ValueError(f"models={name} must be one of {', '.join(Config.models)}")
        if not self.seeds:
            raise ValueError("seeds=() must name at least one")


# ---- wirings
def size(config):
    """Number of parameters."""
    with torch.device("meta"):  # shapes only
        return sum(p.numel() for p in cerebros.Model(config).parameters())


def sized(config, levels, n):
    """`config` with this wiring, the neurons of its units scaled so that it has nearly n parameters."""
    def scaled(factor):
        wiring = []
        for level in levels[:-1]:
            wiring.append([unit | {"neurons": max(1, round(factor * unit["neurons"]))} for unit in level])
        wiring.append(levels[-1])  # the output's neurons are n_rank
        return replace(config, wiring=json.dumps(wiring))

    low, high = 0.0, 64.0
    for _ in range(30):
        middle = (low + high) / 2
        if size(scaled(middle)) < n:
            low = middle
        else:
            high = middle
    return scaled(low)


def chain(config, n_places):
    """The wiring of a plain MLP: one unit per level, the first reads the newest places, each other the one below."""
    places = list(range(config.window - n_places, config.window))
    levels = [[{"neurons": 100, "places": places, "units": []}]]
    for k in range(1, config.n_layer):
        levels.append([{"neurons": 100, "places": [], "units": [[k, 0]]}])
    neurons = config.n_rank or config.n_embd
    levels.append([{"neurons": neurons, "places": [], "units": [[config.n_layer, 0]]}])
    return levels


def from_space(found, recipe, seed):
    """`found` with every setting of the graph drawn from the space of a search."""
    optuna = search.optuna_module()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    trial = study.ask()
    space = search.parse_space(configurator.load(search.Config, recipe))
    drawn = {key: suggest(trial) for key, suggest in space.items()}  # all of them, in order: a seed gives one wiring
    shape = {"n_embd", "n_rank", "window", "act", "dropout"}  # not of the graph
    keys = {f.name for f in fields(found)} & set(drawn) - shape
    return replace(found, wiring="", **{key: drawn[key] for key in keys})


def contestants(cfg, found, seed):
    """{name: config}, all of the size of `found`."""
    n = size(found)
    random = from_space(found, cfg.space, seed)
    redrawn = replace(found, wiring="", wiring_seed=10_000 + seed)
    return {
        "found wiring": found,
        "random wiring": sized(random, cerebros.draw_wiring(random), n),
        "plain MLP": sized(found, chain(found, found.window), n),
        "MLP of 8 tokens": sized(found, chain(found, min(8, found.window)), n),
        "found, redrawn": sized(redrawn, cerebros.draw_wiring(redrawn), n),
    }


# ---- scores
def ngrams(dataset):
    """Nats per token of n-gram models of the dataset's tokens, whose text the networks read."""
    train_counts = trigrams(dataset.train, dataset.vocab_size)
    val_counts = trigrams(dataset.val, dataset.vocab_size)
    bits = witten_bell(train_counts, val_counts, dataset.vocab_size)
    return {name: n * math.log(2) for name, n in zip(("unigrams", "bigrams", "trigrams"), bits, strict=True)}


def settings(cfg, config, out_dir, seed):
    """The train.Config that trains `config`."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    del values["vocab_size"]  # the dataset's
    values["out_dir"] = str(out_dir)
    if cfg.dataset:
        values |= {"dataset": cfg.dataset, "prepare": ""}
    if cfg.max_steps:
        warmup = cfg.max_steps // 10
        values |= {"max_steps": cfg.max_steps, "warmup_steps": warmup, "restart_steps": cfg.max_steps - warmup,
                   "eval_every": max(1, cfg.max_steps // 2)}
    return configurator.load(train.Config, cfg.recipe, **values, seed=seed, prompts=())


def score(one):
    """Train as the train.Config `one` says unless that is done -> nats per token of the best checkpoint, reloaded."""
    out_dir = Path(one.out_dir)
    if not (out_dir / "latest").exists():
        train.train(one)
    elif checkpoint.load_run(out_dir).meta["step"] < one.max_steps:
        train.train(replace(one, resume=True))
    best = checkpoint.load_run(out_dir, "best")
    environment = best.meta["environment"]
    dtype = getattr(torch, environment["dtype"])
    device = torch.device(environment["device"])
    model = checkpoint.load_model(best).to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    loss = train.evaluate(model, train.open_dataset(one), autocast)["val_loss"]
    reported = best.meta["state"]["record"]["val_loss"]
    if loss != reported:
        raise UserError(f"{out_dir} reported {reported}, its checkpoint scores {loss}: remove it and run this again")
    return loss


def main(cfg):
    saved = load.read(cfg.found, which="best")
    if saved.meta["arch"] != "cerebros":
        raise UserError(f"--found={cfg.found} is a {saved.meta['arch']}, not a cerebros: name a run of one")
    found = configurator.from_flat(cerebros.Config, saved.meta["model_config"])
    other = {"dataset": cfg.dataset} if cfg.dataset else {}
    dataset = train.open_dataset(configurator.load(train.Config, cfg.recipe, **other))
    results = {name: [] for name in cfg.models}  # nats per token, one for each seed
    sizes = {name: [] for name in cfg.models}
    for seed in cfg.seeds:
        built = contestants(cfg, found, seed)
        for name in cfg.models:
            out_dir = Path(cfg.out_dir) / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
            results[name].append(score(settings(cfg, built[name], out_dir, seed)))
            sizes[name].append(size(built[name]))

    per_byte = 1 / dataset.bytes_per_token("val") / math.log(2)  # nats per token -> bits per byte
    print(f"\n{dataset.path}, validation\n  {'':<16}{'perplexity':>11}{'bits/byte':>11}{'spread':>9}{'parameters':>13}")
    for name, nats in ngrams(dataset).items():
        print(f"  {name:<16}{math.exp(nats):>11.2f}{nats * per_byte:>11.4f}")
    for name, nats in results.items():
        mean = statistics.mean(nats)
        spread = (max(nats) - min(nats)) * per_byte
        print(f"  {name:<16}{math.exp(mean):>11.2f}{mean * per_byte:>11.4f}{spread:>9.4f}"
              f"{statistics.mean(sizes[name]):>13,.0f}")


if __name__ == "__main__":
    configurator.run(main, Config)
