"""LoRA for any model file: each matrix W becomes W + B A, and only A and B learn (Hu et al. 2021, sec. 4.1).

    lora = Lora(model, rank=8)                              # freezes the model
    optimizer = optim.Optimizer(lora, "adamw", lr=1e-3)
    model(x, y)[1].backward()                               # leaves gradients in A and B, none in the model
    optimizer.step(1.0)
    lora.merge()                                            # writes W + B A into the model

The code of the model stays as it is. Its weights always hold W + B A, so a checkpoint of it is merged already. A hook
turns the gradient of each matrix into those of its A and B as soon as it is complete, and frees it. Compared with a
second path for B A x in the forward pass this costs one copy of W; compared with full training it saves the gradient of
W and its optimizer state.
"""
import torch
import torch.nn as nn


class Pair(nn.Module):
    """A (rank, in) and B (out, rank) beside `base`, the matrix (out, in) as it was."""

    def __init__(self, weight, rank):
        super().__init__()
        n_out, n_in = weight.shape
        device = weight.device
        self.register_buffer("base", weight.detach().clone())
        # A is normal and B zero, so that training starts from the model as it is (Hu et al. 2021, sec. 4.1)
        self.a = nn.Parameter(torch.randn(rank, n_in, device=device) / n_in ** 0.5)
        self.b = nn.Parameter(torch.zeros(n_out, rank, device=device))
        weight.register_post_accumulate_grad_hook(self.take_gradient)

    @torch.no_grad()
    def take_gradient(self, weight):
        """Move weight.grad into A and B: W = base + B A, so dA = B^T dW and dB = dW A^T."""
        add_gradient(self.a, self.b.mT @ weight.grad)  # (rank, out) (out, in)
        add_gradient(self.b, weight.grad @ self.a.mT)  # (out, in) (in, rank)
        weight.grad = None  # nobody needs it, and it is the larger one


def add_gradient(parameter, grad):
    """As backward() would: gradients of several micro-batches add up."""
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad


class Lora(nn.Module):
    """A Pair for every matrix inside the layers of `model`, all of which is frozen.

    ValueError if rank exceeds the shorter side of a matrix.
    """

    def __init__(self, model, rank):
        super().__init__()
        groups = model.param_groups()
        matrices = [*groups.get("matrix", ()), *groups.get("ternary", ())]
        self.weights = [p for p in matrices if p.dim() == 2]
        limit = min((min(p.shape) for p in self.weights), default=0)
        if rank > limit:
            raise ValueError(f"lora_rank={rank} exceeds {limit}, the shorter side of the smallest matrix in the layers")
        model.requires_grad_(False)
        for p in self.weights:
            p.requires_grad_(True)  # only for the hook: no optimizer is given these
        self.pairs = nn.ModuleList(Pair(p, rank) for p in self.weights)

    def param_groups(self):
        """{role: [parameters]} for optim.Optimizer, as a model file has it."""
        return {"lora": list(self.parameters())}

    @torch.no_grad()
    def merge(self):
        """Write W + B A into the model."""
        for weight, pair in zip(self.weights, self.pairs, strict=True):
            weight.copy_(torch.addmm(pair.base, pair.b, pair.a))
