"""Next-token model over a randomly wired graph of dense units, after the Cerebros search.

    python train.py config/cerebros_bible.py                        # train one
    python search.py config/search_cerebros.py                      # search for a good one
    python bench/wiring.py --wiring_seed=3                          # draw the graph of this seed, as wiring.png

A window of the last W tokens is embedded, each embedding rotated by its place in the window. Above it lie n_layer
levels of units, each a dense layer on what it is wired to: places of the window, units of earlier levels, units beside
it. One last unit gathers them for the head. The window slides along a text, so every position trains; places before the
text's first token hold 0 (in the ONNX form of export.py --window an id of -1 marks them).

Legend: B batch, T tokens, C n_embd, W window, P places that a unit reads, N its neurons, R n_rank, V vocabulary.
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
    min_units: int = 2              # fewest units of a level; the number is drawn
    max_units: int = 4              # most units of a level
    min_neurons: int = 64           # fewest neurons of a unit; the number is drawn
    max_neurons: int = 192          # most neurons of a unit
    window: int = 40                # tokens that a prediction sees
    n_embd: int = 128               # width of the embedding
    n_rank: int = 0                 # width of what the head reads; 0: n_embd
    vocab_size: int = 0             # 0: the dataset's
    block_size: int = 256           # tokens of a training row, over which the window slides
    wiring_seed: int = 0            # draws the graph
    affinity_first: float = 0.5     # first level: draws of places, per place of the window
    recency: float = 2.0            # a place of the window is drawn with a weight of 1 / age**recency; 0: all equal
    affinity: float = 1.0           # later levels: draws, per place or unit of an earlier level
    affinity_decay: float = 0.7     # factor on affinity for each level further down
    p_lateral: float = 0.25         # chance of a connection to a unit of the same level, at each try
    lateral_decay: float = 0.95     # factor on p_lateral for each unit further away
    lateral_tries: int = 1          # tries for each pair
    max_lateral: int = 7            # neighbours in a row that one unit may connect to
    wiring: str = ""                # the graph itself, as JSON; empty: it is drawn, and then stored here
    act: Literal["silu", "gelu", "softplus"] = "silu"  # of every unit
    tie_embeddings: bool = False    # one matrix for the embedding and the head
    dropout: float = 0.0            # on the embedding and on the output of each unit
    rope_theta: float = 10000.0     # base of the rotation's wavelengths
    norm_eps: float = 1e-5          # inside the root of RMSNorm

    def __post_init__(self):
        for name in ("n_layer", "min_units", "min_neurons", "window", "n_embd", "block_size", "lateral_tries"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        for name in ("affinity_first", "affinity"):
            value = getattr(self, name)
            if not 0 < value <= 1000:
                raise ValueError(f"{name}={value} must be above 0 and at most 1000")
        for name in ("affinity_decay", "p_lateral", "lateral_decay"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be in [0, 1]")
        for low, high in (("min_units", "max_units"), ("min_neurons", "max_neurons"), ("window", "block_size")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low}={getattr(self, low)} must not exceed {high}={getattr(self, high)}")
        if self.n_embd % 2:
            raise ValueError(f"n_embd={self.n_embd} must be even: the rotation acts on pairs of numbers")
        if self.tie_embeddings and self.n_rank not in (0, self.n_embd):
            raise ValueError(f"n_rank={self.n_rank} must be n_embd={self.n_embd} where the head is the embedding")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.wiring:
            read_wiring(self)


def draw_wiring(config):
    """The graph as nested lists: levels of units {"neurons": N, "places": [...], "units": [[level, index], ...]}.

    Level 0 stands for the window (place W - 1 holds the newest token), levels 1 to n_layer for the hidden units, the
    last level for the output, a single unit. A unit of level k draws ceil(affinity * decay^(k - j) * size) times from
    every level j < k, the first level ceil(affinity_first * W) times from the window, the output 2 * size more from
    the last level, always with replacement: what is drawn twice is connected once, as for a dense unit a second copy
    changes nothing. Units are drawn with equal chances, places with weights of 1 / age^recency, the newest of age 1. A
    neighbour at distance d is connected if one of lateral_tries draws falls below p_lateral * lateral_decay^d, until
    max_lateral in a row are. A unit that nothing reads is then given to a random later one, at most seven levels up; a
    place that nothing reads stays unread.
    """
    rng = random.Random(config.wiring_seed)
    last = config.n_layer + 1
    sizes = [config.window]  # places or units of each level
    for _ in range(config.n_layer):
        sizes.append(rng.randint(config.min_units, config.max_units))
    sizes.append(1)
    neurons = {}  # {(level, index): number}
    reads = {}  # {(level, index): set of the (level, index) that it reads}
    for k in range(1, last + 1):
        for i in range(sizes[k]):
            if k < last:
                neurons[k, i] = rng.randint(config.min_neurons, config.max_neurons)
            else:
                neurons[k, i] = config.n_rank or config.n_embd
            reads[k, i] = draw_below(config, rng, sizes, k) | draw_beside(config, rng, k, i)

    # repair: every unit has to have a reader
    read = set().union(*reads.values())
    for j in range(1, last):
        for i in range(sizes[j]):
            if (j, i) in read:
                continue
            k = rng.randint(j, min(j + 6, last - 1)) + 1
            reader = rng.choice(range(sizes[k]))
            reads[k, reader].add((j, i))

    levels = []
    for k in range(1, last + 1):
        level = []
        for i in range(sizes[k]):
            places = sorted(v for j, v in reads[k, i] if j == 0)
            units = sorted([j, v] for j, v in reads[k, i] if j > 0)
            level.append({"neurons": neurons[k, i], "places": places, "units": units})
        levels.append(level)
    return levels


def draw_below(config, rng, sizes, k):
    """What a unit of level k reads of the levels below: a set of (level, index)."""
    W = config.window
    last = len(sizes) - 1
    reads = set()
    for j in range(k):
        if k == 1:
            share = config.affinity_first
        else:
            share = config.affinity * config.affinity_decay ** (k - j)
        draws = max(1, math.ceil(share * sizes[j]))
        if k == last and j == last - 1:
            draws += 2 * sizes[j]
        weights = None  # units: all alike
        if j == 0:
            weights = [(W - place) ** -config.recency for place in range(W)]
        drawn = rng.choices(range(sizes[j]), weights, k=draws)
        reads.update((j, v) for v in drawn)
    return reads


def draw_beside(config, rng, k, i):
    """What unit i of level k reads of the units before it in its level, the nearest first: a set of (level, index)."""
    reads = set()
    row = 0  # neighbours connected one after the other
    for v in reversed(range(i)):
        p = config.p_lateral * config.lateral_decay ** (i - v)
        hit = any(rng.random() < p for _ in range(config.lateral_tries))
        row = row + 1 if hit else 0
        if row > config.max_lateral:
            break
        if hit:
            reads.add((k, v))
    return reads


def read_wiring(config):
    """The graph of config.wiring; ValueError unless it is one that this config can build."""
    try:
        levels = json.loads(config.wiring)
        earlier = []  # [level, index] of the units so far
        for k, level in enumerate(levels, 1):
            for i, unit in enumerate(level):
                check_unit(unit, f"unit {i} of level {k}", config.window, earlier)
                earlier.append([k, i])
        neurons = config.n_rank or config.n_embd
        if len(levels[-1]) != 1 or levels[-1][0]["neurons"] != neurons:
            raise ValueError(f"the last level must be one unit of {neurons} neurons")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as e:
        raise ValueError(f"wiring={config.wiring[:60]!r}: {e}; leave it empty to have one drawn") from None
    return levels


def check_unit(unit, name, window, earlier):
    """ValueError unless a unit reads something, and only what comes before it."""
    numbers = [unit["neurons"], *unit["places"], *sum(unit["units"], [])]
    if len(unit) > 3 or any(type(n) is not int for n in numbers):
        raise ValueError(f"{name} must hold neurons, places and units, in whole numbers")
    if unit["neurons"] < 1:
        raise ValueError(f"{name} has no neurons")
    if not unit["places"] and not unit["units"]:
        raise ValueError(f"{name} reads nothing")
    wrong = [place for place in unit["places"] if place not in range(window)]
    wrong += [other for other in unit["units"] if other not in earlier]
    if wrong:
        raise ValueError(f"{name} reads {wrong}, which is not before it")


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
        norm = torch.rsqrt(mean + self.eps)
        y = wide * norm * self.weight
        return y.to(x.dtype)


def rotate_pairs(x, angles):
    """Rotate the pair (x_2i, x_2i+1) by angles[..., i]: RoFormer (Su et al. 2021), eq. 34. x: (..., C), angles: C/2."""
    cos = angles.cos().to(x.dtype)
    sin = angles.sin().to(x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                              # (..., C/2) each
    rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)       # (..., C/2, 2)
    return rotated.flatten(-2)


class Unit(nn.Module):
    """A dense layer on places of the window and on the normalised outputs of other units; the model activates it."""

    def __init__(self, config, neurons, places, units, sizes):
        super().__init__()
        self.places = places
        self.units = [tuple(unit) for unit in units]
        n_places = len(places) * config.n_embd
        n_units = sum(sizes[unit] for unit in self.units)
        self.std = (n_places + n_units) ** -0.5  # of the weights: outputs are of size 1 where inputs are
        self.bias = nn.Parameter(torch.zeros(neurons))
        self.window = None
        self.norm = None
        self.proj = None
        if places:
            self.window = nn.Parameter(torch.empty(neurons, n_places))
        if units:
            self.norm = RMSNorm(n_units, config.norm_eps)
            self.proj = nn.Linear(n_units, neurons, bias=False)

    def rotated(self, angles):
        """angles: (W, C/2) -> (N, P * C).

        The product of weights with an embedding rotated by its place is that of the weights, rotated back, with the
        embedding itself. So the weights are rotated once a batch, and not each embedding once for every position.
        """
        weights = self.window.unflatten(1, (len(self.places), -1))          # (N, P, C)
        return rotate_pairs(weights, -angles[self.places]).flatten(1)

    def forward(self, x, angles, outputs):
        """x: (B, W - 1 + T, C); outputs: {(level, index): (B, T, n)} -> (B, T, N)."""
        z = self.bias
        if self.places:
            T = x.size(1) - len(angles) + 1
            # the prediction at t sees place p in x[:, t + p]
            read = [x[:, place:place + T] for place in self.places]
            z = z + F.linear(torch.cat(read, -1), self.rotated(angles))     # (B, T, N)
        if self.units:
            read = [outputs[unit] for unit in self.units]
            z = z + self.proj(self.norm(torch.cat(read, -1)))               # (B, T, N)
        return z


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size} must be at least 1 to build a model")
        if not config.wiring:
            # kept in the checkpoint: another version of Python may draw another graph from the same seed
            wiring = json.dumps(draw_wiring(config), separators=(",", ":"))
            config = replace(config, wiring=wiring)
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.act = {"silu": F.silu, "gelu": F.gelu, "softplus": F.softplus}[config.act]
        sizes = {}  # {(level, index): neurons}
        units = []
        for k, level in enumerate(read_wiring(config), 1):
            for i, unit in enumerate(level):
                units.append(Unit(config, **unit, sizes=sizes))
                sizes[k, i] = unit["neurons"]
        self.names = list(sizes)
        self.units = nn.ModuleList(units)
        n_rank = config.n_rank or config.n_embd
        self.norm = RMSNorm(n_rank, config.norm_eps)
        self.head = None  # tied: the embedding is the head
        if not config.tie_embeddings:
            self.head = nn.Linear(n_rank, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        """Units put out numbers of size 1, the head such small ones that every model starts at a loss of ln V."""
        for unit in self.units:
            if unit.window is not None:
                nn.init.normal_(unit.window, std=unit.std)
            if unit.proj is not None:
                nn.init.normal_(unit.proj.weight, std=unit.std)
        if self.head is None:
            # tied: the logit of the token itself starts at std * n_embd
            nn.init.normal_(self.embed.weight, std=min(0.02, 4 / self.config.n_embd))
        else:
            nn.init.normal_(self.embed.weight, std=0.02)
            nn.init.normal_(self.head.weight, std=0.01)

    def angles(self):
        """(W, C/2): place times frequency."""
        c = self.config
        device = self.embed.weight.device
        pairs = torch.arange(0, c.n_embd, 2, device=device)
        freqs = c.rope_theta ** (-pairs / c.n_embd)                         # (C/2)
        places = torch.arange(c.window, device=device)
        return places[:, None] * freqs

    def _hidden(self, idx, cache=None):
        """idx (B, T) -> what the head reads, (B, T, R); a cache is read and filled in."""
        B, T = idx.shape
        W = self.config.window
        C = self.config.n_embd
        x = self.embed_norm(self.embed(idx))                                # (B, T, C)
        if cache is None:
            before = x.new_zeros(B, W - 1, C)  # no tokens
        else:
            before = cache["window"]
        x = torch.cat((before, self.dropout(x)), 1)                         # (B, W - 1 + T, C)
        if cache is not None:
            cache["window"].copy_(x[:, T:])
        if torch.is_autocast_enabled(x.device.type):
            # half the memory traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        angles = self.angles()
        outputs = {}
        for name, unit in zip(self.names, self.units, strict=True):
            z = unit(x, angles, outputs)                                    # (B, T, N)
            outputs[name] = self.dropout(self.act(z))
        return self.norm(z)  # the last unit's, before its activation

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
        """The embeddings of the last W - 1 tokens, none so far, and the position. It never grows."""
        weight = self.embed.weight
        kind = {"dtype": weight.dtype, "device": weight.device}
        window = torch.zeros(batch_size, self.config.window - 1, self.config.n_embd, **kind)
        pos = torch.zeros((), dtype=torch.long)
        return {"pos": pos, "window": window}

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
        groups = {"embed": [self.embed.weight]}
        if self.head is not None:
            groups["head"] = [self.head.weight]
        units = list(self.units.parameters())
        groups["matrix"] = [p for p in units if p.dim() == 2]
        groups["vector"] = [p for p in units if p.dim() == 1]
        groups["vector"] += [self.embed_norm.weight, self.norm.weight]
        return groups

    def flops_per_token(self, seq_len):
        """Training FLOPs per token, 2 per multiply-add, backward = 2 x forward; the same for any seq_len."""
        n = sum(p.numel() for p in self.units.parameters() if p.dim() == 2)
        head = self.embed if self.head is None else self.head
        return 6 * (n + head.weight.numel())
