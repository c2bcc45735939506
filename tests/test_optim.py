"""Update rules against their papers' formulas and torch's own; schedules against their closed forms."""
import math
from dataclasses import fields
from inspect import Parameter, signature

import pytest
import torch
import torch.nn as nn

import optim
import train
from optim import lr_scale


class Toy(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 6)
        self.a, self.b, self.c = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 10, bias=False)
        self.gain = nn.Parameter(torch.ones(10))

    def param_groups(self):
        return {"embed": [self.embed.weight], "matrix": [self.a.weight, self.c.weight, self.b.weight],
                "vector": [self.gain]}

    def loss(self):
        x = self.embed(torch.arange(7))
        return (self.c(self.b(self.a(x).tanh())) * self.gain).square().sum() + x.sum()


def run(toy, optimizer, steps=3):
    for _ in range(steps):
        toy.zero_grad()
        toy.loss().backward()
        optimizer.step(0.5)
    return toy


def test_adamw_equals_torch_with_no_decay_on_gains_and_embeddings():
    ours = run(t := Toy(), optim.Optimizer(t, "adamw", lr=0.02, weight_decay=0.3, betas=(0.8, 0.9)))
    theirs = Toy()
    groups = [{"params": theirs.param_groups()["matrix"], "weight_decay": 0.3},
              {"params": [theirs.embed.weight, theirs.gain], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))
    for _ in range(3):
        theirs.zero_grad()
        theirs.loss().backward()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6


def test_muon_equals_torchs_muon():
    ours = run(t := Toy(), optim.Optimizer(t, "muon", lr=0.2, weight_decay=0.1, rest_lr=0.02))
    theirs = Toy()
    # torch scales its rate by sqrt(max(1, rows / cols)) under "original", as we do
    muon = torch.optim.Muon(theirs.param_groups()["matrix"], lr=0.1, weight_decay=0.1, momentum=0.95)
    rest = torch.optim.AdamW([theirs.embed.weight, theirs.gain], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        theirs.zero_grad()
        theirs.loss().backward()
        muon.step()
        rest.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # both iterate in bfloat16, and in another order of sums: what differs is rounding, 2^-8 of an update of 0.1
        assert (a - b).abs().max() < 0.012, name


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 24, 8), (2, 8, 24)])
def test_orthogonalize_turns_every_singular_value_to_about_one(shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(optim.orthogonalize(x := torch.randn(shape)), full_matrices=False)
    assert 0.6 < s.min() and s.max() < 1.3
    u0, s0, v0 = torch.linalg.svd(x, full_matrices=False)
    exact = u0 @ v0  # the polar factor that the iteration approximates
    assert ((u * s[:, None]) @ v - exact).norm() / exact.norm() < 0.35


def test_lion_follows_its_algorithm():
    g, m = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-0.05, 0.5, 0.0])
    update = optim.lion_update(g, m, (0.9, 0.99))
    assert update.tolist() == [1.0, 1.0, 0.0]  # sign(.9 m + .1 g)
    assert torch.allclose(m, torch.tensor([0.99 * -0.05 + 0.01, 0.99 * 0.5 - 0.02, 0.0]))


def test_lion_moves_each_weight_by_the_rate():
    toy = Toy()
    before = [p.clone() for p in toy.parameters()]
    run(toy, optim.Optimizer(toy, "lion", lr=0.01), steps=1)
    moved = torch.cat([(p - b).abs().flatten() for p, b in zip(toy.parameters(), before, strict=True)])
    assert ((moved - 0.005).abs() < 1e-6).float().mean() > 0.95


@pytest.mark.parametrize("optimizer, rest", [("muon", "adamw"), ("muon", "lion"), ("adamw", "adamw"), ("lion", "lion")])
def test_state_restores_bit_for_bit(optimizer, rest):
    toy = Toy()
    first = optim.Optimizer(toy, optimizer, 0.02, rest, 0.01)
    run(toy, first, 2)
    saved = {k: t.clone() for k, t in first.state_dict().items()}
    weights = {k: t.clone() for k, t in toy.state_dict().items()}
    run(toy, first, 2)
    again = Toy(seed=5)
    again.load_state_dict(weights)
    second = optim.Optimizer(again, optimizer, 0.02, rest, 0.01)
    second.load_state_dict(saved)
    run(again, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(toy.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="does not fit"):
        second.load_state_dict({k: t for k, t in saved.items() if "gain" not in k})


def test_roles_must_cover_every_parameter_once():
    for change in ({"vector": []}, {"vector": [0]}, {"nonsense": []}):
        toy = Toy()
        groups = toy.param_groups() | {k: [toy.a.weight] if v else v for k, v in change.items()}
        toy.param_groups = lambda groups=groups: groups
        with pytest.raises(ValueError, match="param_groups"):
            optim.Optimizer(toy, "muon", 0.02)


def test_no_default_differs_from_that_of_the_loop():
    defaults = {f.name: f.default for f in fields(train.Config)}
    for name, p in signature(optim.Optimizer).parameters.items():
        assert p.default in (Parameter.empty, None, defaults.get(name)), name


# ---- schedules: W warm-up steps, T steps in all
W, T = 10, 200


def closed_form(step, schedule):
    if step < W:
        return step / W
    p = min(1, (step - W) / (T - W))
    if schedule == "wsd":
        p = min(1, max(0, (step - 160) / 40))
    if schedule == "linear":
        return 1 - 0.9 * p
    return 1 if schedule == "constant" else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * p))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_rate_equals_its_closed_form_at_every_step(schedule):
    scales = [lr_scale(s, schedule, T, W, 0.1, 0.2) for s in range(1, 10 * T)]
    for step, scale in enumerate(scales, 1):
        assert abs(scale - closed_form(min(step, T), schedule)) < 1e-12
    assert scales[0] == 1 / W and scales[W - 1] == 1  # the first step is warmed up, not at the full rate
    falling = scales[W - 1:]
    assert all(a >= b for a, b in zip(falling, falling[1:], strict=False)), "the rate rises again after the warm-up"
    if schedule != "constant":
        assert abs(scales[T - 1] - 0.1) < 1e-12 and scales[-1] == scales[T - 1]


def test_wsd_stays_at_the_peak_until_four_fifths():
    assert all(lr_scale(s, "wsd", T, W) == 1 for s in range(W, 161)) and lr_scale(162, "wsd", T, W) < 1


def test_restarts_return_to_a_lower_peak():
    scale = [lr_scale(s, "restarts", 1000, 10, 0.01, restart_steps=100, restart_mul=2.0, restart_decay=0.9)
             for s in range(1001)]
    assert scale[10] == 1 and abs(scale[110] - 0.9) < 1e-12 and abs(scale[310] - 0.81) < 1e-12
    assert abs(scale[60] - (0.01 + 0.99 / 2)) < 1e-12 and abs(scale[210] - 0.9 * (0.01 + 0.99 / 2)) < 1e-12
    assert all(0 <= s <= 1 for s in scale)


def test_warm_up_longer_than_the_run_never_exceeds_one():
    assert all(0 < lr_scale(s, sched, 5, 5) <= 1 for s in range(1, 9) for sched in optim.SCHEDULES)
