"""LoRA for any model file: the matrices W become W + B A, and only A and B learn (Hu et al. 2021, sec. 4.1).

    python train.py config/sft_tiny.py --lora_rank=8 --init_from=runs/tiny_cpu

The model itself is not touched. Its weights always hold W + B A, so a checkpoint is merged as it is; a hook turns the
gradient of each matrix into those of A and B the moment it is there, and drops it. What that costs beside a forward
pass of its own for B A x is a copy of W; what it saves beside full training is the gradients and both moments of W.
"""
import torch
import torch.nn as nn


class Pair(nn.Module):
    """A (rank, in) normal, B (out, rank) zero, beside W (out, in) as it was."""

    def __init__(self, weight, rank):
        super().__init__()
        self.register_buffer("base", weight.detach().clone())
        self.a = nn.Parameter(torch.randn(rank, weight.size(1), device=weight.device) / weight.size(1) ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.size(0), rank, device=weight.device))
        weight.register_post_accumulate_grad_hook(self.take)

    @torch.no_grad()
    def take(self, weight):
        """W = base + B A, so dA = B^T dW and dB = dW A^T."""
        for p, grad in ((self.a, self.b.mT @ weight.grad), (self.b, weight.grad @ self.a.mT)):
            p.grad = grad if p.grad is None else p.grad + grad
        weight.grad = None


class Lora(nn.Module):
    """Pairs for all matrices inside the layers of `model`, the rest of which is frozen. ValueError on a bad rank."""

    def __init__(self, model, rank):
        super().__init__()
        groups = model.param_groups()
        weights = [p for role in ("matrix", "ternary") for p in groups.get(role, ()) if p.dim() == 2]
        most = min((min(p.shape) for p in weights), default=0)
        if rank > most:
            raise ValueError(f"lora_rank={rank} is more than the {most} of the smallest matrix inside the layers")
        for p in model.parameters():
            p.requires_grad_(False)
        for p in weights:
            p.requires_grad_(True)                         # for its gradient; no optimizer knows it
        self.weights = weights
        self.pairs = nn.ModuleList(Pair(p, rank) for p in weights)

    def param_groups(self):
        return {"lora": list(self.parameters())}

    @torch.no_grad()
    def merge(self):
        """Write W + B A into the model."""
        for p, pair in zip(self.weights, self.pairs, strict=True):
            p.copy_(torch.addmm(pair.base, pair.b, pair.a))
