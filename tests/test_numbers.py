"""Numbers: every operation and whole models in float64, gradients by differences, and losses that were recorded.

    PYTHONPATH=. python tests/test_numbers.py   # records them again, after a change that is meant to change them
"""
import copy
import importlib
import json
import math
import random
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import cases
import pytest
import torch
import torch.nn.functional as F
from test_contract import BASE, ids, shaken
from test_contract import CASES as CONTRACT
from test_hybrid_ssm import recurrence
from tries import tries

import cerebros
import hybrid_ssm
import model
import train
from formats import names, reference
from thimble import configurator

pytestmark = pytest.mark.usefixtures("lean")

FIXTURES = Path(__file__).resolve().parent / "fixtures"
GOLDEN = FIXTURES / "golden.json"


# ---- errors: never more than twice those of the plain formula in the same dtype
def error(found, exact):
    """Root mean square of the difference, relative to that of the exact value."""
    exact = exact.double()
    size = exact.square().mean().sqrt().clamp(min=1e-30)
    return ((found.double() - exact).square().mean().sqrt() / size).item()


def plain_attention(q, k, v):
    """q (B, H, T, D), the last T of S tokens; k, v (B, K, S, D)."""
    T = q.size(2)
    S = k.size(2)
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), 1) for t in (k, v))
    scores = q @ k.mT / math.sqrt(q.size(-1))
    future = torch.ones(T, S, dtype=torch.bool).triu(1 + S - T)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def plain_conv(x, weight, bias, window):
    """x (B, T, E); window (B, k - 1, E), what came before it."""
    y = F.conv1d(torch.cat((window, x), 1).mT, weight, bias, groups=len(weight))
    return y.mT


def our_rms_norm(x, weight):
    norm = model.RMSNorm(x.size(-1), 1e-5)
    norm.weight = torch.nn.Parameter(weight)
    return norm(x)


def our_rotary(x, theta):
    cos, sin = model.rope_table(torch.arange(x.size(1)), x.size(-1), float(theta))
    return model.rotate(x, cos.to(x.dtype), sin.to(x.dtype))


def plain_rotary(x, theta):
    return reference.rotary(x, {"rope_type": "default", "rope_theta": float(theta)})


def our_scan(x, dt, A, B, C, h):
    x, dt, B, C = (t.transpose(0, 1) for t in (x, dt, B, C))
    y, h = hybrid_ssm.SelectiveScan.apply(x, dt, A, B, C, h)
    return torch.cat((y.transpose(0, 1), h), 1)


def plain_scan(x, dt, A, B, C, h):
    return torch.cat(recurrence(x, dt, dt, A, B, C, h), 1)


def our_ssd(x, dt, A, B, C, h):
    return torch.cat(hybrid_ssm.ssd(x, dt, A, B, C, h), 1)


