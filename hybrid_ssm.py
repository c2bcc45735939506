"""Hybrid: state space layers and some attention; exactly Jamba with ssm="mamba1", Granite with "mamba2", the faster.

    python prepare/shakespeare.py --tokenizer=byte
    python train.py config/nexus_bytes.py --device=cpu
    python train.py config/nexus_bytes.py --device=cpu --ssm=mamba1
    python bench/hybrid.py

Every layer is a mixer and an MLP, each with a residual connection; the mixer of layer i is attention where
i % attn_layer_period == attn_layer_offset, else Mamba (Lieber et al. 2024, Jamba, without the experts).

Legend: B batch, T tokens, S keys seen so far (cache included), C n_embd, H query heads, K key/value heads,
D head size, F MLP width, V vocabulary; in the state space layers E expand * n_embd channels (HF: intermediate_size),
N d_state numbers per channel, L tokens of a chunk, G heads of D channels (mamba2).
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

SPAN = 16  # mamba1: tokens between the states that are kept for the backward pass
WORK = 2**18  # mamba1: state numbers to work on at a time, few enough to stay in the CPU's cache
CHUNK = 64  # mamba2: tokens that see each other through one matrix


@dataclass(frozen=True)
class Config:
    n_layer: int = 6                # blocks, each a mixer and an MLP
    attn_layer_period: int = 6      # one layer in this many is attention:
    attn_layer_offset: int = 1      # this one (counted from 0); the others are state space layers
    n_head: int = 4                 # attention: query heads
    n_kv_head: int = 0              # key/value heads, shared by n_head / n_kv_head queries each; 0: n_head
    n_embd: int = 128               # width of the residual stream
    n_hidden: int = 0               # width of the MLP; 0: 8/3 of n_embd (up to a multiple of 32)
    vocab_size: int = 0             # 0: the dataset's
    block_size: int = 256           # longest context, in tokens
    ssm: Literal["mamba1", "mamba2"] = "mamba2"  # decays per channel and state as in Jamba, or per head (faster)
    expand: int = 2                 # channels of a state space layer, as a multiple of n_embd
    d_state: int = 0                # state per channel; 0: 16 with mamba1, 64 with mamba2
    d_conv: int = 4                 # tokens that the convolution before the state space sees
    dt_rank: int = 0                # mamba1: rank of the step sizes; 0: n_embd / 16, rounded up
    ssm_head_dim: int = 64          # mamba2: channels that share a decay
    rope: bool = False              # positions in the attention layers; Jamba has none
    tie_embeddings: bool = False    # one matrix for the embedding and the head
    qk_norm: bool = False           # RMSNorm on every query and key head
    dropout: float = 0.0            # on the embedding and on what each layer adds
    rope_theta: float = 10000.0     # base of RoPE's wavelengths
    norm_eps: float = 1e-6          # inside the root of RMSNorm

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size", "attn_layer_period", "expand", "d_conv",
                     "ssm_head_dim"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
        if not 0 <= self.attn_layer_offset < self.attn_layer_period:
            raise ValueError(f"attn_layer_offset={self.attn_layer_offset} must be in [0, "
                             f"attn_layer_period={self.attn_layer_period})")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.rope and self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd={self.n_embd} / n_head={self.n_head} must be even: RoPE rotates pairs of numbers")
        if self.ssm == "mamba2" and self.expand * self.n_embd % self.ssm_head_dim:
            raise ValueError(f"expand={self.expand} * n_embd={self.n_embd} must be a multiple of "
                             f"ssm_head_dim={self.ssm_head_dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")


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


# copied from model.py
class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.head_dim = C // config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        n_kv = self.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, n_kv, bias=False)
        self.v_proj = nn.Linear(C, n_kv, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

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
        q = rotate(self.q_norm(q), *rope)
        k = rotate(self.k_norm(k), *rope)
        q = q.transpose(1, 2)                                               # (B, H, T, D)
        k = k.transpose(1, 2)                                               # (B, K, T, D)
        v = v.transpose(1, 2)                                               # (B, K, T, D)
        mask = None
        if cache is not None:
            k, v, mask = remember(cache, k, v, start)                       # (B, K, S, D)
        y = attend(q, k, v, mask)                                           # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
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


def causal_conv(x, weight, bias, window):
    """y_t = bias + sum_j weight_j x_{t-k+1+j} in each channel, as k shifted sums.

    x: (B, T, E); weight: (E, 1, k); window: (B, k - 1, E), the inputs before x -> y (B, T, E), the next window.
    """
    T = x.size(1)
    seen = torch.cat((window, x), 1)                                        # (B, k - 1 + T, E)
    y = bias
    for j in range(weight.size(-1)):
        y = torch.addcmul(y, seen[:, j:j + T], weight[:, 0, j])             # (B, T, E)
    return y, seen[:, T:]


# The selective scan of Mamba (Gu & Dao 2023, section 3): in each channel, for each of its N states,
#
#     h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,    y_t = sum over N of C_t h_t
#
# The state is N times as large as the input, so the cost is in passing over it, and the plain recurrence passes over it
# least often. It is also stable for any dt: no decay exceeds 1, and there is no division by one, as with cumulative
# products. One step works on all of (B, N, E), which is enough to keep a CPU busy and fits its cache; where B is small,
# everything but the recurrence itself takes L tokens at once. Every SPAN-th state is kept; the backward pass recomputes
# those between, then follows the adjoint of h from the end: g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}.
class SelectiveScan(torch.autograd.Function):
    """x, dt: (T, B, E); A: (N, E), negative; B, C: (T, B, N); h: (B, N, E) -> y (T, B, E), the last h."""

    @staticmethod
    def states(x, dt, A, B, h, decay, out):
        """Fill decay and out (L, B, N, E) with exp(dt A) and with the states that follow h -> the last of them."""
        torch.mul(dt[:, :, None], A / math.log(2), out=decay)
        torch.exp2(decay, out=decay)  # three times as fast as exp where that is MKL's
        xdt = x * dt                                                        # (L, B, E)
        torch.mul(xdt[:, :, None], B[..., None], out=out)
        for t in range(len(out)):
            h = out[t].addcmul_(decay[t], h)
        return h

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        T = len(x)
        affordable = max(1, WORK // h.numel())  # tokens at once,
        L = 2 ** (affordable.bit_length() - 1)  # rounded down to a power of 2, to divide SPAN
        L = min(SPAN, L)
        y = torch.empty_like(x)
        starts = []  # the states before tokens 0, SPAN, 2 SPAN, ...
        decay, out, spare = h.new_empty(3, min(L, T), *h.shape)             # (L, B, N, E) each
        with torch.autocast(x.device.type, enabled=False):
            for t in range(0, T, L):
                if t % SPAN == 0:
                    starts.append(h.clone())
                n = min(L, T - t)
                now = slice(t, t + L)
                h = SelectiveScan.states(x[now], dt[now], A, B[now], h, decay[:n], out[:n])
                sums = C[now, :, None] @ out[:n]                            # (L, B, 1, E)
                y[now] = sums[:, :, 0]
                out, spare = spare, out  # h is a part of out: write to the other one next
        ctx.L = L
        ctx.save_for_backward(x, dt, A, B, C, *starts)
        return y, h.clone()

    @staticmethod
    def backward(ctx, dy, g):
        """dy: (T, B, E), g: (B, N, E), the gradients of y and of the last h."""
        x, dt, A, B, C, *starts = ctx.saved_tensors
        T = len(x)
        L = ctx.L
        dx = torch.empty_like(x)
        ddt = torch.empty_like(dt)
        dB = torch.empty_like(B)
        dC = torch.empty_like(C)
        dA = torch.zeros_like(g)                                            # (B, N, E), summed over B at the end
        decay = g.new_empty(SPAN, *g.shape)
        h = g.new_empty(SPAN + 1, *g.shape)  # h[0] is the state before the span
        adjoint, flow, dlog = g.new_empty(3, L, *g.shape)                   # (L, B, N, E) each
        ones = A.new_ones(1, len(A))  # sums over N as a product
        with torch.autocast(x.device.type, enabled=False):
            for begin in reversed(range(0, T, SPAN)):
                end = min(T, begin + SPAN)
                pieces = [slice(t, min(t + L, end)) for t in range(begin, end, L)]
                h[0] = starts.pop()
                for now in pieces:
                    i = now.start - begin
                    j = now.stop - begin
                    SelectiveScan.states(x[now], dt[now], A, B[now], h[i], decay[i:j], h[i + 1:j + 1])
                for now in reversed(pieces):
                    i = now.start - begin
                    j = now.stop - begin
                    n = j - i
                    before = h[i:j]                                         # (L, B, N, E), of each token
                    after = h[i + 1:j + 1]                                  # (L, B, N, E)
                    for k in reversed(range(n)):
                        # g comes in as exp(dt_{t+1} A) g_{t+1}, the part of the adjoint from the token after
                        t = now.start + k
                        torch.addcmul(g, dy[t, :, None], C[t, :, :, None], out=adjoint[k])
                        g = torch.mul(decay[i + k], adjoint[k], out=flow[k])
                    a = adjoint[:n]
                    xdt = x[now] * dt[now]                                  # (L, B, E)
                    dB[now] = (a @ xdt[..., None])[..., 0]
                    dC[now] = (after @ dy[now, ..., None])[..., 0]
                    dxdt = B[now, :, None] @ a                              # (L, B, 1, E)
                    dx[now] = dxdt[:, :, 0]  # the factor dt follows below
                    # the gradient of dt A
                    p = torch.mul(flow[:n], before, out=dlog[:n])
                    for k in range(n):
                        dA.addcmul_(p[k], dt[now.start + k, :, None])
                    ddt[now] = (ones @ p.mul_(A))[:, :, 0]
        ddt.addcmul_(dx, x)
        dx.mul_(dt)
        return dx, ddt, dA.sum(0), dB, dC, g.clone()


def ssd(x, dt, A, B, C, h=None):
    """The same recurrence with one decay per head, as matrices (Dao & Gu 2024, Mamba-2, section 6).

    Inside a chunk y = (C B^T * decays) dt x, between chunks the state is carried. x: (B, T, E); dt: (B, T, G);
    A: (G,), negative; B, C: (B, T, N); h: (B, N, E) or None -> y (B, T, E), the last h (None if h was).
    """
    T = x.size(1)
    G = len(A)
    L = min(CHUNK, T)
    # sums of logarithms, and above all their differences, need more digits than float32 has where dt is large
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    if T % L:
        # fill up the last chunk: with dt = 0 the state stays as it is
        x, dt, B, C = (F.pad(t, (0, 0, 0, -T % L)) for t in (x, dt, B, C))
    x, dt, B, C = (t.unflatten(1, (-1, L)) for t in (x, dt, B, C))          # (B, n, L, ...), n chunks
    x = x.unflatten(-1, (G, -1)) * dt[..., None]                            # (B, n, L, G, D)
    rates = A / math.log(2)
    logs = (dt * rates).to(exact)  # of the decays, base 2
    sums = logs.cumsum(2)                                                   # (B, n, L, G)

    # inside a chunk token t sees token s with the decays of s + 1 to t
    past = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
    between = sums.mT[..., None] - sums.mT[..., None, :]                    # (B, n, G, L, L)
    between = between.to(x.dtype).masked_fill(~past, -torch.inf)
    decay = between.exp2()
    scores = C @ B.mT                                                       # (B, n, L, L)
    weights = scores[:, :, None] * decay                                    # (B, n, G, L, L)
    y = weights @ x.transpose(2, 3)                                         # (B, n, G, L, D)
    y = y.transpose(2, 3)                                                   # (B, n, L, G, D)

    if h is not None or x.size(1) > 1:
        before, h = chunk_states(x, B, sums, h)                             # (B, n, N, E)
        carried = C @ before                                                # (B, n, L, E)
        carried = carried.unflatten(-1, (G, -1))                            # (B, n, L, G, D)
        faded = sums.to(x.dtype).exp2()                                     # (B, n, L, G)
        y = torch.addcmul(y, carried, faded[..., None])
    y = y.flatten(3).flatten(1, 2)                                          # (B, n * L, E)
    return y[:, :T], h


def chunk_states(x, B, sums, h):
    """x: (B, n, L, G, D), times dt; B: (B, n, L, N); sums: (B, n, L, G), log2 of the decays from a chunk's beginning
    to each token; h: (B, N, E) or None -> the states before each chunk, (B, n, N, E), and the last (None if h was).
    """
    n = x.size(1)
    D = x.size(-1)
    going = n if h is not None else n - 1  # chunks whose state is needed after them
    ends = sums[:, :going, -1:]                                             # (B, n, 1, G)
    # what is left of a token at the end of its chunk
    left = (ends - sums[:, :going]).to(x.dtype).exp2()                      # (B, n, L, G)
    kept = x[:, :going] * left[..., None]                                   # (B, n, L, G, D)
    new = B[:, :going].mT @ kept.flatten(3)                                 # (B, n, N, E)
    # and of the state before the chunk
    keep = ends.to(x.dtype).exp2()                                          # (B, n, 1, G)
    keep = keep.repeat_interleave(D, -1)                                    # (B, n, 1, E)
    states = [torch.zeros_like(new[:, 0]) if h is None else h]
    for i in range(going):
        after = torch.addcmul(new[:, i], keep[:, i], states[-1])            # (B, N, E)
        states.append(after)
    before = torch.stack(states[:n], 1)
    if h is not None:
        h = states[-1]
    return before, h


def spread_steps(n):
    """(n,) biases whose softplus is log-uniform in [1e-3, 1e-1]: memories of many lengths from the start."""
    logs = torch.empty(n).uniform_(math.log(1e-3), math.log(1e-1))
    dt = logs.exp()
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


class Mamba1(nn.Module):
    """Mamba as in Jamba, with norms on dt, B and C."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        E = config.expand * C
        N = config.d_state or 16
        self.n_state = N
        self.dt_rank = config.dt_rank or math.ceil(C / 16)
        self.in_proj = nn.Linear(C, 2 * E, bias=False)
        self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E)
        self.x_proj = nn.Linear(E, self.dt_rank + 2 * N, bias=False)
        self.dt_norm = RMSNorm(self.dt_rank, config.norm_eps)
        self.b_norm = RMSNorm(N, config.norm_eps)
        self.c_norm = RMSNorm(N, config.norm_eps)
        self.dt_proj = nn.Linear(self.dt_rank, E)
        A = torch.arange(1.0, N + 1)                                        # (N)
        self.A_log = nn.Parameter(A.log().repeat(E, 1))                     # (E, N)
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, C, bias=False)
        with torch.no_grad():
            self.dt_proj.bias.copy_(spread_steps(E))

    def init_cache(self, batch_size, max_len, **kind):
        kind["dtype"] = torch.promote_types(kind["dtype"], torch.float32)
        E, _, k = self.conv1d.weight.shape
        conv = torch.zeros(batch_size, k - 1, E, **kind)
        h = torch.zeros(batch_size, self.n_state, E, **kind)
        return {"conv": conv, "h": h}

    def forward(self, x, rope, cache=None, start=0):
        x, z = self.in_proj(x).chunk(2, -1)                                 # (B, T, E) each
        dtype = z.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        state = cache or self.init_cache(len(x), 0, dtype=x.dtype, device=x.device)
        x, window = causal_conv(x, self.conv1d.weight, self.conv1d.bias, state["conv"])
        x = F.silu(x)
        sizes = self.dt_rank, self.n_state, self.n_state
        dt, B, C = self.x_proj(x.to(dtype)).split(sizes, -1)
        dt = F.linear(self.dt_norm(dt), self.dt_proj.weight).to(x.dtype)    # (B, T, E)
        dt = F.softplus(dt + self.dt_proj.bias)
        B = self.b_norm(B).to(x.dtype)                                      # (B, T, N)
        C = self.c_norm(C).to(x.dtype)                                      # (B, T, N)
        A = -self.A_log.to(x.dtype).exp().T.contiguous()                    # (N, E)
        xs, dts = x.transpose(0, 1), dt.transpose(0, 1)                     # (T, B, E) each
        Bs, Cs = B.transpose(0, 1), C.transpose(0, 1)                       # (T, B, N) each
        y, h = SelectiveScan.apply(xs, dts, A, Bs, Cs, state["h"])
        if cache is not None:
            cache["conv"].copy_(window)
            cache["h"].copy_(h)
        y = torch.addcmul(y.transpose(0, 1), x, self.D).to(dtype)           # (B, T, E)
        return self.out_proj(y * F.silu(z))


