"""What a model made elsewhere is here: config.json or the metadata of a GGUF file -> settings of a model file.

Only what is understood is read. Every key must be used here or known to change nothing; any other refuses, since a
setting that is passed over would make another model without a word.
"""
import importlib
import math
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np

from formats import names
from thimble import checkpoint, configurator
from thimble.files import UserError

# ---- numbers
# far beyond any model that exists; without them a damaged file could ask for any amount of memory
LIMITS = {"n_layer": 1000, "vocab_size": 2**24, "block_size": 2**28}
MOST = 2**60  # of a float


def number(where, name, value, kind=int, limit=2**20):
    """`value` if it is an int, or a float where `kind` says so, above 0 and below `limit`; else UserError."""
    if type(value) not in (int, kind) or not 0 < value < limit:
        raise UserError(f"{where}: {name} is {str(value)[:40]!r}, not a number in its range")
    return float(value) if kind is float else value


def shape(where, about, keys):
    """{setting of ours: number} for `keys`, {setting of ours: key of theirs}; UserError where one is out of range."""
    config = {}
    for ours, theirs in keys.items():
        value = about.get(theirs)
        if ours == "n_kv_head":  # may be left out: then as many as queries
            value = config["n_head"] if value is None else value
        kind = float if ours == "norm_eps" else int
        config[ours] = number(where, theirs, value, kind, LIMITS.get(ours, 2**20))
    return config


def at_least_1(where, name, theta):
    """The base of RoPE: below 1 its pairs would turn many times per token, where float32 decides what comes out."""
    if theta < 1:
        refuse(where, name, theta)
    return theta


def refuse(where, key, value, remedy=""):
    raise UserError(f"{where} has {key}={str(value)[:60]}, which cannot be read{remedy}")


def one_of(where, key, value, allowed):
    """`value` if it is one of `allowed`."""
    if value not in allowed:
        refuse(where, key, value, f": only {', '.join(map(str, allowed))}")
    return value


# ---- config.json
FAMILY = ("llama", "mistral", "qwen2", "qwen3")
KEYS = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "n_hidden": "intermediate_size",
        "block_size": "max_position_embeddings", "norm_eps": "rms_norm_eps"}
USED = {*KEYS.values(), "model_type", "architectures", "tie_word_embeddings", "rope_theta", "rope_scaling",
        "rope_parameters", "bos_token_id", "eos_token_id"}
# of training, of programs and of their versions
HARMLESS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "initializer_range",
            "attention_dropout", "pad_token_id", "pretraining_tp", "is_llama_config", "max_sequence_length",
            "transformers.js_config", "_attn_implementation", "_attn_implementation_autoset", "unsloth_fixed",
            "unsloth_version"}
# what could change what is computed, with the values that do not
PLAIN = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "rope_interleaved": (False,),
         "use_mrope": (False,), "partial_rotary_factor": (1.0,)}
