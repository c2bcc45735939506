"""The stock architectures once more, from their published definitions alone, to compare a model with.

    >>> stock_architecture(model)
    ('llama', '')

Programs elsewhere compute one of these, whatever a model file says by now. So a model is called by such a name
only after its own forward gave the same logits. Nothing here imports a model file.

Legend: B batch, T tokens, C width, H query heads, K key/value heads, D head size; in Mamba E channels, each with N
numbers of state, and in Mamba-2 G heads of E / G channels.
"""
import contextlib
import copy
import math

import torch
import torch.nn.functional as F

from formats import names
from formats.weights import product, ternary_parts, weights
from thimble.files import short


# ---- the architectures: {name in Hugging Face: tensor}, emptied as it is used; config.json -> logits (B, T, V)
def rms_norm(x, weight, eps):
    """Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4."""
    mean = x.square().mean(-1, keepdim=True)
    return x / (mean + eps).sqrt() * weight


def rope_freqs(rope, D):
    """rope_parameters of config.json -> radians per token of each pair, (D/2,) in float64."""
    theta = rope["rope_theta"]
    freqs = []
    for i in range(D // 2):
        freq = theta ** (-2 * i / D)
        factor = rope.get("factor", 1.0)
        if rope["rope_type"] == "linear":  # Chen et al. 2023, "Positional Interpolation", eq. 4
            freq /= factor
        elif rope["rope_type"] == "llama3":  # Meta's own code for Llama 3.1, `apply_scaling`
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
            if turns < low:
                freq /= factor
            elif turns < high:
                smooth = (turns - low) / (high - low)
                freq *= (1 - smooth) / factor + smooth
        elif rope["rope_type"] == "yarn":  # Peng et al. 2023, "YaRN", section 3.2, with bounds in whole pairs
            bounds = []
            for turns in (rope["beta_fast"], rope["beta_slow"]):
                wavelength = rope["original_max_position_embeddings"] / turns
                bounds.append(D * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta)))
            low = max(math.floor(bounds[0]), 0)
            high = min(math.ceil(bounds[1]), D - 1)
            ramp = min(max((i - low) / max(high - low, 0.001), 0), 1)
            freq *= ramp / factor + 1 - ramp
        freqs.append(freq)
    return torch.tensor(freqs, dtype=torch.float64)


def rotary(x, rope):
    """Su et al. 2021, "RoFormer", eq. 34, with x_i and x_{i + D/2} as a pair (GPT-NeoX). x: (B, T, heads, D)."""
    T = x.size(1)
    D = x.size(-1)
    freqs = rope_freqs(rope, D).to(x.dtype)
    positions = torch.arange(T, dtype=x.dtype)
    angles = positions[:, None, None] * freqs  # (T, 1, D/2)
    gain = rope.get("attention_factor", 1.0)  # YaRN's
    cos = angles.cos() * gain
    sin = angles.sin() * gain
    one, other = x.chunk(2, -1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), -1)


def attention(w, prefix, config, x, linear=F.linear, window=None):
    """Vaswani et al. 2017, causal; grouped queries after Ainslie et al. 2023. Jamba has no rotary embedding.

    Qwen3 has a norm on each head of queries and keys (Yang et al. 2025, "Qwen3 Technical Report", section 2), Qwen2 a
    bias (Yang et al. 2024, section 2.2), Mistral sees `window` tokens (Jiang et al. 2023, "Mistral 7B", section 2).
    """
    B, T, C = x.shape
    H = config["num_attention_heads"]
    K = config["num_key_value_heads"]
    q = linear(x, w.pop(prefix + "q_proj.weight"))
    k = linear(x, w.pop(prefix + "k_proj.weight"))
    v = linear(x, w.pop(prefix + "v_proj.weight"))
    if config["model_type"] == "qwen2":
        q = q + w.pop(prefix + "q_proj.bias")
        k = k + w.pop(prefix + "k_proj.bias")
        v = v + w.pop(prefix + "v_proj.bias")
    q = q.view(B, T, H, -1)
    k = k.view(B, T, K, -1)
    v = v.view(B, T, K, -1)
    if config["model_type"] == "qwen3":
        q = rms_norm(q, w.pop(prefix + "q_norm.weight"), config["rms_norm_eps"])
        k = rms_norm(k, w.pop(prefix + "k_norm.weight"), config["rms_norm_eps"])
    if "rope_parameters" in config:
        q = rotary(q, config["rope_parameters"])
        k = rotary(k, config["rope_parameters"])
    k = k.repeat_interleave(H // K, 2)  # (B, T, H, D)
    v = v.repeat_interleave(H // K, 2)
    scale = config.get("attention_multiplier", 1 / math.sqrt(q.size(-1)))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)  # the future
    if window is not None:
        hidden |= torch.ones(T, T, dtype=torch.bool).tril(-window)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)  # (B, H, T, T)
    y = torch.einsum("bhts,bshd->bthd", weights, v).reshape(B, T, -1)
    if config["model_type"] == "bitnet":
        y = rms_norm(y, w.pop(prefix + "attn_sub_norm.weight"), config["rms_norm_eps"])
    return linear(y, w.pop(prefix + "o_proj.weight"))


