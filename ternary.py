"""BitNet b1.58: weights of -1, 0 and 1, activations of 8 bits (Ma et al. 2024); optionally mHC-lite residual streams.

In training each matrix is kept in float32 (the shadow weights) and rounded for use; packed (`Config.packed`), it takes
2 bits per weight and runs on integers (kernels/ternary.py). `diff model.py ternary.py` shows the idea and nothing else.

Legend: B batch, T tokens, S keys seen so far (cache included), C n_embd, H query heads, K key/value heads,
D head size, F MLP width, V vocabulary, n residual streams.
"""
import itertools
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
    n_hidden: int = 0               # width of the MLP; 0: 8/3 of n_embd, up to a multiple of 32 (or of group_size)
    vocab_size: int = 0             # 0: the dataset's
    block_size: int = 256           # longest context, in tokens
    act: Literal["silu", "relu2"] = "silu"  # of the MLP's gate; llama.cpp has no relu(x)^2 here
    group_size: int = 0             # inputs that share a scale; 0: one scale per matrix, as in BitNet
    sub_norm: bool = True           # BitNet's RMSNorms before the last matrix of attention and MLP
    n_streams: int = 1              # mHC-lite: residual streams; 1: the plain residual
    static_streams: bool = False    # mHC-lite: the same mixing for every token
    rope_theta: float = 10000.0     # base of RoPE's wavelengths
    norm_eps: float = 1e-5          # inside the root of RMSNorm
    packed: bool = False            # 2 bits per weight: for running, not for training (sample.py --packed writes it)

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd={self.n_embd} / n_head={self.n_head} must be even: RoPE rotates pairs of numbers")
        if self.group_size and (self.n_embd % self.group_size or self.n_hidden % self.group_size):
            raise ValueError(f"n_embd={self.n_embd} and n_hidden={self.n_hidden} must be multiples of "
                             f"group_size={self.group_size}")
        if self.n_streams not in (1, 2, 4):
            raise ValueError(f"n_streams={self.n_streams} must be 1, 2 or 4: mHC-lite mixes with all n! permutations")


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


def absmean(weight, group_size=0):
    """weight (N, K) -> (t (N, K) of -1, 0, 1; scale, () or (N, K / group_size)), so that t * scale is near weight.

    scale = mean |w|, t = clip(round(w / scale), -1, 1): BitNet b1.58, Ma et al. 2024, section 2.
    """
    if not group_size:
        scale = weight.abs().mean().clamp(min=1e-5)
        t = (weight / scale).round().clamp(-1, 1)
        return t, scale
    groups = weight.unflatten(1, (-1, group_size))                          # (N, groups, group_size)
    scale = groups.abs().mean(-1).clamp(min=1e-5)                           # (N, groups)
    t = (groups / scale[..., None]).round().clamp(-1, 1)
    return t.flatten(1), scale