SLIDING = {"mistral": {"sliding_window"},
           "qwen2": {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"},
           "qwen3": {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}}
# keys of RoPE's own settings, by its type
ROPE = {"default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
        "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}}
PLAIN_ROPE = {"partial_rotary_factor": (1.0,), "truncate": (True,)}


def understood(path, about, used, plain, required=()):
    """UserError unless every key of config.json is in `used`, in `plain` with one of its values, or always harmless."""
    family = about["model_type"]
    if about.get("architectures") not in (None, [names.CLASSES[family]]):
        refuse(path, "architectures", about["architectures"], f": only {names.CLASSES[family]}")
    for key, value in about.items():
        if value is None or key in USED or key in HARMLESS or key in used:
            continue
        if value not in plain.get(key, ()):
            refuse(path, key, value, f": only {plain[key][0]}" if plain.get(key) else "")
    for key in required:
        if about.get(key) is None:
            refuse(path, key, "nothing")


def common_settings(path, about):
    """Settings of what all the architectures have."""
    config = shape(path, about, KEYS)
    if "num_key_value_heads" not in about and about["model_type"] != "llama":
        refuse(path, "num_key_value_heads", "nothing")  # transformers takes 8 or 32 for granted
    tied = about.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        refuse(path, "tie_word_embeddings", tied)
    return config | {"tie_embeddings": tied}


def from_hf(path, about):
    """(model_type, settings of llama.Config) of what config.json at `path` says; UserError unless all is understood."""
    family = about["model_type"]
    understood(path, about, SLIDING.get(family, set()) | {"head_dim"}, PLAIN)
    config = common_settings(path, about)
    if about.get("head_dim") is not None:
        config["head_dim"] = number(path, "head_dim", about["head_dim"])
    elif family == "qwen3":
        refuse(path, "head_dim", "nothing")  # transformers takes 128 for granted
    # no key says so: the class has them
    config["qkv_bias"] = family == "qwen2"
    config["qk_norm"] = family == "qwen3"
    config |= rope_from_hf(path, about, config["block_size"])
    return family, config | window_from_hf(path, about, config)


def rope_from_hf(path, about, block_size):
    """Settings of RoPE: transformers 5 has rope_parameters, before it there were rope_theta and rope_scaling."""
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        if about.get(key) not in (None, {}):
            found.append(one_rope(path, key, about[key], about, block_size))
    if not found:
        found.append(one_rope(path, "rope_parameters", {}, about, block_size))
    if found[0] != found[-1]:
        refuse(path, "rope_scaling", about["rope_scaling"], " beside another rope_parameters: remove one of the two")
    return found[0]


def one_rope(path, where, rope, about, block_size):
    """Settings of RoPE from rope_parameters or rope_scaling; `where` says which."""
    if not isinstance(rope, dict):
        refuse(path, where, rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if type(kind) is not str or kind not in ROPE or rope.get("type", kind) != kind:
        refuse(path, where, rope, f": only RoPE of type {', '.join(ROPE)}")
    for key, value in rope.items():
        used = key in ROPE[kind] or key in ("rope_type", "type", "rope_theta")
        if value is not None and not used and value not in PLAIN_ROPE.get(key, ()):
            refuse(path, f"{where}.{key}", value, f" with RoPE of type {kind}")
    # of two bases transformers 4 took this one, transformers 5 takes the other
    theta = about.get("rope_theta", 10000.0)
    if rope.get("rope_theta", theta) != theta and "rope_theta" in about:
        refuse(path, "rope_theta", theta, f" beside another one in {where}: remove one of the two")

    def value(key, default=None, kind=float):
        given = rope.get(key)
        return number(path, f"{where}.{key}", default if given is None else given, kind, MOST)

    config = {"rope_theta": at_least_1(path, "rope_theta", value("rope_theta", theta))}
    if kind == "default":
        return config
    config |= {"rope_type": kind, "rope_factor": value("factor")}
    if kind == "linear":
        return config
    config["rope_context"] = value("original_max_position_embeddings", block_size, int)
    if kind == "llama3":
        return config | {"rope_low": value("low_freq_factor"), "rope_high": value("high_freq_factor")}
    gain = value("attention_factor", yarn_gain(config["rope_factor"]))
    return config | {"rope_low": value("beta_slow", 1.0), "rope_high": value("beta_fast", 32.0), "rope_gain": gain}


def yarn_gain(factor):
    """The factor on queries and keys that YaRN suggests (Peng et al. 2023, eq. 22)."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def window_from_hf(path, about, config):
    """Settings of the sliding window, {} where there is none or where it holds the longest context."""
    size = None
    first = 0
    if about["model_type"] == "mistral":
        size = about.get("sliding_window", 4096)  # transformers takes that for granted
    elif about.get("use_sliding_window"):
        size = about.get("sliding_window", 4096)
        first = about.get("max_window_layers", 28)
    if size is None:
        first = config["n_layer"]
    else:
        number(path, "sliding_window", size, limit=MOST)
        if type(first) is not int or first < 0:
            refuse(path, "max_window_layers", first)
    # a list of the same, which transformers writes besides
    kinds = [("full" if i < first else "sliding") + "_attention" for i in range(config["n_layer"])]
    if about.get("layer_types") not in (None, kinds):
        refuse(path, "layer_types", about["layer_types"], " with this sliding_window")
    if size is None or size >= config["block_size"] or first >= config["n_layer"]:
        return {}
    return {"window": size, "window_from": first}


# ---- GGUF
ARCHITECTURES = ("llama", "qwen2", "qwen3")
GGUF_KEYS = {"vocab_size": "vocab_size", "n_layer": "block_count", "n_head": "attention.head_count",
             "n_kv_head": "attention.head_count_kv", "n_embd": "embedding_length", "n_hidden": "feed_forward_length",
             "block_size": "context_length", "norm_eps": "attention.layer_norm_rms_epsilon"}
GGUF_USED = {*GGUF_KEYS.values(), "attention.key_length", "attention.value_length", "rope.dimension_count",
             "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
             "rope.scaling.original_context_length", "rope.scaling.finetuned"}
# what could change what llama.cpp computes, with the values that do not
GGUF_PLAIN = {"attention.causal": (True,), "expert_count": (0,), "expert_used_count": (0,),
              "rope.scaling.attn_factor": (1.0,), "rope.scaling.yarn_beta_fast": (32.0,),
              "rope.scaling.yarn_beta_slow": (1.0,), "rope.scaling.yarn_attn_factor": (1.0,),
              "tensor_data_layout": ("Meta AI original pth",)}


def gguf_keys(path, values, arch, used, plain):
    """{key without its architecture: value}; UserError unless each is in `used` or, with that value, in `plain`."""
    if values.get("general.type", "model") != "model":
        refuse(path, "general.type", values["general.type"], ": only whole models")
    if values.get("split.count", 1) not in (0, 1):
        refuse(path, "split.count", values["split.count"], ": join the parts with llama-gguf-split --merge")
    about = {}
    for key, value in values.items():
        if not key.startswith(f"{arch}."):
            continue
        key = key.removeprefix(f"{arch}.")
        if key not in used and value not in plain.get(key, ()):
            refuse(path, f"{arch}.{key}", value)
        # a float32: 9.99999974e-06
        about[key] = float(f"{value:.7g}") if isinstance(value, float) else value
    # older files leave it to the list of tokens
    about.setdefault("vocab_size", len(values.get("tokenizer.ggml.tokens", ())))
    return about


def from_gguf(path, values, arrays):
    """(architecture, settings of llama.Config) of a GGUF file's metadata `values`; UserError unless all is understood.

    arrays: {name of a tensor: function that returns it}.
    """
    family = values["general.architecture"]
    about = gguf_keys(path, values, family, GGUF_USED, GGUF_PLAIN)
    where = f"{path}: {family}"
    config = shape(where, about, GGUF_KEYS)
    # llama.cpp knows heads of one width only, all of which turns
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        given = about.get(key, config["n_embd"] // config["n_head"])
        if given != config.setdefault("head_dim", given):
            refuse(path, f"{family}.{key}", given, f" with heads of {config['head_dim']}")
    number(where, "attention.key_length", config["head_dim"])
    config["tie_embeddings"] = "output.weight" not in arrays
    config["qkv_bias"] = "blk.0.attn_q.bias" in arrays
    config["qk_norm"] = "blk.0.attn_q_norm.weight" in arrays
    config |= rope_from_gguf(where, about, config["block_size"])
    if "rope_freqs.weight" in arrays:
        if "rope_type" in config:
            refuse(path, "rope_freqs.weight", "a tensor", " beside rope.scaling")
        config |= llama3_from_factors(path, arrays["rope_freqs.weight"](), config)
    return family, config


def rope_from_gguf(where, about, block_size):
    """Settings of RoPE, as llama.cpp reads them: a factor without a type is linear."""
    theta = number(where, "rope.freq_base", about.get("rope.freq_base", 10000.0), float, MOST)
    at_least_1(where, "rope.freq_base", theta)
    factor = about.get("rope.scaling.factor", about.get("rope.scale_linear", 0.0))
    kind = about.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return {"rope_theta": theta}
    factor = number(where, "rope.scaling.factor", factor, float)
    config = {"rope_theta": theta, "rope_type": kind, "rope_factor": factor}
    if kind == "linear":
        return config
    if kind != "yarn":
        refuse(where, "rope.scaling.type", kind, ": only none, linear, yarn")
    context = about.get("rope.scaling.original_context_length", block_size)
    config["rope_context"] = number(where, "rope.scaling.original_context_length", context, limit=MOST)
    return config | {"rope_low": 1.0, "rope_high": 32.0, "rope_gain": yarn_gain(config["rope_factor"])}


def llama3_from_factors(path, factors, config):
    """Llama 3.1's settings of RoPE that give `factors` (D/2,), by which a GGUF file divides the speed of each pair.

    Where a pair is stretched in part, the share that it keeps is linear in the turns that it makes over the context:
    (L turns - low) / (high - low). With low = 1, as in all models, slope and offset of that line give the rest.
    """
    factors = np.asarray(factors, np.float64).ravel()
    D = config["head_dim"]
    if len(factors) != D // 2 or not np.isfinite(factors).all() or factors.min() < 1:
        refuse(path, "rope_freqs.weight", f"{len(factors)} factors")
    turns = config["rope_theta"] ** (-np.arange(0, D, 2) / D) / (2 * math.pi)  # per token
    factor = float(f"{factors.max():.7g}")
    if factor == 1:
        return {}
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    partly = (kept > 1e-3) & (kept < 1 - 1e-3)
    context, high = 8192, 4.0  # those of all models so far, where the pairs do not tell
    if partly.sum() > 1:
        slope, offset = np.polyfit(turns[partly], kept[partly], 1)
        context = round(-slope / offset)
        high = float(f"{1 - 1 / offset:.5g}")
    found = {"rope_type": "llama3", "rope_factor": factor, "rope_context": context, "rope_low": 1.0, "rope_high": high}
    again = factors_of_llama3(SimpleNamespace(**config | found))
    if not np.abs(again / factors - 1).max() < 1e-5:
        refuse(path, "rope_freqs.weight", "factors", ": only those of Llama 3.1's formula")
    return found


def factors_of_llama3(config):
    """The factors (D/2,) in float32 by which llama.cpp divides the speed of each pair."""
    D = config.head_dim or config.n_embd // config.n_head
    turns = config.rope_theta ** (-np.arange(0, D, 2) / D) / (2 * math.pi)  # per token
    kept = (config.rope_context * turns - config.rope_low) / (config.rope_high - config.rope_low)
    kept = kept.clip(0, 1)
    return (1 / (kept + (1 - kept) / config.rope_factor)).astype(np.float32)


# ---- both
def as_checkpoint(path, config, tensors, arch=None):
    """The Checkpoint of weights made elsewhere, for the model file `arch`.

    Without one: of model.py where its Config can say all of it, else of llama.py.
    """
    module = importlib.import_module(arch or "llama")
    if config.get("head_dim", 0) * config["n_head"] == config["n_embd"]:
        del config["head_dim"]  # the default
    defaults = {field.name: field.default for field in fields(module.Config)}
    config = {key: value for key, value in config.items() if value != defaults.get(key, ...)}
    plain = importlib.import_module("model")
    if not arch and config.keys() <= {field.name for field in fields(plain.Config)}:
        module = plain
    try:
        config = configurator.from_flat(module.Config, config)
    except ValueError as error:
        raise UserError(f"{path}: {module.__name__}.py cannot express what it describes ({error})") from None
    meta = {"arch": module.__name__, "model_config": asdict(config), "step": 0, "name": path.stem}
    return checkpoint.Checkpoint(path, meta, tensors, None)