def activated(config, x):
    act = config["hidden_act"]
    if act == "relu2":
        return F.relu(x).square()
    if act == "gelu":
        return F.gelu(x)
    return F.silu(x)


def mlp(w, prefix, config, x, linear=F.linear):
    """Shazeer 2020, "GLU variants": down(act(gate(x)) * up(x)); BitNet b1.58 2B4T has a norm before `down`.

    Arcee has no gate: down(act(up(x))).
    """
    y = linear(x, w.pop(prefix + "up_proj.weight"))
    if config["model_type"] == "arcee":
        y = activated(config, y)
    else:
        y = activated(config, linear(x, w.pop(prefix + "gate_proj.weight"))) * y
    if config["model_type"] == "bitnet":
        y = rms_norm(y, w.pop(prefix + "ffn_sub_norm.weight"), config["rms_norm_eps"])
    return linear(y, w.pop(prefix + "down_proj.weight"))


def convolution(w, prefix, u):
    """u (B, T, E) -> silu of its convolution, each channel by itself; causal: it sees this token and those before."""
    kernel = w.pop(prefix + "conv1d.weight")  # (E, 1, k)
    bias = w.pop(prefix + "conv1d.bias")
    u = F.pad(u.mT, (kernel.size(-1) - 1, 0))
    u = F.conv1d(u, kernel, bias, groups=len(kernel))
    return F.silu(u).mT  # (B, T, E)


def recurrence(u, dt, a, b, c):
    """u, dt (B, T, E), b, c (B, T, N), a (E, N) or (E, 1) -> y (B, T, E), one token at a time: nothing to get wrong."""
    h = 0
    ys = []
    for t in range(u.size(1)):
        decay = (dt[:, t, :, None] * a).exp()  # (B, E, N or 1)
        new = (dt * u)[:, t, :, None] * b[:, t, None]  # (B, E, N)
        h = decay * h + new
        y = (h * c[:, t, None]).sum(-1)  # (B, E)
        ys.append(y)
    return torch.stack(ys, 1)


def mamba(w, prefix, config, x):
    """Gu & Dao 2023, "Mamba", algorithm 2, with the norms on dt, B and C of Lieber et al. 2024, "Jamba"."""
    eps = config["rms_norm_eps"]
    N = config["mamba_d_state"]
    rank = config["mamba_dt_rank"]
    u, z = F.linear(x, w.pop(prefix + "in_proj.weight")).chunk(2, -1)  # (B, T, E)
    u = convolution(w, prefix, u)
    projected = F.linear(u, w.pop(prefix + "x_proj.weight"))
    dt, b, c = projected.split((rank, N, N), -1)
    dt = rms_norm(dt, w.pop(prefix + "dt_layernorm.weight"), eps)
    b = rms_norm(b, w.pop(prefix + "b_layernorm.weight"), eps)
    c = rms_norm(c, w.pop(prefix + "c_layernorm.weight"), eps)
    dt = F.linear(dt, w.pop(prefix + "dt_proj.weight"), w.pop(prefix + "dt_proj.bias"))
    dt = F.softplus(dt)  # (B, T, E)
    a = -w.pop(prefix + "A_log").exp()  # (E, N)
    y = recurrence(u, dt, a, b, c) + u * w.pop(prefix + "D")
    y = y * F.silu(z)
    return F.linear(y, w.pop(prefix + "out_proj.weight"))


