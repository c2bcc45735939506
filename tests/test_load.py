"""Whatever a path is, it becomes a model that works, or one line that says what the path is instead."""
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cases import send

import hybrid_ssm
import model
import sample
import ternary
from thimble import checkpoint, load
from thimble.files import UserError
from thimble.generate import generate
from thimble.tokenizer import byte_tokenizer, char_tokenizer


def tiny(module=model, vocab_size=257, **settings):
    """A model with weights far from the initial ones, so that every one of them matters."""
    torch.manual_seed(0)
    config = module.Config(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=vocab_size, **settings)
    made = module.Model(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.2 * torch.randn_like(p)
    return made


def save(run, made, step=1, tokenizer=None, meta=None, **options):
    """A checkpoint of a model with a byte tokenizer, or with the one given."""
    file = run.parent / "tokenizer.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text((tokenizer or byte_tokenizer()).to_json())
    arch = type(made).__module__
    about = {"arch": arch, "model_config": asdict(made.config), **(meta or {})}
    return checkpoint.save(run, step, made.state_dict(), None, about, file, **options)


def refused(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def same(a, b, tolerance=0.0):
    idx = torch.arange(20)[None]
    return (a(idx)[0] - b(idx)[0]).abs().max().item() <= tolerance


# ---- each kind of path
def test_a_run_its_checkpoints_and_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "train one first" in refused(load.load)
    made = tiny()
    save(tmp_path / "runs/a", made, 1, best=True)
    save(tmp_path / "runs/a", made, 2)
    loaded = load.load("runs/a")
    assert loaded.path == Path("runs/a/step_000001") and loaded.name == "a" and loaded.meta["step"] == 1
    assert same(loaded.model, made) and not loaded.model.training
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("é")) == "é"
    assert loaded.stop_ids == {loaded.tokenizer.eot} and loaded.template in ("elite", "chatml")
    assert load.load("runs/a", "latest").meta["step"] == 2
    assert load.load("runs/a/step_000002").name == "a"
    for nothing in ("", None):
        assert load.load(nothing).path == Path("runs/a/step_000001")
    # a copy of a checkpoint under another name
    (tmp_path / "runs/a/step_000002").rename(tmp_path / "kept")
    assert load.load("kept").meta["step"] == 2 and load.load("kept").name == "kept"
    assert load.read("runs/a").meta["step"] == 1           # what is left, although `latest` names another


def test_a_tokenizer_from_a_dataset_a_file_and_a_checkpoint(toy, tmp_path):
    dataset = load.read_tokenizer(toy)
    assert dataset.decode(dataset.encode("the cat")) == "the cat"
    assert load.read_tokenizer(str(Path(toy) / "tokenizer.json")).to_json() == dataset.to_json()
    path = save(tmp_path / "run", tiny(), tokenizer=char_tokenizer("abc"))
    assert load.read_tokenizer(path).decode([0, 1, 2]) == "abc"
    assert "nowhere" in refused(load.read_tokenizer, tmp_path / "nowhere")


def test_a_hugging_face_folder(tmp_path):
    pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    made = tiny()
    send(made, byte_tokenizer(), tmp_path / "hf_model", "hf", "f32", check=False)
    loaded = load.load(tmp_path / "hf_model")
    assert loaded.name == "hf_model" and loaded.path == tmp_path / "hf_model" and loaded.meta["arch"] == "model"
    assert same(loaded.model, made, 1e-5)
    assert loaded.tokenizer.encode("abc") == byte_tokenizer().encode("abc")
    assert loaded.tokenizer.eot in loaded.stop_ids


def test_a_gguf_file(tmp_path):
    pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    made = tiny()
    send(made, byte_tokenizer(), tmp_path / "small.gguf", "gguf", "f32", check=False)
    loaded = load.load(tmp_path / "small.gguf")
    assert loaded.name == "small" and loaded.path == tmp_path / "small.gguf"
    assert same(loaded.model, made, 1e-5)
    assert loaded.tokenizer.encode("abc") == load.read_tokenizer(str(tmp_path / "small.gguf")).encode("abc")
    assert list(generate(loaded.model, [1], 5, temperature=0)) == list(generate(made, [1], 5, temperature=0))


# ---- what is none of them
def test_what_is_not_a_model_says_what_it_is(toy, tmp_path):
    message = refused(load.load, tmp_path / "nowhere")
    assert "nowhere" in message and "python train.py" in message
    message = refused(load.load, toy)
    assert "is a dataset" in message and f"--dataset={toy}" in message
    (tmp_path / "empty").mkdir()
    assert "no checkpoint in" in refused(load.load, tmp_path / "empty")
    for name in ("notes.txt", "weights.pt", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"hello")
        message = refused(load.load, tmp_path / name)
        assert name in message and "pickles" in message
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    assert "broken.gguf" in refused(load.load, tmp_path / "broken.gguf")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"x")
    assert "pickled" in refused(load.load, tmp_path / "pickled")
    (tmp_path / "exported/onnx").mkdir(parents=True)
    (tmp_path / "exported/config.json").write_text("{}")
    assert "is an ONNX export" in refused(load.load, tmp_path / "exported")


