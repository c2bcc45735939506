"""The check of formats/check.py notices damage, bugs of the exporter, and what a program computes differently."""
import shutil
import struct

import pytest
from cases import built, edit_json, edit_tensors, out, tokenizer

import export
from formats import gguf as gguf_format
from formats import names
from formats import onnx as onnx_format
from formats.weights import with_weights
from thimble.files import UserError


def patch(old, new):
    """Replace bytes of the metadata of a GGUF file by as many others."""
    def damage(path):
        content = path.read_bytes()
        assert content.count(old) >= 1 and len(old) == len(new)
        path.write_bytes(content.replace(old, new, 1))
    return damage


def key(name, kind, value):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I" + kind[1], int(kind[0]), value)


def swap(tensors, one, other):
    tensors[one], tensors[other] = tensors[other], tensors[one]


def transpose(tensors, name):
    tensors[name] = tensors[name].T.contiguous()


LAYER, UP, NORM = "model.layers.1.", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
SABOTAGE = {
    "a dropped tensor": ("llama", "hf", edit_tensors(lambda t: t.pop(LAYER + "mlp.up_proj.weight"))),
    "a transposed matrix": ("llama", "hf", edit_tensors(lambda t: transpose(t, LAYER + "self_attn.q_proj.weight"))),
    "another dtype": ("llama", "hf", edit_tensors(lambda t: t.update({NORM: t[NORM].half()}))),
    "swapped matrices": ("llama", "hf", edit_tensors(lambda t: swap(t, LAYER + "mlp.up_proj.weight", LAYER +
                                                                    "mlp.gate_proj.weight"))),
    "no tokenizer": ("llama", "hf", lambda path: (path / "tokenizer.json").unlink()),
    "another RoPE": ("llama", "hf", edit_json("config.json", rope_theta=9e3,
                                              rope_parameters={"rope_type": "default", "rope_theta": 9e3})),
    "another end of text": ("llama", "hf", edit_json("special_tokens_map.json", eos_token="a")),
    "texts that end elsewhere": ("llama", "hf", edit_json("generation_config.json", eos_token_id=[5])),
    "another model's code": ("gelu", "hf", lambda path: (path / "model.py").write_text(
        (path / "model.py").read_text().replace("F.gelu(", "F.relu("))),
    "cut short": ("llama", "gguf", lambda path: path.write_bytes(path.read_bytes()[:-4])),
    "a flipped bit": ("llama", "gguf", lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\x00\x40")),
    "RoPE of another base": ("llama", "gguf", patch(key("llama.rope.freq_base", "6f", 10000.0),
                                                    key("llama.rope.freq_base", "6f", 9000.0))),
    "another word splitter": ("llama", "gguf", patch(b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0olmo1")),
    "a file that ends texts elsewhere": ("llama", "gguf", patch(key("tokenizer.ggml.eos_token_id", "4I", 0),
                                                                key("tokenizer.ggml.eos_token_id", "4I", 5))),
    "a swapped scale": ("bitnet", "gguf", lambda path: swap_scales(path)),
    "another vocabulary": ("llama", "onnx", lambda path: (path / "tokenizer.json").write_text(
        tokenizer("byte").to_json())),
    "another graph": ("llama", "onnx", lambda path: shutil.copyfile(other_graph(path), path / "onnx" / "model.onnx")),
}


def swap_scales(path):
    found = {tensor.name: tensor.data for tensor in gguf_format.parts(path)[2].tensors}
    content = path.read_bytes()
    one, other = (found[f"blk.{i}.attn_q.scale"].tobytes() for i in (0, 1))
    assert one != other and content.count(one) == content.count(other) == 1
    path.write_bytes(content.replace(one, b"XXXX").replace(other, one).replace(b"XXXX", other))


def other_graph(path):
    model = built("llama")[0]
    onnx_format.write(path / "other.onnx",
                      with_weights(model, lambda name, w: w * 1.01 if "blocks.1.mlp.up" in name else w))
    return path / "other.onnx"


@pytest.mark.score("B4")
@pytest.mark.parametrize("name", SABOTAGE)
def test_the_check_sees(tmp_path, monkeypatch, name):
    case, form, damage = SABOTAGE[name]

    check = export.check

    def sabotaged(artefact, *args):
        damage(artefact.path)
        return check(artefact, *args)
    monkeypatch.setattr(export, "check", sabotaged)
    with pytest.raises(UserError) as error:
        out(case, tmp_path / f"m.{form}".removesuffix(".onnx"), form)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


BUGS = {  # of the exporter itself: what is in the file is what was meant, but it is wrong
    "not permuted": ("llama", "gguf", "permute", lambda w, *_, **__: w),
    "up for gate": ("llama", "gguf", "NAMES", [tuple(x.replace("ffn_up", "?").replace("ffn_gate", "ffn_up").replace(
        "?", "ffn_gate") for x in row) for row in names.NAMES]),
}


@pytest.mark.score("B4")
@pytest.mark.parametrize("name", BUGS)
def test_the_check_sees_a_bug_of_the_exporter(tmp_path, monkeypatch, name):
    case, form, attribute, value = BUGS[name]
    monkeypatch.setattr(names, attribute, value)
    with pytest.raises(UserError, match="check failed"):
        out(case, tmp_path / f"m.{form}", form)
    assert not list(tmp_path.iterdir())
