"""Hybrids made elsewhere, beside transformers: Jamba and Granite 4, multipliers included."""
import json

import pytest
import torch
from cases import out
from test_families import build, edit, gap, try_changed
from test_families_gguf import off_llama_cpp, prompts, write

from formats.gguf import parts
from thimble import checkpoint, load
from thimble.files import UserError

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "mamba_d_state": 8}
GRANITE = {"shared_intermediate_size": 48, "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_heads": 4,
           "mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"] * 2}
# as in granite-4.0-h-micro
SCALED = {"embedding_multiplier": 12.0, "attention_multiplier": 0.0078125, "residual_multiplier": 0.22,
          "logits_scaling": 8.0, "tie_word_embeddings": True}
MODELS = {
    "Jamba": ("jamba", {"num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 3, "attn_layer_offset": 1}),
    "Granite 4": ("granitemoehybrid", GRANITE | SCALED),
    "Granite 4, untied, RoPE": ("granitemoehybrid", GRANITE | SCALED | {
        "position_embedding_type": "rope", "tie_word_embeddings": False}),
    "Granite 4, one attention": ("granitemoehybrid", GRANITE | {
        "attention_multiplier": 0.3, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}),
}


def made(name):
    kind, settings = MODELS[name]
    return build(transformers.AutoConfig.for_model(kind, **SHAPE | settings))


@pytest.mark.parametrize("name", MODELS)
def test_a_hybrid_is_equal_in_transformers(tmp_path, name, record_property):
    theirs = made(name)
    theirs.save_pretrained(tmp_path)
    ours = load.read(tmp_path)
    assert ours.meta["arch"] == "hybrid_ssm"
    off = gap(checkpoint.load_model(ours).eval(), theirs)
    record_property("figures", f"max |dlogit| {off:.1e}")
    assert off < 1e-4


@pytest.mark.parametrize("name,values,message", [
    ("Jamba", {"num_experts": 16}, "num_experts=16"),
    ("Jamba", {"mamba_proj_bias": True}, "mamba_proj_bias=True"),
    ("Jamba", {"attn_layer_offset": 5}, "attn_layer_offset=5"),
    ("Jamba", {"num_experts": ...}, "num_experts=nothing"),
    ("Granite 4", {"num_local_experts": 4}, "num_local_experts=4"),
    ("Granite 4", {"mamba_n_groups": 2}, "mamba_n_groups=2"),
    ("Granite 4", {"layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"]},
     "attention at equal distances only"),
    ("Granite 4", {"position_embedding_type": "alibi"}, "position_embedding_type=alibi"),
    ("Granite 4", {"time_step_limit": [0.0, 0.1]}, "time_step_limit="),
    ("Granite 4", {"new_multiplier": 2.0}, "new_multiplier=2.0"),
])
def test_what_would_be_another_model_is_refused(tmp_path, name, values, message):
    made(name).save_pretrained(tmp_path)
    edit(tmp_path, **values)
    with pytest.raises(UserError, match=message) as error:
        load.read(tmp_path)
    assert "\n" not in str(error.value) and json.loads((tmp_path / "config.json").read_text())


def test_a_granite_file_with_multipliers_is_equal_in_llama_cpp(tmp_path):
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
    out("granite", tmp_path / "plain.gguf", "gguf", "f32", check=False)
    values, arrays, _ = parts(tmp_path / "plain.gguf")
    about = {key.removeprefix("granitehybrid."): value for key, value in values.items() if "granitehybrid." in key}
    about |= {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0, "attention.scale": 0.1}
    write(tmp_path / "m.gguf", "granitehybrid", about, {name: array() for name, array in arrays.items()})
    assert off_llama_cpp(tmp_path / "m.gguf") < 2e-3 < off_each_other(tmp_path / "m.gguf", tmp_path / "plain.gguf")


@torch.no_grad()
def off_each_other(*paths):
    one, other = (checkpoint.load_model(load.read(path)).eval()(prompts())[0] for path in paths)
    return (one - other).abs().max().item()


@pytest.mark.parametrize("case,values,message", [
    ("arcee", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "cannot express"),
    ("bitnet", {"rope_theta": ..., "rope_parameters": {"rope_type": "default"}}, "rope_theta=nothing"),
    ("bitnet", {"hidden_act": ...}, "hidden_act=nothing"),
    ("bitnet", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ("bitnet", {"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
    ("bitnet", {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["x"]}}, "not_convert="),
    ("bitnet", {"quantization_config": None}, "does not hold -1, 0 and 1 times one scale"),
])
def test_what_export_wrote_and_somebody_changed_is_refused(tmp_path, case, values, message):
    out(case, tmp_path / "m", "hf", check=False)
    edit(tmp_path / "m", **values)
    with pytest.raises(UserError, match=message):
        load.read(tmp_path / "m")


KEYS = ["mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank", "mamba_conv_bias", "mamba_proj_bias",
        "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "attn_layer_period", "attn_layer_offset", "num_experts",
        "num_local_experts", "num_experts_per_tok", "embedding_multiplier", "residual_multiplier", "logits_scaling",
        "attention_multiplier", "position_embedding_type", "shared_intermediate_size", "intermediate_size",
        "layers_block_type", "time_step_limit", "hidden_act", "hidden_size", "num_attention_heads", "rms_norm_eps"]


def test_a_changed_config_is_equal_in_transformers_or_refused(tmp_path, count, score):
    tries = count(40, 300)
    equal, refused, alone, wrong = try_changed(tmp_path, made, MODELS, KEYS, tries)
    figures = f"{equal} equal, {refused} refused, {alone} read here alone"
    assert not wrong, f"{figures}, {len(wrong)} read wrongly: {wrong[0]}"
    assert equal > tries / 20 and refused > tries / 5
    score(tries - len(wrong), tries, figures)
