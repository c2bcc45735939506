"""8 and 4 bits as the ONNX graphs have them: codes and scales of a matrix, and the torch model with weights so rounded.

Legend: N outputs and K inputs of a matrix.
"""
import copy

import numpy as np
import torch
import torch.nn as nn

from formats.weights import is_ternary

BLOCK = 32  # inputs that share a scale, as in llama.cpp: one outlier costs the precision of 31 others, not of a row


def in_blocks(weight):
    """weight (N, K) -> (N, blocks, BLOCK) float32, zeros behind the last."""
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % BLOCK)))
    return padded.reshape(len(weight), -1, BLOCK).astype(np.float32)


def half(values):
    """`values` as the file stores them. A float32 scale for each block would make a 4-bit file a fifth larger."""
    return values[..., 0].astype(np.float16)


def nearest(offsets, scales, least, most):
    """offsets (N, blocks, BLOCK), scales (N, blocks, 1) -> the integers nearest to their quotients, within bounds."""
    divisors = np.where(scales, scales, 1)  # a block of equal numbers has a scale of 0
    return np.clip(np.round(offsets / divisors), least, most)


def quantise8(weight):
    """weight (N, K) -> uint8 codes (N, K), scales (N, blocks) float16: w is near (code - 128) * scale."""
    blocks = in_blocks(weight)
    scales = half(np.abs(blocks).max(-1, keepdims=True) / 127)
    integers = nearest(blocks, scales[..., None].astype(np.float32), -127, 127)
    codes = (integers + 128).reshape(len(weight), -1)
    return codes[:, :weight.shape[1]].astype(np.uint8), scales


def quantise4(weight):
    """weight (N, K) -> uint8 codes (N, K), float16 scales and middles (N, blocks).

    w is near (code - 8) * scale + middle. The middle of a block, not its least number, so that the codes' part is about
    0 on average: runtimes round what meets it, and the mean of a block would multiply that error.

    The codes first span each block from its least number to its largest, as llama.cpp's Q4_1. So weights that come from
    such a file get their old codes back, where a second grid over the first would round once more. Then scale and
    middle are those of least squares for these codes, and the codes the nearest for these: three turns, each of which
    can only lower the error, take 7 % off that of normal weights; more turns less than 1 %.
    """
    blocks = in_blocks(weight)
    least = blocks.min(-1, keepdims=True)
    scales = (blocks.max(-1, keepdims=True) - least) / 15
    middles = least + 8 * scales
    mean = blocks.mean(-1, keepdims=True)
    for _ in range(3):
        integers = nearest(blocks - middles, scales, -8, 7)
        centre = integers.mean(-1, keepdims=True)
        spread = integers - centre
        covariance = (spread * (blocks - mean)).sum(-1, keepdims=True)
        variance = np.square(spread).sum(-1, keepdims=True)
        scales = covariance / np.maximum(variance, 1e-12)
        middles = mean - scales * centre
    scales = half(scales)
    middles = half(middles)
    offsets = blocks - middles[..., None].astype(np.float32)
    integers = nearest(offsets, scales[..., None].astype(np.float32), -8, 7)
    codes = (integers + 8).reshape(len(weight), -1)
    return codes[:, :weight.shape[1]].astype(np.uint8), scales, middles


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
    integers = torch.from_numpy(codes).float() - 128
    return integers * spread_out(scales, codes)


def rounded4(weight):
    """weight (N, K) -> what its 4-bit codes stand for."""
    codes, scales, middles = quantise4(weight.numpy())
    integers = torch.from_numpy(codes).float() - 8
    return integers * spread_out(scales, codes) + spread_out(middles, codes)


def spread_out(values, codes):
    """values (N, blocks), one for each block -> (N, K) float32, one for each of the codes (N, K)."""
    repeated = torch.from_numpy(values).float().repeat_interleave(BLOCK, 1)
    return repeated[:, :codes.shape[1]]


@torch.no_grad()
def twin(model, quant):
    """The torch model with the weights that the graph of this form holds.

    Runtimes round what these meet to 8 bits, in blocks too and each in its own way; the twin does not.
    """
    twin = copy.deepcopy(model).float().eval()
    if quant not in ("int8", "int4"):  # fp32, and q2, which holds -1, 0 and 1 as they are
        return twin
    if hasattr(twin, "embedding"):  # of a ternary model: float16 first, then 8 bits
        twin.embed.weight.copy_(twin.embedding())
        twin.embedding = lambda: twin.embed.weight
    for name, module in twin.named_modules():
        if isinstance(module, nn.Embedding) or name == "head":
            module.weight.copy_(rounded8(module.weight))
        elif isinstance(module, nn.Linear) and not is_ternary(module) and not name.endswith("dt_proj"):  # see `mamba`
            rounded = rounded8 if quant == "int8" else rounded4
            module.weight.copy_(rounded(module.weight))
    return twin
