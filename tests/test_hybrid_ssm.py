"""hybrid_ssm.py against references from outside: the recurrence token by token in float64, Hugging Face's Jamba."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hybrid_ssm
from thimble import configurator

CONFIG = hybrid_ssm.Config(n_layer=4, attn_layer_period=3, n_head=4, n_embd=32, n_hidden=48, vocab_size=40,
                           block_size=64, ssm_head_dim=16)
STEPS = {"tiny": (1e-6, 1e-5), "usual": (1e-3, 1e-1), "huge": (1e2, 1e3), "all": (1e-6, 1e3)}


def shaken(config, seed=0):
    torch.manual_seed(seed)
    m = hybrid_ssm.Model(config).eval()
    with torch.no_grad():
        for p in m.parameters():
            p += 0.2 * torch.randn_like(p)
    return m


# ---- the scans

def recurrence(x, dt, dt_in, A, B, C, h):
    """One token after the other. x, dt, dt_in (the dt of the input): (b, T, E); A: (N or 1, E); B, C: (b, T, N)."""
    decay = (dt[:, :, None] * A).exp()                     # (b, T, N or 1, E)
    added = (dt_in * x)[:, :, None] * B[..., None]         # (b, T, N, E)
    states = []
    # unbind, as the gradient of an index [:, t] would be as long as all tokens, at each of them
    for decay_t, added_t in zip(decay.unbind(1), added.unbind(1), strict=True):
        h = decay_t * h + added_t
        states.append(h)
    return (C[..., None] * torch.stack(states, 1)).sum(2), h


def scan(x, dt, A, B, C, h):
    y, h = hybrid_ssm.SelectiveScan.apply(x.transpose(0, 1), dt.transpose(0, 1), A, B.transpose(0, 1),
                                          C.transpose(0, 1), h)
    return y.transpose(0, 1), h


def check(ssm, T, dt_range, b=2, E=6, N=4, seed=0):
    """y, the last h and all six gradients: each element within 1e-4 of the sum of the magnitudes that it is made of.

    That sum is what the recurrence gives for the magnitudes of its inputs, with the dt of decay and input kept apart.
    """
    torch.manual_seed(seed)
    heads = E if ssm == "mamba1" else 3
    low, high = map(math.log, dt_range)
    dt = torch.empty(b, T, heads).uniform_(low, high).exp()
    A = -torch.linspace(1, 16, N)[:, None].repeat(1, E) if ssm == "mamba1" else -torch.linspace(1, 16, heads)
    inputs = [torch.randn(b, T, E), dt, A, torch.randn(b, T, N), torch.randn(b, T, N), torch.randn(b, N, E)]
    dy, dh = torch.randn(b, T, E), torch.randn(b, N, E)

    def run(f, inputs, dy, dh):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, h = f(*leaves)
        return y, h, *torch.autograd.grad((y, h), leaves, (dy, dh))

    def reference(x, dt, dt_in, A, B, C, h):
        wide = [t.repeat_interleave(E // heads, -1) for t in (dt, dt_in, A)]
        return recurrence(x, *wide, B, C, h)

    got = run(scan if ssm == "mamba1" else hybrid_ssm.ssd, inputs, dy, dh)
    x, dt, A, *rest = (t.double() for t in inputs)
    y, h, gx, g_decay, g_in, gA, *grads = run(reference, [x, dt, dt, A, *rest], dy.double(), dh.double())
    expected = [y, h, gx, g_decay + g_in, gA, *grads]
    y, h, gx, g_decay, g_in, gA, *grads = run(reference, [x.abs(), dt, dt, A, *(t.abs() for t in rest)],
                                              dy.double().abs(), dh.double().abs())
    size = [y, h, gx, g_decay.abs() + g_in, gA, *grads]
    for name, a, e, s in zip(("y", "h", "dx", "ddt", "dA", "dB", "dC", "dh"), got, expected, size, strict=True):
        assert a.dtype == torch.float32 and a.shape == e.shape
        worst = ((a - e).abs() / (s + 1e-30)).max()
        assert worst < 1e-4, f"{name} is off by {worst:.1e} of its size"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
def test_scan_equals_the_recurrence_in_float64(ssm, steps):
    check(ssm, 300, STEPS[steps])


@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
def test_scan_is_sound_over_4096_tokens(ssm):
    check(ssm, 4096, STEPS["all"], b=1, E=3, N=2)


@pytest.mark.parametrize("work", [1, 200, 2**18], ids=["1 token", "4 tokens", "a span"])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 31, 33, 47])
def test_scan_of_any_length_and_chunk(T, work, monkeypatch):
    monkeypatch.setattr(hybrid_ssm, "WORK", work)
    check("mamba1", T, STEPS["all"], seed=T)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 127, 128, 129, 193])
def test_ssd_of_any_length(T):
    check("mamba2", T, STEPS["all"], seed=T)


class Largest(TorchDispatchMode):
    """The most numbers in one new tensor."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.dtype.is_floating_point and t._base is None:
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
def test_memory_is_linear_in_the_length_and_holds_no_states_of_all_tokens(ssm):
    b, N = 2, 64
    mixer = hybrid_ssm.Block(replace(CONFIG, ssm=ssm, d_state=N, ssm_head_dim=64), 0).mixer
    saved = {}
    for T in (256, 512, 1024):
        kept = {}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            mixer(torch.randn(b, T, 32, requires_grad=True), None).square().mean().backward()
        saved[T] = sum(kept.values())
        states = b * T * 64 * N                            # of all tokens, E = 64
        assert saved[T] < 4 * states / 2                    # bytes
        assert largest.numel < states / 4
    assert saved[1024] - saved[512] < 2.1 * (saved[512] - saved[256])


