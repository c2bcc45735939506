"""Templates, masks and rows: a model is asked exactly as it was taught, and only answers are in the loss."""
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command

import model
import train
from prepare import sft
from prepare.make_tokenizer import train_bpe
from prepare.text import prepare
from thimble import chat, checkpoint, configurator, data, load
from thimble.files import UserError
from thimble.ngrams import NGrams, baselines
from thimble.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TALK = [{"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say <|im_start|> and <|endoftext|>, ä 🎉", "input": "x\ny"},
        {"role": "assistant", "content": "Yes.  Two lines:\n\n1 2"},
        {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "(7)"}]
TEXT = ["User: Hello world. Assistant: ### Response:\n system user assistant\n\n hello 1 2 3 "] * 20


def smollm_like():
    """A BPE with chatml's special tokens, as SmolLM2's has."""
    tokenizer = train_bpe(TEXT, 300, "smollm")
    tokenizer.hf.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(tokenizer.hf)


TOKENIZERS = {"byte": byte_tokenizer, "gpt2": lambda: train_bpe(TEXT, 320, "gpt2"),
              "llama3": lambda: train_bpe(TEXT, 320, "llama3"), "smollm": smollm_like,
              "char": lambda: char_tokenizer("".join(m["content"] for m in TALK) + "".join(TEXT)
                                                  + "<|im_start|>Instruction:#Inputxy")}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("template", chat.TEMPLATES)
def test_a_prompt_is_the_beginning_of_what_was_taught(tokenizer, template):
    ids, counts = chat.encode(tokenizer, TALK, template)
    for n in (2, 4):
        prompt = chat.prompt(tokenizer, TALK[:n], template)
        before = counts[:len(prompt)]
        assert ids[:len(prompt)] == prompt
        answer = ids[len(prompt):]
        answer = answer[:(counts[len(prompt):] + [0]).index(0)]
        assert answer[-1] == chat.record_for(tokenizer, template).ends[0] and not before[-1]
        assert tokenizer.decode(answer).strip() == TALK[n]["content"]
        if template != "chatml":
            text = chat.render(tokenizer, TALK[:n], template, reply=True).replace(chat.MARK, "")
            assert tokenizer.decode(prompt, skip_special=False) == text
    assert sum(counts) == sum(before) + len(answer)


def test_nobody_can_type_a_special_token():
    tokenizer = smollm_like()
    ids, _ = chat.encode(tokenizer, [{"role": "user", "content": t} for t in ("<|im_start|>", "<|im_end|>",
                                                                              "<|endoftext|>")], "chatml")
    assert ids.count(tokenizer.special("<|im_start|>")) == ids.count(tokenizer.special("<|im_end|>")) == 3
    assert tokenizer.eot not in ids


def test_a_token_across_the_border_is_refused():
    """A tokenizer without any notion of words may join the end of a prompt to the beginning of an answer."""
    import tokenizers

    vocab = {c: i for i, c in enumerate(sorted(set("User: xAssitan\n")))} | {": ": 50}
    vocab = {k: i for i, k in enumerate(vocab)}
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[(":", " ")]))
    hf.decoder = tokenizers.decoders.Fuse()
    with pytest.raises(UserError, match="reaches from the prompt"):
        chat.encode(Tokenizer(hf), [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}],
                    "elite")


def test_fit_forgets_the_oldest():
    tokenizer = byte_tokenizer()
    whole = chat.fit(tokenizer, TALK, "elite", 1000)
    assert whole == chat.prompt(tokenizer, TALK, "elite")
    short = chat.fit(tokenizer, TALK, "elite", len(whole) - 1)
    assert short == chat.prompt(tokenizer, [TALK[0], *TALK[3:]], "elite")
    assert len(chat.fit(tokenizer, TALK, "elite", 10)) == 10
    assert len(chat.fit(tokenizer, TALK[:1], "elite", 10)) == len(chat.fit(tokenizer, [], "elite", 10)) == 10


