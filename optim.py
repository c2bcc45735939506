"""Muon, Lion and AdamW as pure functions, one table of what each role gets, one Optimizer, the schedules.

A model file says what its parameters are (`param_groups()`: embed, head, matrix, vector, ssm, ternary); this file says
how they learn. Nothing here depends on a particular model.
"""
import math
from collections import namedtuple

import torch
from torch.optim.adamw import adamw

SCHEDULES = ("constant", "linear", "cosine", "wsd", "restarts")

# role: (updated by Muon under --optimizer=muon?, weight decay?)
# Weight decay is for matrices that multiply. Gains, biases, state-space constants and look-up tables keep their size.
ROLES = {
    "matrix":  (True, True),
    "ternary": (True, True),
    "head":    (False, True),
    "embed":   (False, False),
    "vector":  (False, False),
    "ssm":     (False, False),
    "lora":    (False, True),
}

# Parameters that are updated together: the name of their rule, peak learning rate, weight decay, the parameters, and
# {what: a tensor for each of them} of running means.
Group = namedtuple("Group", "rule lr weight_decay params state")


# ---- schedules
def lr_scale(step, schedule, max_steps, warmup_steps=0, min_lr=0.1, decay_frac=0.2, restart_steps=1000,
             restart_mul=1.0, restart_decay=1.0):
    """Factor in [0, 1] on the peak rate for optimizer step 1 <= step <= max_steps; a pure function of the step.

    The warm-up rises linearly to 1 at warmup_steps. Then: constant; linear or cosine fall to min_lr at max_steps; wsd
    (warm-up, stable, decay) stays at 1 and falls along a cosine over the last decay_frac of all steps (Hu et al. 2024,
    MiniCPM, sec. 4); restarts falls along a cosine in cycles of restart_steps, each restart_mul times as long as the
    one before and restart_decay times as high (Loshchilov & Hutter 2017, SGDR). Past max_steps it stays where it ended.
    """
    step = min(step, max_steps)
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "restarts":
        since = step - warmup_steps  # steps into the current cycle
        length = restart_steps
        cycle = 0
        while since >= length:
            since -= length
            length = max(1, round(length * restart_mul))
            cycle += 1
        return restart_decay ** cycle * cosine(since, length, min_lr)
    begin = warmup_steps  # the step at which the rate starts to fall
    if schedule == "wsd":
        begin = max(warmup_steps, round((1 - decay_frac) * max_steps))
    progress = (step - begin) / max(1, max_steps - begin)
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "linear":
        return 1 - (1 - min_lr) * progress
    return cosine(progress, 1, min_lr)


def cosine(at, length, low):
    """Half a cosine, from 1 where at = 0 to `low` where at = length (Loshchilov & Hutter 2017, eq. 5)."""
    return low + (1 - low) * (1 + math.cos(math.pi * at / length)) / 2


# ---- update rules
def orthogonalize(x, steps=5):
    """x: (n, rows, cols) -> roughly the nearest semi-orthogonal matrices: singular values end in about [0.7, 1.2].

    Newton-Schulz iteration with the quintic of Jordan et al. 2024 (Muon): p(s) = 3.4445 s - 4.7750 s^3 + 2.0315 s^5 is
    applied to every singular value s. The coefficients are tuned for a steep slope at 0, not for convergence to 1; five
    steps are enough. The dtype stays that of x; bfloat16 is precise enough.
    """
    wide = x.size(-2) <= x.size(-1)
    if not wide:
        x = x.mT.contiguous()  # x x^T below is then the smaller of the two products
    # the Frobenius norm bounds the largest singular value, so that all of them start in [0, 1]
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT  # (n, short, short)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)  # 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
    return x if wide else x.mT


def muon_update(grads, momentum, beta=0.95):
    """grads, momentum: (n, rows, cols) -> updates of the same shape. momentum changes in place.

    Nesterov momentum, then orthogonalisation (Jordan et al. 2024). The factor sqrt(max(1, rows / cols)) is that of
    their code: with it an update of a tall matrix changes the RMS of its outputs by about lr times that of its inputs.
    """
    momentum.lerp_(grads, 1 - beta)
    ahead = torch.lerp(grads, momentum, beta)  # Nesterov: one more step along the momentum
    update = orthogonalize(ahead.bfloat16()).to(grads.dtype)
    rows, cols = grads.shape[-2:]
    return update * max(1, rows / cols) ** 0.5


def lion_update(grad, momentum, betas=(0.9, 0.99)):
    """sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g (Chen et al. 2023, algorithm 2). momentum changes in place.

    Every weight moves by exactly lr, so lr must be smaller than AdamW's, and weight decay larger (their sec. 5).
    """
    update = torch.lerp(grad, momentum, betas[0]).sign_()
    momentum.lerp_(grad, 1 - betas[1])
    return update