def absmax(x):
    """x (..., K) -> (q, scale (..., 1)): q = round(x * scale), integers from -127 to 127 in x's dtype.

    The scale is float32 even where x is bfloat16: with eight bits it would be 128 instead of 127 and misround one
    number in eight.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(-1, keepdim=True)                                # (..., 1)
    scale = 127 / largest.to(wide.dtype).clamp(min=1e-5)
    q = (wide * scale).round_()
    return q.to(x.dtype), scale


class TernaryMatmul(torch.autograd.Function):
    """x (..., K), weight (N, K) -> (..., N), both rounded; the gradient passes the roundings as if they were not there.

    t and w_scale are `absmean` of the weight, w = t * w_scale. In float32 and float64 the sums run over integers, which
    are exact in any order: the packed model gives the same bits.
    """

    @staticmethod
    def forward(ctx, x, weight, t, w_scale, w):
        q, scale = absmax(x)
        ctx.save_for_backward(q, scale, w)
        if not w_scale.dim():
            factor = (w_scale / scale).to(x.dtype)                          # (..., 1)
            return F.linear(q, t) * factor
        if x.dtype == torch.bfloat16:
            # each sum keeps only seven bits anyway, and one product is faster than one for each group
            y = F.linear(q, w) / scale
            return y.to(x.dtype)
        size = t.size(1) // w_scale.size(1)  # inputs of a group
        groups = zip(q.split(size, -1), t.split(size, -1), w_scale.unbind(1), strict=True)
        y = 0
        for q_g, t_g, scale_g in groups:
            y = y + F.linear(q_g, t_g) * scale_g                            # (..., N)
        return y / scale

    @staticmethod
    def backward(ctx, grad):
        q, scale, w = ctx.saved_tensors
        rows = (grad / scale).to(grad.dtype).flatten(0, -2)                 # (tokens, N)
        grad_weight = rows.mT @ q.flatten(0, -2)                            # (N, K)
        grad_weight = grad_weight.to(torch.promote_types(grad.dtype, torch.float32))
        return grad @ w, grad_weight, None, None, None


class TernaryLinear(nn.Module):
    def __init__(self, n_in, n_out, group_size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.group_size = group_size
        self.cache = None, None  # what was rounded, and the result

    @torch.no_grad()
    def rounded(self, dtype):
        """(t, w_scale, w) for TernaryMatmul."""
        t, scale = absmean(self.weight.float(), self.group_size)  # in float32, whatever dtype the model runs in
        wide = scale
        if self.group_size:
            wide = scale.repeat_interleave(self.group_size, 1)              # (N, K)
        w = t * wide
        scale = scale.to(torch.promote_types(dtype, torch.float32))
        return t.to(dtype), scale, w.to(dtype)

    def forward(self, x):
        device = x.device.type
        dtype = x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        if torch.compiler.is_compiling():
            # The compiler could not follow the cache; and it fuses the rounding, which then costs little.
            return TernaryMatmul.apply(x, self.weight, *self.rounded(dtype))
        key = self.weight._version, self.weight.data_ptr(), dtype
        known, rounded = self.cache
        if known != key:
            # once per optimizer step, not per micro-batch
            rounded = self.rounded(dtype)
            self.cache = key, rounded
        return TernaryMatmul.apply(x, self.weight, *rounded)


class PackedLinear(nn.Module):
    """TernaryLinear at 2 bits per weight, in the layout of kernels/ternary.py."""

    def __init__(self, n_in, n_out, group_size):
        super().__init__()
        self.group_size = group_size
        n_blocks = math.ceil(n_in / 256)
        codes = torch.zeros(n_out, n_blocks * 64, dtype=torch.uint8)  # four to a byte, in blocks of 256
        shape = ()
        if group_size:
            shape = (n_in // group_size, n_out)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.zeros(shape))

    def forward(self, x):
        from kernels import ternary
        return ternary.linear(x, self.codes, self.scales, self.group_size)


# copied from model.py
def rope_table(positions, head_dim, theta):
    """positions (..., T) -> cos and signed sin, each (..., T, D), for `rotate`. RoFormer (Su et al. 2021), eq. 34."""
    # pair i of a head turns by theta^(-2i / D) per token: the first pair fastest, the last hardly at all
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    freqs = theta ** (-pairs / head_dim)                                    # (D/2,)
    angles = positions[..., None] * freqs                                   # (..., T, D/2)
    cos = angles.cos()
    sin = angles.sin()
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


# copied from model.py
def attend(q, k, v, mask=None):
    """Causal softmax(q k^T / sqrt(D)) v. q: (B, H, T, D), the last T of S tokens; k, v: (B, K, S, D).

    With T = 1, a mask (B, 1, 1, S) may say which keys each row sees.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    # On a CPU two plain matmuls train 2 to 3 times faster than the fused kernel, whose backward pass is slow, as long
    # as the (T, S) scores are small.
    fused = q.is_cuda or T == 1 or T * S > 2**20
    if 1 < T < S or not fused:
        # query t is token S - T + t: it sees the keys up to that one
        mask = q.new_full((T, S), -torch.inf)
        mask = mask.triu(1 + S - T)
    if fused:
        # is_causal, where nothing is cached, skips the half of the scores that a mask would throw away
        is_causal = T == S > 1
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
    def __init__(self, config):
        super().__init__()
        linear = PackedLinear if config.packed else TernaryLinear
        C = config.n_embd
        self.head_dim = C // config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        n_kv = self.n_kv_head * self.head_dim
        self.q_proj = linear(C, C, config.group_size)
        self.k_proj = linear(C, n_kv, config.group_size)
        self.v_proj = linear(C, n_kv, config.group_size)
        self.o_proj = linear(C, C, config.group_size)
        self.sub_norm = nn.Identity()
        if config.sub_norm:
            self.sub_norm = RMSNorm(C, config.norm_eps)

    # copied from model.py
    def init_cache(self, batch_size, max_len, **kind):
        shape = (batch_size, self.n_kv_head, max_len, self.head_dim)
        k = torch.zeros(shape, **kind)
        v = torch.zeros(shape, **kind)
        return {"k": k, "v": v}

    def forward(self, x, rope, cache=None, start=0):
        B, T, C = x.shape
        D = self.head_dim
        q = self.q_proj(x).view(B, T, -1, D)                                # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, D)                                # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, D)                                # (B, T, K, D)
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        q = q.transpose(1, 2)                                               # (B, H, T, D)
        k = k.transpose(1, 2)                                               # (B, K, T, D)
        v = v.transpose(1, 2)                                               # (B, K, T, D)
        mask = None
        if cache is not None:
            k, v, mask = remember(cache, k, v, start)                       # (B, K, S, D)
        y = attend(q, k, v, mask)                                           # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.o_proj(self.sub_norm(y))