def mamba2(w, prefix, config, x):
    """Dao & Gu 2024, "Transformers are SSMs", section 7, with one group of b and c, and the gate before the norm."""
    E = config["mamba_expand"] * config["hidden_size"]
    N = config["mamba_d_state"]
    G = config["mamba_n_heads"]
    z, u, dt = F.linear(x, w.pop(prefix + "in_proj.weight")).split((E, E + 2 * N, G), -1)
    u, b, c = convolution(w, prefix, u).split((E, N, N), -1)
    dt = F.softplus(dt + w.pop(prefix + "dt_bias"))  # (B, T, G)
    a = -w.pop(prefix + "A_log").exp()  # (G)
    skip = w.pop(prefix + "D")
    # one step size, decay and skip for all channels of a head
    dt = dt.repeat_interleave(E // G, -1)  # (B, T, E)
    a = a.repeat_interleave(E // G)[:, None]  # (E, 1)
    skip = skip.repeat_interleave(E // G)
    y = recurrence(u, dt, a, b, c) + u * skip
    y = rms_norm(y * F.silu(z), w.pop(prefix + "norm.weight"), config["rms_norm_eps"])
    return F.linear(y, w.pop(prefix + "out_proj.weight"))


def llama(w, config, ids, linear=F.linear):
    """Touvron et al. 2023, "LLaMA", section 2.2; names and layout as in transformers' LlamaForCausalLM.

    Mistral, Qwen2, Qwen3, Arcee and BitNet differ from it within attention and MLP only.
    """
    eps = config["rms_norm_eps"]
    embedding = w.pop("model.embed_tokens.weight")  # and the head, if the two are tied
    x = embedding[ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        y = rms_norm(x, w.pop(layer + "input_layernorm.weight"), eps)
        window = config.get("sliding_window") if i >= config.get("max_window_layers", 0) else None
        x = x + attention(w, layer + "self_attn.", config, y, linear, window)
        y = rms_norm(x, w.pop(layer + "post_attention_layernorm.weight"), eps)
        x = x + mlp(w, layer + "mlp.", config, y, linear)
    x = rms_norm(x, w.pop("model.norm.weight"), eps)
    return F.linear(x, w.pop("lm_head.weight", embedding))


def bitnet(w, config, ids):
    """Ma et al. 2024, "The Era of 1-bit LLMs", section 2: Llama with rounded weights (-1, 0, 1) and activations."""
    online = config["quantization_config"]["quantization_mode"] == "online"

    def linear(x, weight):
        if online:  # else the weights are rounded already
            # in float32, as every program does it: 0.5 must fall to the same side everywhere
            weight = weight.float()
            scale = weight.abs().mean().clamp(min=1e-5)
            t = (weight / scale).round().clamp(-1, 1)
            weight = (t.double() * scale).to(x.dtype)
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        q = (x * scale).round().clamp(-128, 127)
        return F.linear(q / scale, weight)

    return llama(w, config, ids, linear)


def jamba(w, config, ids):
    """Lieber et al. 2024, "Jamba", section 2, without experts; names as in transformers' JambaForCausalLM."""
    eps = config["rms_norm_eps"]
    embedding = w.pop("model.embed_tokens.weight")  # and the head, if the two are tied
    x = embedding[ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        y = rms_norm(x, w.pop(layer + "input_layernorm.weight"), eps)
        if i % config["attn_layer_period"] == config["attn_layer_offset"]:
            x = x + attention(w, layer + "self_attn.", config, y)
        else:
            x = x + mamba(w, layer + "mamba.", config, y)
        y = rms_norm(x, w.pop(layer + "pre_ff_layernorm.weight"), eps)
        x = x + mlp(w, layer + "feed_forward.", config, y)
    x = rms_norm(x, w.pop("model.final_layernorm.weight"), eps)
    return F.linear(x, w.pop("lm_head.weight", embedding))


def granite(w, config, ids):
    """IBM 2025, "Granite 4.0", without experts: Mamba-2 or attention, then an MLP; all of its multipliers are 1 here.

    Names as in transformers' GraniteMoeHybridForCausalLM, which holds an MLP's gate and `up` in one matrix.
    """
    eps = config["rms_norm_eps"]
    embedding = w.pop("model.embed_tokens.weight")  # and the head, if the two are tied
    x = embedding[ids]
    for i, kind in enumerate(config["layer_types"]):
        layer = f"model.layers.{i}."
        y = rms_norm(x, w.pop(layer + "input_layernorm.weight"), eps)
        if kind == "attention":
            x = x + attention(w, layer + "self_attn.", config, y)
        else:
            x = x + mamba2(w, layer + "mamba.", config, y)
        y = rms_norm(x, w.pop(layer + "post_attention_layernorm.weight"), eps)
        gate, up = F.linear(y, w.pop(layer + "shared_mlp.input_linear.weight")).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, w.pop(layer + "shared_mlp.output_linear.weight"))
    x = rms_norm(x, w.pop("model.norm.weight"), eps)
    return F.linear(x, w.pop("lm_head.weight", embedding))


# ---- a model beside them
FORWARD = {"llama": llama, "mistral": llama, "qwen2": llama, "qwen3": llama, "arcee": llama, "bitnet": bitnet,
           "jamba": jamba, "granitemoehybrid": granite}
TITLES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "arcee": "Arcee",
          "bitnet": "BitNet", "jamba": "Jamba", "granitemoehybrid": "GraniteMoeHybrid"}
# Largest difference of two logits, over the largest logit. In float64 two ways to compute the same differ by 1e-14,
# what a model returns in float32 by 1e-7; the least change of a formula shows in the second or third digit.
SAME = 1e-6
MOST_TOKENS = 1024  # of the row that is compared: beyond it a model is taken at its word
MOST_LOGITS = 2**24  # of that row, which is shorter where the vocabulary is large
MOST_WORK = 2**34  # multiply-adds of a forward, that is parameters times tokens: some ten seconds of one core
# settings of our model files that leave the stock architectures, with the values at which they do not
EXTRAS = {"qk_norm": False, "n_streams": 1, "group_size": 0, "sub_norm": True, "rope": False}
ALLOWED = {"qwen3": "qk_norm", "granitemoehybrid": "rope"}  # the one of these that an architecture does have


def some_ids(model):
    """(1, T) random ids: a whole context if the limits above allow: a sliding window shows only beyond its width."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    affordable = min(MOST_TOKENS, MOST_LOGITS // config.vocab_size, MOST_WORK // max(1, parameters))
    n = min(config.block_size, max(16, affordable))
    return torch.randint(config.vocab_size, (1, n), generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def in_float64():
    """Make float64 the dtype of what a forward makes itself, such as RoPE's table."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def widened(model):
    """A copy in float64, where no rounding hides a difference, with gains that differ from 1.

    While all gains are 1, the first token's activations are integers times one factor. Some then lie at exactly half of
    a rounding step, and a last bit decides: an untrained ternary model would seem to be another architecture.
    """
    wide = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    for p in wide.parameters():
        if p.dim() == 1:
            p *= 1 + 0.01 * torch.rand(p.shape, generator=generator, dtype=p.dtype)
    return wide


@torch.no_grad()
def own_logits(wide, ids):
    """ids (B, T) -> (B, T, V), by the own forward of a `widened` model."""
    with in_float64():
        return wide(ids)[0].double()


def differs(ours, theirs):
    """Whether two tensors of logits are further apart than rounding explains; NaN is."""
    gap = (ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30)
    return not gap <= SAME


def stock_tensors(wide, stock):
    """{name in Hugging Face: tensor} of a `widened` model; KeyError with our name of one that has none there."""
    tensors = weights(wide)
    for name, (t, scale) in ternary_parts(wide).items():
        if scale.dim():  # every format has one scale a matrix
            raise KeyError(f"{name}.weight (with a scale for each group)")
        if tensors.pop(f"{name}.codes", None) is not None:  # packed
            del tensors[f"{name}.scales"]
            tensors[f"{name}.weight"] = product(t, scale)
    found = names.to_hugging_face(tensors, stock)
    return {name: tensor.double() for name, tensor in found.items()}


def likely_stock(tensors, config):
    """The architecture to try first, and last, for a model with tensors of these names."""
    if any(name.endswith("dt_bias") for name in tensors):
        return "granitemoehybrid"
    if any(name.endswith("A_log") for name in tensors):
        return "jamba"
    if any("sub_norm" in name for name in tensors):
        return "bitnet"
    if any("up_proj" in name for name in tensors) and not any("gate_proj" in name for name in tensors):
        return "arcee"
    if any("q_norm" in name for name in tensors):
        return "qwen3"
    if any(name.endswith("q_proj.bias") for name in tensors):
        return "qwen2"
    return "mistral" if getattr(config, "window", 0) else "llama"


@torch.no_grad()
def stock_architecture(model):
    """(a key of names.CLASSES, "") if that architecture computes what this model does, else ("", why not).

    The names of its tensors say which one to try; random ids decide.
    """
    config = model.config
    stock = likely_stock(model.state_dict(), config)
    why = ""
    try:
        wide = widened(model)
        theirs = stock_tensors(wide, stock)
        about = names.hf_config(model, stock)
        # transformers' words for weights that are rounded already, and for those rounded at each forward
        mode = "offline" if getattr(config, "packed", False) else "online"
        about["quantization_config"] = {"quantization_mode": mode}
        ids = some_ids(model)
        logits = FORWARD[stock](theirs, about, ids)
        if theirs:  # a tensor for which the architecture has no use
            raise KeyError(next(iter(theirs)))
        if differs(own_logits(wide, ids), logits):
            why = f"it computes something other than {TITLES[stock]}"
    except KeyError as error:
        why = f"its tensors are not those of {TITLES[stock]}: {error.args[0]}"
    except Exception as error:  # a fork may lack anything, or fail in float64
        why = f"it cannot be compared with {TITLES[stock]}: {short(error, 100)}"
    if not why:
        return stock, ""
    for key, value in EXTRAS.items():  # the better reason, where there is one
        if key != ALLOWED.get(stock) and getattr(config, key, value) != value:
            return "", f"{key}={getattr(config, key)}"
    return "", why
