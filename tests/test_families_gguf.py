"""GGUF files made elsewhere: the Llama family beside llama.cpp and transformers, every number format, and lies."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from formats import families
from formats import gguf as gguf_format
from formats.check import LlamaCpp
from thimble import checkpoint, load
from thimble.files import UserError
from thimble.tokenizer import byte_tokenizer

gguf = pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")

V = 257  # of the byte tokenizer
SHAPE = {"vocab_size": V, "embedding_length": 32, "feed_forward_length": 48, "block_count": 2, "context_length": 64,
         "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
         "rope.dimension_count": 8, "rope.freq_base": 100.0}
WIDE = {"rope.dimension_count": 12, "attention.key_length": 12, "attention.value_length": 12}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 40}
# name: (architecture, metadata of it, with the factors of Llama 3.1, the model file that it becomes)
FAMILY = {
    "Llama": ("llama", {}, False, "model"),
    "Llama, old metadata": ("llama", {"vocab_size": ..., "rope.dimension_count": ..., "rope.freq_base": ...}, False,
                            "model"),
    "Llama 3.1": ("llama", {key: 16 for key in WIDE}, True, "llama"),
    "Mistral Nemo": ("llama", WIDE, False, "llama"),
    "Llama, linear": ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, False, "llama"),
    "Llama, a factor without a type": ("llama", {"rope.scaling.factor": 4.0}, False, "llama"),
    "Llama, scale_linear": ("llama", {"rope.scale_linear": 4.0}, False, "llama"),
    "Llama, a factor that is off": ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, False, "model"),
    "Llama, YaRN": ("llama", YARN, False, "llama"),
    "Llama, biases": ("llama", {"bias": True}, False, "llama"),
    "Qwen2": ("qwen2", {"bias": True}, False, "llama"),
    "Qwen2, YaRN": ("qwen2", {"bias": True} | YARN, False, "llama"),
    "Qwen3": ("qwen3", WIDE | {"norm": True}, False, "llama"),
    "Qwen3, untied": ("qwen3", {"norm": True, "head": True}, False, "model"),
}


def tensors_of(about, seed=0):
    """{name: float32 array} for the metadata `about`."""
    rng = np.random.default_rng(seed)
    C, F = about["embedding_length"], about["feed_forward_length"]
    D = about.get("attention.key_length", C // about["attention.head_count"])
    q, kv = about["attention.head_count"] * D, about["attention.head_count_kv"] * D
    n = about["vocab_size"]
    shapes = {"token_embd.weight": (n, C), "output_norm.weight": (C,)}
    if about.get("head", True):
        shapes["output.weight"] = (n, C)
    for i in range(about["block_count"]):
        layer = {"attn_norm.weight": (C,), "attn_q.weight": (q, C), "attn_k.weight": (kv, C), "attn_v.weight": (kv, C),
                 "attn_output.weight": (C, q), "ffn_norm.weight": (C,), "ffn_gate.weight": (F, C),
                 "ffn_up.weight": (F, C), "ffn_down.weight": (C, F)}
        if about.get("bias"):
            layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if about.get("norm"):
            layer |= {"attn_q_norm.weight": (D,), "attn_k_norm.weight": (D,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    found = {}
    for name, shape in shapes.items():
        centre = 1.0 if "norm" in name else 0.0
        found[name] = rng.normal(centre, 0.2, shape).astype(np.float32)
    return found


def llama3_factors(D, theta, factor=8.0, low=1.0, high=4.0, context=50):
    """What llama.cpp's converter computes for Llama 3.1: branch by branch, as Meta published it."""
    factors = []
    for freq in 1 / theta ** (np.arange(0, D, 2) / D):
        wavelength = 2 * np.pi / freq
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def write(path, arch, about, tensors, kinds=()):
    """A GGUF file by the gguf package. kinds: {tensor: (type, its bytes)}; metadata that is ... is left out."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in about.items():
        if value is ... or key in ("bias", "norm", "head"):
            continue
        key = key if key.startswith(("general.", "split.")) else f"{arch}.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}
        add[type(value)](key, value)
    gguf_format.add_tokenizer(gguf, writer, byte_tokenizer(), V)
    kinds = dict(kinds)
    for name, array in tensors.items():
        if name in kinds:
            writer.add_tensor(name, kinds[name][1], raw_dtype=kinds[name][0])
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def family_file(path, name, **more):
    arch, about, llama3, _ = FAMILY[name]
    about = SHAPE | about | more
    shape = {key: SHAPE.get(key) if value is ... else value for key, value in about.items()}
    tensors = tensors_of(shape)
    if llama3:
        tensors["rope_freqs.weight"] = llama3_factors(16, SHAPE["rope.freq_base"])
    write(path, arch, about, tensors)


def prompts(n=45):
    return torch.randint(97, 123, (2, n), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def off_llama_cpp(path):
    """The largest difference of log p to llama.cpp's, in units of the spread (standard deviation) of the logits."""
    ours = checkpoint.load_model(load.read(path)).eval()
    there = LlamaCpp(path)
    idx = prompts(max(1, min(45, ours.config.block_size - 2)))
    try:
        logits = ours(idx)[0][:, -1]
        return ((logits.log_softmax(-1) - there.logprobs(idx)[:, -1]).abs().max() / logits.std()).item()
    finally:
        there.close()


