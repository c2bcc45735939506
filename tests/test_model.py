"""model.py against references from outside: a plain float64 twin in numpy, Hugging Face's Llama, known sizes."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

import model
from thimble.configurator import load
from train import Config as TrainConfig

CONFIG = model.Config(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, vocab_size=40, block_size=64)


def shaken(config, seed=0):
    torch.manual_seed(seed)
    m = model.Model(config).eval()
    with torch.no_grad():
        for p in m.parameters():
            p += 0.2 * torch.randn_like(p)
    return m


def twin(m, idx):
    """Llama's forward pass as its paper has it, one token and one head at a time, in float64 numpy."""
    w = {name: p.detach().double().numpy() for name, p in m.named_parameters()}
    c = m.config
    D, group = c.n_embd // c.n_head, c.n_head // (c.n_kv_head or c.n_head)

    def norm(x, gain):
        return x / np.sqrt((x**2).mean() + c.norm_eps) * gain

    def turn(x, t):                                        # pairs (i, i + D/2), angle t * theta^(-2i/D)
        out = x.copy()
        for i in range(D // 2):
            a = t * c.rope_theta ** (-2 * i / D)
            out[i] = x[i] * math.cos(a) - x[i + D // 2] * math.sin(a)
            out[i + D // 2] = x[i + D // 2] * math.cos(a) + x[i] * math.sin(a)
        return out

    xs = [w["embed.weight"][i] for i in idx]
    for n in range(c.n_layer):
        b = f"blocks.{n}."
        keys, values, after = [], [], []
        for t, x in enumerate(xs):
            h = norm(x, w[b + "attn_norm.weight"])
            q, k, v = (w[b + f"attn.{name}_proj.weight"] @ h for name in "qkv")
            k, v = k.reshape(-1, D), v.reshape(-1, D)
            if c.qk_norm:
                k = np.stack([norm(head, w[b + "attn.k_norm.weight"]) for head in k])
            keys.append([turn(head, t) for head in k])
            values.append(v)
            y = []
            for head, q_head in enumerate(q.reshape(-1, D)):
                if c.qk_norm:
                    q_head = norm(q_head, w[b + "attn.q_norm.weight"])
                scores = np.array([turn(q_head, t) @ past[head // group] for past in keys]) / math.sqrt(D)
                p = np.exp(scores - scores.max())
                y.append(sum(p_s * past[head // group] for p_s, past in zip(p / p.sum(), values, strict=True)))
            x = x + w[b + "attn.o_proj.weight"] @ np.concatenate(y)
            h = norm(x, w[b + "mlp_norm.weight"])
            if c.mlp == "swiglu":
                g = w[b + "mlp.gate_proj.weight"] @ h
                h = g / (1 + np.exp(-g)) * (w[b + "mlp.up_proj.weight"] @ h)
            else:
                u = w[b + "mlp.up_proj.weight"] @ h
                h = u * np.array([(1 + math.erf(z / math.sqrt(2))) / 2 for z in u])
            after.append(x + w[b + "mlp.down_proj.weight"] @ h)
        xs = after
    head = w["embed.weight" if c.tie_embeddings else "head.weight"]
    return np.stack([head @ norm(x, w["norm.weight"]) for x in xs])


@pytest.mark.parametrize("extra", [{}, {"tie_embeddings": True}, {"qk_norm": True}, {"mlp": "gelu"}, {"n_kv_head": 1}])
def test_logits_equal_a_float64_twin(extra):
    m = shaken(replace(CONFIG, **extra))
    idx = torch.randint(40, (1, 12))
    expected = twin(m, idx[0].tolist())
    assert np.abs(m(idx)[0][0].detach().numpy() - expected).max() < 1e-4
    assert np.abs(m.double()(idx)[0][0].detach().numpy() - expected).max() < 1e-4


def test_bfloat16_stays_close_to_float32():
    m = shaken(CONFIG)
    idx = torch.randint(40, (2, 64))
    exact, _ = m(idx)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = m(idx)
    assert rough.dtype == torch.float32
    assert (rough - exact).square().mean() < 1e-3 * exact.square().mean()  # 8 bits, over two layers of large weights


def test_long_sequences_take_the_fused_kernel_and_agree():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 1100, 8), torch.randn(1, 2, 1100, 8), torch.randn(1, 2, 1100, 8)
    whole = model.attend(q, k, v)
    for begin, end in ((0, 900), (300, 1100), (1099, 1100)):  # plain; fused with keys of before; one query
        part = model.attend(q[:, :, begin:end], k[:, :, :end], v[:, :, :end])
        assert (part - whole[:, :, begin:end]).abs().max() < 1e-5


def test_rope_keeps_norms_and_sees_distance_only():
    torch.manual_seed(0)
    cos, sin = model.rope_table(torch.arange(100), 16, 10000.0)
    q, k = torch.randn(1, 1, 1, 16).expand(1, 100, 1, 16), torch.randn(1, 1, 1, 16).expand(1, 100, 1, 16)
    rq, rk = model.rotate(q, cos, sin)[0, :, 0], model.rotate(k, cos, sin)[0, :, 0]
    assert (rq.norm(dim=-1) - q[0, 0, 0].norm()).abs().max() < 1e-5
    dots = rq @ rk.T
    for distance in (0, 3, 50):
        diagonal = dots.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4
    assert (dots[0, 0] - dots[0, 50]).abs() > 1e-2


@pytest.mark.parametrize("recipe, count", [("mini_llm", 27_073_024), ("elite_112m", 112_085_760)])
def test_published_parameter_counts(recipe, count):
    config = load(TrainConfig, ROOT / f"config/{recipe}.py").model
    with torch.device("meta"):
        assert sum(p.numel() for p in model.Model(config).parameters()) == count


def test_parity_with_transformers():
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    m = shaken(CONFIG)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=CONFIG.norm_eps, max_position_embeddings=64, rope_theta=10000.0,
        tie_word_embeddings=False)).eval()
    names = {"embed.": "model.embed_tokens.", "head.": "lm_head.", "norm.": "model.norm.", "blocks.": "model.layers.",
             "attn.": "self_attn.", "attn_norm.": "input_layernorm.", "mlp_norm.": "post_attention_layernorm."}

    def renamed(name):
        head, rest = name.split(".", 1)
        if head == "blocks":
            n, part, rest = rest.split(".", 2)
            return f"model.layers.{n}.{names.get(part + '.', part + '.')}{rest}"
        return names[head + "."] + rest

    hf.load_state_dict({renamed(name): p for name, p in m.state_dict().items()})
    idx = torch.randint(40, (2, 50))
    assert (m(idx)[0] - hf(idx).logits).abs().max() < 1e-4


@pytest.mark.parametrize("wrong, match", [
    ({"n_embd": 30}, "n_embd=30 must be a multiple of n_head=4"),
    ({"n_kv_head": 3}, "n_head=4 must be a multiple of n_kv_head=3"),
    ({"n_embd": 12}, "must be even"), ({"n_layer": 0}, "n_layer=0"), ({"dropout": 1.0}, "dropout=1.0"),
    ({"rope_theta": 0.0}, "rope_theta=0.0"),
])
def test_impossible_shapes_are_named(wrong, match):
    with pytest.raises(ValueError, match=match):
        replace(CONFIG, **wrong)


def test_no_model_without_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size=0"):
        model.Model(model.Config())


def test_dropout_only_in_training():
    m = model.Model(replace(CONFIG, dropout=0.5))
    idx = torch.randint(40, (1, 20))
    assert not torch.equal(m(idx)[0], m(idx)[0])
    m.eval()
    assert torch.equal(m(idx)[0], m(idx)[0])
