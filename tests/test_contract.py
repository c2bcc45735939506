"""What every model file must keep, tested for each file beside train.py that has a Config and a Model."""
import importlib
import math
import re
import sys
from dataclasses import asdict, fields

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import optim
from formats import names
from kernels import ternary as kernel
from thimble import checkpoint, configurator, load
from thimble.tokenizer import byte_tokenizer

ARCHS = sorted(p.stem for p in ROOT.glob("*.py")
               if len(set(re.findall(r"^class (Config|Model)\b", p.read_text(), re.M))) == 2)
# more shapes of a model file than its default; every file must take what it knows of the base
BASE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 50, "block_size": 48}
VARIANTS = {"model": [{"n_kv_head": 2}, {"n_kv_head": 1, "tie_embeddings": True, "qk_norm": True}, {"mlp": "gelu"}],
            "ternary": [{"n_kv_head": 2, "act": "relu2", "group_size": 16, "n_hidden": 64, "sub_norm": False},
                        {"n_streams": 2}, {"n_streams": 2, "static_streams": True}, {"n_streams": 4}],
            "hybrid_ssm": [{"ssm": "mamba1"}, {"ssm": "mamba1", "n_kv_head": 1, "rope": True, "tie_embeddings": True},
                           {"ssm": "mamba2", "ssm_head_dim": 16, "n_kv_head": 2, "rope": True, "qk_norm": True},
                           {"ssm": "mamba2", "d_state": 8, "d_conv": 2, "tie_embeddings": True},
                           {"n_layer": 3, "attn_layer_period": 9, "attn_layer_offset": 8, "ssm": "mamba1"}],
            "llama": [{"n_kv_head": 2, "head_dim": 12, "qk_norm": True, "rope_theta": 100.0},
                      {"n_kv_head": 1, "qkv_bias": True, "tie_embeddings": True, "rope_type": "linear",
                       "rope_factor": 4.0},
                      {"n_kv_head": 2, "window": 5, "rope_theta": 50.0, "rope_type": "llama3", "rope_factor": 8.0,
                       "rope_context": 40},
                      {"window": 7, "window_from": 1, "qkv_bias": True, "qk_norm": True, "rope_type": "yarn",
                       "rope_factor": 4.0, "rope_context": 60, "rope_high": 32.0, "rope_gain": 1.14}],
            "cerebros": [{"tie_embeddings": True, "act": "gelu", "window": 1}, {"n_rank": 16, "act": "softplus"},
                         {"n_layer": 4, "p_lateral": 1.0, "max_units": 2, "window": 7, "wiring_seed": 5}]}
CASES = [(arch, extra) for arch in ARCHS for extra in [{}, *VARIANTS.get(arch, [])]]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'-'.join(map(str, case[1].values())) or 'base'}")
def model(request):
    arch, extra = request.param
    module = importlib.import_module(arch)
    torch.manual_seed(0)
    known = {f.name for f in fields(module.Config)}
    return module.Model(module.Config(**{k: v for k, v in BASE.items() if k in known} | extra))