def test_half_a_hugging_face_folder_says_what_is_missing(tmp_path):
    send(tiny(), byte_tokenizer(), tmp_path / "hf", "hf", check=False)
    (tmp_path / "hf/config.json").rename(tmp_path / "config.json")
    assert "hf has weights, but no config.json" in refused(load.load, tmp_path / "hf")
    (tmp_path / "config.json").rename(tmp_path / "hf/config.json")
    (tmp_path / "hf/model.safetensors").unlink()
    assert "hf has a config.json, but no model.safetensors" in refused(load.load, tmp_path / "hf")
    (tmp_path / "run").mkdir()  # one that has not saved yet
    (tmp_path / "run/config.json").write_text('{"n_layer": 2}')
    assert "no checkpoint in" in refused(load.load, tmp_path / "run")


class Computed(model.Model):
    """Two names for one matrix, and a buffer that is computed from a weight."""

    def __init__(self, config):
        super().__init__(config)
        self.twin = self.embed
        self.register_buffer("row", 2 * self.embed.weight[0].detach(), persistent=False)


@pytest.mark.parametrize("make", [lambda: tiny(), lambda: tiny(tie_embeddings=True), lambda: tiny(ternary),
                                  lambda: tiny(hybrid_ssm, attn_layer_period=2)])