@pytest.mark.parametrize("name", FAMILY)
def test_a_file_of_the_family_is_equal_in_llama_cpp(tmp_path, name, record_property):
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
    family_file(tmp_path / "m.gguf", name)
    assert load.read(tmp_path / "m.gguf").meta["arch"] == FAMILY[name][3]
    off = off_llama_cpp(tmp_path / "m.gguf")
    record_property("figures", f"max |dlog p| {off:.1e}")
    assert off < 2e-3


def test_scaling_shows_in_these_prompts(tmp_path):
    """Read without it, the file would be off by far more than what passes above."""
    family_file(tmp_path / "m.gguf", "Llama, YaRN")
    scaled = load.read(tmp_path / "m.gguf")
    plain = {**scaled.meta["model_config"], "rope_type": "default"}
    twin = checkpoint.Checkpoint(scaled.path, {**scaled.meta, "model_config": plain}, scaled.model, None)
    with torch.no_grad():
        one, other = (checkpoint.load_model(found).eval()(prompts())[0] for found in (scaled, twin))
    assert (one - other).abs().max() > 0.05


# ---- number formats
KINDS = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0",
         "TQ2_0", "MXFP4", "NVFP4", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL",
         "IQ4_XS"]
QUANT_SHAPE = SHAPE | {"embedding_length": 256, "rope.dimension_count": 64, "block_count": 1}


def random_matrix(kind, n_rows, n_columns):
    """(type, bytes (n_rows, bytes of a row)) of a matrix of moderate numbers: a choice of random blocks."""
    kind = gguf.GGMLQuantizationType[kind]
    size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    try:
        return kind, gguf.quantize(rng.normal(0, 0.2, (n_rows, n_columns)).astype(np.float32), kind)
    except NotImplementedError:  # the package only reads it
        pass
    n_blocks = n_rows * n_columns // size
    blocks = rng.integers(0, 256, (60 * n_blocks, n_bytes), np.uint8)
    with np.errstate(all="ignore"):
        largest = np.abs(gguf.dequantize(blocks, kind)).max(1)
    good = blocks[(largest > 0.05) & (largest < 1)]
    return kind, good[rng.integers(len(good), size=n_blocks)].reshape(n_rows, -1)


def quantised_file(path, **names):
    tensors = tensors_of(QUANT_SHAPE)
    kinds = {}
    for name, kind in names.items():
        name = f"blk.0.{name}.weight"
        kinds[name] = random_matrix(kind, *tensors[name].shape)
    write(path, "llama", QUANT_SHAPE, tensors, kinds)
    return kinds


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_format_is_read(tmp_path, kind):
    kinds = quantised_file(tmp_path / "m.gguf", ffn_up=kind)
    want = gguf.dequantize(kinds["blk.0.ffn_up.weight"][1], kinds["blk.0.ffn_up.weight"][0]).astype(np.float32)
    got = load.read(tmp_path / "m.gguf").model["blocks.0.mlp.up_proj.weight"].numpy()
    assert np.array_equal(got, want) and want.std() > 0.01


def test_q4_k_m_is_what_llama_cpp_computes(tmp_path):
    """The most downloaded mixture: it rounds what it multiplies to 8 bits there."""
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
    quantised_file(tmp_path / "m.gguf", ffn_up="Q4_K", ffn_gate="Q4_K", attn_q="Q4_K", attn_k="Q4_K", attn_v="Q6_K",
                   attn_output="Q5_K")
    assert off_llama_cpp(tmp_path / "m.gguf") < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_format_is_what_llama_cpp_computes(tmp_path, kind):
    quantised_file(tmp_path / "m.gguf", ffn_up=kind, attn_q=kind)
    assert off_llama_cpp(tmp_path / "m.gguf") < 0.25


