"""The check of formats/check.py notices damage, bugs of the exporter, and what a program computes differently."""
import math
import shutil
import struct

import pytest
import torch
from cases import built, edit_json, edit_tensors, out, tokenizer

import export
from formats import gguf as gguf_format
from formats import names
from formats import onnx as onnx_format
from formats.check import CONSUMERS, Artefact, bits_per_byte, compare_logprobs, divergence, text_rows, tolerance_of
from formats.weights import with_weights
from thimble import data
from thimble.files import UserError
from thimble.tokenizer import char_tokenizer


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


def other_graph(path, factor=1.01):
    model = built("llama")[0]
    onnx_format.write(path / "other.onnx",
                      with_weights(model, lambda name, w: w * factor if "blocks.1.mlp.up" in name else w))
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


@pytest.mark.parametrize("damage,words", [
    (edit_json("genai_config.json", model={"type": "nothing"}), "onnxruntime-genai does not load it"),
    (lambda path: shutil.copyfile(other_graph(path, 3), path / "genai.onnx"), "texts of onnxruntime-genai differ")])
def test_the_check_sees_what_genai_would_read(tmp_path, monkeypatch, damage, words):
    pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai reads the folder")
    check = export.check

    def sabotaged(artefact, *args):
        damage(artefact.path)
        file = artefact.path / "genai_config.json"
        if (artefact.path / "genai.onnx").is_file():
            file.write_text(file.read_text().replace("onnx/model.onnx", "genai.onnx"))
        return check(artefact, *args)
    monkeypatch.setattr(export, "check", sabotaged)
    with pytest.raises(UserError, match=words) as error:
        out("llama", tmp_path / "m", "onnx")
    assert "\n" not in str(error.value)


# ---- what is measured on text
def logprobs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def test_divergence_is_that_of_torch():
    ours, there = logprobs(3, 5, 11), logprobs(3, 5, 11, seed=1)
    want = torch.nn.functional.kl_div(there, ours, reduction="sum", log_target=True).item() / 15
    assert divergence(ours, there) == pytest.approx(want, rel=1e-4) and abs(divergence(ours, ours)) < 1e-6
    # tokens without a figure count together as one
    lumped = [torch.cat((p[..., :4], p[..., 4:].logsumexp(-1, keepdim=True)), -1) for p in (ours, there)]
    few = there.clone()
    few[..., 4:] = torch.nan
    assert divergence(ours, few) == pytest.approx(divergence(*lumped), rel=1e-4) and divergence(ours, few) < want
    few[0, 0] = torch.nan  # of which a program gave nothing at all
    assert divergence(ours, few) < want


@torch.no_grad()
@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_logits_that_are_not_numbers_are_refused(quant):
    model, rows = built("llama")[0], torch.arange(12)[None]
    artefact = Artefact(None, "gguf", quant, model, {})
    there = model(rows)[0].log_softmax(-1)
    there[0, :, 5:] = torch.nan  # a program may name the likeliest alone
    assert compare_logprobs(artefact, rows, there)[0] == 0
    there[0, 3] = torch.nan
    with pytest.raises(UserError, match="check failed: logits differ: some are not numbers"):
        compare_logprobs(artefact, rows, there)


def test_bits_per_byte_are_those_of_the_tokens_behind_the_first():
    rows = torch.tensor([[3, 1, 4], [1, 5, 9]])
    there = logprobs(2, 3, 11)
    nats = -sum(there[r, t, rows[r, t + 1]] for r in (0, 1) for t in (0, 1)).item()
    assert bits_per_byte(there, rows, 7) == pytest.approx(nats / 7 / math.log(2), rel=1e-5)


def test_the_text_is_the_runs_own_where_it_is_here(toy, tmp_path):
    dataset = data.load(toy)
    words = dataset.tokenizer()
    passage = text_rows(words, {}, 50)
    assert passage.shape == (10, 50) and words.decode(passage[0].tolist()).startswith("In the days when the judges")
    meta = {"dataset": {"path": str(toy)}}
    rows = text_rows(words, meta, 50)
    assert rows.flatten().tolist() == dataset.val[:500].tolist()
    assert text_rows(words, {"dataset": {"path": str(tmp_path / "gone")}}, 50).equal(passage)
    bpe = tokenizer("bpe")  # with which that text was not prepared
    assert bpe.decode(text_rows(bpe, meta, 50)[0].tolist()).startswith("In the days when")
    assert tokenizer("char").decode(text_rows(tokenizer("char"), {}, 20)[0].tolist())[:3] == "n t"  # it has no I
    assert text_rows(char_tokenizer("αβγ"), {}, 20).shape == (25, 20)  # none of the passage's: any ids


