"""Next-token model over a randomly wired graph of dense units, after the Cerebros search.

    python cerebros.py --draw --wiring_seed=3                       # what this seed wires, as wiring.png
    python cerebros.py --draw --checkpoint=runs/search_cerebros/best  # what a search has found
    python train.py config/cerebros_bible.py                        # train one
    python search.py config/search_cerebros.py                      # search one

A window of the last W tokens is embedded, each embedding turned by its place in the window. Above it lie n_layer
levels of units, each a dense layer on what the wiring gives it: places of the window, units of earlier levels, units
beside it. One last unit gathers them for the head. The window slides along a text, so every position trains; places
before the text's first token hold 0 (in the ONNX form of export.py --window an id of -1 says so).

Legend: B batch, T tokens, C n_embd, W window, P places a unit reads, N neurons, V vocabulary.
"""
import json
import math
import random
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Config:
    n_layer: int = 3                # levels of units between the window and the output
    min_units: int = 2              # fewest units of a level; how many is drawn
    max_units: int = 4              # and most
    min_neurons: int = 64           # fewest neurons of a unit
    max_neurons: int = 192          # and most
    window: int = 40                # tokens that a prediction sees
    n_embd: int = 128               # width of the embedding
    n_rank: int = 0                 # width of what the head reads; 0: n_embd
    vocab_size: int = 0             # 0: the dataset's
    block_size: int = 256           # tokens of a training row, over which the window slides
    wiring_seed: int = 0            # draws the graph
    affinity_first: float = 0.5     # first level: draws of places, per place of the window
    recency: float = 2.0            # a place of the window is drawn with a chance of 1 / age**recency; 0: all alike
    affinity: float = 1.0           # later levels: draws, per place or unit of an earlier level
    affinity_decay: float = 0.7     # of that, for each level further down
    p_lateral: float = 0.25         # chance of a connection to the unit beside, at each try
    lateral_decay: float = 0.95     # of that, for each unit further away
    lateral_tries: int = 1          # tries for each pair
    max_lateral: int = 7            # neighbours in a row that one unit may connect to
    wiring: str = ""                # the graph itself, as JSON; empty: it is drawn, and then kept here
    act: Literal["silu", "gelu", "softplus"] = "silu"  # of every unit
    tie_embeddings: bool = False    # one matrix for the embedding and the head
    dropout: float = 0.0            # on the embedding and on what units give
    rope_theta: float = 10000.0     # base of the rotation's wavelengths
    norm_eps: float = 1e-5          # inside the root of RMSNorm

    def __post_init__(self):
        for name in ("n_layer", "min_units", "min_neurons", "window", "n_embd", "block_size", "lateral_tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("n_rank", "vocab_size", "max_lateral", "wiring_seed", "recency"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for low, high in (("min_units", "max_units"), ("min_neurons", "max_neurons"), ("window", "block_size")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low}={getattr(self, low)} must not exceed {high}={getattr(self, high)}")
        if self.n_embd % 2:
            raise ValueError(f"n_embd={self.n_embd} must be even: the rotation turns pairs of numbers")
        if self.tie_embeddings and self.n_rank not in (0, self.n_embd):
            raise ValueError(f"n_rank={self.n_rank} must be n_embd={self.n_embd} where the head is the embedding")
        if not (0 < self.affinity_first <= 1000 and 0 < self.affinity <= 1000):
            raise ValueError(f"affinity_first={self.affinity_first} and affinity={self.affinity} must be above 0 and "
                             "at most 1000")
        for name in ("affinity_decay", "p_lateral", "lateral_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} and norm_eps={self.norm_eps} must be above 0")
        if self.wiring:
            read_wiring(self)