# ---- which file it is
def test_a_gguf_file_is_known_by_its_content(tmp_path):
    """Ollama's blobs have no suffix, and some files are called .GGUF."""
    family_file(tmp_path / "m.gguf", "Llama")
    for name in ("sha256-0123456789abcdef", "MODEL.GGUF"):
        (tmp_path / name).write_bytes((tmp_path / "m.gguf").read_bytes())
        loaded = load.load(tmp_path / name)
        assert loaded.meta["arch"] == "model" and loaded.tokenizer.encode("ab") == [97, 98]


def refused(path, message):
    with pytest.raises(UserError, match=message) as error:
        load.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_true_reason(tmp_path):
    path = tmp_path / "m.gguf"
    family_file(path, "Llama")
    content = path.read_bytes()
    path.write_bytes(content[:4] + content[4:8][::-1] + content[8:])
    refused(path, "big-endian.*gguf-convert-endian")
    tensors = tensors_of(SHAPE)
    wide = tensors["blk.0.ffn_up.weight"].astype(np.float64)
    write(path, "llama", SHAPE, tensors, {"blk.0.ffn_up.weight": (gguf.GGMLQuantizationType.F64, wide)})
    refused(path, "blk.0.ffn_up.weight is F64, which cannot be read")
    family_file(path, "Llama", **{"split.count": 3})
    refused(path, "split.count=3.*llama-gguf-split --merge")
    family_file(path, "Llama", **{"general.type": "adapter"})
    refused(path, "general.type=adapter")


READ = {"llama", "qwen2", "qwen3", "bitnet", "jamba", "granitehybrid"}
ARCHITECTURES = sorted({*gguf.MODEL_ARCH_NAMES.values()} - READ)


def test_other_architectures_are_refused_in_one_line(tmp_path):
    """All that llama.cpp knows."""
    assert len(ARCHITECTURES) > 100
    for arch in ARCHITECTURES:
        write(tmp_path / "m.gguf", arch, SHAPE, {})
        refused(tmp_path / "m.gguf", f"general.architecture={arch}, which cannot be read: only llama")
        (tmp_path / "m.gguf").unlink()


# ---- what metadata could say besides
# each was read as another model once, or is a file that llama.cpp itself refuses
LIES = {
    "not causal": ({"attention.causal": False}, "attention.causal=False"),
    "a width that is not that of RoPE": ({"attention.key_length": 16}, "value_length=8, .* with heads of 16"),
    "values of another width": (WIDE | {"attention.value_length": 8}, "value_length=8, .* with heads of 12"),
    "a part of each head": ({"rope.dimension_count": 4}, "dimension_count=4, .* with heads of 8"),
    "experts": ({"expert_count": 4}, "expert_count=4"),
    "a window": ({"attention.sliding_window": 16}, "attention.sliding_window=16"),
    "a factor on logits": ({"logit_scale": 0.5}, "logit_scale=0.5"),
    "clamping": ({"attention.clamp_kqv": 8.0}, "attention.clamp_kqv=8.0"),
    "LongRoPE": ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "rope.scaling.type=longrope"),
    "other bounds of YaRN": (YARN | {"rope.scaling.yarn_beta_fast": 20.0}, "yarn_beta_fast=20.0"),
    "an unknown key": ({"attention.new_trick": 1}, "attention.new_trick=1"),
}


@pytest.mark.parametrize("case", LIES)
def test_what_would_be_another_model_is_refused(tmp_path, case):
    values, message = LIES[case]
    about = SHAPE | ({"attention.key_length": 8} if "a part" in case else {}) | values
    write(tmp_path / "m.gguf", "llama", about, tensors_of(SHAPE))
    refused(tmp_path / "m.gguf", message)


def test_factors_of_another_formula_are_refused(tmp_path):
    about = SHAPE | {key: 16 for key in WIDE}
    for factors in (np.linspace(1, 8, 8), [1, 8, 1, 8, 1, 8, 1, 8], [0.5] * 8, [1] * 7 + [np.nan]):
        factors = {"rope_freqs.weight": np.array(factors, np.float32)}
        write(tmp_path / "m.gguf", "llama", about, tensors_of(about) | factors)
        refused(tmp_path / "m.gguf", "rope_freqs.weight=")
        (tmp_path / "m.gguf").unlink()


