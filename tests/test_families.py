"""Weights made elsewhere: the Llama family beside transformers, and what must not come in as something else."""
import json
import random

import pytest
import safetensors.torch
import torch

from thimble import checkpoint, load
from thimble.files import UserError

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
transformers.utils.logging.set_verbosity(50)

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 40}
# name: (model_type, settings of it, the model file that it becomes)
FAMILY = {
    "Llama 1": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}, "model"),
    "TinyLlama": ("llama", {}, "model"),
    "SmolLM2": ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e5}}, "model"),
    "Llama 3.1": ("llama", {"rope_parameters": LLAMA3}, "llama"),
    "Llama 3.2": ("llama", {"rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True}, "llama"),
    "deepseek-coder": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "llama"),
    "Llama, YaRN": ("llama", {"rope_parameters": YARN | {"attention_factor": 0.9, "beta_fast": 20}}, "llama"),
    "Mistral 0.1": ("mistral", {"sliding_window": 9}, "llama"),
    "Mistral 0.3": ("mistral", {"sliding_window": None}, "model"),
    "Mistral Nemo": ("mistral", {"sliding_window": None, "head_dim": 12}, "llama"),
    "Qwen2": ("qwen2", {"tie_word_embeddings": True}, "llama"),
    "Qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, "llama"),
    "Qwen2.5, YaRN": ("qwen2", {"rope_parameters": YARN}, "llama"),
    "Qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}, "llama"),
    "Qwen3, heads as usual": ("qwen3", {"head_dim": 8, "rope_parameters": YARN}, "llama"),
    "Qwen3, plain": ("qwen3", {"head_dim": 8}, "model"),
}


def build(config):
    """transformers' model of a config, in float32, with weights among which every one matters."""
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in made.parameters():
            p += (0.2 if p.dim() < 2 else 0.15) * torch.randn_like(p)
    return made


def family_model(name):
    kind, settings, _ = FAMILY[name]
    return build(transformers.AutoConfig.for_model(kind, **SHAPE | settings))


def ids(n=60):
    return torch.randint(SHAPE["vocab_size"], (2, n), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def gap(ours, theirs):
    """The largest difference of two logits."""
    return (ours(ids())[0] - theirs(ids()).logits).abs().max().item()


# ---- folders
@pytest.mark.parametrize("name", FAMILY)
def test_a_folder_of_the_family_is_equal_in_transformers(tmp_path, name, record_property):
    theirs = family_model(name)
    theirs.save_pretrained(tmp_path)
    found = load.read(tmp_path)
    ours = checkpoint.load_model(found).eval()
    assert found.meta["arch"] == FAMILY[name][2]
    off = gap(ours, theirs)
    record_property("figures", f"max |dlogit| {off:.1e}")
    assert off < 2e-5 and ids().size(1) > 32  # beyond the original context, where scaled RoPE shows
    # token by token, from a cache
    cache = ours.init_cache(2, 64)
    with torch.no_grad():
        for t in range(20):
            logits, cache = ours.step(ids()[:, t:t + 1], cache)
        assert (logits - theirs(ids()[:, :20]).logits[:, -1]).abs().max() < 2e-5
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


OTHERS = ["gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "gptj", "opt", "bloom", "falcon", "stablelm",
          "olmo", "olmo2", "cohere", "cohere2", "starcoder2", "granite", "mixtral", "qwen2_moe", "qwen3_moe", "smollm3",
          "glm", "helium", "nemotron", "exaone4", "ministral", "apertus", "seed_oss", "mamba", "llama4_text"]


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_is_refused_in_one_line(tmp_path, name):
    about = transformers.AutoConfig.for_model(name).to_diff_dict() | SHAPE | {"model_type": name}
    (tmp_path / "config.json").write_text(json.dumps(about, default=str))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"model_type={name}, which cannot be read: only llama") as error:
        load.read(tmp_path)
    assert "\n" not in str(error.value)


def edit(folder, **values):
    """Change keys of config.json; ... stands for taking one away."""
    about = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in about.items() if value is not ...}))


