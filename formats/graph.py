"""Nodes and weights of an ONNX graph under construction, and its matrix products in every number format.

    g = Graph()
    y = g.Mul(g.input("x", [None, 8]), 2.0)                        # adds a node -> the name of its output

Legend: N outputs and K inputs of a matrix, B batch, T tokens, C width, V vocabulary.
"""
import functools
import itertools
import math

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from formats.rounding import BLOCK, pack, quantise4, quantise8
from formats.weights import is_ternary, product, ternary_weight


class Graph:
    """Nodes and weights under construction: g.Mul(x, 2.0) adds a node and returns the name of its output.

    Inputs are such names, arrays, floats (which become `dtype`) or lists of int (int64).
    """

    def __init__(self, config=None, quant="fp32", cached=False, dtype=np.float32):
        self.config = config
        self.quant = quant
        self.cached = cached
        self.dtype = dtype
        self.float = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs = {}  # {name: (type, shape)}
        self.outputs = {}  # the same
        self.nodes = []
        self.weights = {}  # {name: array}
        self.constants = {}  # {(dtype, shape, bytes): name}
        self.count = itertools.count()
        self.is_body = False

    def __getattr__(self, op):  # any operator of ONNX
        return functools.partial(self.add, op)

    def add(self, op, *inputs, n=1, name=None, domain="", **attributes):
        """Add a node with n outputs -> its name, or the list of their names."""
        if n == 1:
            outputs = [name or f"{op}_{next(self.count)}"]
        else:
            outputs = [f"{op}_{next(self.count)}" for _ in range(n)]
        inputs = [x if isinstance(x, str) else self.weight(x) for x in inputs]
        self.nodes.append(helper.make_node(op, inputs, outputs, f"{op}:{outputs[0]}", domain=domain, **attributes))
        return outputs[0] if n == 1 else outputs

    def weight(self, value, name=None):
        """Name of a constant; equal nameless ones are stored once."""
        if isinstance(value, torch.Tensor):
            value = value.detach().numpy()
        array = np.ascontiguousarray(value)
        array = array.reshape(np.shape(value))  # ascontiguousarray makes a vector of a scalar
        if array.dtype in (np.float32, np.float64):  # float16 stays float16
            array = array.astype(self.dtype, copy=False)
        if name is None:
            key = array.dtype.str, array.shape, array.tobytes()
            name = self.constants.setdefault(key, f"constant_{len(self.constants)}")
        self.weights[name] = array
        return name

    def body(self):
        """Graph for the body of a loop, which sees the constants of this one."""
        body = Graph(dtype=self.dtype)
        body.weights = self.weights
        body.constants = self.constants
        body.count = self.count
        body.is_body = True
        return body

    def input(self, name, shape, kind=None):
        """Declare an input, of floats unless `kind` says otherwise -> its name."""
        self.inputs[name] = kind or self.float, shape
        return name

    def output(self, name, shape):
        self.outputs[name] = self.float, shape

    def build(self, name, with_weights=True):
        """-> onnx.GraphProto."""
        inputs = value_infos(self.inputs)
        outputs = value_infos(self.outputs)
        weights = []
        if with_weights and not self.is_body:  # a body's belong to the graph around it
            weights = [numpy_helper.from_array(array, key) for key, array in self.weights.items()]
        return helper.make_graph(self.nodes, name, inputs, outputs, weights)


def value_infos(named):
    """{name: (type, shape)} -> [onnx.ValueInfoProto]."""
    return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in named.items()]


# ---- matrices
# accuracy_level of MatMulNBits: the runtime may round what meets the codes to 8 bits, in blocks as they are. One token
# takes a third of the time through 4-bit weights then, and a hundredth through 8-bit weights, for which onnxruntime has
# no other kernel
INT8 = 4


def absmax(g, x):
    """x (..., K) -> (integers from -127 to 127 as floats, their scale (..., 1)), as ternary.absmax."""
    largest = g.ReduceMax(g.Abs(x), axes=[-1])
    scale = g.Div(127.0, g.Max(largest, 1e-5))
    q = g.Round(g.Mul(x, scale))
    return q, scale


def matmul_int8(g, x, codes, scales):
    """Integers x (..., K) times uint8 codes (K, N) less 128 -> (..., N) floats, times scales.

    Both sides unsigned: x86 processors without VNNI overflow on signed times unsigned.
    """
    zero = np.uint8(128)
    x = g.Cast(g.Add(x, 128.0), to=TensorProto.UINT8)
    sums = g.MatMulInteger(x, codes, zero, zero)  # int32
    return g.Mul(g.Cast(sums, to=g.float), scales)


def matmul_nbits(g, x, codes, scales, bits, block, name, **level):
    """x (..., K) times codes (N, K) less 2 ** (bits - 1) times scales (N, ceil(K / block)) -> (..., N).

    A com.microsoft operator: its weights stay packed in memory.
    """
    n, k = codes.shape
    weights = g.weight(pack(codes, bits, block), f"{name}_q{bits}")
    scales = as_float(g, scales, f"{name}_scales")
    return g.MatMulNBits(x, weights, scales, domain="com.microsoft", K=k, N=n, bits=bits, block_size=block, **level)