def shaken(model):
    """Far from the initial weights, where every part matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return model.eval()


def ids(*shape, seed=0):
    return torch.randint(BASE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def test_forward_gives_a_pair(model):
    idx = ids(3, 20)
    logits, loss = model(idx)
    assert logits.shape == (3, 20, 50) and logits.dtype == torch.float32 and loss is None
    logits, loss = model(idx, ids(3, 20, seed=1))
    assert loss.shape == () and loss.dtype == torch.float32


def test_target_minus_one_is_ignored(model):
    idx, targets = ids(2, 20), ids(2, 20, seed=1)
    targets[:, 7:] = -1
    logits, loss = model(idx, targets)
    by_hand = -logits.log_softmax(-1)[:, :7].gather(-1, targets[:, :7, None]).mean()
    assert abs(loss - by_hand) < 1e-5


@pytest.mark.score("E4")
@pytest.mark.parametrize("chop", [[40], [1] * 40, [20, 20], [7, 1, 1, 13, 18], [39, 1], [1, 39]])
@torch.no_grad()
def test_step_on_any_chopping_equals_forward(model, chop):
    model, idx = shaken(model), ids(2, 40)
    whole, _ = model(idx)
    cache, end = model.init_cache(2, 48), 0
    for n in chop:
        logits, cache = model.step(idx[:, end:end + n], cache)
        end += n
        assert logits.shape == (2, 50)
        assert (logits - whole[:, end - 1]).abs().max() < 1e-4
    assert end == 40


@pytest.mark.score("E4")
@torch.no_grad()
def test_rows_of_different_lengths_share_a_step(model):
    """cache["pos"] of shape (B,): what serve.py batches. A row alone gives the same."""
    model, idx, lengths = shaken(model), ids(3, 40), [1, 17, 30]
    whole, _ = model(idx)
    cache = model.init_cache(3, 48)
    for row, n in enumerate(lengths):
        alone = model.step(idx[row:row + 1, :n], model.init_cache(1, 48))[1]
        copy_row(cache, alone, row)
    cache["pos"] = torch.tensor(lengths)
    for t in range(10):
        logits, cache = model.step(torch.stack([idx[row, n + t] for row, n in enumerate(lengths)])[:, None], cache)
        for row, n in enumerate(lengths):
            assert (logits[row] - whole[row, n + t]).abs().max() < 1e-4
    assert cache["pos"].tolist() == [11, 27, 40]


def copy_row(cache, alone, row):
    for key, part in (alone.items() if isinstance(alone, dict) else enumerate(alone)):
        if not isinstance(part, torch.Tensor):
            copy_row(cache[key], part, row)
        elif part.dim():
            cache[key][row] = part[0]


@pytest.mark.score("E4")
@torch.no_grad()
def test_a_changed_token_never_changes_earlier_logits(model):
    model, idx = shaken(model), ids(2, 40)
    whole, _ = model(idx)
    for t in (1, 17, 39):
        other = idx.clone()
        other[:, t] = (other[:, t] + 1) % 50
        logits, _ = model(other)
        assert torch.equal(logits[:, :t], whole[:, :t]), f"token {t} is seen from before"
        assert not torch.equal(logits[:, t], whole[:, t])


@pytest.mark.score("E4")
@torch.no_grad()
def test_rows_of_a_batch_do_not_mix(model):
    model, idx = shaken(model), ids(4, 30)
    assert (model(idx)[0][2] - model(idx[2:3])[0][0]).abs().max() < 1e-4


def test_every_parameter_gets_a_gradient_and_one_role(model):
    shaken(model).train()
    model(ids(4, 40), ids(4, 40, seed=1))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, f"{name} gets no gradient"
    listed = [p for params in model.param_groups().values() for p in params]
    assert sorted(map(id, listed)) == sorted(map(id, model.parameters()))
    assert set(model.param_groups()) <= set(optim.ROLES)


@pytest.mark.score("E4")
def test_loss_at_step_0_is_ln_v(model):
    _, loss = model(ids(8, 48), ids(8, 48, seed=1))
    assert abs(loss.item() - math.log(50)) < 0.02 * math.log(50)


def test_flops_equal_what_a_counter_counts(model):
    idx = ids(2, 48)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == model.flops_per_token(48) * idx.numel()


def test_same_seed_same_bits(model):
    twin_of = type(model)
    torch.manual_seed(0)
    twin = twin_of(model.config)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.score("E4")
def test_it_can_overfit_one_batch(model):
    idx = ids(2, 16)
    optimizer = optim.Optimizer(model, "adamw", lr=1e-2)
    for i in range(120):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        for p in model.parameters():
            p.grad = None
        loss.backward()
        optimizer.step(1 - i / 120)
        if loss < 0.5:
            return
    raise AssertionError(f"loss {loss:.2f} after 120 steps")


def test_float64_works(model):
    """Research wants gradients checked in double precision."""
    model = shaken(model)
    single, _ = model(ids(2, 30))
    double, _ = model.double()(ids(2, 30))
    assert (single - double).abs().max() < 1e-3


def test_too_long_a_sequence_is_refused(model):
    with pytest.raises(ValueError, match="block_size=48"):
        model(ids(1, 49))


@pytest.mark.parametrize("arch", ARCHS)
def test_impossible_numbers_are_refused_by_name(arch):
    """Relations by the Config itself, however it is made; what is negative by the configurator, for every file."""
    module = importlib.import_module(arch)
    for name in ("n_layer", "n_embd", "block_size"):
        with pytest.raises(ValueError, match=f"{name}=0 "):
            module.Config(**{name: 0})
    for field in fields(module.Config):
        if type(field.default) in (int, float):
            with pytest.raises(ValueError, match=f"{field.name}=-1"):
                configurator.load(module.Config, **{field.name: type(field.default)(-1)})


# ---- forks: what a copy of a model file says is what samples and serves

# one line of each model file, and what a fork has in its place
ALTERED = {"model": ("F.silu(gate)", "torch.sin(gate)"),
           "llama": ("F.silu(gate)", "torch.sin(gate)"),
           "ternary": ("F.silu(gate)", "torch.sin(gate)"),
           "hybrid_ssm": ("F.softplus(dt + self.dt_proj.bias)", "torch.sigmoid(dt + self.dt_proj.bias)"),
           "cerebros": ('"silu": F.silu', '"silu": torch.sin')}


@pytest.fixture(params=[*((arch, "") for arch in ARCHS), *((arch, "mine_") for arch in ARCHS)],
                ids=lambda case: case[1] + case[0])
def saved(request, tmp_path, monkeypatch):
    """A checkpoint on disk of each model file, or of a fork of it, and its arch."""
    arch, prefix = request.param
    extra = {"ssm": "mamba1"} if arch == "hybrid_ssm" else {}
    source = (ROOT / f"{arch}.py").read_text()
    if prefix:
        old, new = ALTERED[arch]
        assert source.count(old) == 1
        (tmp_path / f"mine_{arch}.py").write_text(source.replace(old, new))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(checkpoint, "HERE", tmp_path)  # where model files are
        monkeypatch.delitem(sys.modules, f"mine_{arch}", raising=False)
    arch = prefix + arch
    module = importlib.import_module(arch)
    torch.manual_seed(0)
    config = module.Config(n_layer=2, n_embd=32, vocab_size=300, block_size=48, **extra)
    model = shaken(module.Model(config))
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_json())
    meta = {"arch": arch, "model_config": asdict(model.config)}
    checkpoint.save(tmp_path / "run", 1, model.state_dict(), None, meta, tmp_path / "tokenizer.json")
    yield arch, tmp_path / "run"
    if prefix:
        del sys.modules[arch]


@pytest.mark.parametrize("chop", [[40], [1] * 40, [7, 1, 1, 13, 18]])
@torch.no_grad()
def test_step_as_sample_py_loads_it_equals_forward(saved, chop, capsys):
    arch, run = saved
    kernel.note.cache_clear()
    model = load.load(run, "latest").model                 # as sample.py and serve.py do, for a CPU
    exact = checkpoint.load_model(checkpoint.load(run, "latest")).eval()
    if arch == "ternary" and kernel.library():             # which computes in float64: in float32 a rounding may tip
        assert model.compiled_step(renew=True) is not None
        exact = exact.double()
    idx = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(2))
    whole, _ = exact(idx)
    cache, end = model.init_cache(2, 48), 0
    for n in chop:
        logits, cache = model.step(idx[:, end:end + n], cache)
        end += n
        assert (logits - whole[:, end - 1]).abs().max() < 1e-4, f"after {end} tokens"
    notes = capsys.readouterr().err
    assert notes.count("\n") == (arch == "mine_ternary" and kernel.library() is not None)
    assert not notes or "mine_ternary.py" in notes


# ---- what only shows in training, or above a threshold

# calls of dropout in a forward pass: on the embedding and on what each of the 2 halves of a layer adds, as the comment
# of the key says. Cerebros has it on the output of each unit instead, and a unit may be silent on these tokens.
DROPOUTS = {"model": 1 + 2 * 2, "hybrid_ssm": 1 + 2 * 2}


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if "dropout" in
                                  {f.name for f in fields(importlib.import_module(arch).Config)}])
def test_dropout_is_wherever_the_key_says(arch, monkeypatch):
    """Each call by itself changes the result in training; with none of them training gives what evaluation gives."""
    module = importlib.import_module(arch)
    torch.manual_seed(0)
    known = {f.name for f in fields(module.Config)}
    model = shaken(module.Model(module.Config(**{k: v for k, v in BASE.items() if k in known}, dropout=0.5)))
    idx = ids(2, 20)
    whole, _ = model(idx)
    assert torch.equal(whole, model(idx)[0])
    calls = []
    only = []  # number of the call that drops

    def drop(dropout, x):
        calls.append((dropout.p, dropout.training))
        return x * 0.5 if [len(calls) - 1] == only else x

    monkeypatch.setattr(torch.nn.Dropout, "forward", drop)
    assert torch.equal(model.train()(idx)[0], whole)
    assert set(calls) == {(0.5, True)}
    n_calls = len(calls)
    n_felt = 0
    for i in range(n_calls):
        only[:] = [i]
        calls.clear()
        n_felt += not torch.equal(model(idx)[0], whole)
    if arch in DROPOUTS:
        assert n_felt == n_calls == DROPOUTS[arch]
    else:
        assert n_felt > BASE["n_layer"]


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if hasattr(importlib.import_module(arch), "attend")])
@pytest.mark.parametrize("n_new, n_keys", [(3, 9), (9, 9), (1, 9), (3, 2**20 // 3 + 2), (1100, 1100)])
@torch.no_grad()
def test_attention_by_hand_on_both_sides_of_the_fused_threshold(arch, n_new, n_keys):
    """The last query of the last row, in plain arithmetic; grouped queries, with and without what is cached."""
    attend = importlib.import_module(arch).attend
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, n_new, 4, generator=generator)
    k, v = torch.randn(2, 1, 1, n_keys, 4, generator=generator)
    v[:, :, 1 - n_new:] *= n_keys / 10  # what a query must not see would show, among however many keys
    y = attend(q, k, v)
    assert y.shape == q.shape
    for t in range(max(0, n_new - 3), n_new):
        seen = n_keys - n_new + t + 1  # the keys up to its own
        for head in range(2):
            scores = (k[0, 0, :seen].double() @ q[0, head, t].double()) / math.sqrt(4)
            p = (scores - scores.max()).exp()
            expected = p @ v[0, 0, :seen].double() / p.sum()
            assert (y[0, head, t] - expected).abs().max() < 1e-4 * max(1, n_keys / 100 if n_new == n_keys else 1)


@pytest.mark.parametrize("arch", ["model", "llama", "hybrid_ssm"])
def test_the_head_is_tied_where_the_key_says(arch):
    module = importlib.import_module(arch)
    apart = module.Model(module.Config(**BASE, tie_embeddings=False))
    tied = module.Model(module.Config(**BASE, tie_embeddings=True))
    assert "head" in apart.param_groups() and "head" not in tied.param_groups()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (apart, tied)]
    assert sizes[0] - sizes[1] == BASE["vocab_size"] * BASE["n_embd"]


@pytest.mark.parametrize("arch,extra,tied", [
    ("model", {}, False), ("model", {"mlp": "gelu"}, True), ("llama", {"qkv_bias": True}, False), ("llama", {}, True),
    ("hybrid_ssm", {"ssm": "mamba1", "attn_layer_period": 2}, False), ("hybrid_ssm", {"ssm": "mamba2"}, True),
    ("ternary", {"n_streams": 2}, None), ("ternary", {}, None), ("cerebros", {}, False), ("cerebros", {}, True)])
def test_initial_weights_are_of_the_sizes_that_the_comments_name(arch, extra, tied):
    """At a width where 4 / n_embd = 0.0156 is below 0.02: only the tied embedding of such a model is that small."""
    module = importlib.import_module(arch)
    known = {f.name for f in fields(module.Config)}
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 256, "vocab_size": 300, "block_size": 48}
    shape = {key: value for key, value in shape.items() if key in known} | extra
    if tied is not None:
        shape["tie_embeddings"] = tied
    torch.manual_seed(0)
    model = module.Model(module.Config(**shape))
    seen = set()
    for name, p in model.named_parameters():
        if name.endswith("bias") and arch == "llama":
            assert not p.any()
        if p.dim() != 2 or name.endswith("A_log") or name.startswith("units"):
            continue
        kind = name.removesuffix(".weight").split(".")[-1]
        expected = {"o_proj": 0.01, "down_proj": 0.01, "out_proj": 0.01, "head": 0.01}.get(kind, 0.02)
        if kind == "embed" and tied is not False:
            expected = 4 / 256 / extra.get("n_streams", 1)
        elif kind == "dt_proj":
            expected = 16 ** -0.5  # of n_embd / 16 numbers
        elif "residual" in name:
            expected = 0.0
        seen.add(kind)
        assert p.std().item() == pytest.approx(expected, rel=0.06) and abs(p.mean()) <= 0.05 * expected, name
    assert "embed" in seen and ("head" in seen) == (tied is False)


@pytest.mark.parametrize("ssm,extra,n_state", [("mamba1", {}, 16), ("mamba2", {}, 64), ("mamba1", {"d_state": 4}, 4),
                                               ("mamba2", {"d_state": 4}, 4)])
def test_a_state_has_the_size_of_its_kind(ssm, extra, n_state):
    module = importlib.import_module("hybrid_ssm")
    model = module.Model(module.Config(**BASE, ssm=ssm, **extra))
    layers = model.init_cache(3, 48)["layers"]
    sizes = {layer["h"].numel() for layer in layers if "h" in layer}
    assert sizes == {3 * 2 * 32 * n_state}  # rows, channels (expand = 2), numbers for each


@pytest.mark.parametrize("arch", ["model", "llama", "ternary", "hybrid_ssm"])
def test_heads_of_an_odd_width_are_refused_where_rope_rotates_pairs(arch):
    module = importlib.import_module(arch)
    known = {f.name for f in fields(module.Config)}
    rope = {"rope": True, "ssm": "mamba1"} if "rope" in known else {}
    for n_embd, n_head in ((12, 4), (20, 4), (33, 1), (15, 3)):
        with pytest.raises(ValueError, match="must be even"):
            module.Config(n_layer=2, n_head=n_head, n_embd=n_embd, **rope)
    module.Config(n_layer=2, n_head=4, n_embd=24, **rope)


def test_sizes_that_a_config_leaves_to_its_file_are_those_that_formats_write():
    module = importlib.import_module("hybrid_ssm")
    for extra, rank, n_state in (({"n_embd": 40}, 3, 16), ({"n_embd": 48}, 3, 16), ({"n_embd": 8}, 1, 16),
                                 ({"n_embd": 40, "dt_rank": 5, "d_state": 4}, 5, 4)):
        config = module.Config(n_layer=1, n_head=4, vocab_size=50, ssm="mamba1", attn_layer_period=2,
                               attn_layer_offset=1, **extra)
        mixer = module.Model(config).blocks[0].mixer
        assert names.dt_rank(config) == mixer.dt_proj.weight.size(1) == rank
        assert names.d_state(config) == mixer.A_log.size(1) == n_state
