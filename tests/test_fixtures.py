"""What an earlier version wrote must load now and later: fixtures/v1 was made by the commands of commit 47bf8e3.

A dataset of 9,331 bytes, runs of model.py and ternary.py after 6 steps, the packed form of the second, and the first as
a Hugging Face folder, a GGUF file and an ONNX folder. expected.json has what that commit computed from them.
"""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from thimble import checkpoint, data
from thimble.generate import generate
from thimble.load import load, read, read_tokenizer

V1 = ROOT / "tests" / "fixtures" / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())
IDS = torch.tensor([EXPECTED["ids"]])


@torch.no_grad()
def last_logits(path):
    model = checkpoint.load_model(read(path, "best")).eval()
    return model(IDS)[0][0, -1]


def test_the_dataset():
    dataset = data.load(V1 / "data")
    assert (len(dataset.train), len(dataset.val), dataset.vocab_size) == (9331, 1037, 257)
    assert dataset.tokenizer().decode(dataset.train[:7]) == "and tre"
    assert dataset.meta["baselines"]["trigram"] == pytest.approx(1.0604, abs=1e-4)


@pytest.mark.parametrize("arch", ["model", "ternary"])
def test_a_run_computes_what_it_did(arch):
    want = torch.tensor(EXPECTED["logits"][arch])
    torch.testing.assert_close(last_logits(V1 / "runs" / arch), want, atol=1e-3, rtol=0)
    loaded = load(V1 / "runs" / arch)
    assert loaded.meta["step"] == 6
    written = generate(loaded.model, EXPECTED["ids"], 8, temperature=0)
    assert list(written) == EXPECTED["greedy"][arch]


def test_the_packed_model_writes_the_same():
    loaded = load(V1 / "packed")
    written = generate(loaded.model, EXPECTED["ids"], 8, temperature=0)
    assert list(written) == EXPECTED["greedy"]["ternary"]


@pytest.mark.parametrize("name", ["hf", "model.gguf"])
def test_the_exports_come_back_as_the_model(name):
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
    want = torch.tensor(EXPECTED["logits"]["model"])
    torch.testing.assert_close(last_logits(V1 / name), want, atol=1e-5, rtol=0)
    assert read_tokenizer(V1 / name).encode("the") == [116, 104, 101]


def test_the_onnx_folder_runs():
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(V1 / "onnx" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            shape = [{"batch_size": 1}.get(size, 0) if isinstance(size, str) else size for size in value.shape]
            feed[value.name] = torch.zeros(shape).numpy()
    feed["input_ids"] = IDS.numpy()
    feed["attention_mask"] = torch.ones_like(IDS).numpy()
    feed["position_ids"] = torch.arange(IDS.size(1))[None].numpy()
    names = {value.name for value in session.get_inputs()}
    logits = session.run(["logits"], {name: array for name, array in feed.items() if name in names})[0]
    torch.testing.assert_close(torch.from_numpy(logits[0, -1]), torch.tensor(EXPECTED["logits"]["model"]),
                               atol=1e-4, rtol=0)


def test_a_run_goes_on_where_it_was(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(V1 / "runs" / "model", run)
    command = [sys.executable, "train.py", "--resume", f"--out_dir={run}", f"--dataset={V1 / 'data'}", "--max_steps=9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert losses[-1] == pytest.approx(EXPECTED["resumed"], abs=2e-3)