def linear(g, x, module, name, n_in):
    """x (..., K) -> (..., N) by an nn.Linear, a TernaryLinear or a PackedLinear."""
    if is_ternary(module):
        return ternary_linear(g, x, module, name, n_in)
    y = product_with(g, x, module.weight.detach().numpy(), name)
    if module.bias is None:
        return y
    return g.Add(y, g.weight(module.bias, f"{name}.bias"))


def product_with(g, x, weight, name):
    """x (..., K), weight (N, K) -> (..., N), in the number format of the graph."""
    # a head at 4 bits would cost more than it saves
    if g.quant == "int8" or (g.quant == "int4" and name == "head"):
        codes, scales = quantise8(weight)
        return matmul_nbits(g, x, codes, scales, 8, BLOCK, name, accuracy_level=INT8)
    if g.quant == "int4":
        return linear_int4(g, x, weight, name)
    return g.MatMul(x, g.weight(weight.T, name))


def linear_int4(g, x, weight, name):
    """x (B, T, K), weight (N, K) -> (B, T, N).

    MatMulNBits knows no middles, only zero points that are codes. So it multiplies (code - 8) * scale, and the middle
    of each block, which is the same for all its inputs, meets their sum.
    """
    codes, scales, middles = quantise4(weight)
    y = matmul_nbits(g, x, codes, scales, 4, BLOCK, name, accuracy_level=INT8)
    missing = -codes.shape[1] % BLOCK
    if missing:
        x = g.Pad(x, [0, 0, 0, 0, 0, missing])
    sums = g.ReduceSum(g.Reshape(x, [0, 0, -1, BLOCK]), [-1], keepdims=0)  # (B, T, blocks)
    shifts = g.MatMul(sums, as_float(g, middles.T, f"{name}_middles"))
    return g.Add(y, shifts)


def as_float(g, array, name):
    """Name of a constant in float32; a float16 array stays one in the file, and runtimes widen it when they load."""
    constant = g.weight(array, name)
    return g.Cast(constant, to=g.float) if array.dtype == np.float16 else constant


def ternary_linear(g, x, module, name, n_in):
    """ternary.TernaryLinear, activations rounded in the graph. Each of its forms is lossless."""
    t, w_scale = ternary_weight(module, n_in)
    w_scale = w_scale.numpy()  # (), or (N, groups)
    group = module.group_size
    q, scale = absmax(g, x)
    if group:
        scale = g.Div(1.0, scale)  # (..., 1)
        block = math.gcd(group, 256)  # inputs that share a scale in the file
    else:
        scale = g.Div(w_scale, scale)
        block = 128
    bits = {"int4": 4, "q2": 2}.get(g.quant)
    if bits and block >= 16:  # the least that MatMulNBits knows
        if group:
            scales = np.repeat(w_scale, group // block, 1)  # (N, blocks)
        else:
            # of 1: it then adds integers, which float32 does exactly
            n_blocks = math.ceil(n_in / block)
            scales = np.ones((len(t), n_blocks), np.float32)
        zero = np.int8(2 ** (bits - 1))
        codes = t.numpy().astype(np.int8) + zero
        y = matmul_nbits(g, q, codes, scales, bits, block, name)
        return g.Mul(y, scale)
    if g.quant == "int8" and not group:
        codes = (t.numpy() + 128).astype(np.uint8)
        codes = g.weight(codes.T, f"{name}_q8")
        return matmul_int8(g, q, codes, scale)
    if group:
        t = product(t, torch.from_numpy(w_scale))
    y = g.MatMul(q, g.weight(t.numpy().T, name))
    return g.Mul(y, scale)


def embed(g, ids, weight):
    """ids (B, T), weight (V, C) -> (B, T, C)."""
    if g.quant in ("int8", "int4"):
        # looked up as bytes, so that the table stays one byte a number in memory, too
        codes, scales = quantise8(weight)
        rows = g.Gather(g.weight(pack(codes, 8, BLOCK), "embed_q8"), ids)  # (B, T, blocks, BLOCK)
        scales = g.Gather(g.weight(scales, "embed_scales"), ids)  # (B, T, blocks)
        scales = g.Unsqueeze(g.Cast(scales, to=g.float), [3])
        x = g.Sub(g.Cast(rows, to=g.float), 128.0)
        x = g.Reshape(g.Mul(x, scales), [0, 0, -1])
        if weight.shape[1] % BLOCK:
            x = g.Slice(x, [0], [weight.shape[1]], [2])
        return x
    half = weight.astype(np.float16)
    if g.quant == "q2" and (half == weight).all():  # a ternary model's
        # the Cast comes first: a runtime folds it when it loads, and not every GPU supports float16
        table = g.Cast(g.weight(half, "embed_f16"), to=g.float, name="embed")
        return g.Gather(table, ids)
    return g.Gather(g.weight(weight, "embed"), ids)


def tied_head(g, x):
    """x (..., C) -> logits (..., V) by the matrix of `embed`, which the file holds once."""
    if "embed_q8" in g.weights:
        codes = g.weights["embed_q8"]
        scales = g.Cast("embed_scales", to=g.float)
        return g.MatMulNBits(x, "embed_q8", scales, domain="com.microsoft", K=g.config.n_embd, N=len(codes), bits=8,
                             block_size=BLOCK, accuracy_level=INT8)
    return g.MatMul(x, g.Transpose("embed", perm=[1, 0]))
