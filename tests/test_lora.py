"""LoRA against its definition: B A x beside a frozen W x, by autograd and in float64."""
import pytest
import torch
import torch.nn as nn

import model
import ternary
import train
from thimble import checkpoint, configurator
from thimble.files import UserError
from thimble.lora import Lora

pytestmark = pytest.mark.usefixtures("lean")


def tiny(module=model, **kwargs):
    torch.manual_seed(0)
    return module.Model(module.Config(n_layer=2, n_head=2, n_embd=16, vocab_size=31, block_size=12, **kwargs))


class Beside(nn.Module):
    """A linear layer as the paper draws it: the frozen one, and A and B on a path of their own."""

    def __init__(self, linear, a, b):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a, self.b = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())

    def forward(self, x):
        return self.linear(x) + x @ self.a.mT @ self.b.mT


def unmerged(m, lora):
    """A copy of the model with Beside in place of every matrix, [its Besides in the order of the pairs]."""
    twin, found = tiny().to(next(m.parameters()).dtype), {}
    twin.load_state_dict(m.state_dict())
    names = {id(p): name.removesuffix(".weight") for name, p in m.named_parameters()}
    for p, pair in zip(lora.weights, lora.pairs, strict=True):
        path, _, leaf = names[id(p)].rpartition(".")
        parent = twin.get_submodule(path)
        linear = getattr(parent, leaf)
        linear.weight.data.copy_(pair.base)
        found[names[id(p)]] = Beside(linear, pair.a, pair.b)
        setattr(parent, leaf, found[names[id(p)]])
    return twin, list(found.values())


def test_gradients_and_merging_equal_the_definition():
    m = tiny().double()
    lora = Lora(m, 3).double()
    with torch.no_grad():
        for pair in lora.pairs:
            pair.b.normal_()
    lora.merge()
    idx, targets = torch.randint(31, (2, 3, 12))
    twin, besides = unmerged(m, lora)
    assert torch.allclose(m(idx)[0], twin(idx)[0], atol=1e-10)
    for part in (0, 1):  # two micro-batches add up
        m(idx[part:part + 1], targets[part:part + 1])[1].backward()
        twin(idx[part:part + 1], targets[part:part + 1])[1].backward()
    for pair, beside in zip(lora.pairs, besides, strict=True):
        assert torch.allclose(pair.a.grad, beside.a.grad, atol=1e-10) and beside.a.grad.abs().max() > 0
        assert torch.allclose(pair.b.grad, beside.b.grad, atol=1e-10)
    assert all(p.grad is None for p in m.parameters())
    assert {name.split(".")[-2] for name, p in m.named_parameters() if p.requires_grad} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_merged_equals_unmerged_in_float32():
    m = tiny()
    lora = Lora(m, 2)
    with torch.no_grad():
        for pair in lora.pairs:
            pair.b.normal_(std=0.1)
    lora.merge()
    idx = torch.randint(31, (2, 12))
    assert (m(idx)[0] - unmerged(m, lora)[0](idx)[0]).abs().max() < 1e-5


def settings(toy, tmp_path, name, **kwargs):
    shape = {"arch": "model", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32}
    return configurator.load(train.Config, **(shape | {
        "dataset": str(toy), "out_dir": str(tmp_path / name), "max_steps": 6, "eval_every": 3, "batch_size": 4,
        "device": "cpu", "dtype": "float32", "lr": 0.02, "rest_lr": 0.02} | kwargs))


@pytest.mark.parametrize("arch", ["model", "ternary", "hybrid_ssm"])
def test_training_touches_the_pairs_only_and_resumes_bit_for_bit(toy, tmp_path, arch):
    n = {"model": {}, "ternary": {"n_embd": 32}, "hybrid_ssm": {"n_embd": 32, "ssm_head_dim": 16, "d_state": 8}}[arch]
    train.train(settings(toy, tmp_path, "base", arch=arch, **n))
    more = {"arch": arch, "init_from": str(tmp_path / "base"), "lora_rank": 2, **n}
    before = checkpoint.load(tmp_path / "base", which="best").model
    record = train.train(settings(toy, tmp_path, "whole", **more))
    whole = checkpoint.load(tmp_path / "whole", optimizer=True)
    moved = {name for name in before if not torch.equal(before[name], whole.model[name])}
    assert moved == {name for name in before if "_proj" in name}
    for name in moved:
        assert torch.linalg.matrix_rank(whole.model[name].double() - before[name].double(), rtol=1e-4) <= 2
    assert record["best_loss"] < checkpoint.load(tmp_path / "base").meta["state"]["best_loss"]
    train.train(settings(toy, tmp_path, "halves", **more, save_every=3))
    import shutil
    shutil.rmtree(tmp_path / "halves" / "step_000006")
    for pointer in ("latest", "best"):
        (tmp_path / "halves" / pointer).write_text("step_000003")
    train.train(settings(toy, tmp_path, "halves", **more, save_every=3, resume=True))
    halves = checkpoint.load(tmp_path / "halves", optimizer=True)
    assert all(torch.equal(halves.model[k], t) for k, t in whole.model.items())
    assert all(torch.equal(halves.optimizer[k], t) for k, t in whole.optimizer.items())
    assert sum(t.numel() for k, t in whole.optimizer.items() if k.endswith((".m", ".v"))) < sum(
        t.numel() for t in whole.model.values()) / 2


def test_lora_obeys_the_rate_and_the_decay(toy, tmp_path, capsys):
    train.train(settings(toy, tmp_path, "base"))
    more = {"init_from": str(tmp_path / "base"), "lora_rank": 2}

    def pairs(name, **changes):
        cfg = settings(toy, tmp_path, name, **more, **changes)
        train.train(cfg, command=configurator.Command("", [], changes, changes))
        return checkpoint.load(tmp_path / name, optimizer=True).optimizer["lora.pairs.0.a"]
    plain = pairs("plain")
    capsys.readouterr()
    assert not torch.equal(plain, pairs("decay", weight_decay=0.5))
    assert "by adamw at rest_lr=0.02" in capsys.readouterr().out
    assert not torch.equal(plain, pairs("rate", rest_lr=0.01))
    assert not torch.equal(pairs("adamw", optimizer="adamw"), pairs("slow", optimizer="adamw", lr=0.001))
    out, err = capsys.readouterr()
    assert "by adamw at lr=0.001" in out and err == ""
    assert torch.equal(plain, pairs("said", lr=0.5))       # of the matrices, none of which learns here
    assert "lr=0.5 is not used" in capsys.readouterr().err


def test_mistakes(toy, tmp_path):
    with pytest.raises(ValueError, match="init_from"):
        settings(toy, tmp_path, "x", lora_rank=2)
    with pytest.raises(ValueError, match="lora_rank=99"):
        Lora(tiny(), 99)
    train.train(settings(toy, tmp_path, "base"))
    with pytest.raises(UserError, match="lora_rank=99"):
        train.train(settings(toy, tmp_path, "x", init_from=str(tmp_path / "base"), lora_rank=99))


def test_ternary_feels_the_merge():
    """Its layers keep their rounded weights; they must notice that the weights have changed."""
    m = tiny(ternary).eval()
    lora, idx = Lora(m, 2), torch.randint(31, (1, 12))
    before = m(idx)[0]
    with torch.no_grad():
        for pair in lora.pairs:
            pair.b.normal_()
    lora.merge()
    assert not torch.equal(before, m(idx)[0])