def draw_wiring(config):
    """The graph as nested lists: levels of units {"neurons": N, "places": [...], "units": [[level, index], ...]}.

    Level 0 stands for the window (place W - 1 holds the newest token), levels 1 to n_layer for the hidden units, the
    last level for the output, a single unit. A unit of level k draws ceil(affinity * decay^(k - j) * size) times from
    every level j < k, the first level ceil(affinity_first * W) times from the window, the output 2 * size more from
    the last level, always with replacement: what is drawn twice is connected once, as for a dense unit a second copy
    changes nothing. Units are drawn with equal chances, places with chances of 1 / age^recency, the newest of age 1. A
    neighbour at distance d is connected if one of lateral_tries draws falls below p_lateral * lateral_decay^d, until
    max_lateral in a row are. A unit that nothing reads is then given to a random later one, at most seven levels up; a
    place that nothing reads stays so.
    """
    rng, W, last = random.Random(config.wiring_seed), config.window, config.n_layer + 1
    sizes = [W] + [rng.randint(config.min_units, config.max_units) for _ in range(config.n_layer)] + [1]
    levels = []
    for k in range(1, last + 1):
        level = []
        for u in range(sizes[k]):
            neurons = (config.n_rank or config.n_embd) if k == last else rng.randint(config.min_neurons,
                                                                                     config.max_neurons)
            reads = set()
            for j in range(k):
                share = config.affinity_first if k == 1 else config.affinity * config.affinity_decay ** (k - j)
                draws = max(1, math.ceil(share * sizes[j])) + (2 * sizes[j] if (k, j) == (last, last - 1) else 0)
                chances = [(W - p) ** -config.recency for p in range(W)] if j == 0 else None
                reads |= {(j, i) for i in rng.choices(range(sizes[j]), chances, k=draws)}
            row = 0                                        # neighbours connected one after the other
            for v in reversed(range(u)):
                p = config.p_lateral * config.lateral_decay ** (u - v)
                hit = any(rng.random() < p for _ in range(config.lateral_tries))
                row = row + 1 if hit else 0
                if row > config.max_lateral:
                    break
                reads |= {(k, v)} if hit else set()
            level.append((neurons, reads))
        levels.append(level)
    read = set().union(*(reads for level in levels for _, reads in level))
    for j in range(1, last):                               # repair: nothing is computed for nobody
        for i in range(sizes[j]):
            if (j, i) not in read:
                rng.choice(levels[rng.randint(j, min(j + 6, last - 1))])[1].add((j, i))  # levels[j] is level j + 1
    return [[{"neurons": n, "places": sorted(i for j, i in reads if j == 0),
              "units": sorted([j, i] for j, i in reads if j)} for n, reads in level] for level in levels]


def read_wiring(config):
    """The graph of config.wiring; ValueError unless it is one that this config can build."""
    try:
        levels, there = json.loads(config.wiring), []      # there: [level, index] of the units so far
        for k, level in enumerate(levels, 1):
            for i, unit in enumerate(level):
                numbers = [unit["neurons"], *unit["places"], *sum(unit["units"], [])]
                if len(unit) > 3 or any(type(n) is not int for n in numbers):
                    raise ValueError(f"unit {i} of level {k} must hold neurons, places and units, in whole numbers")
                wrong = [p for p in unit["places"] if p not in range(config.window)]
                wrong += [u for u in unit["units"] if u not in there]
                if wrong or not unit["places"] + unit["units"] or unit["neurons"] < 1:
                    raise ValueError(f"unit {i} of level {k} has no neurons or reads nothing, or nothing that is "
                                     f"before it: {wrong}")
                there.append([k, i])
        if len(levels[-1]) != 1 or levels[-1][0]["neurons"] != (config.n_rank or config.n_embd):
            raise ValueError(f"the last level must be one unit of {config.n_rank or config.n_embd} neurons")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as e:
        raise ValueError(f"wiring={config.wiring[:60]!r}: {e}; leave it empty to have one drawn") from None
    return levels


# copied from model.py
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019); float32 inside."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # the sum of squares as a vecdot: with its backward, less than half the time of F.rms_norm on a CPU
        squares = torch.linalg.vecdot(wide, wide)                           # (...)
        mean = squares[..., None] / x.size(-1)                              # (..., 1)
        y = wide * torch.rsqrt(mean + self.eps) * self.weight
        return y.to(x.dtype)