def test_records():
    assert sft.conversation({"instruction": " a ", "input": "b", "output": "c"}, "") == [
        {"role": "user", "content": " a ", "input": "b"}, {"role": "assistant", "content": "c"}]
    gsm = sft.conversation({"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}, "")
    assert gsm[1]["content"] == "<<1+1=2>>2\n#### 2"
    talk = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
            {"from": "human", "value": "unanswered"}]
    assert [m["role"] for m in sft.conversation({"conversations": talk}, "")] == ["system", "user", "assistant"]
    cat = [{"role": "cat", "content": "x"}, {"role": "assistant", "content": ""}]
    for bad in ({}, {"messages": 5}, {"messages": cat}, {"messages": []},
                {"conversations": [{"from": "tool", "value": "x"}]}, [1], {"instruction": "a", "output": None},
                {"question": "a", "answer": "\ud800"}):
        with pytest.raises(UserError, match="line 7 is not a conversation"):
            sft.conversation(bad, "line 7")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A dataset of 60 sums and 20 greetings, the greetings three times."""
    folder = tmp_path_factory.mktemp("sft")
    sums = [{"question": f"{i} + {j}?", "answer": f"<<{i}+{j}={i + j}>>{i + j}"} for i in range(10) for j in range(6)]
    hello = [{"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello" * (i + 1)}]}
             for i in range(20)]
    for name, records in (("sums", sums), ("hello", hello)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    cfg = sft.Config(input=(str(folder / "sums.jsonl"), str(folder / "hello.jsonl")), weights=(1.0, 3.0), name="rows",
                     tokenizer="byte", block_size=96, val_fraction=0.15, data_dir=str(folder))
    sft.main(cfg)
    return folder / "rows"


def test_rows(rows):
    dataset, tokenizer = data.load(rows), byte_tokenizer()
    assert dataset.row_length == 96 and dataset.meta["template"] == "elite"
    texts = {}
    for split in data.SPLITS:
        tokens, mask = getattr(dataset, split), getattr(dataset, f"{split}_mask")
        assert len(tokens) % 96 == 1
        texts[split] = [tokenizer.decode(row) for row in tokens[:-1].reshape(-1, 96)]
        for row, counts in zip(tokens[:-1].reshape(-1, 96), mask[:-1].reshape(-1, 96), strict=True):
            text, answer = tokenizer.decode(row), tokenizer.decode(row[counts == 1])
            assert text.startswith("User: ") and text.split("Assistant:")[1] == answer
            assert counts.any() and row[counts == 1][-1] == tokenizer.eot
            assert (row[np.flatnonzero(counts)[-1]:] == tokenizer.eot).all()
    assert not set(texts["train"]) & set(texts["val"])
    greetings = [t for t in texts["train"] if "Hi" in t]
    assert len(greetings) == 3 * len(set(greetings)) and len(set(greetings)) + sum("Hi" in t for t in texts["val"]) < 20
    n_bytes = sum(len(t.split("Assistant:")[1].strip()) for t in texts["val"])
    assert dataset.bytes_per_token("val") == n_bytes / dataset.val_mask.sum()


def test_the_seed_says_what_is_held_out_and_in_which_order(tmp_path, monkeypatch):
    records = [{"question": f"{i}?", "answer": f"Number {i}."} for i in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))

    def rows_of(seed, split):
        sft.main(sft.Config(input=(str(tmp_path / "in.jsonl"),), name="ds", tokenizer="byte", block_size=48,
                            val_fraction=0.2, data_dir=str(tmp_path), seed=seed))
        tokens = getattr(data.load(tmp_path / "ds"), split)[:-1].reshape(-1, 48)
        return [byte_tokenizer().decode(row) for row in tokens]

    assert set(rows_of(1, "val")) != set(rows_of(2, "val"))
    monkeypatch.setattr(sft, "is_held_out", lambda messages, fraction, seed: "7" in messages[0]["content"])
    for split in data.SPLITS:
        first = rows_of(1, split)
        other = rows_of(2, split)
        assert sorted(first) == sorted(other) and first != other


def test_bits_per_byte_of_answers_by_hand(tmp_path):
    """All logits equal: a token in the loss costs log2(257) bits. " ab", a newline and the end are 5, for 2 bytes."""
    records = [{"question": f"A question of {i} tokens that are not in the loss?", "answer": "ab"} for i in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    sft.main(sft.Config(input=(str(tmp_path / "in.jsonl"),), name="ab", tokenizer="byte", block_size=96,
                        val_fraction=0.2, data_dir=str(tmp_path)))
    dataset = data.load(tmp_path / "ab")
    n = dataset.meta["documents"]["val"]
    assert dataset.meta["bytes"]["val"] == 2 * n and dataset.val_mask.sum() == 5 * n
    assert dataset.bytes_per_token("val") == dataset.bytes_per_token("train") == 2 / 5
    m = model.Model(model.Config(n_layer=1, n_embd=16, n_head=2, vocab_size=257, block_size=96))
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
    found = train.evaluate(m, dataset, torch.autocast("cpu", enabled=False))
    assert found["val_tokens"] == 5 * n
    assert found["val_bpb"] == pytest.approx(5 * math.log2(257) / 2, rel=1e-6)
    # the n-gram models see the answers alone: "abab...", of which val holds the trigrams aba and bab
    train_answers = b"ab" * dataset.meta["documents"]["train"]
    counts = [NGrams(), NGrams()]
    counts[0].add(np.frombuffer(train_answers, np.uint8))
    counts[1].add(np.frombuffer(b"ab" * n, np.uint8))
    assert dataset.meta["baselines"] == baselines(*counts) and dataset.meta["baselines"]["unigram"] < 1.1


def test_batches_are_rows(rows):
    """Every batch holds whole rows, each row once an epoch, without the padding that all have in common."""
    dataset = data.load(rows)
    n, seen = (len(dataset.train) - 1) // 96, []
    for step in range(n // 4):
        x, y = data.batch(dataset.train, step, 4, 96, 3, dataset.train_mask, 96)
        assert x.shape == y.shape and x.shape[1] % 32 == 0 and (y >= 0).any(1).all()
        for xs, ys in zip(x, y, strict=True):
            starts = [i for i in range(n) if (dataset.train[i * 96:i * 96 + x.shape[1]] == xs).all()]
            assert starts
            assert (ys >= 0).sum() == dataset.train_mask[starts[0] * 96:starts[0] * 96 + 96].sum()
            seen.append(bytes(xs.astype(np.uint8)))
    rows_of = {bytes(dataset.train[i * 96:i * 96 + 32].astype(np.uint8)) for i in range(n)}
    assert {s[:32] for s in seen} >= set(list(rows_of)[:1]) and len(set(s[:32] for s in seen)) >= len(rows_of) - 3
    with pytest.raises(UserError, match="--block_size=96"):
        data.batch(dataset.train, 0, 4, 64, 3, dataset.train_mask, 96)


def test_no_example_feels_another(rows):
    """The loss of a row does not change with what stands in the other rows."""
    dataset = data.load(rows)
    torch.manual_seed(0)
    m = model.Model(model.Config(n_layer=1, n_embd=16, n_head=2, vocab_size=257, block_size=96))
    x, y = map(torch.from_numpy, data.batch(dataset.train, 0, 4, 96, 3, dataset.train_mask, 96))
    alone = [m(x[i:i + 1], y[i:i + 1])[1] * (y[i] >= 0).sum() for i in range(4)]
    assert torch.allclose(m(x, y)[1] * (y >= 0).sum(), sum(alone), rtol=1e-5)


def test_training_learns_answers_only(rows, tmp_path):
    cfg = configurator.load(train.Config, dataset=str(rows), out_dir=str(tmp_path / "run"), max_steps=12, eval_every=12,
                            batch_size=4, block_size=96, n_layer=1, n_embd=32, n_head=2, device="cpu", dtype="float32")
    record = train.train(cfg)
    loaded = checkpoint.load(tmp_path / "run")
    assert loaded.meta["template"] == "elite" and record["val_loss"] < 5
    dataset = data.load(rows)
    m = checkpoint.load_model(loaded).eval()
    nats = 0.0
    for row, counts in zip(dataset.val[:-1].reshape(-1, 96), dataset.val_mask[:-1].reshape(-1, 96), strict=True):
        row, counts = torch.tensor(row.astype(int)), torch.tensor(counts)
        logp = m(row[None])[0][0].log_softmax(-1)
        nats -= sum(logp[t - 1, row[t]].item() for t in range(1, 96) if counts[t])
    assert record["val_loss"] == pytest.approx(nats / dataset.val_mask.sum(), rel=1e-3)
    assert record["val_tokens"] == dataset.val_mask.sum()
    with pytest.raises(UserError, match="--block_size=96"):
        train.train(replace(cfg, out_dir=str(tmp_path / "other"), model=replace(cfg.model, block_size=32)))


def test_it_says_to_chat_next_and_that_plain_text_loses_the_template(rows, toy, tmp_path, capsys):
    small = ["--max_steps=1", "--eval_every=1", "--batch_size=2", "--device=cpu", "--dtype=float32"]
    shape = ["--block_size=96", "--n_layer=1", "--n_embd=32", "--n_head=2"]
    train.main(*configurator.parse(train.Config, [*small, *shape, f"--dataset={rows}", f"--out_dir={tmp_path}/a"]))
    said = capsys.readouterr()
    assert said.out.endswith(f"python sample.py --checkpoint={tmp_path}/a --chat\n")
    assert "no chat template" not in said.err
    again = [*small, f"--init_from={tmp_path}/a", f"--dataset={toy}", f"--out_dir={tmp_path}/b"]
    train.main(*configurator.parse(train.Config, again))
    said = capsys.readouterr()
    assert said.out.endswith('--prompt "To be"\n') and "has no chat template" in said.err
    prepare(lambda: iter(["the cat sat. " * 99]), "kept", "tests", str(tmp_path / "a/step_000001/tokenizer.json"),
            data_dir=tmp_path)  # the remedy
    again[-2:] = [f"--dataset={tmp_path}/kept", f"--out_dir={tmp_path}/c"]
    train.main(*configurator.parse(train.Config, again))
    assert "no chat template" not in capsys.readouterr().err
    assert load.load(tmp_path / "c").tokenizer.record.template == load.load(tmp_path / "a").tokenizer.record.template


def test_the_terminal_asks_as_training_did(rows, tmp_path, monkeypatch, capsys):
    """What sample.py --chat gives the model for a second question is the beginning of a training example."""
    import sample

    cfg = configurator.load(train.Config, dataset=str(rows), out_dir=str(tmp_path / "run"), max_steps=1, batch_size=4,
                            block_size=96, n_layer=1, n_embd=16, n_head=2, device="cpu", dtype="float32")
    train.train(cfg)
    tokenizer, asked = byte_tokenizer(), []

    def generate(model, ids, max_new_tokens, generator, stop_ids, vocab_size, **sampling):
        asked.append((ids, max_new_tokens, sampling["temperature"], stop_ids))
        yield from tokenizer.encode(" Fine.\n")

    lines = iter(["How are you?", "/temp 0.5", "/max 7", "/temp x", "/what", "", "And you?", "/reset", "Hi", "/quit"])
    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    sample.main(sample.Config(checkpoint=str(tmp_path / "run"), chat=True, max_new_tokens=9))
    talk = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."},
            {"role": "user", "content": "And you?"}, {"role": "assistant", "content": "Fine."}]
    ids, counts = chat.encode(tokenizer, talk, "elite")
    assert ids[:len(asked[0][0])] == asked[0][0] and ids[:len(asked[1][0])] == asked[1][0]
    assert counts[len(asked[1][0])] and asked[1][1:] == (7, 0.5, {tokenizer.eot})
    assert asked[2][0] == tokenizer.encode("User: Hi\nAssistant:")
    shown = capsys.readouterr()
    assert shown.out.count("Fine.") == 3 and "/temp x" in shown.err and "/what is not a command" in shown.err
    sample.main(sample.Config(checkpoint=str(tmp_path / "run"), chat=True, prompt="Hi"))
    assert asked[3][0] == asked[2][0] and capsys.readouterr().out.strip() == "Fine."


def test_command_line(tmp_path):
    def call(*flags):
        return command("prepare/sft.py", *flags, f"--data_dir={tmp_path}")

    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"q{i}", "answer": f"a{i} ä"}) for i in range(50)))
    out = call(f"--input={file}", "--name=x", "--tokenizer=byte", "--show=1", "--template=alpaca")
    assert out.returncode == 0, out.stderr
    assert "\033[2m### Instruction:\nq" in out.stdout and "\033[0ma" in out.stdout
    assert data.load(tmp_path / "x").meta["template"] == "alpaca"
    good = [f"--input={file}", "--name=x", "--tokenizer=byte"]
    for flag, words in (("--input=", "--input"), (f"--input={tmp_path}/no.json", "no.json"),
                        ("--weights=1,2", "weights"), ("--weights=1e9", "weights"), ("--tokenizer=nosuch", "nosuch"),
                        ("--block_size=4", "block_size")):
        out = call(*good, flag)
        assert out.returncode == 1 and words in out.stderr.splitlines()[-1] and "Traceback" not in out.stderr


def test_what_is_left_out_is_counted(tmp_path, capsys):
    answers = ["yes"] * 30 + ["a long answer " * 9] * 3 + [" "] * 2
    records = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    sft.main(sft.Config(input=(str(tmp_path / "in.jsonl"),), name="ds", tokenizer="byte", block_size=48,
                        val_fraction=0.2, data_dir=str(tmp_path)))
    out, err = capsys.readouterr()
    assert "left out: 3 conversations longer than --block_size=48 tokens, 2 without an answer" in err
    n = data.load(tmp_path / "ds").meta["documents"]
    assert n["train"] + n["val"] == 30 and f"{n['train']} examples to train on, {n['val']} held out" in out


@pytest.mark.parametrize("weight,count", [(0.0, 0), (0.5, 2), (1.0, 3), (2.0, 6), (2.5, 8)])
def test_a_weight_by_hand(weight, count):
    """Of three examples; whole copies, and different ones for the rest."""
    found = sft.weighted(["a", "b", "c"], weight, np.random.default_rng(0))
    assert len(found) == count and sft.weighted([], weight, np.random.default_rng(0)) == []
    times = [found.count(name) for name in "abc"]
    assert max(times) - min(times) <= 1
