"""What export.py writes besides the Llama family, on the way back in: BitNet, Jamba, GraniteMoeHybrid, Arcee.

Each as a folder of Hugging Face and, where llama.cpp has it, as a GGUF file; from elsewhere, too, where the shape is
one that ternary.py, hybrid_ssm.py or model.py has. As in families.py, every key must be understood.
"""
import math

import torch

from formats import names
from formats.families import (
    GGUF_KEYS,
    common_settings,
    gguf_keys,
    number,
    one_of,
    refuse,
    rope_from_hf,
    shape,
    understood,
)
from kernels import ternary
from thimble.files import UserError

ARCHS = {"arcee": "model", "bitnet": "ternary", "jamba": "hybrid_ssm", "granitemoehybrid": "hybrid_ssm"}
GGUF_NAMES = {"bitnet": "bitnet", "jamba": "jamba", "granitehybrid": "granitemoehybrid"}  # llama.cpp's: Hugging Face's
# float16, in which ternary.py holds the embedding, has steps of 6e-8 near 0
HALF_STEP = 3.1e-8


# ---- config.json
def from_hf(path, about):
    """(model_type, settings of the model file in ARCHS); UserError unless all of `about` is understood."""
    readers = {"arcee": arcee, "bitnet": bitnet, "jamba": jamba, "granitemoehybrid": granite}
    family = about["model_type"]
    return family, readers[family](path, about)


def arcee(path, about):
    # a Llama without a gate; Arcee's own models have ReLU^2, which model.py does not
    plain = {"hidden_act": ("gelu",), "attention_bias": (False,), "mlp_bias": (False,)}
    understood(path, about, {"head_dim"}, plain, required=("hidden_act",))
    config = common_settings(path, about) | rope_from_hf(path, about, about["max_position_embeddings"])
    return config | {"mlp": "gelu", "head_dim": usual_head(path, about, config)}


def bitnet(path, about):
    plain = {"attention_bias": (False,), "mlp_bias": (False,)}
    understood(path, about, {"head_dim", "hidden_act", "quantization_config"}, plain, required=("hidden_act",))
    config = common_settings(path, about)
    if not config.pop("tie_embeddings"):
        refuse(path, "tie_word_embeddings", False, ": ternary.py has one matrix for the embedding and the head")
    rope = about.get("rope_parameters")
    if about.get("rope_theta") is None and not (isinstance(rope, dict) and rope.get("rope_theta")):
        refuse(path, "rope_theta", "nothing")  # transformers takes 500,000 for granted here
    config |= rope_from_hf(path, about, about["max_position_embeddings"])
    usual_head(path, about, config)
    config["act"] = one_of(path, "hidden_act", about["hidden_act"], ("silu", "relu2"))
    # what is rounded already can only be run: rounding it once more would shrink the scale
    config["packed"] = mode_of(path, about) != "online"
    return config


def mode_of(path, about):
    """How transformers gets at the weights of a BitNet: "online", "offline", or "plain" without rounding anything."""
    how = about.get("quantization_config")
    if how is None:
        return "plain"
    known = {"quant_method", "linear_class", "quantization_mode", "modules_to_not_convert", "use_rms_norm",
             "rms_norm_eps"}
    if not isinstance(how, dict) or how.keys() - known:
        refuse(path, "quantization_config", how)
    if how.get("quant_method") != "bitnet" or how.get("use_rms_norm"):
        refuse(path, "quantization_config", how)
    # a matrix that is not converted would not be ternary
    one_of(path, "modules_to_not_convert", how.get("modules_to_not_convert"), (None, [], ["lm_head"]))
    return one_of(path, "quantization_mode", how.get("quantization_mode", "offline"), ("online", "offline"))


def usual_head(path, about, config):
    """The width of a head, which must be that of the residual stream divided by the number of heads."""
    head_dim = config["n_embd"] // config["n_head"]
    if about.get("head_dim") not in (None, head_dim):
        refuse(path, "head_dim", about["head_dim"], f": only {head_dim}")
    return head_dim


MAMBA = {"d_state": "mamba_d_state", "d_conv": "mamba_d_conv", "expand": "mamba_expand"}