def rotate_pairs(x, angles):
    """Turn the pair (x_2i, x_2i+1) by angles[..., i]: RoFormer (Su et al. 2021), eq. 34. x: (..., C), angles: C/2."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class Unit(nn.Module):
    """A dense layer on places of the window and on the normalised outputs of other units; the model activates it."""

    def __init__(self, config, neurons, places, units, sizes):
        super().__init__()
        self.places, self.units = places, [tuple(u) for u in units]
        n_in = sum(sizes[u] for u in self.units)
        self.std = (len(places) * config.n_embd + n_in) ** -0.5
        self.bias = nn.Parameter(torch.zeros(neurons))
        self.window = nn.Parameter(torch.empty(neurons, len(places) * config.n_embd)) if places else None
        self.norm = RMSNorm(n_in, config.norm_eps) if units else None
        self.proj = nn.Linear(n_in, neurons, bias=False) if units else None

    def turned(self, angles):
        """angles: (W, C/2) -> (N, P * C).

        The product of weights with an embedding turned by its place is that of the weights, turned back, with the
        embedding itself: so they turn once a batch, not each embedding once for every position.
        """
        return rotate_pairs(self.window.unflatten(1, (len(self.places), -1)), -angles[self.places]).flatten(1)

    def forward(self, x, angles, outputs):
        """x: (B, W - 1 + T, C); outputs: {(level, index): (B, T, n)} -> (B, T, N)."""
        z, T = self.bias, x.size(1) - len(angles) + 1
        if self.places:
            z = z + F.linear(torch.cat([x[:, p:p + T] for p in self.places], -1), self.turned(angles))
        if self.units:
            z = z + self.proj(self.norm(torch.cat([outputs[u] for u in self.units], -1)))
        return z


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size} must be at least 1 to build a model")
        if not config.wiring:
            config = replace(config, wiring=json.dumps(draw_wiring(config), separators=(",", ":")))
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.act = {"silu": F.silu, "gelu": F.gelu, "softplus": F.softplus}[config.act]
        sizes, units = {}, []
        for k, level in enumerate(read_wiring(config), 1):
            for i, unit in enumerate(level):
                units.append(Unit(config, **unit, sizes=sizes))
                sizes[k, i] = unit["neurons"]
        self.names = list(sizes)                           # (level, index) of each unit
        self.units = nn.ModuleList(units)
        n_rank = config.n_rank or config.n_embd
        self.norm = RMSNorm(n_rank, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(n_rank, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        """Units give numbers of size 1, the head so small ones that every model starts at a loss of ln V."""
        for unit in self.units:
            for p in (unit.window, unit.proj and unit.proj.weight):
                if p is not None:
                    nn.init.normal_(p, std=unit.std)
        tied = self.head is None
        nn.init.normal_(self.embed.weight, std=min(0.02, 4 / self.config.n_embd) if tied else 0.02)
        if not tied:
            nn.init.normal_(self.head.weight, std=0.01)

    def angles(self):
        """(W, C/2): place times frequency."""
        c, device = self.config, self.embed.weight.device
        freqs = c.rope_theta ** (-torch.arange(0, c.n_embd, 2, device=device) / c.n_embd)
        return torch.arange(c.window, device=device)[:, None] * freqs

    def _hidden(self, idx, cache=None):
        B, T = idx.shape
        W, C = self.config.window, self.config.n_embd
        x = self.embed_norm(self.embed(idx))                                                 # (B, T, C)
        before = x.new_zeros(B, W - 1, C) if cache is None else cache["window"]  # no token: 0
        x = torch.cat((before, self.dropout(x)), 1)                                          # (B, W - 1 + T, C)
        if cache is not None:
            cache["window"].copy_(x[:, T:])
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        angles, outputs = self.angles(), {}
        for name, unit in zip(self.names, self.units, strict=True):
            z = unit(x, angles, outputs)
            outputs[name] = self.dropout(self.act(z))
        return self.norm(z)                                # the last unit's, before its activation

    # copied from model.py
    def unembed(self, x):
        head = self.embed if self.head is None else self.head
        return F.linear(x, head.weight).float()

    # copied from model.py
    def forward(self, idx, targets=None):
        """idx, targets: (B, T) ids -> (logits (B, T, V) float32, mean loss or None). Targets of -1 are ignored."""
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens do not fit block_size={self.config.block_size}")
        logits = self.unembed(self._hidden(idx))                            # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def init_cache(self, batch_size, max_len):
        """The embeddings of the last W - 1 tokens, as yet none, and the position: a window needs no more, ever."""
        kind = {"dtype": self.embed.weight.dtype, "device": self.embed.weight.device}
        window = torch.zeros(batch_size, self.config.window - 1, self.config.n_embd, **kind)
        return {"pos": torch.zeros((), dtype=torch.long), "window": window}

    # copied from model.py
    def step(self, idx, cache):
        """idx: (B, T >= 1) more ids -> (logits (B, V) float32 of the last, cache). Use the returned cache.

        With T = 1, cache["pos"] may be (B,) instead of (): rows of different lengths, as a server has them.
        """
        x = self._hidden(idx, cache)                                        # (B, T, C)
        logits = self.unembed(x[:, -1])                                     # (B, V)
        return logits, cache | {"pos": cache["pos"] + idx.size(1)}

    def param_groups(self):
        """{role: [parameters]}: optim.py knows what each role gets. A tied matrix is an embedding."""
        groups = {"embed": [self.embed.weight], "head": [] if self.head is None else [self.head.weight]}
        groups["matrix"] = [p for p in self.units.parameters() if p.dim() == 2]
        groups["vector"] = [p for p in self.units.parameters() if p.dim() == 1]
        groups["vector"] += [self.embed_norm.weight, self.norm.weight]
        return {role: params for role, params in groups.items() if params}

    def flops_per_token(self, seq_len):
        """Training FLOPs per token, 2 per multiply-add, backward = 2 x forward; whatever seq_len is."""
        n = sum(p.numel() for p in self.units.parameters() if p.dim() == 2)
        return 6 * (n + (self.embed if self.head is None else self.head).weight.numel())


def draw(config, path):
    """A picture of the wiring at `path`: levels from bottom to top, a unit's area by its neurons."""
    from matplotlib.figure import Figure
    levels, W = read_wiring(config) if config.wiring else draw_wiring(config), config.window
    at = {(0, p): (0.98 - 0.96 * math.log(W - p) / math.log(W + 1), 0) for p in range(W)}
    for k, level in enumerate(levels, 1):                  # shifted, so that no unit hides the link between two others
        shift = 0.3 * (-1) ** k * (k < len(levels)) / len(level)
        at |= {(k, i): ((i + 0.5 + shift) / len(level), k) for i in range(len(level))}
    figure = Figure(figsize=(9, 1.3 * len(levels) + 1.7), layout="constrained")
    axes = figure.subplots()
    read = set()
    for k, level in enumerate(levels, 1):
        for i, unit in enumerate(level):
            x, y = at[k, i]
            for j, v in [*((0, p) for p in unit["places"]), *map(tuple, unit["units"])]:
                color, rad = ("tab:red", 0.4) if j == k else ("tab:orange", 0) if j == 0 else ("gray", 0)
                arrow = {"arrowstyle": "-", "linewidth": 0.9 if j else 0.6, "color": color, "alpha": 0.7,
                         "connectionstyle": f"arc3,rad={rad}", "shrinkA": 0, "shrinkB": 0, "zorder": 1}
                axes.annotate("", (x, y), at[j, v], arrowprops=arrow)
                read |= {(j, v)}
            axes.scatter(x, y, s=2 * unit["neurons"] + 20, color="tab:blue", zorder=3)
            axes.annotate(str(unit["neurons"]), (x, y), ha="center", va="center", fontsize=7, color="white", zorder=4)
    for p in range(W):
        axes.scatter(*at[0, p], s=14, color="black" if (0, p) in read else "lightgray", zorder=3)
        if (age := W - p) in (1, 2, 3, 4, 6, 8, 12, 16, 24, 40, W):
            axes.annotate(str(age), (at[0, p][0], -0.1), ha="center", va="top", fontsize=7)
    for color, name in (("tab:orange", "reads a token"), ("gray", "reads a unit below"), ("tab:red", "lateral")):
        axes.plot([], [], color=color, label=name)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    names = ["window", *(f"level {k}" for k in range(1, len(levels))), "output"]
    axes.set_yticks(range(len(names)), names)
    axes.set(xticks=[], xlabel="age of a token, the newest is 1", xlim=(0, 1.02), ylim=(-0.5, len(levels) + 0.4))
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=120)