class MLP(nn.Module):
    """down(norm(act(gate(x)) * up(x)))."""

    def __init__(self, config):
        super().__init__()
        linear = PackedLinear if config.packed else TernaryLinear
        C = config.n_embd
        n_hidden = config.n_hidden
        if not n_hidden:
            unit = config.group_size or 32
            n_hidden = unit * math.ceil(8 * C / 3 / unit)
        self.act = config.act
        self.gate_proj = linear(C, n_hidden, config.group_size)
        self.up_proj = linear(C, n_hidden, config.group_size)
        self.down_proj = linear(n_hidden, C, config.group_size)
        self.sub_norm = nn.Identity()
        if config.sub_norm:
            self.sub_norm = RMSNorm(n_hidden, config.norm_eps)

    def forward(self, x):
        gate = self.gate_proj(x)                                            # (B, T, F)
        if self.act == "silu":
            gate = F.silu(gate)
        else:
            gate = F.relu(gate).square()
        y = gate * self.up_proj(x)
        return self.down_proj(self.sub_norm(y))


class Residual(nn.Module):
    def forward(self, x, f):
        return x + f(x)


class Streams(nn.Module):
    """mHC-lite: n residual streams, mixed around one layer by a convex combination of all n! permutations.

    These are exactly the doubly stochastic matrices (Birkhoff), so the sum of the streams passes unchanged and does not
    grow with depth. The coefficients come from the token itself, or are the same for all tokens with static_streams.
    arXiv 2601.05732 (mHC-lite), after hyper-connections (Zhu et al. 2024). x: (B, T, n, C).
    """

    def __init__(self, config, index):
        super().__init__()
        n = config.n_streams
        width = n * config.n_embd
        self.n = n
        orders = torch.tensor(list(itertools.permutations(range(n))))       # (n!, n), identity first
        permutations = F.one_hot(orders).float()                            # (n!, n, n)
        self.register_buffer("permutations", permutations, persistent=False)
        # Only differences of logits count in a softmax: the identity's is left out if static, and starts at 0 if not.
        n_res = len(orders) - config.static_streams
        self.sizes = n, n, n_res  # of pre, post, res
        # each layer starts out reading and writing mostly one stream, in turn
        favoured = torch.where(torch.arange(n) == index % n, 1.0, -1.0)     # (n)
        unlikely = torch.full((n_res,), -8.0)
        self.bias = nn.Parameter(torch.cat((favoured, favoured, unlikely)))
        self.proj = None
        if config.static_streams:
            return
        with torch.no_grad():
            self.bias[2 * n] = 0
        self.gain = nn.Parameter(torch.ones(width))  # of an RMSNorm over all streams
        self.proj = nn.Parameter(torch.empty(sum(self.sizes), width))
        self.norm_eps = config.norm_eps
        self.scale = nn.Parameter(torch.full((3,), 0.01))  # of pre, post, res

    def coefficients(self, x):
        """-> pre (..., n), post (..., n), res (..., n, n), in float32; stream s goes to stream t with res[s, t]."""
        logits = self.bias                                                  # (2 n + n_res)
        if self.proj is not None:
            x = x.flatten(-2)                                               # (B, T, n * C)
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            squares = torch.linalg.vecdot(wide, wide)                       # (B, T)
            norm = torch.rsqrt(squares / x.size(-1) + self.norm_eps)
            scales = [s.expand(size) for s, size in zip(self.scale, self.sizes, strict=True)]
            scale = torch.cat(scales)                                       # (2 n + n_res)
            y = F.linear(x, self.proj * self.gain)                          # (B, T, 2 n + n_res)
            # the norm of x is a factor of the product: cheaper to apply to its n! numbers than to the n * C of x
            y = y * norm[..., None]
            logits = torch.addcmul(logits, y, scale)
        pre, post, res = logits.split(self.sizes, -1)
        missing = len(self.permutations) - res.size(-1)
        res = F.pad(res, (missing, 0)).softmax(-1)                          # (..., n!)
        mix = self.permutations.flatten(1)                                  # (n!, n * n)
        with torch.autocast(res.device.type, enabled=False):
            # in bfloat16 the rows would miss 1 by half a percent
            if self.proj is None:
                res = mix.mT @ res                                          # (n * n)
            else:
                res = res @ mix                                             # (B, T, n * n)
        res = res.unflatten(-1, (self.n, self.n))
        return pre.sigmoid(), 2 * post.sigmoid(), res

    def forward(self, x, f):
        B, T, n, C = x.shape
        pre, post, res = self.coefficients(x)
        # one product mixes both: the layer's input in row 0, the streams that pass it by in the others
        weights = torch.cat((pre[..., None, :], res.mT), -2).to(x.dtype)    # (..., n + 1, n)
        weights = weights.expand(B, T, n + 1, n).reshape(-1, n + 1, n)
        mixed = weights @ x.reshape(-1, n, C)                               # (B*T, n + 1, C)
        y = f(mixed[:, 0].view(B, T, C))
        post = post.to(x.dtype).expand(B, T, n).reshape(-1, n, 1)
        x = torch.baddbmm(mixed[:, 1:], post, y.view(-1, 1, C))             # (B*T, n, C)
        return x.view(B, T, n, C)