class Mamba2(nn.Module):
    """Mamba-2: one projection makes x, B, C and dt, and the channels of a head share dt and a decay."""

    def __init__(self, config):
        super().__init__()
        E = config.expand * config.n_embd
        N = config.d_state or 64
        self.n_state = N
        self.n_head = E // config.ssm_head_dim
        W = E + 2 * N  # channels of x, B and C together
        self.in_proj = nn.Linear(config.n_embd, E + W + self.n_head, bias=False)
        self.conv1d = nn.Conv1d(W, W, config.d_conv, groups=W)
        self.dt_bias = nn.Parameter(spread_steps(self.n_head))
        A = torch.empty(self.n_head).uniform_(1, 16)
        self.A_log = nn.Parameter(A.log())
        self.D = nn.Parameter(torch.ones(self.n_head))
        self.norm = RMSNorm(E, config.norm_eps)
        self.out_proj = nn.Linear(E, config.n_embd, bias=False)

    def init_cache(self, batch_size, max_len, **kind):
        kind["dtype"] = torch.promote_types(kind["dtype"], torch.float32)
        W, _, k = self.conv1d.weight.shape
        conv = torch.zeros(batch_size, k - 1, W, **kind)
        h = torch.zeros(batch_size, self.n_state, self.out_proj.in_features, **kind)
        return {"conv": conv, "h": h}

    def forward(self, x, rope, cache=None, start=0):
        E, N = self.out_proj.in_features, self.n_state
        W, _, k = self.conv1d.weight.shape
        z, x, dt = self.in_proj(x).split((E, W, self.n_head), -1)
        dtype = x.dtype
        wide = torch.promote_types(dtype, torch.float32)
        state = cache
        if cache is None:
            # no h at all is cheaper than one of zeros
            state = {"conv": x.new_zeros(len(x), k - 1, W, dtype=wide), "h": None}
        x, window = causal_conv(x.to(wide), self.conv1d.weight, self.conv1d.bias, state["conv"])
        x, B, C = F.silu(x).split((E, N, N), -1)                            # (B, T, E), (B, T, N) twice
        dt = F.softplus(dt.to(wide) + self.dt_bias)                         # (B, T, G)
        with torch.autocast(x.device.type, enabled=False):
            A = -self.A_log.to(wide).exp()                                  # (G)
            y, h = ssd(x, dt, A, B, C, state["h"])
        if cache is not None:
            cache["conv"].copy_(window)
            cache["h"].copy_(h)
        D = self.D.repeat_interleave(E // self.n_head)
        y = torch.addcmul(y, x, D).to(dtype)                                # (B, T, E)
        return self.out_proj(self.norm(y * F.silu(z)))


class Block(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        mixer = Mamba1 if config.ssm == "mamba1" else Mamba2
        if index % config.attn_layer_period == config.attn_layer_offset:
            mixer = Attention
        self.mixer_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mixer = mixer(config)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, cache=None, start=0):
        y = self.mixer(self.mixer_norm(x), rope, cache, start)
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
        """Normal weights, so small at the outputs that every model starts at a loss of ln V. The rest is as the mixers
        made it: A = -1 ... -N (mamba1) or in [-16, -1] (mamba2), dt in [0.001, 0.1], convolutions in [-1, 1] / sqrt(k).
        """
        for name, p in self.named_parameters():
            if p.dim() != 2 or name.endswith("A_log"):
                continue
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
                # GPT-2: each of 2 n_layer layers adds to the residual stream, whose size must not grow with depth
                std /= math.sqrt(2 * self.config.n_layer)
            elif name.endswith("dt_proj.weight"):
                # it multiplies a normalised vector: at the start dt varies by a factor of e
                std = p.size(1) ** -0.5
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
        if c.rope:
            positions = torch.arange(T, device=idx.device) + start          # (T), or (B, 1)
            head_dim = c.n_embd // c.n_head
            cos, sin = rope_table(positions, head_dim, c.rope_theta)
        else:
            cos = torch.ones(T, 1, device=x.device)  # no rotation
            sin = torch.zeros(T, 1, device=x.device)
        rope = cos.to(x.dtype), sin.to(x.dtype)                             # (..., T, D or 1) each
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, rope, layer, start)
        return self.norm(x)

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
        """An empty cache for max_len tokens: keys and values, windows and states of every layer, and the position."""
        weight = self.embed.weight
        kind = {"dtype": weight.dtype, "device": weight.device}
        layers = [block.mixer.init_cache(batch_size, max_len, **kind) for block in self.blocks]
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

    def param_groups(self):
        """{role: [parameters]}: optim.py knows what each role gets. A tied matrix is an embedding."""
        groups = {"embed": [self.embed.weight], "head": [], "matrix": [], "vector": [], "ssm": []}
        if self.head is not None:
            groups["head"].append(self.head.weight)
        for name, p in self.blocks.named_parameters():
            if "conv1d" in name or name.endswith(("A_log", ".D", "dt_bias", "dt_proj.bias")):
                role = "ssm"
            else:
                role = "matrix" if p.dim() == 2 else "vector"
            groups[role].append(p)
        groups["vector"].append(self.norm.weight)
        return {role: params for role, params in groups.items() if params}

    def flops_per_token(self, seq_len):
        """Training FLOPs per token, 2 per multiply-add of a matrix product, backward = 2 x forward (PaLM, appendix B).

        6 N for the matrices that multiply, 12 C T for an attention layer; mamba1 sums the state once forward and four
        times backward, all else in it is elementwise; mamba2 has two products within chunks and two between them.
        """
        c = self.config
        T = seq_len
        matrices = self.param_groups()["matrix"]
        n = sum(p.numel() for p in matrices)
        n += self.embed.weight.numel()  # of the head, tied or not: it has the same shape
        E = c.expand * c.n_embd
        if c.ssm == "mamba1":
            scan = 10 * (c.d_state or 16) * E
        else:
            N = c.d_state or 64
            L = min(CHUNK, T)
            chunks = math.ceil(T / CHUNK)
            scan = 6 * (N + E) * chunks * L * L
            if chunks > 1:
                scan += 6 * N * E * (2 * chunks - 1) * L
            scan /= T
        attention = 12 * c.n_embd * T
        n_attention = sum(isinstance(block.mixer, Attention) for block in self.blocks)
        n_scan = c.n_layer - n_attention
        return 6 * n + n_attention * attention + n_scan * scan