def jamba(path, about):
    plain = {"hidden_act": ("silu",), "num_experts": (1,), "output_router_logits": (False,),
             "mamba_conv_bias": (True,), "mamba_proj_bias": (False,)}
    used = {*MAMBA.values(), "mamba_dt_rank", "attn_layer_period", "attn_layer_offset"}
    harmless = {"num_experts_per_tok", "expert_layer_period", "expert_layer_offset", "router_aux_loss_coef",
                "use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep"}  # with one expert
    understood(path, about, used | harmless, plain, required=("num_experts", *used))
    config = common_settings(path, about) | shape(path, about, MAMBA) | {"ssm": "mamba1"}
    rank = about["mamba_dt_rank"]
    config["dt_rank"] = math.ceil(config["n_embd"] / 16) if rank == "auto" else number(path, "mamba_dt_rank", rank)
    period = number(path, "attn_layer_period", about["attn_layer_period"])
    offset = about["attn_layer_offset"]
    if type(offset) is not int or not 0 <= offset < period:
        refuse(path, "attn_layer_offset", offset)
    return config | {"attn_layer_period": period, "attn_layer_offset": offset}


def granite(path, about):
    plain = {"hidden_act": ("silu",), "num_local_experts": (0,), "output_router_logits": (False,),
             "attention_bias": (False,), "mamba_n_groups": (1,), "mamba_conv_bias": (True,),
             "mamba_proj_bias": (False,), "normalization_function": ("rmsnorm",),
             # transformers' two ways to write infinity into JSON
             "time_step_limit": ([0.0, {"__float__": "Infinity"}], [0.0, math.inf])}
    multipliers = {"embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"}
    used = {*MAMBA.values(), *multipliers, "shared_intermediate_size", "layer_types", "mamba_n_heads"}
    more = {"mamba_d_head", "mamba_chunk_size", "num_experts_per_tok", "router_aux_loss_coef", "init_method",
            "position_embedding_type"}
    understood(path, about, used | more, plain, required=("num_local_experts", *used))
    # every layer has the shared MLP; the key intermediate_size is about the experts, of which there are none
    about = about | {"intermediate_size": about["shared_intermediate_size"]}
    config = common_settings(path, about) | shape(path, about, MAMBA) | {"ssm": "mamba2"}
    for key in multipliers:
        number(path, key, about[key], float)
    heads = number(path, "mamba_n_heads", about["mamba_n_heads"])
    channels = config["expand"] * config["n_embd"]
    config["ssm_head_dim"] = channels // heads
    if channels % heads or about.get("mamba_d_head", "auto") not in ("auto", channels // heads):
        refuse(path, "mamba_d_head", about.get("mamba_d_head"))
    kind = one_of(path, "position_embedding_type", about.get("position_embedding_type"), (None, "nope", "rope"))
    config["rope"] = kind == "rope"
    if config["rope"]:
        config |= rope_from_hf(path, about, about["max_position_embeddings"])
    if not isinstance(about["layer_types"], list):
        refuse(path, "layer_types", about["layer_types"])
    is_attention = []
    for layer in about["layer_types"]:
        # transformers 5 calls a state space layer linear attention
        one_of(path, "layer_types", layer, ("attention", "full_attention", "mamba", "linear_attention"))
        is_attention.append(layer in ("attention", "full_attention"))
    return config | places(path, is_attention, config["n_layer"])


def places(path, is_attention, n_layer):
    """attn_layer_period and attn_layer_offset that give this list of layers; UserError where none do."""
    at = [i for i, attention in enumerate(is_attention) if attention]
    # with one attention layer, or none, the next would be behind the last layer
    offset = at[0] if at else n_layer
    period = at[1] - at[0] if len(at) > 1 else n_layer + 1
    again = [i % period == offset for i in range(n_layer)]
    if again != is_attention:
        refuse(path, "layer_types", is_attention, ": hybrid_ssm.py has attention at equal distances only")
    return {"attn_layer_period": period, "attn_layer_offset": offset}


def settle_hf(path, about, family, config, tensors):
    """Turn `tensors`, under our names, into those of the model file, in place."""
    if family == "granitemoehybrid":
        for name in [name for name in tensors if name.endswith("mlp.gate_proj.weight")]:
            gate, up = tensors[name].chunk(2)  # there one matrix, the gate's rows first
            tensors[name] = gate.clone()
            tensors[name.replace("gate_proj", "up_proj")] = up.clone()
        fold(about, config, tensors)
    if family != "bitnet":
        return
    mode = mode_of(path, about)
    check_embedding(path, tensors)
    if mode == "online":  # the weights that ternary.py trains, which it rounds itself
        return
    scales = {}  # {name of a matrix: the factor on it}
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        scale = tensors.pop(name).squeeze()
        # the other class divides by it
        divides = about["quantization_config"].get("linear_class", "bitlinear") == "bitlinear"
        scales[name.replace("weight_scale", "weight")] = 1 / scale if divides else scale
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        w = tensors.pop(name)
        if mode == "offline":
            if w.dtype != torch.uint8 or name not in scales:
                raise UserError(f"{path}: tensor {name} is not packed, although quantization_mode is offline")
            # row r holds the rows r, r + N / 4, r + N / 2 and r + 3 N / 4, low bits first, as 0, 1 and 2
            planes = [w >> shift & 3 for shift in (0, 2, 4, 6)]
            w = torch.cat(planes).float() - 1  # (N, K)
        pack(path, name, w, scales.get(name, torch.ones(())), tensors)


def fold(about, config, tensors):
    """Granite's multipliers go into the weights: no model file has them. A tied matrix becomes two."""
    embedding = about["embedding_multiplier"]
    logits = about["logits_scaling"]
    if embedding != 1 or logits != 1:
        head = tensors.get("head.weight", tensors["embed.weight"])
        config["tie_embeddings"] = False
        tensors["head.weight"] = head / logits
        tensors["embed.weight"] = tensors["embed.weight"] * embedding
    usual = (config["n_embd"] // config["n_head"]) ** -0.5  # what hybrid_ssm.py multiplies q k^T by
    for name in tensors:
        # what a layer adds to the residual stream is linear in its last matrix
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            tensors[name] = tensors[name] * about["residual_multiplier"]
        elif name.endswith("q_proj.weight") and about["attention_multiplier"] != usual:
            tensors[name] = tensors[name] * (about["attention_multiplier"] / usual)


# ---- BitNet's numbers
def check_embedding(path, tensors):
    embed = tensors["embed.weight"]
    if not (embed - embed.half().float()).abs().max() <= HALF_STEP:
        raise UserError(f"{path}: its embedding does not fit float16, in which ternary.py holds it")


def pack(path, name, w, factor, tensors):
    """Store a matrix w * factor of -s, 0 and s as the codes and the scale of a packed ternary.py.

    The rounding of activations, which BitNet is trained with, is part of that model, whatever the format leaves to the
    program that reads it.
    """
    scale = w.abs().max()
    t = (w / scale.clamp(min=1e-30)).round()
    if not (w - t * scale).abs().max() <= 1e-6 * scale or factor.numel() != 1:
        raise UserError(f"{path}: {name} does not hold -1, 0 and 1 times one scale: ternary.py cannot be that model")
    module = name.removesuffix(".weight")
    tensors[f"{module}.codes"] = ternary.pack(t)
    tensors[f"{module}.scales"] = scale * factor.reshape(())


# ---- GGUF
def from_gguf(path, values, arrays):
    """(model_type, settings) of a GGUF file whose architecture is in GGUF_NAMES."""
    arch = values["general.architecture"]
    where = f"{path}: {arch}"
    used = {*GGUF_KEYS.values(), "rope.dimension_count", "rope.freq_base"}
    plain = {"ssm.group_count": (1,), "expert_count": (0, 1), "expert_used_count": (0, 1), "attention.causal": (True,)}
    if arch == "bitnet":
        used |= {"hidden_activation"}
    else:
        # the scales are Granite's multipliers
        used |= {"ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "rope.scaling.finetuned",
                 "embedding_scale", "residual_scale", "logit_scale", "attention.scale"}
    about = gguf_keys(path, values, arch, used, plain)
    kv = about.get("attention.head_count_kv")
    if isinstance(kv, list):  # of each layer; 0 is Mamba
        about["attention.head_count_kv"] = max(kv, default=0)
    config = shape(where, about, GGUF_KEYS)
    theta = number(where, "rope.freq_base", about.get("rope.freq_base", 10000.0), float, 2**60)
    head_dim = config["n_embd"] // config["n_head"]
    if about.get("rope.dimension_count", head_dim) != head_dim:
        refuse(path, "rope.dimension_count", about["rope.dimension_count"], f": only {head_dim}")
    if arch == "bitnet":
        # llama.cpp computes SiLU in each, Microsoft's own are ReLU^2: a file that does not say is either
        one_of(where, "hidden_activation", about.get("hidden_activation"), ("silu",))
        return "bitnet", config | {"rope_theta": theta, "packed": True}
    config["tie_embeddings"] = "output.weight" not in arrays
    if not isinstance(kv, list) or len(kv) != config["n_layer"] or set(kv) - {0, config["n_kv_head"]}:
        refuse(path, "attention.head_count_kv", kv)
    config |= places(path, [n > 0 for n in kv], config["n_layer"])
    config["d_conv"] = number(where, "ssm.conv_kernel", about.get("ssm.conv_kernel"))
    config["d_state"] = number(where, "ssm.state_size", about.get("ssm.state_size"))
    if about.get("ssm.inner_size") != 2 * config["n_embd"]:  # llama.cpp's own rule
        refuse(path, "ssm.inner_size", about.get("ssm.inner_size"), f": only {2 * config['n_embd']}")
    rank = number(where, "ssm.time_step_rank", about.get("ssm.time_step_rank"))
    if arch == "jamba":
        for key in ("embedding_scale", "residual_scale", "logit_scale", "attention.scale", "rope.scaling.finetuned"):
            if key in about:
                refuse(path, key, about[key])
        return "jamba", config | {"ssm": "mamba1", "dt_rank": rank}
    if 2 * config["n_embd"] % rank:
        refuse(path, "ssm.time_step_rank", rank)
    # llama.cpp's use of this key: whether there is RoPE at all
    config["rope"] = about.get("rope.scaling.finetuned", True)
    return "granitemoehybrid", config | {"ssm": "mamba2", "ssm_head_dim": 2 * config["n_embd"] // rank,
                                         "rope_theta": theta}


def rename_gguf(family, tensors):
    """{llama.cpp's name: float32 tensor} under our names, a scale as NAME.scale; KeyError with a name that has none."""
    found = {}
    for name, tensor in tensors.items():
        scale = name.endswith(".scale")
        ours = names.rename(name.replace(".scale", ".weight"), names.LLAMA_CPP, names.OURS, family)
        if ours is None:
            raise KeyError(name)
        found[ours.replace(".weight", ".scale") if scale else ours] = tensor
    return found


def settle_gguf(path, values, family, config, tensors):
    """Turn `tensors`, under our names, into those of the model file, in place."""
    if family == "bitnet":
        check_embedding(path, tensors)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            factor = tensors.pop(name.replace(".weight", ".scale"), torch.ones(()))
            pack(path, name, tensors.pop(name), factor, tensors)
        return
    for name, tensor in tensors.items():
        if name.endswith("A_log"):
            tensor = (-tensor).log()  # llama.cpp stores A itself
        if name.endswith("conv1d.weight"):
            tensor = tensor[:, None]  # (E, 1, k)
        if family == "granitemoehybrid" and name.endswith(("A_log", ".D")):
            tensor = tensor.flatten()
        turned = {"q_proj": config["n_head"], "k_proj": config["n_kv_head"]}.get(name.split(".")[-2])
        # Granite turns other pairs there, as Llama does
        if family == "granitemoehybrid" and config["rope"] and turned and tensor.size(0) % (2 * turned) == 0:
            tensor = names.permute(tensor, turned, back=True)
        tensors[name] = tensor.contiguous()
    if family == "granitemoehybrid":
        usual = (config["n_embd"] // config["n_head"]) ** -0.5
        multipliers = {}
        for theirs, key, default in (("embedding_multiplier", "embedding_scale", 1),
                                     ("residual_multiplier", "residual_scale", 1), ("logits_scaling", "logit_scale", 1),
                                     ("attention_multiplier", "attention.scale", usual)):
            # llama.cpp takes 0 for none, too
            multipliers[theirs] = values.get(f"granitehybrid.{key}") or default
        fold(multipliers, config, tensors)