def test_nothing_is_as_large_as_tokens_times_tokens():
    m = hybrid_ssm.Model(replace(CONFIG, block_size=1500, n_layer=2))
    idx = torch.randint(40, (1, 1500))
    with Largest() as largest:
        m(idx, idx)[1].backward()
    assert largest.numel < 1500 * 1500 / 4


# ---- the model

NAMES = {"embed": "embed_tokens", "norm": "final_layernorm", "mixer_norm": "input_layernorm", "blocks": "layers",
         "mlp_norm": "pre_ff_layernorm", "mlp": "feed_forward", "dt_norm": "dt_layernorm", "b_norm": "b_layernorm",
         "c_norm": "c_layernorm"}


def jamba(m):
    """Hugging Face's model of the same shape and weights: each tensor renamed, none changed."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    c = m.config
    hf = transformers.JambaForCausalLM(transformers.JambaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head or c.n_head, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, attn_layer_period=c.attn_layer_period, pad_token_id=None,
        attn_layer_offset=c.attn_layer_offset, num_experts=1, num_experts_per_tok=1, expert_layer_period=1,
        expert_layer_offset=0, mamba_d_state=c.d_state or 16, mamba_d_conv=c.d_conv, mamba_expand=c.expand,
        mamba_dt_rank=c.dt_rank or "auto")).eval()

    def renamed(name):
        if name == "head.weight":
            return "lm_head.weight"
        attention = ".mixer." in name and int(name.split(".")[1]) % c.attn_layer_period == c.attn_layer_offset
        names = NAMES | {"mixer": "self_attn" if attention else "mamba"}
        return "model." + ".".join(names.get(part, part) for part in name.split("."))

    weights = {renamed(name): p for name, p in m.state_dict().items()}
    if c.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    hf.load_state_dict(weights)                            # strict: no name too many, none too few
    return hf


@pytest.mark.parametrize("extra", [{}, {"tie_embeddings": True}, {"n_kv_head": 2}, {"d_state": 8, "dt_rank": 5},
                                   {"expand": 3, "d_conv": 3, "attn_layer_offset": 2, "n_kv_head": 1},
                                   {"n_embd": 20, "d_conv": 1}, {"n_embd": 4, "n_layer": 2}], ids=str)  # odd heads too
def test_parity_with_transformers(extra):
    m = shaken(replace(CONFIG, ssm="mamba1", **extra))
    idx = torch.randint(40, (2, 50))
    with torch.no_grad():
        assert (m(idx)[0] - jamba(m)(idx).logits).abs().max() < 1e-4


@torch.no_grad()
def test_mamba2_mixer_equals_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    mixer = shaken(replace(CONFIG, ssm="mamba2", d_state=8)).blocks[0].mixer
    hf = Mamba2Mixer(transformers.Mamba2Config(hidden_size=32, expand=2, num_heads=4, head_dim=16, state_size=8,
                                               n_groups=1, conv_kernel=4, chunk_size=16, layer_norm_epsilon=1e-6), 0)
    hf.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 100, 32)
    assert (mixer(x, None) - hf(x)).abs().max() < 1e-4


@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
@torch.no_grad()
def test_decoding_equals_forward_after_2000_tokens(ssm):
    m = shaken(replace(CONFIG, ssm=ssm, n_layer=3, n_kv_head=2, block_size=2100))
    idx = torch.randint(40, (1, 2100))
    whole, _ = m(idx)
    chop = [1] * 500 + [7, 64, 65, 129, 500, 635, 17] + [1] * 83
    cache, end = m.init_cache(1, 2100), 0
    for n in chop:
        logits, cache = m.step(idx[:, end:end + n], cache)
        end += n
        assert (logits - whole[:, end - 1]).abs().max() < 1e-4, f"after {end} tokens"
    assert end == 2000


@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
def test_the_state_of_a_mamba_layer_does_not_grow(ssm):
    m = hybrid_ssm.Model(replace(CONFIG, ssm=ssm, n_layer=2))
    short, long = (m.init_cache(1, n)["layers"] for n in (10, 10_000))
    assert {k: v.shape for k, v in short[0].items()} == {k: v.shape for k, v in long[0].items()}


@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
@torch.no_grad()
def test_bfloat16_weights_decode_with_a_float32_state(ssm):
    m = hybrid_ssm.Model(replace(CONFIG, ssm=ssm)).eval()
    idx = torch.randint(40, (1, 60))
    exact, _ = m(idx)
    m.bfloat16()
    cache = m.init_cache(1, 60)
    assert {t.dtype for t in cache["layers"][0].values()} == {torch.float32}
    for part in idx.split(20, 1):
        logits, cache = m.step(part, cache)
    assert (logits - exact[:, -1]).abs().max() < 0.1 * exact.std()


def test_step_sizes_and_decays_begin_in_their_ranges():
    torch.manual_seed(0)
    one, two = (hybrid_ssm.Block(replace(CONFIG, ssm=ssm, n_embd=256, n_head=8, ssm_head_dim=1), 0).mixer
                for ssm in ("mamba1", "mamba2"))
    for dt in (F.softplus(one.dt_proj.bias), F.softplus(two.dt_bias)):
        assert dt.shape == (512,) and 0.999e-3 < dt.min() < 1.2e-3 and 0.8e-1 < dt.max() < 1.001e-1
        assert abs(dt.log().mean() - math.log(1e-2)) < 0.2                # log-uniform: the middle is 0.01
    assert torch.allclose(one.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    A = two.A_log.exp()
    assert A.shape == (512,) and 1 <= A.min() < 1.5 and 15.5 < A.max() <= 16 and abs(A.mean() - 8.5) < 0.6


@pytest.mark.parametrize("bias", [-30.0, 0.0, 30.0, 1000.0])
@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
def test_bfloat16_training_stays_finite_and_close(ssm, bias):
    m = shaken(replace(CONFIG, ssm=ssm))
    for name, p in m.named_parameters():
        if name.endswith(("dt_proj.bias", "dt_bias")):
            torch.nn.init.constant_(p, bias)
    idx = torch.randint(40, (2, 65))
    exact = m(idx[:, :-1], idx[:, 1:])[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = m(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())
    assert abs(loss - exact) < 0.1 * exact


def test_positions_only_with_rope():
    """Without RoPE attention sees a set of earlier tokens: with no other mixer their order is nothing to it."""
    idx = torch.randint(40, (1, 20))
    swapped = idx[:, [1, 0, *range(2, 20)]]
    for rope in (False, True):
        m = shaken(replace(CONFIG, n_layer=1, attn_layer_period=1, attn_layer_offset=0, rope=rope))
        assert torch.allclose(m(idx)[0][:, 2:], m(swapped)[0][:, 2:], atol=1e-5) != rope


@pytest.mark.parametrize("wrong, match", [
    ({"attn_layer_offset": 3}, "attn_layer_offset=3 must be in"), ({"ssm_head_dim": 24}, "ssm_head_dim=24"),
    ({"n_kv_head": 3}, "n_head=4 must be a multiple of n_kv_head=3"), ({"d_conv": 0}, "d_conv=0"),
    ({"n_embd": 36, "rope": True}, "must be even"),
])
def test_impossible_shapes_are_named(wrong, match):
    with pytest.raises(ValueError, match=match):
        replace(CONFIG, **wrong)


@pytest.mark.parametrize("wrong", ["--contexts=0", "--contexts=", "--rounds=0", "--batch_size=0", "--tokens=0",
                                   "--lengths=100", "--parts=all", "--recipe=config/tiny_cpu.py"])
def test_mistakes_with_the_benchmark_are_one_line(wrong, monkeypatch, capsys):
    from bench import hybrid
    monkeypatch.setattr("sys.argv", ["hybrid.py", "--parts=decode", "--seconds=0.01", wrong])
    monkeypatch.chdir(hybrid.ROOT)
    with pytest.raises(SystemExit) as e:
        configurator.run(hybrid.main, hybrid.Config)
    assert e.value.code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and wrong[2:].partition("=")[0] in error
