"""A model as an ONNX graph, built from its weights: opset 14, IR 7, one file, plain ai.onnx operators.

    from formats import onnx as onnx_format
    onnx_format.write("model.onnx", model)                         # input_ids and a cache -> logits and the cache
    onnx_format.write("model_q4.onnx", model, quant="int4")        # "int8", "int4" and, for ternary models, "q2"
    onnx_format.write("window.onnx", model, window=True)           # (batch, block) ids -> logits of the last one

The layers of our model files are spelled out here a second time, so no graph is written before it has given the
logits of the model's own forward (`hold`). The cache has the names and shapes that onnxruntime-genai and
transformers.js know.

Legend: as in model.py; P tokens in the cache, S = P + T, N outputs and K inputs of a matrix
(in Mamba: E channels, each with N numbers of state).
"""
import copy
import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from formats.check import empty_shape
from formats.graph import Graph, embed, linear, tied_head
from formats.names import QUANTS, head_dim, n_hidden
from formats.reference import differs, in_float64, own_logits, some_ids, widened
from formats.rounding import twin
from formats.weights import is_ternary
from thimble import files
from thimble.files import UserError, short

INT32, INT64 = TensorProto.INT32, TensorProto.INT64
OPSET, IR_VERSION = 14, 7  # what runtimes of 2021 read, such as Elixir's Ortex
MOST_BYTES = 2**31 - 2**20  # of weights: a protobuf message ends at 2 GB
END = 2**31  # as the end of a Slice: up to the last


# ---- small layers
def root_mean_square(g, x, eps):
    """x (..., C) -> (..., 1)."""
    mean = g.ReduceMean(g.Pow(x, 2.0), axes=[-1])
    return g.Sqrt(g.Add(mean, eps))


def rms_norm(g, x, module, name):
    if isinstance(module, torch.nn.Identity):  # where a Config switches the norm off
        return x
    root = root_mean_square(g, x, module.eps)
    y = g.Div(x, root)
    return g.Mul(y, g.weight(module.weight, name))


def silu(g, x):
    return g.Mul(x, g.Sigmoid(x))


def gelu(g, x):
    """The exact one, as F.gelu: x / 2 * (1 + erf(x / sqrt(2)))."""
    half = g.Mul(x, 0.5)
    erf = g.Erf(g.Mul(x, math.sqrt(0.5)))
    return g.Mul(half, g.Add(erf, 1.0))


def softplus(g, x):
    return g.Softplus(x)


def rope_table(g, positions, D, theta):
    """positions (B, T) -> cos and signed sin, (B, T, 1, D), for `rotate`."""
    pairs = torch.arange(0, D, 2)
    freqs = theta ** (-pairs / D)  # (D/2,)
    positions = g.Cast(positions, to=g.float)
    positions = g.Unsqueeze(positions, [2, 3])  # (B, T, 1, 1)
    angles = g.Mul(positions, freqs)
    cos = g.Cos(angles)
    sin = g.Sin(angles)
    cos = g.Concat(cos, cos, axis=-1)
    sin = g.Concat(g.Neg(sin), sin, axis=-1)
    return cos, sin


def rotate(g, x, cos, sin):
    """Turn the pair (x_i, x_{i + D/2}) of every head by its position's angle. x: (B, T, heads, D)."""
    left, right = g.Split(x, n=2, axis=-1)
    kept = g.Mul(x, cos)
    swapped = g.Concat(right, left, axis=-1)
    return g.Add(kept, g.Mul(swapped, sin))


# ---- attention and mlp
class Shared(NamedTuple):
    """What every layer reads, computed once."""
    rope: tuple | None  # cos and sin of each position; None: there is no RoPE
    mask: str  # (B or 1, 1, 1, T, S), 0 or -1e9, to be added to scores
    present: str | None  # (B, T, 1), 0 on padding; None: no layer needs it


def heads(g, x, attn, name, kind, n_head, rope=None):
    """The queries, keys or values (kind "q", "k" or "v") of x (B, T, C) -> (B, n_head, T, D)."""
    proj = getattr(attn, f"{kind}_proj")
    projected = linear(g, x, proj, f"{name}.{kind}_proj", g.config.n_embd)
    y = g.Reshape(projected, [0, 0, n_head, attn.head_dim])  # 0: as it is
    norm = getattr(attn, f"{kind}_norm", None)
    if norm is not None:
        y = rms_norm(g, y, norm, f"{name}.{kind}_norm.weight")
    if rope:
        y = rotate(g, y, *rope)
    return g.Transpose(y, perm=[0, 2, 1, 3])


