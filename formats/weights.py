"""A model's weights as they leave: what each tensor holds, and a plain copy of the model that computes with that."""
import copy
from dataclasses import replace

import torch
import torch.nn as nn

from formats.names import n_hidden


def weights(model):
    """{name: tensor}; the embedding of a ternary model as it ships, rounded to float16."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if hasattr(model, "embedding"):
        tensors["embed.weight"] = model.embedding().detach().float()
    return tensors


def is_ternary(module):
    return hasattr(module, "group_size")


def ternary_weight(module, n_in):
    """TernaryLinear or PackedLinear -> t (N, K) of -1, 0, 1 and its scale, () or (N, K / group_size); both float32."""
    if hasattr(module, "codes"):
        from kernels import ternary
        return ternary.unpack(module.codes, n_in).float(), module.scales.detach().float().t()
    t, scale, _ = module.rounded(torch.float32)
    return t.to(torch.int8).float(), scale  # by way of int8, which has no -0.0


def ternary_parts(model):
    """{name of a ternary matrix: what `ternary_weight` gives for it}; empty for any other model."""
    parts = {}
    for name, module in model.named_modules():
        if is_ternary(module):
            n_in = n_hidden(model) if name.endswith("down_proj") else model.config.n_embd
            parts[name] = ternary_weight(module, n_in)
    return parts


def product(t, scale):
    """t (N, K) times its scale -> the matrix that they stand for."""
    if scale.dim():
        scale = scale.repeat_interleave(t.size(1) // scale.size(1), 1)  # (N, K)
    return t * scale


def plain(model):
    """A copy in float32 whose matrices are plain nn.Linear: a ternary model without the rounding of activations."""
    parts = ternary_parts(model)
    if parts and model.config.packed:  # the norms and the embedding are all that it has as they were
        twin = type(model)(replace(model.config, packed=False))
        twin.load_state_dict(model.state_dict(), strict=False)
    else:
        twin = copy.deepcopy(model)
    for name, (t, scale) in parts.items():
        linear = nn.Linear(t.size(1), t.size(0), bias=False)
        linear.weight = nn.Parameter(product(t, scale))
        twin.set_submodule(name, linear)
    return twin.float().eval()


@torch.no_grad()
def with_weights(model, change):
    """A copy in which every tensor is change(name, tensor)."""
    twin = copy.deepcopy(model)
    for name, tensor in twin.state_dict(keep_vars=True).items():
        tensor.copy_(change(name, tensor.detach()))
    return twin
