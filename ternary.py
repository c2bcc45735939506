"""BitNet b1.58: weights of -1, 0 and 1, activations of 8 bits (Ma et al. 2024); optionally mHC-lite residual streams.

Trained, each matrix is kept in float32 (the shadow) and rounded for use; packed (`Config.packed`), it takes 2 bits a
weight and runs on integers (kernels/ternary.py). `diff model.py ternary.py` shows the idea and nothing else.

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
    act: Literal["silu", "relu2"] = "silu"  # of the MLP's gate; llama.cpp knows no relu(x)^2 here
    group_size: int = 0             # inputs that share a scale; 0: one scale a matrix, as BitNet has it
    sub_norm: bool = True           # BitNet's RMSNorms before the last matrix of attention and MLP
    n_streams: int = 1              # mHC-lite: residual streams; 1: the plain residual
    static_streams: bool = False    # mHC-lite: the same mixing for every token
    rope_theta: float = 10000.0     # base of RoPE's wavelengths
    norm_eps: float = 1e-5          # inside the root of RMSNorm
    packed: bool = False            # 2 bits a weight: to run, not to train (sample.py --packed writes it)

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("n_kv_head", "n_hidden", "vocab_size", "group_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd={self.n_embd} / n_head={self.n_head} must be even: RoPE turns pairs of numbers")
        if self.group_size and (self.n_embd % self.group_size or self.n_hidden % self.group_size):
            raise ValueError(f"n_embd={self.n_embd} and n_hidden={self.n_hidden} must be multiples of "
                             f"group_size={self.group_size}")
        if self.n_streams not in (1, 2, 4):
            raise ValueError(f"n_streams={self.n_streams} must be 1, 2 or 4: mHC-lite mixes with all n! permutations")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} and norm_eps={self.norm_eps} must be above 0")


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


def absmean(weight, group_size=0):
    """weight (N, K) -> (t (N, K) of -1, 0, 1; scale, () or (N, K / group_size)), so that t * scale is near weight.

    scale = mean |w|, t = clip(round(w / scale), -1, 1): BitNet b1.58, Ma et al. 2024, section 2.
    """
    if not group_size:
        scale = weight.abs().mean().clamp(min=1e-5)
        return (weight / scale).round().clamp(-1, 1), scale
    groups = weight.unflatten(1, (-1, group_size))                                           # (N, groups, group_size)
    scale = groups.abs().mean(-1).clamp(min=1e-5)
    return (groups / scale[..., None]).round().clamp(-1, 1).flatten(1), scale


def absmax(x):
    """x (..., K) -> (q, scale (..., 1)): q = round(x * scale), integers from -127 to 127 in x's dtype.

    The scale is float32 even where x is bfloat16, whose eight bits would make it 128 and round one in eight otherwise.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = 127 / x.abs().amax(-1, keepdim=True).to(wide).clamp(min=1e-5)
    return (x.to(wide) * scale).round_().to(x.dtype), scale


class TernaryMatmul(torch.autograd.Function):
    """x (..., K), weight (N, K) -> (..., N), both rounded; to the gradient the roundings are the identity.

    t and w_scale are what `absmean` makes of the weight, w = t * w_scale. In float32 and float64 the sums run over
    integers, which are exact in any order: the packed model gives the same bits.
    """

    @staticmethod
    def forward(ctx, x, weight, t, w_scale, w):
        q, scale = absmax(x)
        ctx.save_for_backward(q, scale, w)
        if not w_scale.dim():
            return F.linear(q, t) * (w_scale / scale).to(x.dtype)
        if x.dtype == torch.bfloat16:                      # seven bits of each sum remain anyway: one product is faster
            return (F.linear(q, w) / scale).to(x.dtype)
        y, size = 0, t.size(1) // w_scale.size(1)
        for q_g, t_g, s_g in zip(q.split(size, -1), t.split(size, -1), w_scale.unbind(1), strict=True):
            y = y + F.linear(q_g, t_g) * s_g
        return y / scale

    @staticmethod
    def backward(ctx, grad):
        q, scale, w = ctx.saved_tensors
        grad_weight = (grad / scale).to(grad.dtype).flatten(0, -2).mT @ q.flatten(0, -2)
        return grad @ w, grad_weight.to(torch.promote_types(grad.dtype, torch.float32)), None, None, None