def attention(g, x, attn, name, i, shared):
    """x (B, T, C) -> (B, T, C); the keys and values of layer i come from the cache and go there."""
    D = attn.head_dim
    K = attn.n_kv_head
    width = g.config.n_head * D  # C, but for heads of another width, as Qwen3's
    q = heads(g, x, attn, name, "q", -1, shared.rope)  # (B, H, T, D)
    k = heads(g, x, attn, name, "k", K, shared.rope)  # (B, K, T, D)
    v = heads(g, x, attn, name, "v", K)
    if g.cached:
        past_shape = ["batch_size", K, "past_sequence_length", D]
        present_shape = ["batch_size", K, "total_sequence_length", D]
        past = g.input(f"past_key_values.{i}.key", past_shape)
        k = g.Concat(past, k, axis=2, name=f"present.{i}.key")  # (B, K, S, D)
        past = g.input(f"past_key_values.{i}.value", past_shape)
        v = g.Concat(past, v, axis=2, name=f"present.{i}.value")
        g.output(f"present.{i}.key", present_shape)
        g.output(f"present.{i}.value", present_shape)
    # queries in K groups, which share their key and value by broadcasting
    q = g.Mul(q, 1 / math.sqrt(D))
    q = g.Reshape(q, [0, K, g.config.n_head // K, -1, D])  # (B, K, H / K, T, D)
    k = g.Transpose(k, perm=[0, 1, 3, 2])  # (B, K, D, S)
    k = g.Unsqueeze(k, [2])  # (B, K, 1, D, S)
    scores = g.MatMul(q, k)  # (B, K, H / K, T, S)
    weights = g.Softmax(g.Add(scores, shared.mask), axis=-1)
    v = g.Unsqueeze(v, [2])  # (B, K, 1, S, D)
    y = g.MatMul(weights, v)  # (B, K, H / K, T, D)
    y = g.Transpose(y, perm=[0, 3, 1, 2, 4])
    y = g.Reshape(y, [0, 0, width])  # (B, T, H * D)
    if hasattr(attn, "sub_norm"):
        y = rms_norm(g, y, attn.sub_norm, f"{name}.sub_norm.weight")
    return linear(g, y, attn.o_proj, f"{name}.o_proj", width)


def mlp(g, x, module, name, n_hidden):
    """x (B, T, C) -> (B, T, C): SwiGLU, GELU, or the MLP of ternary.py."""
    C = g.config.n_embd
    up = linear(g, x, module.up_proj, f"{name}.up_proj", C)  # (B, T, F)
    if not hasattr(module, "gate_proj"):
        up = gelu(g, up)
    else:
        gate = linear(g, x, module.gate_proj, f"{name}.gate_proj", C)
        if getattr(module, "act", "silu") == "relu2":
            gate = g.Pow(g.Relu(gate), 2.0)
        else:
            gate = silu(g, gate)
        up = g.Mul(gate, up)
    if hasattr(module, "sub_norm"):
        up = rms_norm(g, up, module.sub_norm, f"{name}.sub_norm.weight")
    return linear(g, up, module.down_proj, f"{name}.down_proj", n_hidden)


# ---- state space layers
def mamba(g, x, mixer, name, i, present):
    """hybrid_ssm.Mamba1 and Mamba2. x (B, T, C) -> (B, T, C); layer i's last inputs and state are in the cache."""
    E = mixer.out_proj.in_features
    N = mixer.n_state
    is_mamba2 = hasattr(mixer, "dt_bias")
    projected = linear(g, x, mixer.in_proj, f"{name}.in_proj", g.config.n_embd)
    if is_mamba2:
        # u, B and C go through the convolution together
        z, u, dt = g.Split(projected, [E, E + 2 * N, mixer.n_head], n=3, axis=-1)
    else:
        u, z = g.Split(projected, n=2, axis=-1)  # (B, T, E)
    u = convolution(g, u, mixer, name, i, present)
    if g.cached:
        h = g.input(f"past_ssm.{i}", ["batch_size", 1, E, N])
        g.output(f"present_ssm.{i}", ["batch_size", 1, E, N])
    else:
        batch_size = g.Slice(g.Shape(x), [0], [1])
        shape = g.Concat(batch_size, [1, E, N], axis=0)
        h = g.Expand(np.float32(0), shape)
    if is_mamba2:
        inputs, a, skip = mamba2_inputs(g, u, dt, mixer)
    else:
        inputs, a, skip = mamba1_inputs(g, u, mixer, name)
    h, y = scan(g, h, inputs, a, N, name)
    if g.cached:
        g.Identity(h, name=f"present_ssm.{i}")
    u = inputs[0]
    skipped = g.Mul(u, g.weight(skip, f"{name}.D"))
    y = g.Add(y, skipped)
    y = g.Mul(y, silu(g, z))
    if is_mamba2:
        y = rms_norm(g, y, mixer.norm, f"{name}.norm.weight")
    return linear(g, y, mixer.out_proj, f"{name}.out_proj", E)


def convolution(g, u, mixer, name, i, present):
    """u (B, T, W) -> silu(conv(u)) (B, T, W), causal, behind the inputs that layer i's cache holds."""
    W, _, width = mixer.conv1d.weight.shape
    if present:
        u = g.Mul(u, present)
    u = g.Transpose(u, perm=[0, 2, 1])  # (B, W, T)
    if g.cached:
        past = g.input(f"past_conv.{i}", ["batch_size", W, width])
        u = g.Concat(past, u, axis=2)  # (B, W, width + T)
        g.Slice(u, [-width], [END], [2], name=f"present_conv.{i}")
        g.output(f"present_conv.{i}", ["batch_size", W, width])
        u = g.Slice(u, [1], [END], [2])  # the first token sees width - 1 before it; transformers.js caches width
    kernel = g.weight(mixer.conv1d.weight, f"{name}.conv1d.weight")
    bias = g.weight(mixer.conv1d.bias)
    padding = 0 if g.cached else width - 1
    u = g.Conv(u, kernel, bias, group=W, pads=[padding, 0])
    u = g.Transpose(silu(g, u), perm=[0, 2, 1])  # (B, T, W)
    if present:
        u = g.Mul(u, present)
    return u


def mamba1_inputs(g, u, mixer, name):
    """u (B, T, E) -> what `scan` reads (u, dt, b, c), a (E, N) and D (E,)."""
    E = mixer.out_proj.in_features
    N = mixer.n_state
    projected = linear(g, u, mixer.x_proj, f"{name}.x_proj", E)
    dt, b, c = g.Split(projected, [mixer.dt_rank, N, N], n=3, axis=-1)
    dt = rms_norm(g, dt, mixer.dt_norm, f"{name}.dt_norm.weight")
    b = rms_norm(g, b, mixer.b_norm, f"{name}.b_norm.weight")
    c = rms_norm(g, c, mixer.c_norm, f"{name}.c_norm.weight")
    # not rounded in any form: it is small, and an error in dt adds up along the text
    dt = g.MatMul(dt, g.weight(mixer.dt_proj.weight.T, f"{name}.dt_proj"))
    dt = g.Add(dt, mixer.dt_proj.bias)
    dt = g.Softplus(dt)  # (B, T, E)
    a = -mixer.A_log.exp()
    return (u, dt, b, c), a, mixer.D


def mamba2_inputs(g, u, dt, mixer):
    """u (B, T, E + 2 N), dt (B, T, heads) -> what `scan` reads (u, dt, b, c), a (E, 1) and D (E,)."""
    E = mixer.out_proj.in_features
    N = mixer.n_state
    width = E // mixer.n_head  # channels that share a decay
    u, b, c = g.Split(u, [E, N, N], n=3, axis=-1)
    spread = torch.eye(mixer.n_head).repeat_interleave(width, 1)  # heads to channels
    dt = g.Softplus(g.Add(dt, mixer.dt_bias))  # (B, T, heads)
    dt = g.MatMul(dt, spread)  # (B, T, E)
    a = -mixer.A_log.exp()  # (heads,)
    a = a.repeat_interleave(width)[:, None]
    skip = mixer.D.repeat_interleave(width)
    return (u, dt, b, c), a, skip


def scan(g, h, inputs, a, n_state, name):
    """h_t = exp(dt_t a) h_{t-1} + dt_t u_t b_t, y_t = c_t h_t, one token at a time -> the last h, y (B, T, E).

    h: (B, 1, E, N); inputs: u, dt (B, T, E) and b, c (B, T, N); a: (E, N), or (E, 1) for one decay a channel (Mamba-2).
    """
    E, N = len(a), n_state
    body = g.body()  # of one token: its inputs lack T
    h_in = body.input(f"{name}.h", [None, 1, E, N])
    u = body.input(f"{name}.u", [None, E])
    dt = body.input(f"{name}.dt", [None, E])
    b = body.input(f"{name}.b", [None, N])
    c = body.input(f"{name}.c", [None, N])
    logs = body.Mul(body.Unsqueeze(dt, [1, 3]), g.weight(a, f"{name}.A"))
    decay = body.Exp(logs)  # (B, 1, E, N or 1)
    dtu = body.Mul(dt, u)
    dtu = body.Unsqueeze(dtu, [1, 3])  # (B, 1, E, 1)
    b = body.Unsqueeze(b, [1, 2])  # (B, 1, 1, N)
    new = body.MatMul(dtu, b)  # (B, 1, E, N)
    kept = body.Mul(decay, h_in)
    h_out = body.Add(kept, new, name=f"{name}.h_out")
    c = body.Unsqueeze(c, [1, 3])  # (B, 1, N, 1)
    y = body.MatMul(h_out, c)  # (B, 1, E, 1)
    body.Squeeze(y, [1, 3], name=f"{name}.y")
    body.output(f"{name}.h_out", [None, 1, E, N])
    body.output(f"{name}.y", [None, E])
    return g.Scan(h, *inputs, n=2, body=body.build(name), num_scan_inputs=4, scan_input_axes=[1] * 4,
                  scan_output_axes=[1])


# ---- residual streams
def streams(g, x, module, name, f):
    """ternary.Streams: x (B, T, n, C) -> the same, mixed around f, which maps (B, T, C) to (B, T, C)."""
    n = module.n
    if module.proj is None:  # the same for every token
        pre, post, res = module.coefficients(None)
        weights = torch.cat((pre[None], res.mT))  # (n + 1, n)
        post = post[:, None]  # (n, 1)
    else:
        pre, post, res = coefficients(g, x, module, name)
        pre = g.Unsqueeze(g.Sigmoid(pre), [2])  # (B, T, 1, n)
        res = g.Transpose(res, perm=[0, 1, 3, 2])
        weights = g.Concat(pre, res, axis=2)  # (B, T, n + 1, n)
        post = g.Mul(g.Sigmoid(post), 2.0)
        post = g.Unsqueeze(post, [3])  # (B, T, n, 1)
    # one product mixes both: the layer's input, and the streams that pass it by
    mixed = g.MatMul(weights, x)  # (B, T, n + 1, C)
    first, rest = g.Split(mixed, [1, n], n=2, axis=2)
    y = f(g.Squeeze(first, [2]))  # (B, T, C)
    y = g.Unsqueeze(y, [2])
    return g.Add(rest, g.Mul(post, y))


def coefficients(g, x, module, name):
    """x (B, T, n, C) -> logits of pre (B, T, n) and of post (B, T, n), and res (B, T, n, n)."""
    n = module.n
    flat = g.Reshape(x, [0, 0, n * g.config.n_embd])
    root = root_mean_square(g, flat, module.norm_eps)
    scales = [s.expand(size) for s, size in zip(module.scale, module.sizes, strict=True)]
    proj = g.weight((module.proj * module.gain).T, f"{name}.proj")
    logits = g.Div(g.MatMul(flat, proj), root)
    logits = g.Mul(logits, torch.cat(scales))
    logits = g.Add(logits, module.bias)
    pre, post, res = g.Split(logits, list(module.sizes), n=3, axis=-1)
    res = g.Softmax(res, axis=-1)  # (B, T, n!)
    res = g.MatMul(res, module.permutations.flatten(1))
    return pre, post, g.Reshape(res, [0, 0, n, n])


def residual(g, x, f, module, name):
    """f, which maps (B, T, C) to (B, T, C), with the residual around it."""
    if hasattr(module, "n"):
        return streams(g, x, module, name, f)
    return g.Add(x, f(x))


# ---- the whole graph
def graph(model, quant="fp32", window=False, dtype=np.float32):
    """-> Graph of any of our models, in eval mode on the CPU, with weights and sums of this dtype."""
    g = Graph(model.config, quant, cached=not window, dtype=dtype)
    if hasattr(model.config, "wiring"):
        x = wired(g, model)
    else:
        x = transformer(g, model, window)
    return finished(g, x, model, window)


def wired(g, model):
    """What the head of cerebros.py reads, (B, R), for ids of any length; an id of -1 stands for no token."""
    config = model.config
    outputs = {}  # {(level, index) of a unit: its output (B, N)}
    act = {"silu": silu, "gelu": gelu, "softplus": softplus}[config.act]
    ids = g.input("input_ids", ["batch", "block"], INT32)
    is_token = g.GreaterOrEqual(ids, np.int32(0))
    is_token = g.Cast(is_token, to=g.float)
    is_token = g.Unsqueeze(is_token, [2])  # (B, T, 1)
    x = embed(g, ids, model.embed.weight.detach().numpy())  # (B, T, C)
    x = rms_norm(g, x, model.embed_norm, "embed_norm.weight")
    x = g.Mul(x, is_token)
    # zeros in front, so that a short text fills the window too
    x = g.Pad(x, np.array([0, config.window - 1, 0, 0, 0, 0]))
    x = g.Slice(x, [-config.window], [END], [1])  # (B, W, C)
    for i, (name, unit) in enumerate(zip(model.names, model.units, strict=True)):
        z = g.weight(unit.bias, f"units.{i}.bias")
        if unit.places:
            seen = g.Gather(x, list(unit.places), axis=1)  # (B, P, C)
            seen = g.Reshape(seen, [0, -1])  # (B, P * C)
            weight = g.weight(unit.rotated(model.angles()).T, f"units.{i}.window")
            z = g.Add(z, g.MatMul(seen, weight))
        if unit.units:
            seen = [outputs[other] for other in unit.units]
            y = g.Concat(*seen, axis=-1)
            y = rms_norm(g, y, unit.norm, f"units.{i}.norm.weight")
            y = linear(g, y, unit.proj, f"units.{i}.proj", 0)
            z = g.Add(z, y)
        outputs[name] = act(g, z)
    return z  # the last unit's, before its activation


def transformer(g, model, window):
    """What the norm before the head reads, (B, T, C) or (B, T, n, C); only the last token's with `window`."""
    config = model.config
    if getattr(config, "window", 0):  # `hold` would see it only in texts that are longer
        raise NoForm(f"it sees {config.window} tokens only (window)")
    ids, shared = inputs(g, config, window)
    weight = model.embedding() if hasattr(model, "embedding") else model.embed.weight
    x = embed(g, ids, weight.detach().numpy())  # (B, T, C)
    n = getattr(config, "n_streams", 1)
    if n > 1:
        x = g.Expand(g.Unsqueeze(x, [2]), [1, 1, n, 1])  # (B, T, n, C)
    if shared.rope is None and not window:
        del g.inputs["position_ids"]  # nothing reads it
    width = n_hidden(model)
    for i, block in enumerate(model.blocks):
        mix = functools.partial(mixer_layer, g, block=block, i=i, shared=shared)
        feed = functools.partial(mlp_layer, g, block=block, i=i, n_hidden=width)
        x = residual(g, x, mix, getattr(block, "attn_residual", None), f"blocks.{i}.attn_residual")
        x = residual(g, x, feed, getattr(block, "mlp_residual", None), f"blocks.{i}.mlp_residual")
    if window:
        x = g.Gather(x, np.int64(-1), axis=1)  # (B, C) or (B, n, C)
    return x


def inputs(g, config, window):
    """Declare the graph's inputs -> the name of the ids, Shared."""
    if window:
        ids = g.input("input_ids", ["batch", "block"], INT32)
        T = S = g.Gather(g.Shape(ids), np.int64(1))
        positions = g.Unsqueeze(g.Range(np.int64(0), T, np.int64(1)), [0])  # (1, T)
    else:
        ids = g.input("input_ids", ["batch_size", "sequence_length"], INT64)
        seen = g.input("attention_mask", ["batch_size", "total_sequence_length"], INT64)
        positions = g.input("position_ids", ["batch_size", "sequence_length"], INT64)
        T = g.Gather(g.Shape(ids), np.int64(1))
        S = g.Gather(g.Shape(seen), np.int64(1))
    keys = g.Range(np.int64(0), S, np.int64(1))
    queries = g.Range(g.Sub(S, T), S, np.int64(1))
    allowed = g.LessOrEqual(keys, g.Unsqueeze(queries, [1]))  # (T, S)
    if window:
        allowed = g.Unsqueeze(allowed, [0, 1, 2])
    else:
        seen_keys = g.Unsqueeze(seen, [1])  # (B, 1, S)
        seen_keys = g.Cast(seen_keys, to=TensorProto.BOOL)
        allowed = g.And(allowed, seen_keys)
        allowed = g.Unsqueeze(allowed, [1, 2])
    # not -inf: a row of padding, which may see nothing, would become NaN
    mask = g.Where(allowed, 0.0, -1e9)  # (B or 1, 1, 1, T, S)
    rope = None
    if getattr(config, "rope", True):
        rope = rope_table(g, positions, head_dim(config), config.rope_theta)
    present = None
    if not window and hasattr(config, "attn_layer_period"):  # a state would remember padding, which attention masks
        start = g.Unsqueeze(g.Sub(S, T), [0])
        recent = g.Slice(seen, start, [END], [1])
        present = g.Cast(recent, to=g.float)
        present = g.Unsqueeze(present, [2])  # (B, T, 1)
    return ids, Shared(rope, mask, present)


def mixer_layer(g, x, block, i, shared):
    """Norm, then attention or Mamba: x (B, T, C) -> (B, T, C)."""
    kind = "mixer" if hasattr(block, "mixer") else "attn"
    name = f"blocks.{i}.{kind}"
    mixer = getattr(block, kind)
    x = rms_norm(g, x, getattr(block, f"{kind}_norm"), f"{name}_norm.weight")
    if hasattr(mixer, "q_proj"):
        return attention(g, x, mixer, name, i, shared)
    return mamba(g, x, mixer, name, i, shared.present)


def mlp_layer(g, x, block, i, n_hidden):
    x = rms_norm(g, x, block.mlp_norm, f"blocks.{i}.mlp_norm.weight")
    return mlp(g, x, block.mlp, f"blocks.{i}.mlp", n_hidden)


def finished(g, x, model, window):
    """The graph with norm and head behind x: (B, C) or (B, T, C), and one dimension more where there are streams."""
    config = model.config
    x = rms_norm(g, x, model.norm, "norm.weight")
    if getattr(config, "n_streams", 1) > 1:
        x = g.ReduceSum(x, [-2], keepdims=0)
    head = getattr(model, "head", None)
    if head is None:
        logits = tied_head(g, x)
    else:
        logits = linear(g, x, head, "head", config.n_embd)
    g.Identity(logits, name="logits")
    shape = ["batch"] if window else ["batch_size", "sequence_length"]
    g.outputs = {"logits": (g.float, [*shape, config.vocab_size])} | g.outputs  # the first, as everyone expects
    return g


def to_proto(g, name, with_weights=True):
    """-> onnx.ModelProto."""
    opsets = [helper.make_opsetid("", OPSET)]
    if any(node.domain for node in g.nodes):
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    return helper.make_model(g.build(name, with_weights), opset_imports=opsets, ir_version=IR_VERSION,
                             producer_name="thimble")


# ---- compared with the model
class NoForm(UserError):
    """The layers of this file are not those of the model."""


class Scan(OpRun):
    """The operator as `scan` uses it, along axis 1, which onnx's own evaluator lacks."""
    op_domain = ""

    def need_context(self):  # the body reads weights of the graph around it
        return True

    def _run(self, h, *inputs, context=None, **_):
        names = self.body.input_names
        ys = []
        for t in range(inputs[0].shape[1]):
            now = [x[:, t] for x in inputs]
            feed = dict(zip(names, [h, *now], strict=True))
            h, y = self._run_body(context | feed)
            ys.append(y)
        return h, np.stack(ys, 1)


def evaluate(g, ids):
    """The graph's logits for ids (B, T) with an empty cache, by onnx's own evaluator, which needs no runtime."""
    B, T = ids.shape
    kind, _ = g.inputs["input_ids"]
    feed = {"input_ids": ids.numpy().astype(helper.tensor_dtype_to_np_dtype(kind))}
    if "attention_mask" in g.inputs:
        feed["attention_mask"] = np.ones((B, T), np.int64)
    if "position_ids" in g.inputs:
        feed["position_ids"] = np.arange(T)[None].repeat(B, 0)
    for name, (_, sizes) in g.inputs.items():
        if name.startswith("past"):
            feed[name] = np.zeros(empty_shape(sizes, B), g.dtype)
    # weights as inputs: inside the graph they would be copied twice
    proto = to_proto(g, "graph", with_weights=False)
    evaluator = ReferenceEvaluator(proto, new_ops=[Scan])
    logits, = evaluator.run(["logits"], feed | g.weights)
    return torch.from_numpy(logits).double()


@torch.no_grad()
def hold(model, window):
    """NoForm unless the graph gives the logits of the model's own forward, both in float64.

    The layers of this file are compared with those of the model file before the graph stands in for them: whoever
    changes an activation there must not get a graph of the old one.
    """
    arch = type(model).__module__
    remedy = "export it with --format=hf, or teach formats/onnx.py its layers"
    try:
        wide = widened(model)
        with in_float64():
            g = graph(wide, window=window, dtype=np.float64)
        ids = some_ids(model)
        if window:
            same = window_agrees(wide, g, ids)
        else:
            same = not differs(own_logits(wide, ids), evaluate(g, ids))
    except Exception as error:  # a fork may lack anything, or have more
        raise NoForm(f"{arch}.py has no ONNX form ({short(error, 100)}): {remedy}") from None
    if not same:
        raise NoForm(f"{arch}.py computes something other than the ONNX form of its layers: {remedy}")


def window_agrees(wide, g, ids):
    """Whether the graph's logits, those of the last token, are the model's: for all ids, and for the first half."""
    T = ids.size(1)
    for length in {T, T // 2 + 1}:  # a short row reads places without a token
        own = own_logits(wide, ids[:, :length])[:, -1]
        if differs(own, evaluate(g, ids[:, :length])):
            return False
    return True


# ---- the file
@torch.no_grad()
def write(path, model, quant="fp32", window=False):
    """Write the model as one ONNX file -> (the model whose logits it must give, {weight: array} as stored).

    quant: "fp32"; "int8" and "int4", weights of 8 or 4 bits in blocks of 32 in com.microsoft.MatMulNBits, embedding and
    head at 8 bits in both; "q2", 2 bits for ternary models. fp32 and q2 are lossless, and so is any form of a ternary
    matrix. Runtimes that know only ai.onnx, such as Elixir's Ortex, read fp32.

    The graph maps input_ids and position_ids int64 (B, T), attention_mask int64 (B, P + T) and for each layer
    past_key_values.{i}.key and .value float32 (B, K, P, D) to logits float32 (B, T, V), present.{i}.key and .value
    (B, K, P + T, D). Begin with P = 0. With window=True it maps input_ids int32 (batch, block), of any length up to
    block_size, to the logits float32 (batch, V) of the last position. That is the one form of cerebros.py, where
    -1 in front of a shorter row stands for no token. UserError for what cannot be expressed.
    """
    path = Path(path)
    arch = type(model).__module__
    if quant not in QUANTS["onnx"]:
        raise UserError(f"--quant={quant} is not an ONNX form; choose one of {', '.join(QUANTS['onnx'])}")
    if hasattr(getattr(model, "config", None), "wiring") and (not window or quant != "fp32"):
        raise NoForm(f"{arch}.py has one ONNX form, a window of ids to logits: add --window, without --quant")
    if quant == "q2" and not any(is_ternary(module) for module in model.modules()):
        raise UserError(f"--quant=q2 is for ternary models, not for {arch}.py; use int4 or int8")
    hold(model, window)
    g = graph(copy.deepcopy(model).float().eval(), quant, window)
    if sum(array.nbytes for array in g.weights.values()) > MOST_BYTES:
        raise UserError(f"{path}: an ONNX file holds 2 GB at most, this model has more; use --quant=int4 or int8")
    proto = to_proto(g, arch)
    helper.set_model_props(proto, {"arch": arch, "quant": quant})
    onnx.checker.check_model(proto, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, proto.SerializeToString())
    return twin(model, quant), g.weights