class Block(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.attn_residual = residual(config, 2 * index)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.mlp_residual = residual(config, 2 * index + 1)

    def forward(self, x, rope, cache=None, start=0):
        def attention(x):
            return self.attn(self.attn_norm(x), rope, cache, start)

        def mlp(x):
            return self.mlp(self.mlp_norm(x))

        x = self.attn_residual(x, attention)
        return self.mlp_residual(x, mlp)


def residual(config, index):
    """The residual connection around layer `index` of 2 n_layer: attention and MLP count one each."""
    if config.n_streams == 1:
        return Residual()
    return Streams(config, index)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size} must be at least 1 to build a model")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # and the head: BitNet ties them
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.init_weights()

    def init_weights(self):
        """Normal weights, so small at the outputs that every model starts at a loss of ln V; mixing starts static."""
        c = self.config
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue  # norm gains stay 1
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # GPT-2: each of 2 n_layer layers adds to the residual stream, whose size must not grow with depth
                std /= math.sqrt(2 * c.n_layer)
            elif p is self.embed.weight:
                # the logit of the token itself starts at std * n_embd, times the streams that are summed
                std = min(std, 4 / c.n_embd) / c.n_streams
            elif "residual" in name:
                std = 0.0  # mHC-lite: at first all tokens are mixed alike
            nn.init.normal_(p, std=std)

    def _hidden(self, idx, cache=None):
        """idx (B, T) -> what the head reads, (B, T, C); a cache is read and filled in."""
        c = self.config
        B, T = idx.shape
        start = 0  # position of the first token
        layers = [None] * c.n_layer
        if cache is not None:
            layers = cache["layers"]
            start = cache["pos"]
            # rows of different lengths have a position each
            start = start[:, None] if start.dim() else int(start)           # (B, 1)
        x = F.embedding(idx, self.embedding())                              # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # the residual stream too: half the memory traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if c.n_streams > 1:
            x = x[..., None, :].expand(B, T, c.n_streams, -1)               # (B, T, n, C)
        positions = torch.arange(T, device=idx.device) + start              # (T), or (B, 1)
        head_dim = c.n_embd // c.n_head
        cos, sin = rope_table(positions, head_dim, c.rope_theta)
        rope = cos.to(x.dtype), sin.to(x.dtype)                             # (..., T, D) each
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, rope, layer, start)
        x = self.norm(x)
        if c.n_streams > 1:
            x = x.sum(-2)
        return x                                                            # (B, T, C)

    def embedding(self):
        """(V, C), rounded to float16 as it ships; the gradient goes to the float32 weights unchanged."""
        w = self.embed.weight
        rounding = w.half().to(w.dtype) - w
        return w + rounding.detach()

    def unembed(self, x):
        return F.linear(x, self.embedding()).float()                        # (..., V)

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
        """An empty cache for max_len tokens: keys and values of every layer, and the position."""
        weight = self.embed.weight
        kind = {"dtype": weight.dtype, "device": weight.device}
        if self.compiled_step(renew=True):
            kind["dtype"] = torch.float64  # it computes in that
        layers = [block.attn.init_cache(batch_size, max_len, **kind) for block in self.blocks]
        pos = torch.zeros((), dtype=torch.long)
        return {"pos": pos, "layers": layers}

    def step(self, idx, cache):
        """idx: (B, T >= 1) more ids -> (logits (B, V) float32 of the last, cache). Use the returned cache.

        With T = 1, cache["pos"] may be (B,) instead of (): rows of different lengths, as a server has them.
        """
        compiled = self.compiled_step()
        if compiled:
            logits = compiled(idx, cache)                                   # (B, V)
        else:
            x = self._hidden(idx, cache)                                    # (B, T, C)
            logits = self.unembed(x[:, -1])                                 # (B, V)
        return logits, cache | {"pos": cache["pos"] + idx.size(1)}

    def compiled_step(self, renew=False):
        """The packed model's step in C++, which must agree with the Python above; None where it does not or cannot."""
        if not self.config.packed:
            return None
        from kernels import ternary
        return ternary.stepper(self, rope_table, renew)

    def param_groups(self):
        """{role: [parameters]}: optim.py knows what each role gets. A tied matrix is an embedding."""
        if self.config.packed:
            raise ValueError("packed=True cannot be trained: start from the model that was packed")
        groups = {"embed": [self.embed.weight], "ternary": [], "vector": []}
        for name, p in self.named_parameters():
            if p is self.embed.weight:
                continue
            # the matrices that mix streams are small: orthogonal updates are not for them
            is_ternary = p.dim() == 2 and "residual" not in name
            role = "ternary" if is_ternary else "vector"
            groups[role].append(p)
        return {role: params for role, params in groups.items() if params}

    def flops_per_token(self, seq_len):
        """Training FLOPs per token, 2 per multiply-add, backward = 2 x forward: 6 N + 12 L C T (PaLM, appendix B).

        N counts the matrices that multiply, the tied head included; attention counts all T x T scores. Mixing n streams
        is n + 1 by n by C and n by 1 by C, its coefficients n! by n x n (without a gradient of the permutations).
        """
        L = self.config.n_layer
        C = self.config.n_embd
        n = self.config.n_streams
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        attention = 12 * L * C * seq_len
        flops = 6 * matrices + attention
        if n > 1:
            mixing = 6 * n * (n + 2) * C
            if not self.config.static_streams:
                mixing += 4 * math.factorial(n) * n * n
            flops += 2 * L * mixing  # 2 L layers: attention and MLP count one each
        return flops

    def deploy_state(self):
        """{name: tensor} of this model with `packed=True`: 2-bit codes and their scales, a float16 embedding."""
        from kernels import ternary
        state = {}
        for name, tensor in self.state_dict().items():
            if not name.endswith("_proj.weight"):
                state[name] = tensor
        state["embed.weight"] = self.embed.weight.detach().half()
        for name, module in self.named_modules():
            if isinstance(module, TernaryLinear):
                # from the shadow weights: rounding what is rounded already would shrink the scale
                t, scale = absmean(module.weight.detach(), module.group_size)
                state[f"{name}.codes"] = ternary.pack(t)
                state[f"{name}.scales"] = scale.t().contiguous()            # () or (K / group_size, N)
        return state
