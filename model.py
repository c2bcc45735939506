"""Dense GPT, exactly Llama-shaped: RoPE (half-split), RMSNorm, grouped-query attention, SwiGLU, no biases.

Legend: B batch, T tokens, S keys seen so far (cache included), C n_embd, H query heads, K key/value heads,
D head size, F MLP width, V vocabulary.

Any file with a `Config` and a `Model` like these works as `python train.py --arch=NAME`: copy, rename, change.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Config:
    n_layer: int = 4                # blocks, each attention and an MLP
    n_head: int = 4                 # query heads
    n_kv_head: int = 0              # key/value heads, shared by n_head / n_kv_head queries each; 0: n_head
    n_embd: int = 128               # width of the residual stream
    n_hidden: int = 0               # width of the MLP; 0: 8/3 of n_embd (up to a multiple of 32), 4 n_embd with gelu
    vocab_size: int = 0             # 0: the dataset's
    block_size: int = 256           # longest context, in tokens
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gated, or plain with GELU
    tie_embeddings: bool = False    # one matrix for the embedding and the head
    qk_norm: bool = False           # RMSNorm on every query and key head
    dropout: float = 0.0            # on the embedding and on what each layer adds
    rope_theta: float = 10000.0     # base of RoPE's wavelengths
    norm_eps: float = 1e-5          # inside the root of RMSNorm

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("n_kv_head", "n_hidden", "vocab_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd={self.n_embd} / n_head={self.n_head} must be even: RoPE turns pairs of numbers")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} and norm_eps={self.norm_eps} must be above 0")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019); float32 inside."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # the sum of squares as a vecdot: with its backward, less than half the time of F.rms_norm on a CPU
        mean = torch.linalg.vecdot(wide, wide)[..., None] / x.size(-1)
        return (wide * torch.rsqrt(mean + self.eps) * self.weight).to(x.dtype)


def rope_table(positions, head_dim, theta):
    """positions (..., T) -> cos and signed sin, each (..., T, D), for `rotate`. RoFormer (Su et al. 2021), eq. 34."""
    freqs = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)     # (D/2,)
    angles = positions[..., None] * freqs                                                    # (..., T, D/2)
    return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)


def rotate(x, cos, sin):
    """Turn the pair (x_i, x_{i + D/2}) of every head by its position's angle. x: (B, T, heads, D)."""
    return torch.addcmul(x * cos[..., None, :], x.roll(x.size(-1) // 2, -1), sin[..., None, :])


def attend(q, k, v, mask=None):
    """Causal softmax(q k^T / sqrt(D)) v. q: (B, H, T, D), the last T of S tokens; k, v: (B, K, S, D).

    With T = 1, a mask (B, 1, 1, S) may say what each row sees.
    """
    B, H, T, D = q.shape
    S = k.size(2)
    fused = q.is_cuda or T == 1 or T * S > 1 << 20
    if 1 < T < S or not fused:
        mask = torch.full((T, S), -torch.inf, dtype=q.dtype, device=q.device).triu(1 + S - T)
    if fused:                                              # nothing cached: half of the scores need no computing
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S > 1, enable_gqa=k.size(1) != H)
    # On a CPU two plain matmuls train 2 to 3 times faster than the fused kernel, whose backward pass is slow,
    # as long as the (T, S) scores are small.
    if k.size(1) != H:
        k, v = (t.repeat_interleave(H // t.size(1), 1) for t in (k, v))                      # (B, H, S, D)
    q, k, v = (t.reshape(B * H, -1, D) for t in (q, k, v))
    scores = torch.baddbmm(mask, q, k.mT, alpha=1 / math.sqrt(D))                            # (B*H, T, S)
    return (scores.softmax(-1) @ v).view(B, H, T, D)


def remember(cache, k, v, start):
    """Put k, v (B, K, T, D) into the cache at start -> all that it holds by now, (B, K, S, D), and a mask for attend.

    start is an int; or (B, 1), rows of different lengths with T = 1, each of which sees no further than it goes.
    """
    if isinstance(start, int):
        S, mask = start + k.size(2), None
        cache["k"][:, :, start:S], cache["v"][:, :, start:S] = k, v
    else:
        S, rows, at = int(start.max()) + 1, torch.arange(len(k), device=k.device), start[:, 0]
        mask = (torch.arange(S, device=k.device) <= start)[:, None, None]                    # (B, 1, 1, S)
        cache["k"][rows, :, at], cache["v"][rows, :, at] = k[:, :, 0], v[:, :, 0]
    return cache["k"][:, :, :S], cache["v"][:, :, :S], mask


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def init_cache(self, batch_size, max_len, **kind):
        shape = (batch_size, self.n_kv_head, max_len, self.head_dim)
        return {"k": torch.zeros(shape, **kind), "v": torch.zeros(shape, **kind)}

    def forward(self, x, rope, cache=None, start=0):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)                     # (B, K, T, D)
        q = rotate(self.q_norm(q), *rope).transpose(1, 2)                                    # (B, H, T, D)
        k = rotate(self.k_norm(k), *rope).transpose(1, 2)                                    # (B, K, T, D)
        mask = None
        if cache is not None:
            k, v, mask = remember(cache, k, v, start)                                        # (B, K, S, D)
        y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, GLU variants)."""

    def __init__(self, config):
        super().__init__()
        n_hidden = config.n_hidden or -(-config.n_embd * 8 // 3 // 32) * 32
        self.gate_proj = nn.Linear(config.n_embd, n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, n_hidden, bias=False)
        self.down_proj = nn.Linear(n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GELU(nn.Module):
    def __init__(self, config):
        super().__init__()
        n_hidden = config.n_hidden or 4 * config.n_embd
        self.up_proj = nn.Linear(config.n_embd, n_hidden, bias=False)
        self.down_proj = nn.Linear(n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, cache=None, start=0):
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, cache, start))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size} must be at least 1 to build a model")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        """Normal weights, so small at the exits that every model starts at a loss of ln V."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue                                   # norm gains stay 1
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.n_layer)  # GPT-2: the residual stream keeps its size with depth
            elif p is self.embed.weight and self.head is None:
                std = min(std, 4 / self.config.n_embd)     # tied: a token's own logit starts at std * n_embd
            elif name == "head.weight":
                std /= 2
            nn.init.normal_(p, std=std)

    def _hidden(self, idx, cache=None):
        B, T = idx.shape
        start = 0
        if cache is not None:                              # or (B, 1), a position of its own for each row
            start = cache["pos"][:, None] if cache["pos"].dim() else int(cache["pos"])
        x = self.embed(idx)                                                                  # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the residual stream too: half the memory traffic
        x = self.dropout(x)
        positions = torch.arange(T, device=idx.device) + start
        rope = rope_table(positions, self.config.n_embd // self.config.n_head, self.config.rope_theta)
        rope = [t.to(x.dtype) for t in rope]
        for i, block in enumerate(self.blocks):
            x = block(x, rope, None if cache is None else cache["layers"][i], start)
        return self.norm(x)

    def unembed(self, x):
        return F.linear(x, self.embed.weight if self.head is None else self.head.weight).float()

    def forward(self, idx, targets=None):
        """idx, targets: (B, T) ids; target -1 counts for nothing -> (logits (B, T, V) float32, mean loss or None)."""
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens do not fit block_size={self.config.block_size}")
        logits = self.unembed(self._hidden(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def init_cache(self, batch_size, max_len):
        """An empty cache for max_len tokens: keys and values of every layer, and the position."""
        kind = {"dtype": self.embed.weight.dtype, "device": self.embed.weight.device}
        layers = [block.attn.init_cache(batch_size, max_len, **kind) for block in self.blocks]
        return {"pos": torch.zeros((), dtype=torch.long), "layers": layers}

    def step(self, idx, cache):
        """idx: (B, T >= 1) more ids -> (logits (B, V) float32 of the last, cache). Use the returned cache.

        With T = 1, cache["pos"] may be (B,) instead of (): rows of different lengths, as a server has them.
        """
        x = self._hidden(idx, cache)
        return self.unembed(x[:, -1]), cache | {"pos": cache["pos"] + idx.size(1)}

    def param_groups(self):
        """{role: [parameters]}: optim.py knows what each role gets. A tied matrix is an embedding."""
        groups = {"embed": [self.embed.weight], "head": [] if self.head is None else [self.head.weight]}
        groups["matrix"] = [p for p in self.blocks.parameters() if p.dim() == 2]
        groups["vector"] = [p for p in self.blocks.parameters() if p.dim() == 1] + [self.norm.weight]
        return {role: params for role, params in groups.items() if params}

    def flops_per_token(self, seq_len):
        """Training FLOPs per token, 2 per multiply-add, backward = 2 x forward: 6 N + 12 L C T (PaLM, appendix B).

        N counts the matrices that multiply, hence not the embedding look-up; attention counts all T x T scores.
        """
        n = sum(p.numel() for p in self.param_groups()["matrix"]) + self.embed.weight.numel()  # the last: the head
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * seq_len