OTHER_KEYS = ["attention.causal", "attention.key_length", "attention.value_length", "attention.scale", "logit_scale",
              "attention.sliding_window", "attention.clamp_kqv", "attention.max_alibi_bias", "pooling_type",
              "embedding_scale", "residual_scale", "expert_count", "expert_used_count", "use_parallel_residual",
              "attention.layer_norm_epsilon", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
              "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor",
              "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_beta_slow", "rope.scaling.finetuned",
              "attention.temperature_scale", "final_logit_softcapping", "rope.dimension_sections",
              "decoder_start_token_id", "swin_norm", "tensor_data_layout"]
VALUES = [True, False, 0, 1, 2, 4, 8, 12, 16, 32, 64, 0.0, 0.5, 1.0, 4.0, 32.0, 1e-6, 1e4, "none", "linear", "yarn",
          "longrope", "", [8, 8], [2, 2], [1.0]]


@pytest.mark.filterwarnings("ignore")
def test_changed_metadata_is_equal_in_llama_cpp_or_refused(tmp_path, count, score):
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
    rng = random.Random(0)
    tries = count(60, 1000)
    refused_here = equal = alone = 0
    wrong = []
    for i in range(tries):
        arch, about, llama3, _ = FAMILY[rng.choice(list(FAMILY))]
        about = SHAPE | about
        tensors = tensors_of({key: SHAPE.get(key) if value is ... else value for key, value in about.items()})
        if llama3:
            tensors["rope_freqs.weight"] = llama3_factors(16, SHAPE["rope.freq_base"])
        changed = dict(about)
        for _ in range(rng.randint(1, 2)):
            key = rng.choice([*SHAPE, *OTHER_KEYS, *OTHER_KEYS])
            changed[key] = ... if rng.random() < 0.2 else rng.choice(VALUES)
        path = tmp_path / f"{i}.gguf"
        write(path, arch, changed, tensors)
        try:
            checkpoint.load_model(load.read(path))
        except UserError as error:
            refused_here += 1
            assert "\n" not in str(error)
            path.unlink()
            continue
        try:
            off = off_llama_cpp(path)
        except RuntimeError:  # it refuses the file
            alone += 1
            off = 0
        equal += off < 2e-3
        if not off < 2e-3:
            wrong.append((off, arch, {key: value for key, value in changed.items() if value != about.get(key)}))
        path.unlink()
    figures = f"{equal - alone} equal, {refused_here} refused, {alone} read here alone"
    assert not wrong, f"{figures}, {len(wrong)} read wrongly: {wrong[0]}"
    assert equal > tries / 20
    score(tries - len(wrong), tries, figures)


@pytest.mark.parametrize("D,theta,factor,context,high", [
    (16, 500000.0, 8.0, 8192, 4.0), (16, 100.0, 8.0, 50, 4.0), (32, 10000.0, 32.0, 300, 8.0),
    (64, 500000.0, 32.0, 8192, 4.0)])
def test_settings_are_found_again_in_the_factors(D, theta, factor, context, high):
    factors = llama3_factors(D, theta, factor, 1.0, high, context)
    config = {"head_dim": D, "rope_theta": theta}
    found = families.llama3_from_factors("m.gguf", factors, config)
    assert found == {"rope_type": "llama3", "rope_factor": factor, "rope_context": context, "rope_low": 1.0,
                     "rope_high": high}
    assert families.factors_of_llama3(SimpleNamespace(**config | found)) == pytest.approx(factors, rel=1e-5)
    assert families.llama3_from_factors("m.gguf", np.ones(D // 2), config) == {}


def test_factors_that_do_not_tell_the_context_are_those_of_8192_tokens():
    """One pair is stretched in part: 2 pi 500000^(4/8) = 4443 tokens, between 8192 / 4 and 8192."""
    factors = llama3_factors(16, 500000.0, 8.0, 1.0, 4.0, 8192)
    assert ((factors > 1) & (factors < 8)).sum() == 1
    config = {"head_dim": 16, "rope_theta": 500000.0}
    found = families.llama3_from_factors("m.gguf", factors, config)
    assert (found["rope_context"], found["rope_high"]) == (8192, 4.0)
