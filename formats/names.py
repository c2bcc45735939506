"""What a model's tensors and settings are called elsewhere: in the stock architectures of Hugging Face and llama.cpp.

    >>> rename("blocks.0.mlp.up_proj.weight", OURS, LLAMA_CPP)
    'blk.0.ffn_up.weight'
"""
import math
import re

import torch

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
NAMES = [  # Llama; BitNet has the sub_norms, Qwen3 q_norm and k_norm, and Arcee lacks the gate
    ("embed", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
    ("*.attn_norm", "*.input_layernorm", "*.attn_norm"),
    ("*.attn.q_proj", "*.self_attn.q_proj", "*.attn_q"),
    ("*.attn.k_proj", "*.self_attn.k_proj", "*.attn_k"),
    ("*.attn.v_proj", "*.self_attn.v_proj", "*.attn_v"),
    ("*.attn.q_norm", "*.self_attn.q_norm", "*.attn_q_norm"),
    ("*.attn.k_norm", "*.self_attn.k_norm", "*.attn_k_norm"),
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

GRANITE = [  # GraniteMoeHybrid without experts: Mamba-2 and some attention
    ("embed", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
    ("*.mixer_norm", "*.input_layernorm", "*.attn_norm"),
    ("*.mlp_norm", "*.post_attention_layernorm", "*.ffn_norm"),
    ("*.mixer.q_proj", "*.self_attn.q_proj", "*.attn_q"),
    ("*.mixer.k_proj", "*.self_attn.k_proj", "*.attn_k"),
    ("*.mixer.v_proj", "*.self_attn.v_proj", "*.attn_v"),
    ("*.mixer.o_proj", "*.self_attn.o_proj", "*.attn_output"),
    ("*.mixer.in_proj", "*.mamba.in_proj", "*.ssm_in"),
    ("*.mixer.conv1d", "*.mamba.conv1d", "*.ssm_conv1d"),
    ("*.mixer.dt_bias", "*.mamba.dt_bias", "*.ssm_dt.bias"),
    ("*.mixer.A_log", "*.mamba.A_log", "*.ssm_a"),
    ("*.mixer.D", "*.mamba.D", "*.ssm_d"),
    ("*.mixer.norm", "*.mamba.norm", "*.ssm_norm"),
    ("*.mixer.out_proj", "*.mamba.out_proj", "*.ssm_out"),
    ("*.mlp.gate_proj", "*.shared_mlp.input_linear", "*.ffn_gate"),  # there one matrix, the gate's rows first
    ("*.mlp.up_proj", "*.shared_mlp.input_linear", "*.ffn_up"),
    ("*.mlp.down_proj", "*.shared_mlp.output_linear", "*.ffn_down"),
]
TABLES = {"jamba": JAMBA, "granitemoehybrid": GRANITE}  # NAMES: all others
KINDS = ("", ".weight", ".bias", ".weight_scale")  # "": A_log and D are parameters, not modules


def rename(name, source, target, stock="llama"):
    """A tensor's name in the column `target`, given that in the column `source`; None if the table lacks it."""
    match = re.fullmatch(re.escape(PREFIXES[source]) + r"\.(\d{1,4})\.(.+)", name)
    pattern = f"*.{match[2]}" if match else name
    for row in TABLES.get(stock, NAMES):
        kind = pattern.removeprefix(row[source])
        if kind == pattern or kind not in KINDS:
            continue
        there = row[target] + kind
        if match:
            there = f"{PREFIXES[target]}.{match[1]}.{there.removeprefix('*.')}"
        return there
    return None


def to_hugging_face(tensors, stock):
    """{our name: tensor} -> {name in Hugging Face: tensor}; KeyError with our name of one that has none there."""
    parts = {}  # {name there: {our name: tensor}}
    for name, tensor in tensors.items():
        there = rename(name, OURS, HUGGING_FACE, stock)
        if there is None:
            raise KeyError(name)
        parts.setdefault(there, {})[name] = tensor
    found = {}
    for there, named in parts.items():
        rows = [named[name] for name in sorted(named)]  # gate_proj, then up_proj
        found[there] = rows[0] if len(rows) == 1 else torch.cat(rows)
    return found


def permute(w, n_head, back=False):
    """Rows of q or k, (heads * D, ...), from half-split RoPE pairs (i, i + D/2) to llama.cpp's (2i, 2i + 1) or back."""
    pairs = w.shape[0] // n_head // 2  # of a head
    shape = (n_head, pairs, 2) if back else (n_head, 2, pairs)
    split = w.reshape(*shape, *w.shape[1:])
    return split.swapaxes(1, 2).reshape(w.shape)


# ---- settings, on the way out
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
           "qwen3": "Qwen3ForCausalLM", "arcee": "ArceeForCausalLM",
           "bitnet": "BitNetForCausalLM", "jamba": "JambaForCausalLM",
           "granitemoehybrid": "GraniteMoeHybridForCausalLM"}  # {model_type: class in transformers}


def n_kv_head(config):
    return config.n_kv_head or config.n_head


def head_dim(config):
    return getattr(config, "head_dim", 0) or config.n_embd // config.n_head


def n_hidden(model):
    """Width of the MLP, from its matrix: a Config may leave it to the model file."""
    up = model.blocks[0].mlp.up_proj
    return len(up.codes if hasattr(up, "codes") else up.weight)


def d_state(config):
    return config.d_state or 16  # hybrid_ssm.py's default with ssm="mamba1"


def dt_rank(config):
    return config.dt_rank or math.ceil(config.n_embd / 16)


def activation(config):
    """The MLP's activation, as Hugging Face calls it: `act` of ternary.py, `mlp` of model.py where that has no gate."""
    act = getattr(config, "act", getattr(config, "mlp", "swiglu"))
    return "silu" if act == "swiglu" else act


def is_attention(model):
    """[whether the mixer is attention, for each layer of a hybrid]."""
    return [hasattr(block.mixer, "q_proj") for block in model.blocks]


def hf_config(model, stock):
    """What config.json says about the shape of a stock architecture, with RoPE under its old and its new names.

    AttributeError if the model's Config lacks one of the settings.
    """
    config = model.config
    about = {"architectures": [CLASSES[stock]], "model_type": stock,
             "hidden_size": config.n_embd, "intermediate_size": n_hidden(model),
             "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
             "num_key_value_heads": n_kv_head(config), "hidden_act": activation(config),
             "rms_norm_eps": config.norm_eps, "tie_word_embeddings": getattr(model, "head", None) is None,
             "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    if stock == "jamba":
        about |= {"attn_layer_period": config.attn_layer_period, "attn_layer_offset": config.attn_layer_offset,
                  "num_experts": 1, "num_experts_per_tok": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
                  "output_router_logits": False, "mamba_expand": config.expand, "mamba_d_conv": config.d_conv,
                  "mamba_d_state": d_state(config), "mamba_conv_bias": True, "mamba_proj_bias": False,
                  "mamba_dt_rank": dt_rank(config)}
        return about
    if stock == "granitemoehybrid":
        mixer = model.blocks[is_attention(model).index(False)].mixer
        kinds = ["attention" if attention else "mamba" for attention in is_attention(model)]
        about |= {"layer_types": kinds, "position_embedding_type": "rope" if config.rope else "nope",
                  "shared_intermediate_size": n_hidden(model), "num_local_experts": 0, "num_experts_per_tok": 0,
                  "output_router_logits": False, "attention_bias": False, "mamba_expand": config.expand,
                  "mamba_d_conv": config.d_conv, "mamba_d_state": mixer.n_state, "mamba_n_groups": 1,
                  "mamba_n_heads": mixer.n_head, "mamba_d_head": config.ssm_head_dim, "mamba_chunk_size": 256,
                  "mamba_conv_bias": True, "mamba_proj_bias": False,
                  # Granite's own multipliers, all of which leave numbers as they are: queries times keys as usual
                  "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
                  "attention_multiplier": head_dim(config) ** -0.5}
        if not config.rope:
            return about
    else:
        about |= {"head_dim": head_dim(config)}
        if stock not in ("mistral", "qwen2"):  # which have no such key
            about |= {"attention_bias": False, "mlp_bias": False}
        about |= window_config(config, stock)
    rope = rope_config(config)
    about |= {"rope_theta": config.rope_theta, "rope_scaling": rope if len(rope) > 1 else None,
              "rope_parameters": rope | {"rope_theta": config.rope_theta}}
    return about


def window_config(config, stock):
    """What config.json says about a sliding window."""
    window = getattr(config, "window", 0)
    if stock == "mistral":
        return {"sliding_window": window}
    if not window or stock not in ("qwen2", "qwen3"):
        return {}
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": config.window_from}


def rope_config(config):
    """What config.json says about RoPE beside its base."""
    kind = getattr(config, "rope_type", "default")
    rope = {"rope_type": kind}
    if kind == "default":
        return rope
    rope["factor"] = config.rope_factor
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = config.rope_context
    if kind == "llama3":
        rope |= {"low_freq_factor": config.rope_low, "high_freq_factor": config.rope_high}
    if kind == "yarn":
        rope |= {"beta_slow": config.rope_low, "beta_fast": config.rope_high, "attention_factor": config.rope_gain}
    return rope
