"""llama.py leaves as what it is: each shape as its own architecture, read back as the same model."""
import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from cases import built, out

import export
import llama
import train
from formats.reference import stock_architecture
from prepare.text import prepare
from thimble import checkpoint, configurator, load
from thimble.files import UserError

pytestmark = pytest.mark.usefixtures("lean")

STOCK = {"mistral": "mistral", "nemo": "llama", "llama3": "llama", "yarn": "llama", "linear": "llama",
         "qwen2": "qwen2", "qwen2 window": "qwen2", "qwen3 wide": "qwen3"}
WINDOWED = ("mistral", "qwen2 window")  # which llama.cpp does not have


def same(path, case):
    """The model at `path` is that of the case: its settings and its logits, token by token, too."""
    model, words = built(case)
    again = load.load(path).model
    assert dataclasses.replace(again.config, head_dim=model.config.head_dim) == dataclasses.replace(
        model.config, n_hidden=96, n_kv_head=model.config.n_kv_head or 4)
    ids = torch.randint(words.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (again(ids)[0] - model(ids)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("case", STOCK)
def test_it_leaves_as_its_own_architecture_and_comes_back(tmp_path, case):
    assert stock_architecture(built(case)[0]) == (STOCK[case], "")
    found = out(case, tmp_path / "m", "hf", "f32")
    assert found["delta"] <= 1e-4 and found["same"] == 6
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == STOCK[case]
    same(tmp_path / "m", case)


@pytest.mark.parametrize("case", sorted(STOCK.keys() - set(WINDOWED)))
def test_it_leaves_for_llama_cpp_and_comes_back(tmp_path, case):
    found = out(case, tmp_path / "m.gguf", "gguf", "f32")
    assert found["delta"] <= 1e-4 and found["same"] == 6
    same(tmp_path / "m.gguf", case)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path):
    for case in WINDOWED:
        with pytest.raises(UserError, match="no sliding window"):
            out(case, tmp_path / "m.gguf", "gguf", "f32", check=False)
    assert not list(tmp_path.iterdir())


def test_what_no_architecture_has_leaves_with_its_code(tmp_path):
    stock, why = stock_architecture(built("odd")[0])
    assert stock == "" and "Qwen3" in why
    found = out("odd", tmp_path / "m", "hf", "f32")
    assert found["delta"] <= 1e-4 and (tmp_path / "m/llama.py").is_file()


@pytest.mark.slow
@torch.no_grad()
def test_onnx_is_the_model_or_refused(tmp_path):
    """A graph is compared with the model before it gets its name."""
    for case in [*STOCK, "odd"]:
        try:
            found = out(case, tmp_path / case, "onnx", "fp32")
        except UserError as error:
            assert "llama.py" in str(error) or "differ" in str(error), error
            continue
        assert found["delta"] <= 1e-4


def test_a_sliding_window_beyond_the_compared_text_is_not_left_out(tmp_path):
    pytest.importorskip("onnx", reason="pip install -r requirements-test.txt")
    from formats import onnx as onnx_format
    config = llama.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, block_size=4096, window=2000)
    with pytest.raises(onnx_format.NoForm, match="window"):
        onnx_format.write(tmp_path / "m.onnx", llama.Model(config))


def test_a_checkpoint_of_it_is_read_like_any_other(tmp_path):
    model, words = built("yarn")
    (tmp_path / "t.json").write_text(words.to_json())
    meta = {"arch": "llama", "model_config": dataclasses.asdict(model.config)}
    checkpoint.save(tmp_path / "run", 1, model.state_dict(), None, meta, tmp_path / "t.json")
    assert load.load(tmp_path / "run", "latest").model.config == model.config