ROTARY = {"rope_type": "default", "rope_theta": 1e4}
# each was read as another model once: logits off by 0.5 to 3.5
AMBIGUOUS = {
    "rope_scaling beside rope_parameters": ("Llama 1", {
        "rope_parameters": ROTARY, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
    "two bases": ("Llama 1", {"rope_parameters": ROTARY, "rope_theta": 500.0}, "rope_theta=500"),
    "a factor without a type": ("Llama 1", {"rope_parameters": ROTARY | {"factor": 4.0}}, "rope_parameters.factor=4.0"),
    "a part of each head": ("Llama 1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "no window said": ("Mistral 0.1", {"layer_types": ["full_attention"] * 3}, "layer_types="),
    "code of its own": ("Llama 1", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map="),
    "quantised": ("Llama 1", {"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
    "quantised by MLX": ("Llama 1", {"quantization": {"bits": 4}}, "quantization="),
    "another head": ("Llama 1", {"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
    "tied by a word": ("Llama 1", {"tie_word_embeddings": "true"}, "tie_word_embeddings=true"),
    "heads of an unsaid width": ("Qwen3", {"head_dim": ...}, "head_dim=nothing"),
    "key heads left out": ("Qwen2", {"num_key_value_heads": ...}, "num_key_value_heads=nothing"),
    "biases": ("Qwen3", {"attention_bias": True}, "attention_bias=True"),
    "an unknown key": ("Qwen3", {"logit_scale": 0.5}, "logit_scale=0.5"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_would_be_another_model_is_refused(tmp_path, case):
    name, values, message = AMBIGUOUS[case]
    family_model(name).save_pretrained(tmp_path)
    edit(tmp_path, **values)
    with pytest.raises(UserError, match=message) as error:
        load.read(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_older_and_newer_spellings_are_the_same_model(tmp_path):
    theirs = family_model("Llama 3.1")
    theirs.save_pretrained(tmp_path)
    old = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")} | {"type": "llama3"}
    edit(tmp_path, rope_parameters=..., rope_scaling=old, rope_theta=300.0, torch_dtype="float32", is_llama_config=True)
    assert gap(checkpoint.load_model(load.read(tmp_path)).eval(), theirs) < 2e-5


def test_a_tied_head_may_be_stored_but_must_be_the_embedding(tmp_path):
    theirs = family_model("SmolLM2")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    assert gap(checkpoint.load_model(load.read(tmp_path)).eval(), theirs) < 2e-5
    tensors["lm_head.weight"] += 0.1
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="stores a head other than the embedding"):
        load.read(tmp_path)


# ---- what a config.json could say besides
VALUES = [None, True, False, 0, 1, 2, 4, 8, 16, 32, 64, 7, 0.5, 1.0, 4.0, 1e-6, 1e4, 500000.0, "silu", "gelu",
          "default", "linear", "llama3", "yarn", "dynamic", "longrope", "", [], {}, [1], -1, "relu"]
ROPES = [None, {}, {"rope_type": "default"}, {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 4.0},
         LLAMA3, YARN, {"rope_type": "dynamic", "factor": 2.0}, {"factor": 2.0}, {"rope_theta": 500.0},
         {"type": "yarn", "factor": 2.0}, YARN | {"truncate": False}, YARN | {"mscale": 0.7, "mscale_all_dim": 0.5},
         LLAMA3 | {"factor": None}, {"rope_type": "default", "partial_rotary_factor": 0.5}]
KEYS = {  # what to try for a key; VALUES for the others
    "rope_parameters": ROPES, "rope_scaling": ROPES, "rope_theta": [100.0, 1e4, None, 10000, 5e5],
    "layer_types": [["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention", "sliding_attention"] * 2],
    "model_type": ["llama", "mistral", "qwen2", "qwen3", "gemma"],
    "architectures": [["LlamaForCausalLM"], ["MistralForCausalLM"], None, ["Qwen3ForSequenceClassification"]]}
OTHER_KEYS = [
    "hidden_act", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "head_dim",
    "partial_rotary_factor", "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
    "final_logit_softcapping", "attention_dropout", "pretraining_tp", "initializer_range", "use_cache", "clip_qkv",
    "qk_layernorm", "is_decoder", "no_rope_layers", "num_experts", "layer_norm_eps", "bos_token_id", "quantization",
    "original_max_position_embeddings", "scale_emb", "tie_word_embeddings", *SHAPE]


def mutated(rng, about, keys):
    """A copy of config.json with one or two keys changed, added or taken away."""
    about = json.loads(json.dumps(about))
    for _ in range(rng.randint(1, 2)):
        key = rng.choice([*KEYS, *KEYS, *keys])
        action = rng.random()
        if action < 0.2:
            about.pop(key, None)
        elif action < 0.4 and isinstance(about.get("rope_parameters"), dict):
            about["rope_parameters"][rng.choice(sorted({*YARN, *LLAMA3, "type", "truncate"}))] = rng.choice(VALUES)
        elif type(about.get(key)) in (int, float) and action < 0.5:
            about[key] = rng.choice([about[key] * 2, about[key] + 1])
        else:
            about[key] = rng.choice(KEYS.get(key, VALUES))
    return about


def try_changed(folder, make, names, keys, tries):
    """-> (how often a changed config was equal in transformers, refused, read here alone; what was read wrongly).

    Transformers refuses wrong types of keys that change nothing; there is nothing to compare with then.
    """
    rng = random.Random(0)
    equal = refused = alone = 0
    wrong = []
    for _ in range(tries):
        name = rng.choice(list(names))
        path = folder / name
        if not path.is_dir():
            make(name).save_pretrained(path)
            (path / "good.json").write_bytes((path / "config.json").read_bytes())
        about = mutated(rng, json.loads((path / "good.json").read_text()), keys)
        (path / "config.json").write_text(json.dumps(about))
        try:
            ours = checkpoint.load_model(load.read(path)).eval()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        try:
            off = as_transformers_has_it(path, ours)
        except Exception:
            alone += 1
            continue
        if off < 2e-4:
            equal += 1
        else:
            wrong.append((name, off, about))
    return equal, refused, alone, wrong


def as_transformers_has_it(folder, ours):
    """The largest difference to the logits of transformers' model of this folder, built without its slow loader."""
    config = transformers.AutoConfig.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = theirs.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"),
                                                 strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    n = min(60, ours.config.block_size)
    with torch.no_grad():
        return (ours(ids(n))[0] - theirs(ids(n)).logits).abs().max().item()


def test_a_changed_config_is_equal_in_transformers_or_refused(tmp_path, count, score):
    tries = count(100, 1000)
    equal, refused, alone, wrong = try_changed(tmp_path, family_model, FAMILY, OTHER_KEYS, tries)
    figures = f"{equal} equal, {refused} refused, {alone} read here alone"
    assert not wrong, f"{figures}, {len(wrong)} read wrongly: {wrong[0]}"
    assert equal > tries / 20 and refused > tries / 5
    score(tries - len(wrong), tries, figures)
