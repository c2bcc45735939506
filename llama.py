"""The Llama family, for weights made elsewhere: Llama 1 to 3.x, TinyLlama, SmolLM2, Mistral, Qwen2 and Qwen3.

    python sample.py --checkpoint=Qwen3-0.6B/ --prompt "The capital of France is"
    python train.py config/finetune_own_text.py --init_from=Qwen3-0.6B/

It is model.py with what these have in addition: heads of any width, biases on queries, keys and values (Qwen2), norms
on queries and keys (Qwen3), a sliding window (Mistral), and RoPE that was stretched to longer contexts.

Legend: B batch, T tokens, S keys seen so far (cache included), C n_embd, H query heads, K key/value heads,
D head size, F MLP width, V vocabulary.
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
    n_hidden: int = 0               # width of the MLP; 0: 8/3 of n_embd, up to a multiple of 32
    head_dim: int = 0               # width of a head; 0: n_embd / n_head
    vocab_size: int = 0             # 0: the dataset's
    block_size: int = 256           # longest context, in tokens
    tie_embeddings: bool = False    # one matrix for the embedding and the head
    qkv_bias: bool = False          # biases on queries, keys and values
    qk_norm: bool = False           # RMSNorm on every query and key head
    window: int = 0                 # tokens that a token sees, itself included; 0: all
    window_from: int = 0            # first layer with the window; the layers before it see everything
    dropout: float = 0.0            # on the embedding and on what each layer adds
    rope_theta: float = 10000.0     # base of RoPE's wavelengths
    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"  # which wavelengths are stretched
    rope_factor: float = 1.0        # by how much, at most
    rope_context: int = 0           # llama3, yarn: context before stretching, in tokens
    rope_low: float = 1.0           # llama3, yarn: pairs that turn less often than this over it are stretched in full
    rope_high: float = 4.0          # llama3, yarn: those that turn more often are not
    rope_gain: float = 1.0          # factor on queries and keys; YaRN suggests 0.1 ln(rope_factor) + 1
    norm_eps: float = 1e-5          # inside the root of RMSNorm

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("rope_theta", "rope_factor", "rope_low", "rope_high", "rope_gain", "norm_eps"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}, or head_dim be set")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if width(self) % 2:
            raise ValueError(f"head_dim={width(self)} must be even: RoPE rotates pairs of numbers")
        if self.rope_type in ("llama3", "yarn"):
            if self.rope_context < 1:
                raise ValueError(f"rope_context={self.rope_context} must be at least 1 with rope_type={self.rope_type}")
            if self.rope_low >= self.rope_high:
                raise ValueError(f"rope_low={self.rope_low} must be below rope_high={self.rope_high}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")


def width(config):
    """Numbers in a head, D."""
    return config.head_dim or config.n_embd // config.n_head


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


def rope_freqs(config, device):
    """-> (D/2,), the radians per token by which each pair of a head turns."""
    c = config
    D = width(c)
    # pair i of a head turns by theta^(-2i / D) per token: the first pair fastest, the last hardly at all
    pairs = torch.arange(0, D, 2, device=device)
    freqs = c.rope_theta ** (-pairs / D)                                    # (D/2,)
    stretched = freqs / c.rope_factor
    if c.rope_type == "default":
        return freqs
    if c.rope_type == "linear":  # positional interpolation (Chen et al. 2023)
        return stretched
    # Pairs that turn often tell neighbours apart and keep their speed; those that never complete a turn within the
    # context would meet unknown angles beyond it, so they are stretched. `kept` runs from 0 to 1 in between.
    if c.rope_type == "llama3":  # linear in the number of turns (Llama 3.1)
        turns = c.rope_context * freqs / (2 * math.pi)
        kept = (turns - c.rope_low) / (c.rope_high - c.rope_low)
    else:  # linear in the index of the pair (YaRN, Peng et al. 2023, section 3.2)
        first = max(math.floor(pair_that_turns(c, c.rope_high)), 0)
        last = min(math.ceil(pair_that_turns(c, c.rope_low)), D - 1)
        index = torch.arange(D // 2, device=device)
        kept = 1 - (index - first) / max(last - first, 0.001)
    kept = kept.clamp(0, 1).to(freqs.dtype)
    return torch.lerp(stretched, freqs, kept)


def pair_that_turns(config, times):
    """The index, with a fraction, of the pair that turns `times` times over rope_context: rope_freqs solved for i."""
    c = config
    return width(c) / 2 * math.log(c.rope_context / (times * 2 * math.pi)) / math.log(c.rope_theta)


def rope_table(positions, config):
    """positions (..., T) -> cos and signed sin, each (..., T, D), for `rotate`. RoFormer (Su et al. 2021), eq. 34."""
    freqs = rope_freqs(config, positions.device)
    angles = positions[..., None] * freqs                                   # (..., T, D/2)
    cos = angles.cos() * config.rope_gain
    sin = angles.sin() * config.rope_gain
    cos = torch.cat((cos, cos), -1)                                         # (..., T, D)
    sin = torch.cat((-sin, sin), -1)                                        # (..., T, D)
    return cos, sin


# copied from model.py
def rotate(x, cos, sin):
    """Rotate the pair (x_i, x_{i + D/2}) of every head by its position's angle. x: (B, T, heads, D)."""
    # one angle for all heads
    cos = cos[..., None, :]                                                 # (..., T, 1, D)
    sin = sin[..., None, :]                                                 # (..., T, 1, D)
    scaled = x * cos
    partner = x.roll(x.size(-1) // 2, -1)
    return torch.addcmul(scaled, partner, sin)


def attend(q, k, v, mask=None, window=0):
    """Causal softmax(q k^T / sqrt(D)) v. q: (B, H, T, D), the last T of S tokens; k, v: (B, K, S, D).

    With T = 1, a mask (B, 1, 1, S) may say which keys each row sees. window: how many tokens each sees; 0: all.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    # On a CPU two plain matmuls train 2 to 3 times faster than the fused kernel, whose backward pass is slow, as long
    # as the (T, S) scores are small.
    fused = q.is_cuda or T == 1 or T * S > 2**20
    windowed = 0 < window < S and mask is None
    if 1 < T < S or not fused or windowed:
        # query t is token S - T + t: it sees the keys up to that one
        mask = q.new_full((T, S), -torch.inf)
        mask = mask.triu(1 + S - T)
        if windowed:
            mask += q.new_full((T, S), -torch.inf).tril(S - T - window)
    if fused:
        # is_causal, where nothing is cached, skips the half of the scores that a mask would throw away
        is_causal = T == S > 1 and not windowed
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=K != H)
    if K < H:
        # each key/value head serves H / K query heads
        k = k.repeat_interleave(H // K, 1)                                  # (B, H, S, D)
        v = v.repeat_interleave(H // K, 1)                                  # (B, H, S, D)
    q = q.reshape(B * H, T, D)
    k = k.reshape(B * H, S, D)
    v = v.reshape(B * H, S, D)
    scores = torch.baddbmm(mask, q, k.mT, alpha=1 / math.sqrt(D))           # (B*H, T, S)
    y = scores.softmax(-1) @ v                                              # (B*H, T, D)
    return y.view(B, H, T, D)


# copied from model.py
def remember(cache, k, v, start):
    """Put k, v (B, K, T, D) into the cache at start -> all that it holds now, (B, K, S, D), and a mask for attend.

    start is an int; or (B, 1), rows of different lengths with T = 1, each of which sees its own tokens only.
    """
    keys = cache["k"]                                                       # (B, K, max_len, D)
    values = cache["v"]                                                     # (B, K, max_len, D)
    if isinstance(start, int):
        S = start + k.size(2)
        keys[:, :, start:S] = k
        values[:, :, start:S] = v
        mask = None
    else:
        S = int(start.max()) + 1  # of the longest row
        rows = torch.arange(len(k), device=k.device)
        keys[rows, :, start[:, 0]] = k[:, :, 0]
        values[rows, :, start[:, 0]] = v[:, :, 0]
        mask = torch.arange(S, device=k.device) <= start                    # (B, S)
        mask = mask[:, None, None]                                          # (B, 1, 1, S)
    return keys[:, :, :S], values[:, :, :S], mask


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        C = config.n_embd
        D = width(config)
        self.head_dim = D
        self.n_kv_head = config.n_kv_head or config.n_head
        self.window = config.window if index >= config.window_from else 0
        n_q = config.n_head * D
        n_kv = self.n_kv_head * D
        self.q_proj = nn.Linear(C, n_q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, n_kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, n_kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(n_q, C, bias=False)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.norm_eps)
            self.k_norm = RMSNorm(D, config.norm_eps)

    # copied from model.py
    def init_cache(self, batch_size, max_len, **kind):
        shape = (batch_size, self.n_kv_head, max_len, self.head_dim)
        k = torch.zeros(shape, **kind)
        v = torch.zeros(shape, **kind)
        return {"k": k, "v": v}

    def forward(self, x, rope, cache=None, start=0):
        B, T, _ = x.shape
        D = self.head_dim
        q = self.q_proj(x).view(B, T, -1, D)                                # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, D)                                # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, D)                                # (B, T, K, D)
        q = rotate(self.q_norm(q), *rope)
        k = rotate(self.k_norm(k), *rope)
        q = q.transpose(1, 2)                                               # (B, H, T, D)
        k = k.transpose(1, 2)                                               # (B, K, T, D)
        v = v.transpose(1, 2)                                               # (B, K, T, D)
        mask = None
        if cache is not None:
            k, v, mask = remember(cache, k, v, start)                       # (B, K, S, D)
        if mask is not None and self.window:
            # each row stands at its own position, and sees no further back from there than the window
            keys = torch.arange(k.size(2), device=k.device)
            in_window = keys > start - self.window                          # (B, S)
            mask = mask & in_window[:, None, None]                          # (B, 1, 1, S)
        y = attend(q, k, v, mask, self.window)                              # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)                             # (B, T, H * D)
        return self.o_proj(y)


# copied from model.py
class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, GLU variants)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        n_hidden = config.n_hidden
        if not n_hidden:
            # 8/3 of C: three matrices that have as many weights as the two of a plain MLP of width 4 C
            n_hidden = 32 * math.ceil(8 * C / 3 / 32)
        self.gate_proj = nn.Linear(C, n_hidden, bias=False)
        self.up_proj = nn.Linear(C, n_hidden, bias=False)
        self.down_proj = nn.Linear(n_hidden, C, bias=False)

    def forward(self, x):
        gate = self.gate_proj(x)                                            # (B, T, F)
        y = F.silu(gate) * self.up_proj(x)
        return self.down_proj(y)


class Block(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, index)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    # copied from model.py
    def forward(self, x, rope, cache=None, start=0):
        y = self.attn(self.attn_norm(x), rope, cache, start)
        x = x + self.dropout(y)
        y = self.mlp(self.mlp_norm(x))
        return x + self.dropout(y)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size} must be at least 1 to build a model")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = None  # tied: the embedding is the head
        if not config.tie_embeddings:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        """Normal weights, so small at the outputs that every model starts at a loss of ln V."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            if p.dim() < 2:
                continue  # norm gains stay 1
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # GPT-2: each of 2 n_layer layers adds to the residual stream, whose size must not grow with depth
                std /= math.sqrt(2 * self.config.n_layer)
            elif p is self.embed.weight and self.head is None:
                # tied: the logit of the token itself starts at std * n_embd
                std = min(std, 4 / self.config.n_embd)
            elif name == "head.weight":
                std /= 2
            nn.init.normal_(p, std=std)

    def _hidden(self, idx, cache=None):
        """idx (B, T) -> what the head reads, (B, T, C); a cache is read and filled in."""
        c = self.config
        T = idx.size(1)
        start = 0  # position of the first token
        layers = [None] * c.n_layer
        if cache is not None:
            layers = cache["layers"]
            start = cache["pos"]
            # rows of different lengths have a position each
            start = start[:, None] if start.dim() else int(start)           # (B, 1)
        x = self.embed(idx)                                                 # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # the residual stream too: half the memory traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.dropout(x)
        positions = torch.arange(T, device=idx.device) + start              # (T), or (B, 1)
        cos, sin = rope_table(positions, c)
        rope = cos.to(x.dtype), sin.to(x.dtype)                             # (..., T, D) each
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, rope, layer, start)
        return self.norm(x)

    # copied from model.py
    def unembed(self, x):
        head = self.embed if self.head is None else self.head
        return F.linear(x, head.weight).float()                             # (..., V)

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

    # copied from model.py
    def init_cache(self, batch_size, max_len):
        """An empty cache for max_len tokens: keys and values of every layer, and the position."""
        weight = self.embed.weight
        kind = {"dtype": weight.dtype, "device": weight.device}
        layers = [block.attn.init_cache(batch_size, max_len, **kind) for block in self.blocks]
        pos = torch.zeros((), dtype=torch.long)
        return {"pos": pos, "layers": layers}

    # copied from model.py
    def step(self, idx, cache):
        """idx: (B, T >= 1) more ids -> (logits (B, V) float32 of the last, cache). Use the returned cache.

        With T = 1, cache["pos"] may be (B,) instead of (): rows of different lengths, as a server has them.
        """
        x = self._hidden(idx, cache)                                        # (B, T, C)
        logits = self.unembed(x[:, -1])                                     # (B, V)
        return logits, cache | {"pos": cache["pos"] + idx.size(1)}

    # copied from model.py
    def param_groups(self):
        """{role: [parameters]}: optim.py knows what each role gets. A tied matrix is an embedding."""
        groups = {"embed": [self.embed.weight]}
        if self.head is not None:
            groups["head"] = [self.head.weight]
        blocks = list(self.blocks.parameters())
        groups["matrix"] = [p for p in blocks if p.dim() == 2]
        groups["vector"] = [p for p in blocks if p.dim() == 1]
        groups["vector"].append(self.norm.weight)
        return groups

    def flops_per_token(self, seq_len):
        """Training FLOPs per token, 2 per multiply-add, backward = 2 x forward: 6 N + 12 L H D T (PaLM, appendix B).

        N counts the matrices that multiply, hence not the embedding look-up; attention counts all T x T scores.
        """
        c = self.config
        matrices = self.param_groups()["matrix"]
        n = sum(p.numel() for p in matrices)
        n += self.embed.weight.numel()  # of the head, tied or not: it has the same shape
        attention = 12 * c.n_layer * c.n_head * width(c) * seq_len
        return 6 * n + attention