def adamw_step(params, grads, state, lr, betas, weight_decay):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) by torch's fused kernel. params and state change in place."""
    adamw(params, grads, state["m"], state["v"], [], state["steps"], fused=True, amsgrad=False, beta1=betas[0],
          beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=1e-8, maximize=False)
    # fused kernels do not count as a change to torch; ternary.py keeps rounded weights until it sees one
    torch.autograd.graph.increment_version(params)


# ---- the optimizer
class Optimizer:
    """One optimizer over a model's roles: `optimizer` for the matrices, `rest_optimizer` for all else under Muon.

    lr is the peak rate of the matrices, rest_lr that of the others (used with Muon only, else lr serves all).
    State is kept by parameter name: `state_dict()` is a flat {name: tensor} that safetensors can hold.
    ValueError if the model's param_groups() and its parameters do not match.
    """

    def __init__(self, model, optimizer, lr, rest_optimizer="adamw", rest_lr=None, weight_decay=0.0,
                 betas=(0.9, 0.95), momentum=0.95):
        self.betas = betas  # of AdamW; Lion has its own, those of its paper
        self.momentum = momentum  # of Muon
        self.groups = []
        for role, params in checked_roles(model).items():
            takes_muon, takes_decay = ROLES[role]
            rule = optimizer
            peak = lr
            if optimizer == "muon" and not takes_muon:
                rule = rest_optimizer
                peak = rest_lr
            decay = weight_decay if takes_decay else 0.0
            # Muon's iteration is batched over all matrices of the same shape
            sets = same_shapes(params) if rule == "muon" else [params]
            for alike in sets:
                self.groups.append(Group(rule, peak, decay, alike, zero_state(rule, alike)))

        names = {p: name for name, p in model.named_parameters()}
        self.state = {}  # "name.what" -> tensor, shared with the groups
        for group in self.groups:
            for what, tensors in group.state.items():
                for p, tensor in zip(group.params, tensors, strict=True):
                    self.state[f"{names[p]}.{what}"] = tensor

    @torch.no_grad()
    def step(self, scale):
        """One update with every rate at `scale` times its peak. Every parameter must have a gradient."""
        for group in self.groups:
            params = group.params
            lr = group.lr * scale
            grads = [p.grad for p in params]
            if group.rule == "adamw":
                adamw_step(params, grads, group.state, lr, self.betas, group.weight_decay)
                continue
            if group.rule == "lion":
                updates = [lion_update(g, m) for g, m in zip(grads, group.state["m"], strict=True)]
            else:
                updates = list(muon_update(torch.stack(grads), group.state["m"], self.momentum))
            if group.weight_decay:
                torch._foreach_mul_(params, 1 - lr * group.weight_decay)  # decoupled, as in AdamW
            torch._foreach_add_(params, updates, alpha=-lr)

    def state_dict(self):
        """{"parameter.what": tensor}: the tensors themselves, not copies."""
        return self.state

    @torch.no_grad()
    def load_state_dict(self, state):
        """Copy a state_dict() into this optimizer. ValueError if names or shapes do not fit."""
        if set(state) != set(self.state):
            odd = sorted(set(state) ^ set(self.state))
            raise ValueError(f"optimizer state does not fit: {odd[0]} and {len(odd) - 1} more are on one side only")
        for name, tensor in self.state.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"optimizer state {name} has shape {tuple(state[name].shape)}, "
                                 f"expected {tuple(tensor.shape)}")
            tensor.copy_(state[name])


def checked_roles(model):
    """model.param_groups(), if every role is known and every parameter has exactly one; else ValueError."""
    groups = model.param_groups()
    unknown = set(groups) - set(ROLES)
    if unknown:
        raise ValueError(f"param_groups() names roles that optim.py does not know: {', '.join(sorted(unknown))}")
    listed = [p for params in groups.values() for p in params]
    if len(listed) != len(set(listed)) or set(listed) != set(model.parameters()):
        raise ValueError("param_groups() must list each parameter of the model exactly once")
    return groups


def same_shapes(params):
    """Split a list of parameters into one list for each shape."""
    shapes = sorted({p.shape for p in params})
    return [[p for p in params if p.shape == shape] for shape in shapes]


def zero_state(rule, params):
    """{what: a tensor for each of params}, zeros: m and v are running means of gradients and of their squares."""
    m = [torch.zeros_like(p) for p in params]
    if rule == "muon":
        return {"m": torch.stack(m)}  # (n, rows, cols), for the batched iteration
    if rule == "lion":
        return {"m": m}
    v = [torch.zeros_like(p) for p in params]
    steps = [torch.zeros((), device=p.device) for p in params]  # for the bias correction of AdamW, as torch wants it
    return {"m": m, "v": v, "steps": steps}
