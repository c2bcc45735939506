"""Bits per byte against sums token by token, and a leaky dataset that must be found out."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluate import Config
from prepare.text import prepare
from tasks import bpb
from tasks.speaker import Speaker
from thimble import data


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_bits_per_byte(runs, name):
    """Of a text: the sum over tokens, one by one within its window, over the bytes of the file."""
    speaker, text = Speaker(runs / name, Config()), (runs / "text.txt").read_text()
    ids = [speaker.tokenizer.eot, *speaker.tokenizer.encode(text)]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = torch.tensor([ids[start:start + 33]])
            logp = speaker.model(window[:, :-1])[0].log_softmax(-1).double()
            nats -= logp[0].gather(1, window[0, 1:, None]).sum().item()
    found = bpb.run(speaker, Config(text=str(runs / "text.txt")))
    assert found["bits per byte"][0] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert found["bits per byte"][2] == len(ids) - 1 and found["bits per byte"][1] > 0
    split = bpb.run(speaker, Config())
    dataset = data.load(runs / "data" / name)
    assert split["bits per byte"][2] == len(dataset.val) - 1
    assert split["trigram bits per byte"][0] == dataset.meta["baselines"]["trigram"]


def test_windows_of_stride_one_are_found_out(runs, tmp_path, capsys):
    """The leak of Mini LLM: overlapping windows, then a random split, so that train has seen all of val."""
    words = " ".join(f"word{i * i % 997}" for i in range(700)).split()
    windows = [" ".join(words[i:i + 40]) for i in range(len(words) - 40)]
    folder = prepare(lambda: iter(windows), "leak", "tests", "byte", data_dir=tmp_path)
    assert json.loads((folder / "meta.json").read_text())["overlap_13gram"] > 0.9
    assert "looks better" in (err := capsys.readouterr().err) or "look better" in err
    found = bpb.run(Speaker(runs / "byte", Config()), Config(dataset=str(folder)))
    assert found["val 13-grams seen in train"][0] > 0.9 and "looks better than it is" in capsys.readouterr().err
    clean = prepare(lambda: iter([" ".join(words)]), "clean", "tests", "byte", data_dir=tmp_path)
    assert json.loads((clean / "meta.json").read_text())["overlap_13gram"] < 0.01


def test_mean_loss_by_hand():
    """Windows of 2 tokens each with 1 and 7 nats: 2 a token, off by -3 and +3, so the error is sqrt(9 + 9) / 4."""
    loss, error = bpb.mean_loss(torch.tensor([1.0, 7.0]), torch.tensor([2.0, 2.0]))
    assert (loss, error) == (2.0, pytest.approx(math.sqrt(18) / 4))
    # 100 times as many windows: a tenth of the error
    loss, error = bpb.mean_loss(torch.tensor([1.0, 7.0] * 100), torch.tensor([2.0, 2.0] * 100))
    assert (loss, error) == (2.0, pytest.approx(math.sqrt(18) / 40))
    # windows of different lengths count by their tokens: 8 nats / 4 tokens, off by 3 - 2 and 5 - 6
    loss, error = bpb.mean_loss(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 3.0]))
    assert (loss, error) == (2.0, pytest.approx(math.sqrt(2) / 4))


def test_only_what_the_mask_counts_is_measured(runs, monkeypatch):
    """Of a split with a mask: the tokens that count, in windows of the model, over the bytes that they stand for."""
    speaker = Speaker(runs / "byte", Config())
    size = speaker.model.config.block_size
    val = np.random.default_rng(0).integers(256, size=2 * size + 1)
    mask = np.arange(len(val)) % 3 == 0
    dataset = SimpleNamespace(val=val, val_mask=mask.astype(np.uint8), row_length=0, meta={"baselines": {}},
                              bytes_per_token=lambda split: 2.5)
    monkeypatch.setattr(bpb, "own_dataset", lambda speaker, cfg: dataset)
    nats = []
    for start in (0, size):
        window = torch.tensor(val[start:start + size + 1])[None]
        with torch.no_grad():
            logp = speaker.model(window[:, :-1])[0][0].log_softmax(-1).double()
        nats += [-logp[t, window[0, t + 1]].item() for t in range(size) if mask[start + t + 1]]
    found = bpb.run(speaker, Config())
    loss = sum(nats) / len(nats)
    assert found["loss"][2] == len(nats) == mask[1:].sum()
    assert found["loss"][0] == pytest.approx(loss, rel=1e-5)
    assert found["bits per byte"][0] == pytest.approx(loss / math.log(2) / 2.5, rel=1e-5)
    assert found["uniform bits per byte"][0] == pytest.approx(math.log2(speaker.tokenizer.vocab_size) / 2.5)
    assert found["perplexity"][0] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("vocab_size, rows", [(2**24, [1, 1, 1]), (2**21, [2, 1]), (2**10, [3])])
def test_rows_at_a_time_by_hand(vocab_size, rows):
    """As many windows of 4 as fit 2^24 logits, at least one; five equally likely ids are ln 5 nats each."""
    shapes = []

    class Model:
        config = SimpleNamespace(vocab_size=vocab_size)

        def parameters(self):
            return iter([torch.zeros(1)])

        def __call__(self, x):
            shapes.append(tuple(x.shape))
            return torch.zeros(*x.shape, 5), None

    sums, counts = bpb.window_nats(Model(), np.arange(11) % 5, 4)
    assert [shape[0] for shape in shapes] == rows
    assert counts.tolist() == [4, 4, 2] and sums.tolist() == pytest.approx([n * math.log(5) for n in (4, 4, 2)])
