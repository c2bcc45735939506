"""Muon, Lion and AdamW as pure functions, one table that says which role gets what, one Optimizer, the schedules.

A model file says what its parameters are (`param_groups()`: embed, head, matrix, vector, ssm, ternary); this file says
what is done to them. Nothing here knows a model.
"""
import math

import torch
from torch.optim.adamw import adamw

SCHEDULES = ("constant", "linear", "cosine", "wsd", "restarts")

# role: (orthogonalised by Muon when --optimizer=muon?, weight decay?)
# Decay is for matrices that multiply; gains, biases, state-space constants and look-up tables keep their size.
ROLES = {
    "matrix":  (True, True),
    "ternary": (True, True),
    "head":    (False, True),
    "embed":   (False, False),
    "vector":  (False, False),
    "ssm":     (False, False),
    "lora":    (False, False),
}


def lr_scale(step, schedule, max_steps, warmup_steps=0, min_lr=0.1, decay_frac=0.2, restart_steps=1000,
             restart_mul=1.0, restart_decay=1.0):
    """Factor in [0, 1] on the peak rate for optimizer step 1 <= step <= max_steps; a pure function of the step.

    Warm-up rises linearly to 1 at warmup_steps. Then: constant; linear or cosine down to min_lr at max_steps; wsd
    stays at 1 and falls by a cosine over the last decay_frac of all steps (Hu et al. 2024, MiniCPM, sec. 4);
    restarts falls by a cosine in cycles of restart_steps, each restart_mul times as long as the one before and
    restart_decay times as high (Loshchilov & Hutter 2017). Past max_steps it stays where it ended.
    """
    step = min(step, max_steps)
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "restarts":
        since, length, cycle = step - warmup_steps, restart_steps, 0
        while since >= length:
            since, length, cycle = since - length, max(1, round(length * restart_mul)), cycle + 1
        peak = restart_decay ** cycle
        return peak * (min_lr + (1 - min_lr) * (1 + math.cos(math.pi * since / length)) / 2)
    begin = max(warmup_steps, round((1 - decay_frac) * max_steps)) if schedule == "wsd" else warmup_steps
    p = min(max((step - begin) / max(1, max_steps - begin), 0.0), 1.0)
    if schedule == "linear":
        return 1 - (1 - min_lr) * p
    return min_lr + (1 - min_lr) * (1 + math.cos(math.pi * p)) / 2


def orthogonalize(x, steps=5):
    """Nearest semi-orthogonal matrices, roughly: singular values of x (n, rows, cols) go to about [0.7, 1.2].

    Newton-Schulz iteration with the quintic coefficients of Jordan et al. 2024 (Muon). bfloat16 in and out where x is.
    """
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT.contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x if wide else x.mT


def muon_update(grads, momentum, beta=0.95):
    """grads, momentum: (n, rows, cols), momentum is changed -> updates of the same shape, Nesterov, orthogonalised.

    Scaled by sqrt(max(1, rows / cols)), so that lr is the spectral norm of an update relative to sqrt(rows / cols).
    """
    momentum.lerp_(grads, 1 - beta)
    x = orthogonalize(torch.lerp(grads, momentum, beta).bfloat16())
    return x.to(grads.dtype) * max(1, grads.size(-2) / grads.size(-1)) ** 0.5


def lion_update(grad, momentum, betas=(0.9, 0.99)):
    """sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g (Chen et al. 2023, algorithm 2). momentum is changed."""
    update = torch.lerp(grad, momentum, betas[0]).sign_()
    momentum.lerp_(grad, 1 - betas[1])
    return update


class Optimizer:
    """One optimizer over a model's roles: `optimizer` for the matrices, `rest_optimizer` for all else under Muon.

    lr is the peak of the matrices, rest_lr the peak of the others (needed with Muon only, else lr serves all).
    State is kept per parameter name: `state_dict()` is a flat {name: tensor} that safetensors can hold.
    """

    def __init__(self, model, optimizer, lr, rest_optimizer="adamw", rest_lr=None, weight_decay=0.0,
                 betas=(0.9, 0.95), momentum=0.95):
        names = {p: name for name, p in model.named_parameters()}
        groups = model.param_groups()
        listed = [p for params in groups.values() for p in params]
        if unknown := set(groups) - set(ROLES):
            raise ValueError(f"param_groups() names roles that optim.py does not know: {', '.join(sorted(unknown))}")
        if len(listed) != len(set(listed)) or set(listed) != set(names):
            raise ValueError("param_groups() must list each parameter of the model exactly once")
        self.betas, self.momentum = betas, momentum
        self.state = {}                                    # "name.what" -> tensor
        self.groups = []                                   # rule, peak lr, weight decay, [parameters], [state] ...
        for role, params in groups.items():
            muon, decay = ROLES[role]
            rule = optimizer if optimizer != "muon" or muon else rest_optimizer
            peak = lr if rule == optimizer else rest_lr
            decay = weight_decay if decay else 0.0
            if rule == "adamw":
                m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
                steps = [torch.zeros((), device=p.device) for p in params]
                self._keep(names, params, m=m, v=v, steps=steps)
                self.groups.append((rule, peak, decay, params, (m, v, steps)))
            elif rule == "lion":
                m = [torch.zeros_like(p) for p in params]
                self._keep(names, params, m=m)
                self.groups.append((rule, peak, decay, params, (m,)))
            else:                                          # muon: one batched iteration for all equal shapes
                for shape in sorted({p.shape for p in params}):
                    same = [p for p in params if p.shape == shape]
                    m = torch.zeros(len(same), *shape, device=same[0].device)
                    self._keep(names, same, m=m)
                    self.groups.append((rule, peak, decay, same, (m,)))

    def _keep(self, names, params, **tensors):
        for what, values in tensors.items():
            self.state.update({f"{names[p]}.{what}": value for p, value in zip(params, values, strict=True)})

    @torch.no_grad()
    def step(self, scale):
        """One update with every rate at scale times its peak. Parameters without a gradient are a mistake."""
        for rule, peak, decay, params, state in self.groups:
            lr, grads = peak * scale, [p.grad for p in params]
            if rule == "adamw":
                adamw(params, grads, *state[:2], [], state[2], fused=True, amsgrad=False, beta1=self.betas[0],
                      beta2=self.betas[1], lr=lr, weight_decay=decay, eps=1e-8, maximize=False)
                torch.autograd.graph.increment_version(params)  # fused kernels forget it, ternary.py needs it
                continue
            if rule == "lion":
                updates = [lion_update(g, m) for g, m in zip(grads, state[0], strict=True)]
            else:
                updates = list(muon_update(torch.stack(grads), state[0], self.momentum))
            if decay:
                torch._foreach_mul_(params, 1 - lr * decay)
            torch._foreach_add_(params, updates, alpha=-lr)

    def state_dict(self):
        return self.state

    @torch.no_grad()
    def load_state_dict(self, state):
        if set(state) != set(self.state):
            odd = sorted(set(state) ^ set(self.state))
            raise ValueError(f"optimizer state does not fit: {odd[0]} and {len(odd) - 1} more are on one side only")
        for name, tensor in self.state.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"optimizer state {name} has shape {tuple(state[name].shape)}, "
                                 f"expected {tuple(tensor.shape)}")
            tensor.copy_(state[name])
