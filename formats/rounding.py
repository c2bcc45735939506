"""8, 4 and 2 bits as the ONNX graphs have them: codes and scales of a matrix, and the torch model that rounds alike.

Legend: N outputs and K inputs of a matrix.
"""
import copy

import numpy as np
import torch
import torch.nn as nn

from formats.weights import is_ternary, plain, ternary_parts
from thimble.files import UserError

BLOCK = 32  # inputs that share a scale at 4 bits, as in llama.cpp's Q4_0


def quantise4(weight):
    """weight (N, K) -> codes (N, K) from 0 to 15, scales (N, blocks): w is near (code - 8) * scale.

    The number of largest size in a block becomes -8, so that all 16 codes are in use (llama.cpp's Q4_0 does the same).
    """
    n, k = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -k % BLOCK)))
    blocks = padded.reshape(n, -1, BLOCK)
    place = np.abs(blocks).argmax(-1, keepdims=True)
    largest = np.take_along_axis(blocks, place, -1)  # (N, blocks, 1), with its sign
    scales = largest / -8
    divisors = np.where(scales, scales, 1)  # a block of zeros has a scale of 0
    codes = np.round(blocks / divisors) + 8
    codes = np.clip(codes, 0, 15).reshape(n, -1)
    return codes[:, :k].astype(np.uint8), scales[..., 0].astype(np.float32)


def quantise8(weight):
    """weight (N, K) -> uint8 codes (N, K), scales (N,): w is near (code - 128) * scale."""
    largest = np.abs(weight).max(1)
    scales = np.maximum(largest, 1e-12) / 127
    codes = np.round(weight / scales[:, None]) + 128
    return codes.astype(np.uint8), scales.astype(np.float32)


def pack(codes, bits, block):
    """codes (N, K) below 2 ** bits -> uint8 (N, ceil(K / block), block * bits / 8), low bits first, for MatMulNBits."""
    n, k = codes.shape
    n_per_byte = 8 // bits
    zero = 2 ** (bits - 1)  # the code that stands for 0
    codes = np.pad(codes, ((0, 0), (0, -k % block)), constant_values=zero)
    codes = codes.reshape(n, -1, block // n_per_byte, n_per_byte).astype(np.uint8)
    packed = np.zeros(codes.shape[:-1], np.uint8)
    for i in range(n_per_byte):
        packed |= codes[..., i] << (bits * i)
    return packed


# ---- the same in torch
def rounded8(weight):
    """weight (N, K) -> what its 8-bit codes stand for."""
    codes, scales = quantise8(weight.numpy())
    integers = codes.astype(np.float32) - 128
    return torch.from_numpy(integers * scales[:, None])


def rounded4(weight):
    """weight (N, K) -> what its 4-bit codes stand for."""
    codes, scales = quantise4(weight.numpy())
    scales = np.repeat(scales, BLOCK, 1)[:, :codes.shape[1]]
    integers = codes.astype(np.float32) - 8
    return torch.from_numpy(integers * scales)


def rounded_activations(x):
    """x (..., K) at 8 bits, with one scale a row."""
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * scale).round() / scale


def round_input(module):
    def rounded(_, inputs):
        return (rounded_activations(inputs[0]),)

    module.register_forward_pre_hook(rounded)


@torch.no_grad()
def twin(model, quant):
    """The torch model whose weights and activations are rounded as the graph of this form rounds them."""
    if quant not in ("int8", "int4"):  # fp32, and q2, which holds -1, 0 and 1 as they are
        return copy.deepcopy(model).float().eval()
    if not hasattr(model, "unembed"):
        raise UserError(f"{type(model).__module__}.py has no method unembed, which turns the last norm's output into "
                        "logits: without it only --quant=fp32 can be checked")
    ternary = ternary_parts(model)
    twin = plain(model)
    if hasattr(twin, "embedding"):  # of a ternary model: float16 first, then 8 bits
        twin.embed.weight.copy_(twin.embedding())
        twin.embedding = lambda: twin.embed.weight
    for name, module in twin.named_modules():
        if name in ternary:  # lossless in every form; its activations have 8 bits
            round_input(module)
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(rounded8(module.weight))
        elif isinstance(module, nn.Linear) and not name.endswith("dt_proj"):  # which the graphs keep: see `mamba`
            if quant == "int8" or name == "head":
                module.weight.copy_(rounded8(module.weight))
                if name != "head":  # unembed rounds its input, below
                    round_input(module)
            else:
                module.weight.copy_(rounded4(module.weight))
    # here, and not at the head, which may be the embedding
    unembed = twin.unembed
    twin.unembed = lambda x: unembed(rounded_activations(x))
    return twin


def rounds_activations(model, quant):
    """Whether the model, or its twin of this form, rounds activations to 8 bits."""
    return quant in ("int8", "int4") or any(is_ternary(module) for module in model.modules())