def test_a_large_model_is_in_memory_once(tmp_path, monkeypatch, make):
    made = make()
    save(tmp_path / "run", made)
    found = checkpoint.load(tmp_path / "run")
    found.model.update({name: tensor.clone() for name, tensor in found.model.items()})  # in torch's own memory
    monkeypatch.setattr(checkpoint, "LARGE", 0)
    with torch.random.fork_rng():
        back = checkpoint.load_model(found).eval()
    assert same(made, back)
    assert {name: p.data_ptr() for name, p in back.state_dict().items() if name in dict(back.named_parameters())} \
        == {name: found.model[name].data_ptr() for name, _ in back.named_parameters()}
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in made.parameters()]
    back(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()  # it learns


@pytest.mark.parametrize("large", [0, 2**40])
def test_a_large_fork_has_its_ties_and_its_buffers(tmp_path, monkeypatch, large):
    """Its buffer is computed from a weight: so it is built with weights, and filled."""
    monkeypatch.setattr(model, "Model", Computed)
    made = Computed(tiny().config)
    tensors = {name: tensor for name, tensor in made.state_dict().items() if not name.startswith("twin")}
    checkpoint.save(tmp_path / "run", 1, tensors, None, {"arch": "model", "model_config": asdict(made.config)})
    monkeypatch.setattr(checkpoint, "LARGE", large)
    back = checkpoint.load_model(checkpoint.load(tmp_path / "run")).eval()
    assert back.twin.weight is back.embed.weight and not back.row.is_meta and same(made.eval(), back)


def test_tensors_that_share_memory_or_have_gaps_are_written(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "again": whole, "turned": whole.T, "part": whole[1:], "none": torch.empty(0)}
    checkpoint.write_tensors(tmp_path / "x.safetensors", tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert data == checkpoint.pack_tensors(tensors)
    back = checkpoint.unpack_tensors(tmp_path / "x.safetensors", data)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert "cannot be written" in refused(checkpoint.write_tensors, tmp_path / "nowhere/x.safetensors", tensors)


def test_a_tokenizer_that_does_not_fit(tmp_path):
    made = tiny(vocab_size=10)
    save(tmp_path / "run", made)
    message = refused(load.load, tmp_path / "run")
    assert "257 ids" in message and "only 10" in message and "do not belong together" in message
    save(tmp_path / "padded/run", tiny(vocab_size=264))
    assert load.load(tmp_path / "padded/run").model.config.vocab_size == 264
    path = save(tmp_path / "without/run", made)
    (path / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(load.load, path)


def test_a_device_that_is_not_there(tmp_path):
    save(tmp_path / "run", tiny())
    assert "--device=warp does not work here: " in refused(load.load, tmp_path / "run", device="warp")


# ---- how it is spoken to
def test_the_template_and_the_ids_that_end_an_answer(tmp_path):
    made = tiny()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}')
    save(tmp_path / "run", made, meta={"template": "alpaca"})
    loaded = load.load(tmp_path / "run")
    eot = loaded.tokenizer.eot
    assert loaded.template == "alpaca" and loaded.stop_ids == loaded.answer_ids == {7, eot}
    assert load.load(tmp_path / "run", template="chatml").template == "chatml"
    save(tmp_path / "plain/run", made)
    assert load.load(tmp_path / "plain/run").template == "elite"   # no <|im_start|> in its tokenizer


# ---- the form in which it ships
@torch.no_grad()
def test_a_ternary_model_is_packed_on_a_cpu_unless_told_not_to(tmp_path):
    made = tiny(ternary)
    save(tmp_path / "run", made)
    packed = load.load(tmp_path / "run").model
    plain = load.load(tmp_path / "run", deploy=False).model
    assert packed.config.packed and not plain.config.packed and not packed.training
    assert same(plain, made) and same(packed, made, 0.05)  # its embedding is float16
    assert load.deployed(packed) is packed
    other = tiny()
    assert load.deployed(other) is other


@pytest.mark.parametrize("change", [
    ("127 / largest", "7 / largest"),  # activations of 4 bits
    ("TernaryMatmul.apply(x, ", "TernaryMatmul.apply(x.relu(), "),
    ("w.half().to(w.dtype)", "w"),  # an embedding that is not rounded
    ("        self.group_size = group_size\n        self.cache",
     "        self.bias = nn.Parameter(torch.zeros(n_out))\n        self.group_size = group_size\n        self.cache"),
], ids=["activations", "matmul", "embedding", "parameter"])
@torch.no_grad()
def test_a_fork_is_packed_only_if_that_is_the_model_that_was_trained(tmp_path, monkeypatch, capsys, change):
    source = Path(ternary.__file__).read_text()
    assert change[0] in source
    (tmp_path / "mine.py").write_text(source.replace(*change))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(checkpoint, "HERE", tmp_path)  # where model files are
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    made = tiny(importlib.import_module("mine"))
    save(tmp_path / "run", made, best=True)
    assert same(load.load(tmp_path / "run").model, made)
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "mine.py" in note and "runs unpacked" in note
    cfg = sample.Config(checkpoint=str(tmp_path / "run"), packed=str(tmp_path / "packed"))
    assert "computes something else" in refused(sample.main, cfg)
    assert not (tmp_path / "packed").exists()
    del sys.modules["mine"]


def test_names():
    assert load.name_of(Path("runs/tiny/step_000500")) == "tiny"
    assert load.name_of(Path("runs/tiny/.trash-step_000500")) == "tiny"
    assert load.name_of(Path("models/SmolLM2")) == "SmolLM2"
    assert load.name_of(Path("models/SmolLM2-1.7B.gguf")) == "SmolLM2-1.7B"