def main(cfg):
    from dataclasses import asdict
    from pathlib import Path

    from thimble import load
    from thimble.configurator import from_flat
    from thimble.files import UserError
    if not cfg.draw:
        raise UserError("nothing to do: --draw draws the wiring; train with python train.py --arch=cerebros")
    config = cfg
    if cfg.checkpoint:
        meta = load.read(cfg.checkpoint, which="best").meta
        if meta["arch"] != "cerebros":
            raise UserError(f"--checkpoint={cfg.checkpoint} is a {meta['arch']}, which has no wiring: name another")
        config = from_flat(Config, meta["model_config"])
    try:
        draw(config, cfg.picture)
    except ImportError:
        raise UserError("--draw needs a package: pip install matplotlib") from None
    except ValueError as e:                                # an ending that is no picture's
        raise UserError(f"--picture={cfg.picture}: {e}") from None
    levels = read_wiring(config) if config.wiring else draw_wiring(config)
    links = sum(len(unit["places"]) + len(unit["units"]) for level in levels for unit in level)
    print(f"{Path(cfg.picture)}: {sum(map(len, levels))} units, {links} connections, wiring_seed="
          f"{asdict(config)['wiring_seed']}")


if __name__ == "__main__":
    from thimble import configurator

    @dataclass(frozen=True)
    class Drawing(Config):
        # drawing
        draw: bool = False              # write a picture of the wiring
        checkpoint: str = ""            # run or checkpoint folder whose wiring to draw; empty: what the keys say
        picture: str = "wiring.png"     # where to

    configurator.run(main, Drawing)