# ---- fine-tuning
@pytest.mark.parametrize("case,form", [("qwen2", "hf"), ("llama3", "gguf")])
def test_in_one_lora_step_and_out(tmp_path, monkeypatch, case, form):
    """The commands: a text with the model's own tokenizer, --init_from without --arch, export as what came in."""
    monkeypatch.chdir(tmp_path)
    source = f"start.{form}"
    out(case, tmp_path / source, form, check=False)
    tokenizer = f"{source}/tokenizer.json" if form == "hf" else source
    prepare(lambda: iter(["the cat sat on the mat. " * 200]), "mine", "tests", tokenizer, data_dir=tmp_path)
    argv = ["--dataset=mine", f"--init_from={source}", "--lora_rank=2", "--max_steps=2", "--eval_every=2",
            "--batch_size=2", "--device=cpu", "--dtype=float32", "--out_dir=tuned", "--block_size=24"]
    train.main(*configurator.parse(train.Config, argv))
    tuned = checkpoint.load("tuned")
    assert tuned.meta["arch"] == "llama" and tuned.meta["model_config"]["block_size"] == 24
    before = load.read(source).model
    moved = {name for name in before if not torch.equal(before[name], tuned.model[name])}
    assert moved == {name for name in before if "_proj.weight" in name}
    found = export.export(load.load("tuned", deploy=False), export.Config(format=form, out=f"done.{form}", prompts=4,
                                                                          prompt_tokens=6))
    assert found["delta"] <= 1e-4 and found["same"] == 4
    # and whole, resumed half-way, with the architecture that the run says
    more = [*argv[:2], *argv[5:8], "--max_steps=4", "--eval_every=2", "--out_dir=whole"]
    train.main(*configurator.parse(train.Config, more))
    shutil.rmtree("whole/step_000004")
    for pointer in ("latest", "best"):
        Path("whole", pointer).write_text("step_000002")
    train.main(*configurator.parse(train.Config, ["--resume", "--out_dir=whole"]))
    assert checkpoint.load("whole").meta["arch"] == "llama"


@pytest.mark.parametrize("settings,kept", [
    ({"rope_theta": 100.0}, [1.0] * 8),
    ({"rope_type": "linear", "rope_theta": 100.0, "rope_factor": 4.0}, [0.0] * 8),
    # pairs 0 to 2.6 turn 32 times over 4000 tokens, those from 5.6 on not once
    ({"rope_type": "yarn", "rope_factor": 4.0, "rope_context": 4000, "rope_high": 32.0},
     [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    # no pair turns 32 times over 40 tokens, and those from 3.8 on not once
    ({"rope_type": "yarn", "rope_theta": 50.0, "rope_factor": 4.0, "rope_context": 40, "rope_high": 32.0},
     [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]),
    # turns over 50 tokens: 7.96, 4.47, 2.52, 1.42, 0.80, ...; between 1 and 4 the share is a third of those above 1
    ({"rope_type": "llama3", "rope_theta": 100.0, "rope_factor": 8.0, "rope_context": 50},
     [1.0, 1.0, 0.5055, 0.1384, 0.0, 0.0, 0.0, 0.0])])
def test_speeds_of_the_pairs_by_hand(settings, kept):
    """kept: the share of its speed that each of 8 pairs keeps; the rest of it is divided by rope_factor."""
    config = llama.Config(n_head=2, n_embd=32, rope_high=settings.pop("rope_high", 4.0), rope_gain=1.5, **settings)
    freqs = llama.rope_freqs(config, "cpu").tolist()
    for i in range(8):
        speed = config.rope_theta ** (-2 * i / 16)
        assert freqs[i] == pytest.approx(speed * (kept[i] + (1 - kept[i]) / config.rope_factor), rel=1e-3)
    cos, sin = llama.rope_table(torch.arange(3), config)
    assert cos.shape == sin.shape == (3, 16)
    for i in range(8):
        assert cos[2, i] == cos[2, i + 8] == pytest.approx(1.5 * math.cos(2 * freqs[i]), abs=1e-5)
        assert -sin[2, i] == sin[2, i + 8] == pytest.approx(1.5 * math.sin(2 * freqs[i]), abs=1e-5)
