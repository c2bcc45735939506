"""Our models as ONNX graphs, built from the weights: opset 14, IR 7, one file, plain ai.onnx operators.

    from formats import onnx as onnx_graph
    onnx_graph.export(model, "model.onnx")                         # input_ids and a cache -> logits and the cache
    onnx_graph.export(model, "model_q4.onnx", quant="int4")        # "int8", "int4" and, for ternary models, "q2"
    onnx_graph.export(model, "window.onnx", window=True)           # (batch, block) ids -> logits of the last one
    print(onnx_check.check(model, "model.onnx"))                   # onnxruntime beside torch

The cache has the names and shapes that onnxruntime-genai and transformers.js know.
Legend: as in model.py; P tokens in the cache, S = P + T, N outputs and K inputs of a matrix
(in Mamba E channels with N numbers of state each).
"""
import functools
import itertools
import math
import os
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from thimble.files import UserError

QUANTS = ("fp32", "int8", "int4", "q2")
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


class Graph:
    """Nodes and weights under construction: g.Mul(x, 2.0) adds a node and returns the name of what it gives.

    Inputs are such names, arrays, floats (float32) or lists of int (int64).
    """

    def __init__(self, config=None, quant="fp32", cached=False):
        self.config, self.quant, self.cached = config, quant, cached
        self.inputs, self.outputs, self.outer = {}, {}, None  # {name: (type, shape)}
        self.nodes, self.weights, self.constants, self.count = [], {}, {}, itertools.count()

    def __getattr__(self, op):
        return functools.partial(self.add, op)

    def add(self, op, *inputs, n=1, name=None, domain="", **attributes):
        outputs = [name or f"{op}_{next(self.count)}"] if n == 1 else [f"{op}_{next(self.count)}" for _ in range(n)]
        inputs = [x if isinstance(x, str) else self.weight(x) for x in inputs]
        self.nodes.append(helper.make_node(op, inputs, outputs, f"{op}:{outputs[0]}", domain=domain, **attributes))
        return outputs[0] if n == 1 else outputs

    def weight(self, value, name=None):
        """Name of a constant; equal small ones are kept once."""
        array = np.ascontiguousarray(value.detach().numpy() if isinstance(value, torch.Tensor) else value)
        array = array.reshape(np.shape(value))             # ascontiguousarray makes a vector of a scalar
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        if name is None:
            key = array.dtype.str, array.shape, array.tobytes()
            name = self.constants.setdefault(key, f"constant_{len(self.constants)}")
        self.weights[name] = array
        return name

    def inner(self):
        """Graph for the body of a loop, which sees the constants of this one."""
        body = Graph()
        body.outer, body.weights, body.constants, body.count = self, self.weights, self.constants, self.count
        return body

    def input(self, name, shape, kind=FLOAT):
        self.inputs[name] = kind, shape
        return name

    def build(self, name):
        values = [[helper.make_tensor_value_info(key, *kind) for key, kind in side.items()]
                  for side in (self.inputs, self.outputs)]
        weights = [numpy_helper.from_array(array, key) for key, array in self.weights.items() if not self.outer]
        return helper.make_graph(self.nodes, name, *values, weights)


# ---- weights

def ternary_weight(module, n_in):
    """TernaryLinear or PackedLinear -> (t (N, K) int8 of -1, 0, 1; scale () or (N, K / group_size) float32)."""
    if hasattr(module, "codes"):
        from kernels import ternary
        return ternary.unpack(module.codes, n_in).numpy(), module.scales.numpy().T
    from ternary import absmean
    t, scale = absmean(module.weight.detach(), module.group_size)
    return t.to(torch.int8).numpy(), scale.numpy()


