"""What a model's tensors and settings are called elsewhere: in Hugging Face's Llama, BitNet and Jamba, in llama.cpp.

    >>> rename("blocks.0.mlp.up_proj.weight", OURS, LLAMA_CPP)
    'blk.0.ffn_up.weight'
"""
import importlib
import math
import re
from dataclasses import asdict

from thimble import checkpoint, configurator
from thimble.files import UserError

# how the numbers of each format may be stored; the first is the default
QUANTS = {
    "hf": ("f32", "f16", "bf16"),
    "hf, ternary": ("online", "packed", "plain", "f16", "bf16"),
    "gguf": ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "tq1_0", "tq2_0"),
    "onnx": ("fp32", "int8", "int4", "q2"),
    "web": ("fp32", "int8", "int4", "q2"),
}


# ---- tensors
OURS, HUGGING_FACE, LLAMA_CPP = range(3)  # columns of the tables
PREFIXES = ("blocks", "model.layers", "blk")  # "*" stands for one of these and the number of the layer
NAMES = [  # Llama, and BitNet with its two more norms
    ("embed", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
    ("*.attn_norm", "*.input_layernorm", "*.attn_norm"),
    ("*.attn.q_proj", "*.self_attn.q_proj", "*.attn_q"),
    ("*.attn.k_proj", "*.self_attn.k_proj", "*.attn_k"),
    ("*.attn.v_proj", "*.self_attn.v_proj", "*.attn_v"),
    ("*.attn.sub_norm", "*.self_attn.attn_sub_norm", "*.attn_sub_norm"),
    ("*.attn.o_proj", "*.self_attn.o_proj", "*.attn_output"),
    ("*.mlp_norm", "*.post_attention_layernorm", "*.ffn_norm"),
    ("*.mlp.gate_proj", "*.mlp.gate_proj", "*.ffn_gate"),
    ("*.mlp.up_proj", "*.mlp.up_proj", "*.ffn_up"),
    ("*.mlp.sub_norm", "*.mlp.ffn_sub_norm", "*.ffn_sub_norm"),
    ("*.mlp.down_proj", "*.mlp.down_proj", "*.ffn_down"),
]
JAMBA = [
    ("embed", "model.embed_tokens", "token_embd"),
    ("norm", "model.final_layernorm", "output_norm"),
    ("head", "lm_head", "output"),
    ("*.mixer_norm", "*.input_layernorm", "*.attn_norm"),
    ("*.mlp_norm", "*.pre_ff_layernorm", "*.ffn_norm"),
    ("*.mixer.q_proj", "*.self_attn.q_proj", "*.attn_q"),
    ("*.mixer.k_proj", "*.self_attn.k_proj", "*.attn_k"),
    ("*.mixer.v_proj", "*.self_attn.v_proj", "*.attn_v"),
    ("*.mixer.o_proj", "*.self_attn.o_proj", "*.attn_output"),
    ("*.mixer.in_proj", "*.mamba.in_proj", "*.ssm_in"),
    ("*.mixer.conv1d", "*.mamba.conv1d", "*.ssm_conv1d"),
    ("*.mixer.x_proj", "*.mamba.x_proj", "*.ssm_x"),
    ("*.mixer.dt_norm", "*.mamba.dt_layernorm", "*.ssm_dt_norm"),
    ("*.mixer.b_norm", "*.mamba.b_layernorm", "*.ssm_b_norm"),
    ("*.mixer.c_norm", "*.mamba.c_layernorm", "*.ssm_c_norm"),
    ("*.mixer.dt_proj", "*.mamba.dt_proj", "*.ssm_dt"),
    ("*.mixer.A_log", "*.mamba.A_log", "*.ssm_a"),
    ("*.mixer.D", "*.mamba.D", "*.ssm_d"),
    ("*.mixer.out_proj", "*.mamba.out_proj", "*.ssm_out"),
    ("*.mlp.gate_proj", "*.feed_forward.gate_proj", "*.ffn_gate"),
    ("*.mlp.up_proj", "*.feed_forward.up_proj", "*.ffn_up"),
    ("*.mlp.down_proj", "*.feed_forward.down_proj", "*.ffn_down"),
]


def rename(name, source, target, stock="llama"):
    """A tensor's name in the column `target`, given that in the column `source`; None if the table lacks it."""
    stem, dot, kind = name.rpartition(".")
    if kind not in ("weight", "bias", "weight_scale"):  # A_log and D are parameters, not modules
        stem, dot, kind = name, "", ""
    match = re.fullmatch(re.escape(PREFIXES[source]) + r"\.(\d{1,4})\.(.+)", stem)
    pattern = f"*.{match[2]}" if match else stem
    for row in JAMBA if stock == "jamba" else NAMES:
        if row[source] == pattern:
            there = row[target]
            if match:
                layer = f"{PREFIXES[target]}.{match[1]}."
                there = layer + there.removeprefix("*.")
            return there + dot + kind
    return None


def permute(w, n_head, back=False):
    """Rows of q or k, (heads * D, C), from half-split RoPE pairs (i, i + D/2) to llama.cpp's (2i, 2i + 1), or back."""
    pairs = w.shape[0] // n_head // 2  # of a head
    shape = (n_head, pairs, 2) if back else (n_head, 2, pairs)
    split = w.reshape(*shape, w.shape[1])
    return split.swapaxes(1, 2).reshape(w.shape)


# ---- settings, on the way out
CLASSES = {"llama": "LlamaForCausalLM", "bitnet": "BitNetForCausalLM", "jamba": "JambaForCausalLM"}


def n_kv_head(config):
    return config.n_kv_head or config.n_head


def n_hidden(model):
    """Width of the MLP, from its matrix: a Config may leave it to the model file."""
    up = model.blocks[0].mlp.up_proj
    return len(up.codes if hasattr(up, "codes") else up.weight)


def d_state(config):
    return config.d_state or 16  # hybrid_ssm.py's default with ssm="mamba1"


def dt_rank(config):
    return config.dt_rank or math.ceil(config.n_embd / 16)


def hf_config(model, stock):
    """What config.json says about the shape of a stock architecture, with RoPE under its old and its new names.

    AttributeError if the model's Config lacks one of the settings.
    """
    config = model.config
    about = {"architectures": [CLASSES[stock]], "model_type": stock,
             "hidden_size": config.n_embd, "intermediate_size": n_hidden(model),
             "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
             "num_key_value_heads": n_kv_head(config), "hidden_act": getattr(config, "act", "silu"),
             "rms_norm_eps": config.norm_eps, "tie_word_embeddings": getattr(model, "head", None) is None,
             "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    if stock == "jamba":
        about |= {"attn_layer_period": config.attn_layer_period, "attn_layer_offset": config.attn_layer_offset,
                  "num_experts": 1, "num_experts_per_tok": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
                  "output_router_logits": False, "mamba_expand": config.expand, "mamba_d_conv": config.d_conv,
                  "mamba_d_state": d_state(config), "mamba_conv_bias": True, "mamba_proj_bias": False,
                  "mamba_dt_rank": dt_rank(config)}
    else:
        about |= {"head_dim": config.n_embd // config.n_head, "attention_bias": False, "mlp_bias": False,
                  "rope_theta": config.rope_theta, "rope_scaling": None,
                  "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    return about


# ---- settings, on the way in
def shape(where, about, keys, rope_theta, head_dim):
    """Settings of model.Config from a foreign description `about`; UserError if one is missing or out of range.

    keys: {setting of ours: key of theirs}, of all but the base of RoPE and the width of a head, which are handed over.
    """
    def number(name, value, kind=int, limit=2**20):
        if type(value) not in (int, kind) or not 0 < value < limit:
            raise UserError(f"{where}: {name} is {str(value)[:40]!r}, not a number in its range")
        return value

    # far beyond any model that exists; without them a damaged file could ask for any amount of memory
    limits = {"n_layer": 1000, "vocab_size": 2**24, "block_size": 2**28}
    config = {}
    for ours, theirs in keys.items():
        value = about.get(theirs)
        if ours == "n_kv_head":  # may be left out: then as many as queries
            value = value or config["n_head"]
        kind = float if ours == "norm_eps" else int
        config[ours] = number(theirs, value, kind, limits.get(ours, 2**20))
    config["norm_eps"] = float(f"{config['norm_eps']:.7g}")  # a float32 in GGUF: 9.99999974e-06
    config["rope_theta"] = float(number("the base of RoPE", rope_theta, float, 2**60))
    if head_dim not in (None, config["n_embd"] // config["n_head"]):
        raise UserError(f"{where}: heads of {str(head_dim)[:40]} are not {keys['n_embd']} / {keys['n_head']}, which "
                        "model.py needs")
    return config


def as_checkpoint(path, config, tensors, meta):
    """The Checkpoint of a Llama made elsewhere, which model.py can be. UserError if it cannot."""
    try:
        config = configurator.from_flat(importlib.import_module("model").Config, config)
    except ValueError as error:
        raise UserError(f"{path}: model.py cannot express what it describes ({error})") from None
    meta = {"arch": "model", "model_config": asdict(config), "step": 0, "name": path.stem} | meta
    return checkpoint.Checkpoint(path, meta, tensors, None)