def test_the_padding_behind_conversations_is_no_text(tmp_path):
    words = tokenizer("byte")
    floors = dict.fromkeys(("uniform", "unigram", "bigram", "trigram"), 8.0)
    with data.Writer(tmp_path / "d", words, "a test", {}, floors) as writer:
        for split in data.SPLITS:
            for row in ([1, 2, 3], [4, 5]):
                n_pad = 8 - len(row)
                writer.append(split, row + [words.eot] * n_pad, 1, 1, [0, *[1] * (len(row) - 1)] + [0] * n_pad)
            writer.append(split, [words.eot], 0, 0, [0])
        writer.meta |= {"row_length": 8, "template": "elite"}
    rows = text_rows(words, {"dataset": {"path": str(tmp_path / "d")}}, 5)
    assert rows.tolist() == [[1, 2, 3, 4, 5]]


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


@pytest.mark.parametrize("case,form,quant,spread,limit", [
    ("llama", "hf", "f32", 0.25, 1e-4), ("llama", "hf", "bf16", 3.0, 3e-4), ("llama", "onnx", "f32", 1.0, 1e-4),
    ("llama", "gguf", "f32", 20.0, 2e-3), ("llama", "gguf", "q8_0", 3.0, None), ("llama", "gguf", "f16", 3.0, None),
    ("llama", "onnx", "int8", 3.0, None), ("llama", "onnx", "int4", 3.0, None), ("groups", "hf", "f32", 3.0, 0.3),
    ("groups", "onnx", "f32", 0.5, 0.05)])
def test_limits_by_hand(case, form, quant, spread, limit):
    assert tolerance_of(Artefact(None, form, quant, built(case)[0], {}), spread) == (limit and pytest.approx(limit))


# ---- greedy texts
@torch.no_grad()
def alone(model, prompt, n):
    """The n likeliest ids after a prompt, by the whole forward pass again for each."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("form", ["hf", "onnx"])
def test_a_program_continues_as_the_model_does(tmp_path, form):
    out("tied", tmp_path / "m", form)
    model = built("tied")[0]
    there = CONSUMERS[form](tmp_path / "m")
    prompts = torch.tensor([[72, 101, 108], [119, 111, 114]])
    for n in (1, 5):
        assert there.greedy(prompts, n) == [alone(model, prompt, n) for prompt in prompts.tolist()]
    there.close()


@torch.no_grad()
def test_a_traced_step_continues_as_the_model_does():
    model = built("tied")[0]
    there = object.__new__(CONSUMERS["traced"])
    there.empty_cache = lambda batch_size: model.init_cache(batch_size, 48)

    def step(ids, cache):
        logits, cache = model.step(torch.tensor(ids), cache)
        return logits.numpy(), cache

    there.step = step
    prompts = torch.tensor([[72, 101, 108], [119, 111, 114]])
    for n in (1, 5):
        assert there.greedy(prompts, n) == [alone(model, prompt, n) for prompt in prompts.tolist()]
    assert torch.allclose(there.logprobs(prompts), model(prompts)[0].log_softmax(-1), atol=1e-5)


@torch.no_grad()
def test_the_limit_follows_the_spread_over_the_vocabulary():
    """Standard deviation over the tokens of the vocabulary, the mean of all positions; not over the positions."""
    class Twin(torch.nn.Module):
        def forward(self, rows):
            return logits, None

    logits = torch.randn(2, 7, 50) * 30 + 100 * torch.randn(2, 7, 1)
    rows = torch.zeros(2, 7, dtype=torch.long)
    artefact = Artefact(None, "hf", "f32", Twin(), {})
    spread = sum(row.double().std().item() for row in logits.view(14, 50)) / 14
    delta, tolerance = compare_logprobs(artefact, rows, logits.log_softmax(-1))
    assert delta == 0 and tolerance == pytest.approx(1e-4 * spread, rel=1e-4) and spread > 20