def pack(codes, bits, block):
    """codes (N, K) below 2 ** bits -> uint8 (N, ceil(K / block), block * bits / 8), little end first: MatMulNBits."""
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % block)), constant_values=1 << (bits - 1))  # which means 0
    codes = codes.reshape(len(codes), -1, block * bits // 8, 8 // bits).astype(np.uint8)
    return sum(codes[..., i] << (bits * i) for i in range(8 // bits)).astype(np.uint8)


def matmul_nbits(g, x, codes, scales, bits, block, name):
    """x (..., K) times codes (N, K) less 2 ** (bits - 1) times scales (N, ceil(K / block)) -> (..., N).

    A com.microsoft operator: its weights stay packed in memory.
    """
    n, k = codes.shape
    weights = g.weight(pack(codes, bits, block), f"{name}_q{bits}"), g.weight(scales, f"{name}_scales")
    return g.MatMulNBits(x, *weights, domain="com.microsoft", K=k, N=n, bits=bits, block_size=block)


def quantise4(weight, block=32):
    """weight (N, K) -> codes (N, K) from 0 to 15, scales (N, blocks): w is near (code - 8) * scale.

    The number of largest size in a block becomes -8, so the 16 codes are all of use (llama.cpp's Q4_0 does the same).
    """
    n, k = weight.shape
    blocks = np.pad(weight, ((0, 0), (0, -k % block))).reshape(n, -1, block)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scales = largest / -8
    codes = np.clip(np.round(blocks / np.where(scales, scales, 1)) + 8, 0, 15)
    return codes.reshape(n, -1)[:, :k].astype(np.uint8), scales[..., 0].astype(np.float32)


def quantise8(weight):
    """weight (N, K) -> uint8 codes (N, K), scales (N,): w is near (code - 128) * scale."""
    scales = np.maximum(np.abs(weight).max(1), 1e-12) / 127
    return (np.round(weight / scales[:, None]) + 128).astype(np.uint8), scales.astype(np.float32)


def absmax(g, x):
    """x (..., K) -> (whole numbers from -127 to 127 in float32, their scale (..., 1)), as ternary.absmax."""
    scale = g.Div(127.0, g.Max(g.ReduceMax(g.Abs(x), axes=[-1]), 1e-5))
    return g.Round(g.Mul(x, scale)), scale


def matmul_int8(g, x, codes, scales):
    """Whole numbers x (..., K) times uint8 codes (K, N) less 128 -> (..., N) float32, times scales.

    Both sides unsigned: x86 processors without VNNI overflow on signed times unsigned.
    """
    x = g.Cast(g.Add(x, 128.0), to=TensorProto.UINT8)
    return g.Mul(g.Cast(g.MatMulInteger(x, codes, np.uint8(128), np.uint8(128)), to=FLOAT), scales)


def linear(g, x, module, name, n_in):
    """x (..., K) -> (..., N) by an nn.Linear, a TernaryLinear or a PackedLinear."""
    if hasattr(module, "group_size"):
        return ternary_linear(g, x, module, name, n_in)
    weight = module.weight.detach().numpy()
    if g.quant == "int8" or (g.quant == "int4" and name == "head"):
        codes, scales = quantise8(weight)
        q, scale = absmax(g, x)
        return matmul_int8(g, q, g.weight(codes.T, f"{name}_q8"), g.Div(g.weight(scales), scale))
    if g.quant == "int4":
        return matmul_nbits(g, x, *quantise4(weight), bits=4, block=32, name=name)
    return g.MatMul(x, g.weight(weight.T, name))


def ternary_linear(g, x, module, name, n_in):
    """ternary.TernaryLinear, activations rounded in the graph. Every form of it loses nothing."""
    t, w_scale = ternary_weight(module, n_in)
    k, group = t.shape[1], module.group_size
    q, scale = absmax(g, x)
    scale = g.Div(1.0 if group else w_scale, scale)        # (..., 1)
    block = 128 if not group else math.gcd(group, 256)     # of inputs that share a scale in the file
    bits = {"int4": 4, "q2": 2}.get(g.quant)
    if bits and block >= 16:
        # without groups the scales in the file are 1, so that it adds whole numbers, which float32 does exactly
        scales = np.repeat(w_scale, group // block, 1) if group else np.ones((len(t), -(-k // block)), np.float32)
        return g.Mul(matmul_nbits(g, q, t + np.int8(1 << (bits - 1)), scales, bits, block, name), scale)
    if g.quant == "int8" and not group:
        return matmul_int8(g, q, g.weight((t + np.int16(128)).astype(np.uint8).T, f"{name}_q8"), scale)
    t = t * (np.repeat(w_scale, group, 1) if group else np.float32(1))
    return g.Mul(g.MatMul(q, g.weight(t.T, name)), scale)


def embed(g, ids, weight):
    """ids (B, T), weight (V, C) -> (B, T, C)."""
    if g.quant in ("int8", "int4"):
        codes, scales = quantise8(weight)
        x = g.Sub(g.Cast(g.Gather(g.weight(codes, "embed_q8"), ids), to=FLOAT), 128.0)
        return g.Mul(x, g.Gather(g.weight(scales[:, None], "embed_scales"), ids))
    if g.quant == "q2" and (weight.astype(np.float16) == weight).all():  # a ternary model's
        # not the other way round: a runtime folds this Cast when it loads, and not every GPU knows float16
        return g.Gather(g.Cast(g.weight(weight.astype(np.float16), "embed_f16"), to=FLOAT, name="embed"), ids)
    return g.Gather(g.weight(weight, "embed"), ids)


def tied_head(g, x):
    """x (..., C) -> logits (..., V) by the matrix of `embed`, which the file holds once."""
    if "embed_q8" in g.weights:
        q, scale = absmax(g, x)
        scales = g.Transpose("embed_scales", perm=[1, 0])
        return matmul_int8(g, q, g.Transpose("embed_q8", perm=[1, 0]), g.Div(scales, scale))
    return g.MatMul(x, g.Transpose("embed", perm=[1, 0]))


# ---- layers

def rms_norm(g, x, module, name):
    if isinstance(module, torch.nn.Identity):
        return x
    root = g.Sqrt(g.Add(g.ReduceMean(g.Pow(x, 2.0), axes=[-1]), module.eps))
    return g.Mul(g.Div(x, root), g.weight(module.weight, name))


def silu(g, x):
    return g.Mul(x, g.Sigmoid(x))


def gelu(g, x):
    return g.Mul(g.Mul(x, 0.5), g.Add(g.Erf(g.Mul(x, math.sqrt(0.5))), 1.0))


def rope_table(g, positions, head_dim, theta):
    """positions (B, T) -> cos and signed sin, (B, T, 1, D), for `rotate`."""
    freqs = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = g.Mul(g.Unsqueeze(g.Cast(positions, to=FLOAT), [2, 3]), freqs)
    cos, sin = g.Cos(angles), g.Sin(angles)
    return g.Concat(cos, cos, axis=-1), g.Concat(g.Neg(sin), sin, axis=-1)


def rotate(g, x, cos, sin):
    left, right = g.Split(x, n=2, axis=-1)
    return g.Add(g.Mul(x, cos), g.Mul(g.Concat(right, left, axis=-1), sin))


def attention(g, x, attn, name, i, rope, mask):
    """x (B, T, C), mask (B or 1, 1, 1, T, S); keys and values of layer i come from the cache and go there."""
    D, K, C = attn.head_dim, attn.n_kv_head, g.config.n_embd

    def heads(kind, shape, norm=None):
        y = g.Reshape(linear(g, x, getattr(attn, f"{kind}_proj"), f"{name}.{kind}_proj", C), shape)
        if norm is not None:
            y = rms_norm(g, y, norm, f"{name}.{kind}_norm.weight")
        return g.Transpose(rotate(g, y, *rope) if rope and kind != "v" else y, perm=[0, 2, 1, 3])

    q = heads("q", [0, 0, -1, D], getattr(attn, "q_norm", None))                             # (B, H, T, D)
    k = heads("k", [0, 0, K, D], getattr(attn, "k_norm", None))                              # (B, K, T, D)
    v = heads("v", [0, 0, K, D])
    if g.cached:
        shape = ["batch_size", K, "past_sequence_length", D]
        k = g.Concat(g.input(f"past_key_values.{i}.key", shape), k, axis=2, name=f"present.{i}.key")  # (B, K, S, D)
        v = g.Concat(g.input(f"past_key_values.{i}.value", shape), v, axis=2, name=f"present.{i}.value")
        g.outputs |= {f"present.{i}.{s}": (FLOAT, ["batch_size", K, "total_sequence_length", D])
                      for s in ("key", "value")}
    q = g.Reshape(g.Mul(q, 1 / math.sqrt(D)), [0, K, g.config.n_head // K, -1, D])           # (B, K, H / K, T, D)
    scores = g.MatMul(q, g.Unsqueeze(g.Transpose(k, perm=[0, 1, 3, 2]), [2]))                # (B, K, H / K, T, S)
    y = g.MatMul(g.Softmax(g.Add(scores, mask), axis=-1), g.Unsqueeze(v, [2]))               # (B, K, H / K, T, D)
    y = g.Reshape(g.Transpose(y, perm=[0, 3, 1, 2, 4]), [0, 0, C])                           # (B, T, C)
    if hasattr(attn, "sub_norm"):
        y = rms_norm(g, y, attn.sub_norm, f"{name}.sub_norm.weight")
    return linear(g, y, attn.o_proj, f"{name}.o_proj", C)


def mlp(g, x, module, name):
    C, F = g.config.n_embd, module.up_proj
    F = len(F.codes if hasattr(F, "codes") else F.weight)
    up = linear(g, x, module.up_proj, f"{name}.up_proj", C)
    if hasattr(module, "gate_proj"):
        gate = linear(g, x, module.gate_proj, f"{name}.gate_proj", C)
        gate = g.Pow(g.Relu(gate), 2.0) if getattr(module, "act", "silu") == "relu2" else silu(g, gate)
        up = g.Mul(gate, up)
    else:
        up = gelu(g, up)
    if hasattr(module, "sub_norm"):
        up = rms_norm(g, up, module.sub_norm, f"{name}.sub_norm.weight")
    return linear(g, up, module.down_proj, f"{name}.down_proj", F)


def mamba(g, x, mixer, name, i, seen):
    """hybrid_ssm.Mamba1 and Mamba2. x (B, T, C) -> (B, T, C), with layer i's last inputs and state in the cache.

    seen: (B, T, 1), 0 on padding, or None. Both kinds are one Scan: Mamba-2 has one decay for many channels.
    """
    E, N, second = mixer.out_proj.in_features, mixer.n_state, hasattr(mixer, "dt_bias")
    W, _, width = mixer.conv1d.weight.shape                # E, or E + 2 N in Mamba-2, which convolves B and C too
    u = linear(g, x, mixer.in_proj, f"{name}.in_proj", g.config.n_embd)
    if second:
        z, u, dt = g.Split(u, [E, W, mixer.n_head], n=3, axis=-1)
    else:
        u, z = g.Split(u, n=2, axis=-1)                                                      # (B, T, E)
    u = g.Transpose(g.Mul(u, seen) if seen else u, perm=[0, 2, 1])                           # (B, W, T)
    if g.cached:
        conv = g.Concat(g.input(f"past_conv.{i}", ["batch_size", W, width]), u, axis=2)      # (B, W, width + T)
        g.Slice(conv, [-width], [2**31], [2], name=f"present_conv.{i}")
        u = g.Slice(conv, [1], [2**31], [2])
        h = g.input(f"past_ssm.{i}", ["batch_size", 1, E, N])
        g.outputs |= {f"present_conv.{i}": (FLOAT, ["batch_size", W, width]),
                      f"present_ssm.{i}": (FLOAT, ["batch_size", 1, E, N])}
    else:
        h = g.Expand(np.float32(0), g.Concat(g.Slice(g.Shape(x), [0], [1]), [1, E, N], axis=0))
    conv = g.weight(mixer.conv1d.weight, f"{name}.conv1d.weight"), g.weight(mixer.conv1d.bias)
    u = silu(g, g.Conv(u, *conv, group=W, pads=[0 if g.cached else width - 1, 0]))
    u = g.Transpose(u, perm=[0, 2, 1])                                                       # (B, T, W)
    u = g.Mul(u, seen) if seen else u
    if second:
        u, b, c = g.Split(u, [E, N, N], n=3, axis=-1)
        a, skip = (p.repeat_interleave(E // mixer.n_head) for p in (-mixer.A_log.exp(), mixer.D))
        spread = torch.eye(mixer.n_head).repeat_interleave(E // mixer.n_head, 1)             # heads to channels
        dt, a = g.MatMul(g.Softplus(g.Add(dt, mixer.dt_bias)), spread), a[:, None]           # (B, T, E), (E, 1)
    else:
        dt, b, c = g.Split(linear(g, u, mixer.x_proj, f"{name}.x_proj", E), [mixer.dt_rank, N, N], n=3, axis=-1)
        dt, b, c = (rms_norm(g, y, getattr(mixer, f"{kind}_norm"), f"{name}.{kind}_norm.weight")
                    for kind, y in (("dt", dt), ("b", b), ("c", c)))
        dt = g.MatMul(dt, g.weight(mixer.dt_proj.weight.T, f"{name}.dt_proj"))
        dt, a, skip = g.Softplus(g.Add(dt, mixer.dt_proj.bias)), -mixer.A_log.exp(), mixer.D  # (B, T, E), (E, N), (E,)
    body = g.inner()                                       # h = exp(dt a) h + dt u b, y = h c: a token at a time
    for key, shape in {"h": [None, 1, E, N], "u": [None, E], "dt": [None, E], "b": [None, N], "c": [None, N]}.items():
        body.input(f"{name}.{key}", shape)
    h_in, u_in, dt_in, b_in, c_in = body.inputs
    decay = body.Exp(body.Mul(body.Unsqueeze(dt_in, [1, 3]), g.weight(a, f"{name}.A")))      # (B, 1, E, N or 1)
    new = body.MatMul(body.Unsqueeze(body.Mul(dt_in, u_in), [1, 3]), body.Unsqueeze(b_in, [1, 2]))
    body.Add(body.Mul(decay, h_in), new, name=f"{name}.h_out")
    body.Squeeze(body.MatMul(f"{name}.h_out", body.Unsqueeze(c_in, [1, 3])), [1, 3], name=f"{name}.y")
    body.outputs = {f"{name}.h_out": (FLOAT, [None, 1, E, N]), f"{name}.y": (FLOAT, [None, E])}
    h, y = g.Scan(h, u, dt, b, c, n=2, body=body.build(name), num_scan_inputs=4, scan_input_axes=[1] * 4,
                  scan_output_axes=[1])
    if g.cached:
        g.Identity(h, name=f"present_ssm.{i}")
    y = g.Mul(g.Add(y, g.Mul(u, g.weight(skip, f"{name}.D"))), silu(g, z))
    y = rms_norm(g, y, mixer.norm, f"{name}.norm.weight") if second else y
    return linear(g, y, mixer.out_proj, f"{name}.out_proj", E)


def streams(g, x, module, name, f):
    """ternary.Streams: x (B, T, n, C) -> the same, mixed around f, which maps (B, T, C) to (B, T, C)."""
    n, C = module.n, g.config.n_embd
    if module.proj is None:
        pre, post, res = module.coefficients(None)
        weights, post = torch.cat((pre[None], res.mT)), post[:, None]                        # (n + 1, n), (n, 1)
    else:
        flat = g.Reshape(x, [0, 0, n * C])
        root = g.Sqrt(g.Add(g.ReduceMean(g.Pow(flat, 2.0), axes=[-1]), module.norm_eps))
        scale = torch.cat([s.expand(size) for s, size in zip(module.scale, module.sizes, strict=True)])
        logits = g.Div(g.MatMul(flat, g.weight((module.proj * module.gain).T, f"{name}.proj")), root)
        logits = g.Add(g.Mul(logits, scale), module.bias)
        pre, post, res = g.Split(logits, list(module.sizes), n=3, axis=-1)
        res = g.Reshape(g.MatMul(g.Softmax(res, axis=-1), module.permutations.flatten(1)), [0, 0, n, n])
        weights = g.Concat(g.Unsqueeze(g.Sigmoid(pre), [2]), g.Transpose(res, perm=[0, 1, 3, 2]), axis=2)
        post = g.Unsqueeze(g.Mul(g.Sigmoid(post), 2.0), [3])                                 # (B, T, n, 1)
    first, rest = g.Split(g.MatMul(weights, x), [1, n], n=2, axis=2)                         # (B, T, 1 and n, C)
    y = f(g.Squeeze(first, [2]))
    return g.Add(rest, g.Mul(post, g.Unsqueeze(y, [2])))


def residual(g, x, f, block, kind, i):
    module = getattr(block, f"{kind}_residual", None)
    if hasattr(module, "n"):
        return streams(g, x, module, f"blocks.{i}.{kind}_residual", f)
    return g.Add(x, f(x))


def wired(g, x, model):
    """x (B, T, C), of any length, 0 where there is no token -> what the head of cerebros.py reads, (B, R)."""
    window, outputs = model.config.window, {}
    act = {"silu": silu, "gelu": gelu, "softplus": lambda g, z: g.Softplus(z)}[model.config.act]
    x = g.Slice(g.Pad(x, np.array([0, window - 1, 0, 0, 0, 0])), [-window], [2**31], [1])    # (B, W, C)
    for i, (name, unit) in enumerate(zip(model.names, model.units, strict=True)):
        z = g.weight(unit.bias, f"units.{i}.bias")
        if unit.places:
            seen = g.Reshape(g.Gather(x, list(unit.places), axis=1), [0, -1])                # (B, P * C)
            z = g.Add(z, g.MatMul(seen, g.weight(unit.turned(model.angles()).T, f"units.{i}.window")))
        if unit.units:
            y = rms_norm(g, g.Concat(*(outputs[u] for u in unit.units), axis=-1), unit.norm, f"units.{i}.norm.weight")
            z = g.Add(z, linear(g, y, unit.proj, f"units.{i}.proj", 0))
        outputs[name] = act(g, z)
    return z


# ---- the whole graph

def graph(model, quant, window):
    """-> Graph of any of our models."""
    config = model.config
    g = Graph(config, quant, cached=not window)
    if hasattr(config, "wiring"):
        ids = g.input("input_ids", ["batch", "block"], INT32)
        there = g.Unsqueeze(g.Cast(g.GreaterOrEqual(ids, np.int32(0)), to=FLOAT), [2])
        x = rms_norm(g, embed(g, ids, model.embed.weight.detach().numpy()), model.embed_norm, "embed_norm.weight")
        return finished(g, wired(g, g.Mul(x, there), model), model, window)
    if window:
        ids = g.input("input_ids", ["batch", "block"], INT32)
        T = S = g.Gather(g.Shape(ids), np.int64(1))
        positions = g.Unsqueeze(g.Range(np.int64(0), T, np.int64(1)), [0])                   # (1, T)
    else:
        ids = g.input("input_ids", ["batch_size", "sequence_length"], INT64)
        seen = g.input("attention_mask", ["batch_size", "total_sequence_length"], INT64)
        positions = g.input("position_ids", ["batch_size", "sequence_length"], INT64)
        T, S = g.Gather(g.Shape(ids), np.int64(1)), g.Gather(g.Shape(seen), np.int64(1))
    keys = g.Range(np.int64(0), S, np.int64(1))
    queries = g.Range(g.Sub(S, T), S, np.int64(1))
    allowed = g.LessOrEqual(keys, g.Unsqueeze(queries, [1]))                                 # (T, S)
    if not window:
        allowed = g.And(allowed, g.Cast(g.Unsqueeze(seen, [1]), to=TensorProto.BOOL))        # (B, T, S)
    # not -inf: a row of padding, which may see nothing, would become NaN
    mask = g.Where(g.Unsqueeze(allowed, [0, 1, 2] if window else [1, 2]), 0.0, -1e9)         # (B or 1, 1, 1, T, S)
    rope = None
    if getattr(config, "rope", True):
        rope = rope_table(g, positions, config.n_embd // config.n_head, config.rope_theta)
    recent = None                                          # a state would remember padding, which attention masks
    if not window and hasattr(config, "attn_layer_period"):
        recent = g.Unsqueeze(g.Cast(g.Slice(seen, g.Unsqueeze(g.Sub(S, T), [0]), [2**31], [1]), to=FLOAT), [2])

    weight = model.embedding() if hasattr(model, "embedding") else model.embed.weight
    x = embed(g, ids, weight.detach().numpy())                                               # (B, T, C)
    n = getattr(config, "n_streams", 1)
    if n > 1:
        x = g.Expand(g.Unsqueeze(x, [2]), [1, 1, n, 1])                                      # (B, T, n, C)
    if rope is None and not window:
        del g.inputs["position_ids"]                       # nothing asks for it
    for i, block in enumerate(model.blocks):
        def mix(x, block=block, i=i):
            kind = "mixer" if hasattr(block, "mixer") else "attn"
            name, mixer = f"blocks.{i}.{kind}", getattr(block, kind)
            x = rms_norm(g, x, getattr(block, f"{kind}_norm"), f"{name}_norm.weight")
            return attention(g, x, mixer, name, i, rope, mask) if hasattr(mixer, "q_proj") \
                else mamba(g, x, mixer, name, i, recent)

        def feed(x, block=block, name=f"blocks.{i}"):
            return mlp(g, rms_norm(g, x, block.mlp_norm, f"{name}.mlp_norm.weight"), block.mlp, f"{name}.mlp")
        x = residual(g, x, mix, block, "attn", i)
        x = residual(g, x, feed, block, "mlp", i)
    if window:
        x = g.Gather(x, np.int64(-1), axis=1)                                                # (B, C) or (B, n, C)
    return finished(g, x, model, window)


def finished(g, x, model, window):
    """The graph with norm and head behind x (B or B, T, C), which may have streams."""
    config = model.config
    x = rms_norm(g, x, model.norm, "norm.weight")
    if getattr(config, "n_streams", 1) > 1:
        x = g.ReduceSum(x, [-2], keepdims=0)
    head = getattr(model, "head", None)
    logits = tied_head(g, x) if head is None else linear(g, x, head, "head", config.n_embd)
    g.Identity(logits, name="logits")
    shape = ["batch"] if window else ["batch_size", "sequence_length"]
    g.outputs = {"logits": (FLOAT, [*shape, config.vocab_size])} | g.outputs
    return g


def copied(model):
    """The same weights in float32 on the CPU, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@torch.no_grad()
def export(model, path, quant="fp32", window=False):
    """Write the model as one ONNX file: opset 14, IR 7, checked by onnx.checker, there whole or not at all.

    quant: "fp32"; "int8", weights and activations of 8 bits in plain MatMulInteger; "int4", weights of 4 bits in blocks
    of 32 in com.microsoft.MatMulNBits; "q2", the same at 2 bits for ternary models, which loses nothing. Embedding and
    head keep 8 bits under int8 and int4, and lose nothing under q2. int8 and int4 lose nothing in a ternary matrix.

    The graph takes input_ids and position_ids int64 (B, T), attention_mask int64 (B, P + T), for each layer
    past_key_values.{i}.key and .value float32 (B, K, P, D), and gives logits float32 (B, T, V), present.{i}.key and
    .value (B, K, P + T, D). Begin with P = 0. window=True takes input_ids int32 (batch, block), of any length up to
    block_size, and gives the logits float32 (batch, V) of the last position. That is the one form of cerebros.py, where
    -1 in front of a shorter row stands for no token. UserError for what cannot be expressed.
    """
    arch = type(model).__module__
    if quant not in QUANTS:
        raise UserError(f"--quant={quant} is not an ONNX form; choose one of {', '.join(QUANTS)}")
    if arch == "cerebros" and (not window or quant != "fp32"):
        raise UserError("cerebros.py has one ONNX form, a window of ids to logits: add --window, without --quant")
    if arch not in ("model", "ternary", "hybrid_ssm", "cerebros"):
        raise UserError(f"{arch}.py has no ONNX form: teach onnx_graph.py its layers, or export it with --format=hf")
    if quant == "q2" and arch != "ternary":
        raise UserError(f"--quant=q2 is for ternary models, not for {arch}.py; use int4 or int8")
    g = graph(copied(model), quant, window)
    if sum(array.nbytes for array in g.weights.values()) > 2**31 - 2**20:
        raise UserError(f"{path}: an ONNX file holds 2 GB at most, this model has more; use --quant=int4 or int8")
    domains = [("", 14)] + [("com.microsoft", 1)] * any(node.domain for node in g.nodes)
    proto = helper.make_model(g.build(arch), opset_imports=[helper.make_opsetid(*domain) for domain in domains],
                              ir_version=7, producer_name="thimble")
    helper.set_model_props(proto, {"arch": arch, "quant": quant})
    onnx.checker.check_model(proto, full_check=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_bytes(proto.SerializeToString())
    os.replace(draft, path)