def plain_ssd(x, dt, A, B, C, h):
    wide = [t.repeat_interleave(x.size(-1) // len(A), -1) for t in (dt, dt, A)]
    return torch.cat(recurrence(x, *wide, B, C, h), 1)


def norm_inputs(dice):
    C = dice.randint(1, 300)
    return torch.randn(dice.randint(1, 9), dice.randint(1, 40), C) * 10 ** dice.uniform(-3, 3), torch.randn(C)


def rotary_inputs(dice):
    x = torch.randn(dice.randint(1, 3), dice.randint(1, 80), dice.randint(1, 4), 2 * dice.randint(1, 32))
    return x, torch.tensor(10 ** dice.uniform(1, 6))


def attention_inputs(dice):
    B, K = dice.randint(1, 3), dice.randint(1, 3)
    S, D = dice.randint(1, 70), dice.randint(1, 48)
    T = dice.randint(1, S)
    return torch.randn(B, K * dice.randint(1, 3), T, D) * 2, torch.randn(B, K, S, D), torch.randn(B, K, S, D)


def conv_inputs(dice):
    E, k = dice.randint(1, 60), dice.randint(2, 5)
    B = dice.randint(1, 3)
    return torch.randn(B, dice.randint(1, 60), E), torch.randn(E, 1, k), torch.randn(E), torch.randn(B, k - 1, E)


def scan_inputs(dice, heads=None):
    b, T, N = dice.randint(1, 3), dice.randint(1, 90), dice.randint(1, 8)
    groups = heads or 1
    E = groups * dice.randint(1, 8)
    dt = torch.empty(b, T, heads or E).uniform_(-6, 0).exp()
    A = -torch.rand(heads) * 16 if heads else -torch.rand(N, E) * 16
    return torch.randn(b, T, E), dt, A, torch.randn(b, T, N), torch.randn(b, T, N), torch.randn(b, N, E)


OPERATIONS = {  # ours, the plain formula, random inputs, the dtypes in which the models run it
    "RMSNorm": (our_rms_norm, lambda x, w: reference.rms_norm(x, w, 1e-5), norm_inputs, "both"),
    "RoPE": (our_rotary, plain_rotary, rotary_inputs, "both"),
    "attention": (model.attend, plain_attention, attention_inputs, "both"),
    "convolution": (lambda *a: hybrid_ssm.causal_conv(*a)[0], plain_conv, conv_inputs, "float32"),
    "selective scan": (our_scan, plain_scan, scan_inputs, "float32"),
    "SSD": (our_ssd, plain_ssd, lambda dice: scan_inputs(dice, dice.randint(1, 4)), "float32"),
}


@pytest.mark.score("E1")
@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_no_operation_is_less_exact_than_plain_pytorch(name, count, score):
    ours, plain, inputs, dtypes = OPERATIONS[name]
    n = count(25, 500)
    held = 0
    worst = {}
    kinds = (torch.float32, torch.bfloat16) if dtypes == "both" else (torch.float32,)
    for dtype in kinds:
        for seed in range(n):
            torch.manual_seed(seed)
            given = [t.to(dtype) for t in inputs(random.Random(seed))]
            with reference.in_float64():
                exact = plain(*(t.double() for t in given))
            off = error(ours(*given), exact)
            allowed = 2 * error(plain(*given), exact) + torch.finfo(dtype).eps
            held += off <= allowed and (dtype != torch.float32 or off**2 <= 1e-7)
            worst[dtype] = max(worst.get(dtype, 0), off)
    offs = [f"{str(dtype)[6:]} off by {off:.1e}" for dtype, off in worst.items()]
    score(held, n * len(kinds), f"{name}: {', '.join(offs)}")
    assert held == n * len(kinds)


def random_model(arch, dice):
    """A small model of a random shape, which a published architecture computes as well."""
    n_kv_head = dice.choice([1, 2])
    n_head = n_kv_head * dice.choice([1, 2, 3])
    shape = {"n_layer": dice.randint(1, 3), "n_head": n_head, "n_kv_head": n_kv_head,
             "n_embd": n_head * 2 * dice.randint(2, 8), "vocab_size": dice.randint(2, 90), "block_size": 64,
             "tie_embeddings": dice.random() < 0.5}
    if arch == "hybrid_ssm":
        shape |= {"ssm": "mamba1", "n_layer": 2, "attn_layer_period": 2, "attn_layer_offset": dice.randint(0, 1)}
    else:
        shape |= {"rope_theta": 10 ** dice.uniform(2, 6)}
    module = importlib.import_module(arch)
    return shaken(module.Model(module.Config(**shape)))


def errors(made, stock, idx, dtype):
    """-> the errors of the logits in a dtype: of the model, and of the formulas of formats/reference.py."""
    ours = copy.deepcopy(made).to(dtype)
    about = names.hf_config(made, stock)
    with reference.in_float64():
        wide = copy.deepcopy(ours).double()
        exact = reference.FORWARD[stock](reference.stock_tensors(wide, stock), about, idx)
    narrow = {name: t.to(dtype) for name, t in reference.stock_tensors(wide, stock).items()}
    return error(ours(idx)[0], exact), error(reference.FORWARD[stock](narrow, about, idx), exact)


def nearby(made):
    """A copy with weights that differ by 1 %: more than bfloat16 rounds away."""
    other = copy.deepcopy(made)
    for p in other.parameters():
        p.mul_(1 + 0.01 * torch.randn_like(p))
    return other


def root_mean_square(numbers):
    return math.sqrt(sum(x * x for x in numbers) / len(numbers))


def compare_with_formulas(arch, stock, seed, dtype):
    """-> whether a random model is exact enough, the error of its logits, whether models nearby had to decide."""
    torch.manual_seed(seed)
    dice = random.Random(seed)
    made = random_model(arch, dice)
    idx = torch.randint(made.config.vocab_size, (dice.randint(1, 3), dice.randint(1, 48)))
    off, plain = errors(made, stock, idx, dtype)
    if dtype == torch.float32 and off**2 > 1e-7:
        return False, off, False
    held = off <= 2 * plain + torch.finfo(dtype).eps
    in_mean = not held
    if in_mean:
        # Where a norm divides by next to nothing, chance decides which of two ways to round comes out ahead. Of 60
        # models beside that of seed 433 the plain formulas lose by a factor of 2 in 7, ours in 14. So the mean decides.
        pairs = [errors(nearby(made), stock, idx, dtype) for _ in range(40)]
        ours, plain = (root_mean_square(side) for side in zip(*pairs, strict=True))
        held = ours <= 2 * plain + torch.finfo(dtype).eps
    return held, off, in_mean


@pytest.mark.score("E1")
@pytest.mark.parametrize("arch, stock", [("model", "llama"), ("hybrid_ssm", "jamba")])
@torch.no_grad()
def test_no_model_is_less_exact_than_the_plain_formulas(arch, stock, count, score):
    n = count(8, 500)
    held = 0
    offs = []
    for dtype in (torch.float32, torch.bfloat16):
        tried = [compare_with_formulas(arch, stock, seed, dtype) for seed in range(n)]
        goods, sizes, in_mean = zip(*tried, strict=True)
        held += sum(goods)
        offs.append(f"{str(dtype)[6:]} logits off by {max(sizes):.1e} of their size, {sum(in_mean)} of {n} compared in "
                    "the mean")
    score(held, 2 * n, f"{arch}.py: {', '.join(offs)}")
    assert held == 2 * n


@torch.no_grad()
def test_a_shape_at_which_chance_decides():
    """One error is 6 times that of the plain formulas, the mean of models nearby is not twice as large."""
    assert compare_with_formulas("hybrid_ssm", "jamba", 433, torch.float32)[0]


def rounded(function, dtype=torch.bfloat16):
    """The function, with what it returns rounded."""
    return lambda *a, **k: function(*a, **k).to(dtype).float()


def scan_in_bfloat16(x, dt, A, B, C, h):
    """The selective scan with a state that is rounded at each token."""
    ys = []
    for t in range(len(x)):
        decay = (dt[t, :, None] * A).exp()
        h = (decay * h + B[t, ..., None] * (dt * x)[t, :, None]).bfloat16().float()
        ys.append((h * C[t, ..., None]).sum(1))
    return torch.stack(ys), h


LOSSES = {  # what is computed with fewer digits: (model file, stock architecture, where, the function that does it)
    "RMSNorm": ("model", "llama", "RMSNorm.forward", rounded(model.RMSNorm.forward)),
    "attention in float16": ("model", "llama", "attend", rounded(model.attend, torch.float16)),
    "RoPE": ("model", "llama", "rotate", rounded(model.rotate)),
    "state of the scan": ("hybrid_ssm", "jamba", "SelectiveScan.apply", scan_in_bfloat16),
}


@pytest.mark.parametrize("name", LOSSES)
@torch.no_grad()
def test_a_planted_loss_of_precision_is_noticed(name, monkeypatch):
    """At none of the shapes does chance hide it."""
    arch, stock, where, less_exact = LOSSES[name]
    monkeypatch.setattr(f"{arch}.{where}", less_exact)
    assert not any(compare_with_formulas(arch, stock, seed, torch.float32)[0] for seed in range(4))


# ---- gradients against differences
def double(*shapes):
    return [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]


def scan_gradients(T, ssm):
    def make():
        x, B, C, h = double((2, T, 4), (2, T, 3), (2, T, 3), (2, 3, 4))
        heads = 4 if ssm == "mamba1" else 2
        dt = torch.rand(2, T, heads, dtype=torch.double, requires_grad=True)
        A = (-torch.rand((3, 4) if ssm == "mamba1" else 2, dtype=torch.double)).requires_grad_()
        return (our_scan if ssm == "mamba1" else our_ssd), (x, dt, A, B, C, h)
    return make


GRADIENTS = {
    **{f"selective scan, {T} tokens": scan_gradients(T, "mamba1") for T in (1, 5, 19)},
    **{f"SSD, {T} tokens": scan_gradients(T, "mamba2") for T in (1, 5, 67)},
    "attention": lambda: (model.attend, double((2, 4, 5, 6), (2, 4, 5, 6), (2, 4, 5, 6))),
    "attention with shared keys": lambda: (model.attend, double((1, 4, 5, 6), (1, 2, 5, 6), (1, 2, 5, 6))),
    "attention after a cache": lambda: (model.attend, double((1, 2, 3, 4), (1, 2, 7, 4), (1, 2, 7, 4))),
    "RMSNorm": lambda: (our_rms_norm_of, double((3, 4, 7), (7,))),
    "RoPE": lambda: (lambda x: our_rotary(x, 100.0), double((2, 6, 3, 8))),
    "convolution": lambda: (lambda *a: hybrid_ssm.causal_conv(*a)[0], double((2, 6, 5), (5, 1, 4), (5,), (2, 3, 5))),
    "pairs turned": lambda: (cerebros.rotate_pairs, double((3, 8), (4,))),
}


def our_rms_norm_of(x, weight):
    norm = model.RMSNorm(x.size(-1), 1e-5)
    return torch.func.functional_call(norm, {"weight": weight}, x)


@pytest.mark.score("E2")
def test_gradients_of_every_operation(count, score):
    def attempt(case):
        make, seed = case
        torch.manual_seed(seed)
        function, inputs = make()
        quick = count(True, False)  # one random direction instead of every element
        assert torch.autograd.gradcheck(function, tuple(inputs), eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=quick)

    cases = {f"{name}, {seed}": (make, seed) for name, make in GRADIENTS.items() for seed in range(count(1, 5))}
    tries(score, cases, attempt, "gradcheck in float64")


@pytest.mark.score("E2")
@pytest.mark.parametrize("arch, extra", [case for case in CONTRACT if case[0] != "ternary"], ids=lambda v: str(v)[:60])
def test_gradients_of_a_whole_model(arch, extra, count, score, monkeypatch):
    """Weights at random against central differences. Not of ternary.py, whose roundings have none."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # of the logits and of what a model makes itself
    module = importlib.import_module(arch)
    torch.manual_seed(0)
    known = {field.name for field in fields(module.Config)}
    made = shaken(module.Model(module.Config(**{k: v for k, v in BASE.items() if k in known} | extra))).double()
    idx, targets = ids(2, 20), ids(2, 20, seed=1)
    n = count(6, 50)
    with reference.in_float64():
        made(idx, targets)[1].backward()
        dice = random.Random(0)
        parameters = list(made.named_parameters())
        cases = {}
        for i in range(n):
            name, p = dice.choice(parameters)
            cases[f"{i}: {name}"] = p, dice.randrange(p.numel())

        @torch.no_grad()
        def attempt(case):
            p, at = case
            step = 1e-6
            losses = []
            for sign in (1, -1):
                p.view(-1)[at] += sign * step
                losses.append(made(idx, targets)[1])
                p.view(-1)[at] -= sign * step
            difference = (losses[0] - losses[1]) / (2 * step)
            assert abs(difference - p.grad.view(-1)[at]) <= 1e-7 + 1e-5 * abs(difference)

        tries(score, cases, attempt, f"{arch} {extra or ''}")


# ---- losses that were recorded
SHAPE = {"n_layer": 2, "n_embd": 16, "batch_size": 4, "max_steps": 100, "eval_every": 100, "log_every": 1,
         "dropout": 0.1, "device": "cpu", "dtype": "float32", "compile": False, "keep_last": 1}
MORE = {"model": {"n_head": 2, "block_size": 32}, "ternary": {"n_head": 2, "block_size": 32},
        "hybrid_ssm": {"n_head": 2, "block_size": 32, "ssm_head_dim": 16}, "cerebros": {"block_size": 48}}


def machine():
    """What decides the order of sums: PyTorch, the instructions it uses, and the processor that MKL asks for."""
    kinds = {line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")}
    return {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(),
            "processor": min(kinds, default="")}


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "event" not in record and "loss" in record]


def known_to(arch, keys):
    """The keys that train.py has with this model file."""
    known = {field.name for config in (importlib.import_module(arch).Config, train.Config) for field in fields(config)}
    return {key: value for key, value in keys.items() if key in known}


def trained(arch, folder):
    keys = known_to(arch, SHAPE | MORE[arch])
    keys |= {"arch": arch, "dataset": str(FIXTURES / "v1" / "data"), "out_dir": str(folder / arch)}
    train.train(configurator.load(train.Config, **keys))
    return losses(folder / arch)


def resumed(arch, folder):
    """20 losses from the checkpoint that an earlier version wrote."""
    run = folder / f"v1-{arch}"
    shutil.copytree(FIXTURES / "v1" / "runs" / arch, run)
    keys = json.loads((run / "config.json").read_text())
    keys |= {"resume": True, "out_dir": str(run), "dataset": str(FIXTURES / "v1" / "data"), "max_steps": 26,
             "eval_every": 26}
    train.train(configurator.load(train.Config, **known_to(arch, keys)))
    return losses(run)[-20:]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compare(found, recorded, score, what):
    """Bit for bit where the recording was made, the first ten within 1e-5 anywhere."""
    here = json.loads(GOLDEN.read_text())["machine"] == machine()
    if here:
        held = sum(a == b for a, b in zip(found, recorded, strict=True))
        score(held, len(recorded), f"{what}: equal to the last bit")
        assert held == len(recorded)
    else:
        held = sum(abs(a - b) <= 1e-5 * max(1, abs(b)) for a, b in zip(found[:10], recorded[:10], strict=True))
        score(held, 10, f"{what}: another machine, so the first 10 losses within 1e-5")
        assert held == 10


@pytest.mark.score("E3")
@pytest.mark.parametrize("arch", MORE)
def test_losses_are_those_that_were_recorded(arch, tmp_path, one_thread, count, score):
    if not count(False, True):
        pytest.skip("seconds of training: run with --full")
    compare(trained(arch, tmp_path), json.loads(GOLDEN.read_text())["trained"][arch], score, f"{arch}.py")


@pytest.mark.score("E3")
@pytest.mark.parametrize("arch", ["model", "ternary"])
def test_checkpoints_of_earlier_versions_go_on_as_recorded(arch, tmp_path, one_thread, count, score):
    if arch != "model" and not count(False, True):
        pytest.skip("seconds of training: run with --full")
    recorded = json.loads(GOLDEN.read_text())["resumed"][arch]
    assert len(recorded) == 20
    compare(resumed(arch, tmp_path), recorded, score, f"{arch}.py from the checkpoint of v1")


def record(folder):
    torch.set_num_threads(1)
    found = {"machine": machine(), "trained": {}, "resumed": {}}
    for arch in MORE:
        found["trained"][arch] = trained(arch, folder)
    for arch in ("model", "ternary"):
        found["resumed"][arch] = resumed(arch, folder)
    GOLDEN.write_text(json.dumps(found, indent=0) + "\n")


# ---- elsewhere
@pytest.mark.score("E5")
@pytest.mark.parametrize("case", ["llama", "tied", "jamba"])
@pytest.mark.parametrize("form, quant", [("hf", "f32"), ("gguf", "f32"), ("onnx", "fp32")])
def test_its_own_program_writes_the_same_64_tokens(case, form, quant, tmp_path, monkeypatch, count, score):
    """50 prompts in transformers, llama.cpp and onnxruntime. test_export.py has 6 of 12 tokens of every form."""
    n = count(0, 50)
    if not n:
        pytest.skip("takes minutes: run with --full")
    monkeypatch.setitem(cases.SHAPE, "block_size", 96)
    cases.built.cache_clear()
    found = cases.out(case, tmp_path / f"m.{form}", form, quant, prompts=n, prompt_tokens=64)
    cases.built.cache_clear()
    score(found["same"], n, f"{case} in {found['runtime']}: log p off by {found['delta']:.1e} at most")
    assert found["tokens"] == 64 and found["delta"] <= 1e-4 and found["same"] == n


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder))