class TernaryLinear(nn.Module):
    def __init__(self, n_in, n_out, group_size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.group_size = group_size
        self.cache = None, None

    @torch.no_grad()
    def rounded(self, dtype):
        t, scale = absmean(self.weight.float(), self.group_size)  # in float32, whatever the model runs in
        w = t * (scale.repeat_interleave(self.group_size, 1) if self.group_size else scale)
        return t.to(dtype), scale.to(torch.promote_types(dtype, torch.float32)), w.to(dtype)

    def forward(self, x):
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if torch.compiler.is_compiling():                  # which could not follow the cache, and fuses the rounding
            return TernaryMatmul.apply(x.to(dtype), self.weight, *self.rounded(dtype))
        made_for = self.weight._version, self.weight.data_ptr(), dtype
        if self.cache[0] != made_for:                      # once per optimizer step, not per micro-batch
            self.cache = made_for, self.rounded(dtype)
        return TernaryMatmul.apply(x.to(dtype), self.weight, *self.cache[1])


class PackedLinear(nn.Module):
    """TernaryLinear at 2 bits a weight, in the layout of kernels/ternary.py."""

    def __init__(self, n_in, n_out, group_size):
        super().__init__()
        self.group_size = group_size
        self.register_buffer("codes", torch.zeros(n_out, -(-n_in // 256) * 64, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros((n_in // group_size, n_out) if group_size else ()))

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
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


# copied from model.py
def rotate(x, cos, sin):
    """Rotate the pair (x_i, x_{i + D/2}) of every head by its position's angle. x: (B, T, heads, D)."""
    cos, sin = cos[..., None, :], sin[..., None, :]                         # (..., T, 1, D), for all heads alike
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
    fused = q.is_cuda or T == 1 or T * S > 1 << 20
    if 1 < T < S or not fused:
        # query t is token S - T + t: it sees the keys up to that one
        mask = q.new_full((T, S), -torch.inf).triu(1 + S - T)
    if fused:
        # is_causal, where nothing is cached, skips the half of the scores that a mask would throw away
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S > 1, enable_gqa=K != H)
    if K != H:
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
    keys, values = cache["k"], cache["v"]                                   # (B, K, max_len, D) each
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
        self.head_dim = config.n_embd // config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.q_proj = linear(config.n_embd, config.n_embd, config.group_size)
        self.k_proj = linear(config.n_embd, self.n_kv_head * self.head_dim, config.group_size)
        self.v_proj = linear(config.n_embd, self.n_kv_head * self.head_dim, config.group_size)
        self.o_proj = linear(config.n_embd, config.n_embd, config.group_size)
        self.sub_norm = RMSNorm(config.n_embd, config.norm_eps) if config.sub_norm else nn.Identity()

    # copied from model.py
    def init_cache(self, batch_size, max_len, **kind):
        shape = (batch_size, self.n_kv_head, max_len, self.head_dim)
        return {"k": torch.zeros(shape, **kind), "v": torch.zeros(shape, **kind)}

    def forward(self, x, rope, cache=None, start=0):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)                     # (B, K, T, D)
        q = rotate(q, *rope).transpose(1, 2)                                                 # (B, H, T, D)
        k = rotate(k, *rope).transpose(1, 2)                                                 # (B, K, T, D)
        mask = None
        if cache is not None:
            k, v, mask = remember(cache, k, v, start)                                        # (B, K, S, D)
        y = attend(q, k, v, mask)
        return self.o_proj(self.sub_norm(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """down(norm(act(gate(x)) * up(x)))."""

    def __init__(self, config):
        super().__init__()
        linear, unit = PackedLinear if config.packed else TernaryLinear, config.group_size or 32
        n_hidden = config.n_hidden or -(-config.n_embd * 8 // 3 // unit) * unit
        self.act = config.act
        self.gate_proj = linear(config.n_embd, n_hidden, config.group_size)
        self.up_proj = linear(config.n_embd, n_hidden, config.group_size)
        self.down_proj = linear(n_hidden, config.n_embd, config.group_size)
        self.sub_norm = RMSNorm(n_hidden, config.norm_eps) if config.sub_norm else nn.Identity()

    def forward(self, x):
        gate = self.gate_proj(x)
        gate = F.silu(gate) if self.act == "silu" else F.relu(gate).square()
        return self.down_proj(self.sub_norm(gate * self.up_proj(x)))


class Residual(nn.Module):
    def forward(self, x, f):
        return x + f(x)


class Streams(nn.Module):
    """mHC-lite: n residual streams, mixed around one layer by a convex combination of all n! permutations.

    That is every doubly stochastic matrix and no other (Birkhoff), so the streams' sum passes unchanged and no depth
    can blow it up. Coefficients come from the token itself, or with static_streams are the same for all.
    arXiv 2601.05732 (mHC-lite), after hyper-connections (Zhu et al. 2024). x: (B, T, n, C).
    """

    def __init__(self, config, index):
        super().__init__()
        n, self.n = config.n_streams, config.n_streams
        orders = torch.tensor(list(itertools.permutations(range(n))))                        # (n!, n), identity first
        self.register_buffer("permutations", F.one_hot(orders).float(), persistent=False)    # (n!, n, n)
        favoured = torch.where(torch.arange(n) == index % n, 1.0, -1.0)  # each layer starts out on a stream of its own
        n_res = len(orders) - config.static_streams        # static: the identity's logit is 0, only differences count
        self.sizes = n, n, n_res
        self.bias = nn.Parameter(torch.cat((favoured, favoured, torch.full((n_res,), -8.0))))
        self.proj = None
        if not config.static_streams:
            with torch.no_grad():
                self.bias[2 * n] = 0
            self.gain = nn.Parameter(torch.ones(n * config.n_embd))  # of an RMSNorm over all streams
            self.proj = nn.Parameter(torch.empty(sum(self.sizes), n * config.n_embd))
            self.norm_eps = config.norm_eps
            self.scale = nn.Parameter(torch.full((3,), 0.01))  # of pre, post, res

    def coefficients(self, x):
        """-> pre (..., n), post (..., n), res (..., n, n), in float32; stream s goes to stream t with res[s, t]."""
        logits = self.bias
        if self.proj is not None:
            x = x.flatten(-2)
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            norm = torch.rsqrt(torch.linalg.vecdot(wide, wide) / x.size(-1) + self.norm_eps)
            scale = torch.cat([s.expand(size) for s, size in zip(self.scale, self.sizes, strict=True)])
            # the norm of x comes out of the product: a pass over the small side of it
            logits = torch.addcmul(logits, F.linear(x, self.proj * self.gain) * norm[..., None], scale)
        pre, post, res = logits.split(self.sizes, -1)
        res = F.pad(res, (len(self.permutations) - res.size(-1), 0)).softmax(-1)
        mix = self.permutations.flatten(1)                                                   # (n!, n * n)
        with torch.autocast(res.device.type, enabled=False):  # in bfloat16 rows would miss 1 by half a percent
            mix = mix.mT @ res if self.proj is None else res @ mix
        return pre.sigmoid(), 2 * post.sigmoid(), mix.unflatten(-1, (self.n, self.n))

    def forward(self, x, f):
        B, T, n, C = x.shape
        pre, post, res = self.coefficients(x)
        weights = torch.cat((pre[..., None, :], res.mT), -2).to(x.dtype).expand(B, T, n + 1, n)
        mixed = weights.reshape(-1, n + 1, n) @ x.reshape(-1, n, C)                          # (B*T, n + 1, C)
        y = f(mixed[:, 0].view(B, T, C))
        post = post.to(x.dtype).expand(B, T, n).reshape(-1, n, 1)
        return torch.baddbmm(mixed[:, 1:], post, y.view(-1, 1, C)).view(B, T, n, C)


class Block(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config)
        self.attn_residual = Residual() if config.n_streams == 1 else Streams(config, 2 * index)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.mlp_residual = Residual() if config.n_streams == 1 else Streams(config, 2 * index + 1)

    def forward(self, x, rope, cache=None, start=0):
        x = self.attn_residual(x, lambda x: self.attn(self.attn_norm(x), rope, cache, start))
        return self.mlp_residual(x, lambda x: self.mlp(self.mlp_norm(x)))


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
        """Normal weights, so small at the exits that every model starts at a loss of ln V; mixing starts static."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue                                   # norm gains stay 1
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.n_layer)  # GPT-2: the residual stream keeps its size with depth
            elif p is self.embed.weight:
                std = min(std, 4 / self.config.n_embd) / self.config.n_streams  # a token's own logit: n * n_embd * std
            elif "residual" in name:
                std = 0.0                                  # mHC-lite: at first no token mixes differently
            nn.init.normal_(p, std=std)

    def _hidden(self, idx, cache=None):
        B, T = idx.shape
        start = 0
        if cache is not None:                              # or (B, 1), a position of its own for each row
            start = cache["pos"][:, None] if cache["pos"].dim() else int(cache["pos"])
        x = F.embedding(idx, self.embedding())                                              # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the residual stream too: half the memory traffic
        if self.config.n_streams > 1:
            x = x[..., None, :].expand(B, T, self.config.n_streams, -1)                      # (B, T, n, C)
        positions = torch.arange(T, device=idx.device) + start
        rope = rope_table(positions, self.config.n_embd // self.config.n_head, self.config.rope_theta)
        rope = [t.to(x.dtype) for t in rope]
        for i, block in enumerate(self.blocks):
            x = block(x, rope, None if cache is None else cache["layers"][i], start)
        x = self.norm(x)
        return x if self.config.n_streams == 1 else x.sum(-2)                                # (B, T, C)

    def embedding(self):
        """(V, C), rounded to float16 as it ships; the gradient goes to the float32 weights unchanged."""
        w = self.embed.weight
        return w + (w.half().to(w.dtype) - w).detach()

    def unembed(self, x):
        return F.linear(x, self.embedding()).float()

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
        kind = {"dtype": torch.float64 if self.compiled_step(renew=True) else weight.dtype, "device": weight.device}
        layers = [block.attn.init_cache(batch_size, max_len, **kind) for block in self.blocks]
        return {"pos": torch.zeros((), dtype=torch.long), "layers": layers}

    def step(self, idx, cache):
        """idx: (B, T >= 1) more ids -> (logits (B, V) float32 of the last, cache). Use the returned cache.

        With T = 1, cache["pos"] may be (B,) instead of (): rows of different lengths, as a server has them.
        """
        compiled = self.compiled_step()
        logits = compiled(idx, cache) if compiled else self.unembed(self._hidden(idx, cache)[:, -1])
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
            raise ValueError("packed=True is to run a model, not to train it: start from the one that was packed")
        groups = {"embed": [self.embed.weight], "ternary": [], "vector": []}
        for name, p in self.named_parameters():
            if p is not self.embed.weight:                 # what mixes streams is small: no orthogonal updates
                groups["ternary" if p.dim() == 2 and "residual" not in name else "vector"].append(p)
        return {role: params for role, params in groups.items() if params}

    def flops_per_token(self, seq_len):
        """Training FLOPs per token, 2 per multiply-add, backward = 2 x forward: 6 N + 12 L C T (PaLM, appendix B).

        N counts the matrices that multiply, the tied head included; attention counts all T x T scores. Mixing n streams
        is n + 1 by n by C and n by 1 by C, its coefficients n! by n x n (without a gradient of the permutations).
        """
        L, C, n = self.config.n_layer, self.config.n_embd, self.config.n_streams
        flops = 6 * sum(p.numel() for p in self.parameters() if p.dim() == 2) + 12 * L * C * seq_len
        if n > 1:
            flops += 2 * L * (6 * n * (n + 2) * C + (not self.config.static_streams) * 4 * math.factorial(n) * n * n)
        return flops

    def deploy_state(self):
        """{name: tensor} of this model with `packed=True`: 2-bit codes and their scales, a float16 embedding."""
        from kernels import ternary
        state = {name: p for name, p in self.state_dict().items() if not name.endswith("_proj.weight")}
        state["embed.weight"] = state["embed.weight"].half()
        for name, module in self.named_modules():
            if isinstance(module, TernaryLinear):          # from the shadow: rounding twice would shrink the scale
                t, scale = absmean(module.weight.detach(), module.group_size)
                state |= {f"{name}.codes": ternary.pack(t), f"{name}.scales": scale.t().contiguous()}
        return state
