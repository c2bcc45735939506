"""Continuous batching without a network: the engine turn by turn, and the model itself as the reference."""
import importlib
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from thimble.engine import Engine, Sequence, free_memory
from thimble.files import UserError
from thimble.generate import generate
from thimble.load import deployed
from thimble.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
BASE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": TOKENIZER.vocab_size, "block_size": 96}
KINDS = {"dense": ("model", {"n_kv_head": 2}), "ternary": ("ternary", {}), "hybrid": ("hybrid_ssm", {"ssm": "mamba2"}),
         "mamba1": ("hybrid_ssm", {"ssm": "mamba1"})}


def tiny(kind="dense", **extra):
    arch, more = KINDS[kind]
    module, generator = importlib.import_module(arch), torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    m = module.Model(module.Config(**BASE | more | extra)).eval()
    with torch.no_grad():
        for p in m.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return deployed(m)


def prompts(n, longest=40):
    generator = torch.Generator().manual_seed(2)
    return [[int(i) for i in torch.randint(97, 123, (1 + k * 7 % longest,), generator=generator)] for k in range(n)]


def test_only_keys_and_values_of_the_whole_context_are_cut():
    model = tiny()
    init_cache = model.init_cache
    for layout, cuttable in ((lambda t: t, True), (lambda t: t.transpose(1, 2), False), (lambda t: t[:, :, :9], False)):
        def changed(*size, layout=layout):
            cache = init_cache(*size)
            return cache | {"layers": [{k: layout(t) for k, t in layer.items()} for layer in cache["layers"]]}
        model.init_cache = changed
        model.step = lambda idx, cache: (torch.zeros(len(idx), 257), cache)
        assert Engine(model, TOKENIZER, set(), 2).cuttable == cuttable
    assert not Engine(tiny("hybrid"), TOKENIZER, set(), 2).cuttable


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_a_batch_that_does_not_fit_is_refused_before_it_is_allocated(kind, monkeypatch):
    model = tiny(kind)
    rows = []
    init_cache = model.init_cache
    model.init_cache = lambda n, size: rows.append(n) or init_cache(n, size)
    monkeypatch.setattr("thimble.engine.free_memory", lambda device: 2e6)
    with pytest.raises(UserError, match=r"--max_batch=5000: 5,000 rows of 96 tokens need .* GB, but 0.0 GB") as e:
        Engine(model, TOKENIZER, set(), 5000)
    assert rows == [1]
    fits = int(re.search(r"use --max_batch=(\d+) or less", str(e.value))[1])
    assert fits > 5 and Engine(model, TOKENIZER, set(), fits).max_batch == fits


def test_free_memory_is_that_of_the_machine():
    free = free_memory(torch.device("cpu"))
    assert free == math.inf or 1e6 < free <= 1024 * int(re.search(r"\d+", Path("/proc/meminfo").read_text())[0])
    assert free_memory(torch.device("meta")) == math.inf


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_whoever_joins_and_leaves_the_others_write_what_they_would_alone(kind):
    """Turn by turn, without a network: prompts that share beginnings, filled in parts; clients that leave at any time;
    a model that fails now and then. The rows stay in order, and no text or log-probability differs.
    """
    model, draw = tiny(kind), random.Random(0)
    engine = Engine(model, TOKENIZER, {TOKENIZER.eot}, 4, prompt_chunk=7)
    known, waiting, finished = prompts(4), [], 0
    reported = {}  # sequence -> log-probabilities
    for _ in range(500):
        if draw.random() < 0.25:
            begin = draw.choice(known[:4] + known[-6:])
            ids = (begin[:draw.randrange(1, 97)] + draw.choice(prompts(9, 12)))[:96]
            room = draw.choice([1, 3, 20, 97 - len(ids)])
            echo = draw.choice([None, None, TOKENIZER.decode(ids)])
            sequence = Sequence(ids, min(room, 97 - len(ids)), TOKENIZER.stream(), sampling={"temperature": 0},
                                echo=echo, top=draw.choice([None, 2]))
            reported[sequence] = []
            waiting += [sequence] if engine.submit([sequence], 6) else []
        if waiting and draw.random() < 0.1:
            engine.cancel([waiting.pop(draw.randrange(len(waiting)))])
        if not (engine.waiting or engine.n_running or engine.filling):
            continue
        if draw.random() < 0.02:
            running = [row.sequence for row in engine.rows if row.sequence]
            waiting = [s for s in waiting if s not in running]
            engine.reset()
        engine.turn()
        for i, row in enumerate(engine.rows):
            assert (row.sequence is not None) == (i < engine.n_running or row is engine.filling)
            assert row is not engine.filling or i == engine.n_running
        for s, _, entries, finish in engine.events:
            reported[s] += [entry.logprob for entry in entries]
            if not finish or s.cancelled:
                continue
            new = list(generate(model, s.prompt, s.max_new_tokens, None, (TOKENIZER.eot,), TOKENIZER.vocab_size,
                                temperature=0))
            assert [i for i in s.out if i != TOKENIZER.eot] == new
            text = s.prompt + s.out
            logp = model(torch.tensor([text[:96]]))[0][0].log_softmax(-1)
            expected = [logp[i - 1, token].item() for i, token in enumerate(text)][0 if s.echo else len(s.prompt):]
            if s.top is not None:  # ternary: where rounding tips over, more
                if s.echo:
                    assert reported[s].pop(0) is None and expected.pop(0)
                assert reported[s] == pytest.approx(expected, abs=0.2 if kind == "ternary" else 2e-4)
            waiting, finished = [w for w in waiting if w is not s], finished + 1
            known.append(text)
        engine.events = []
    assert finished > 20 and engine.counts["prompt_tokens_reused"] > 0


def test_a_tokens_text_begins_where_its_own_characters_do():
    """By hand: of `new`, the last characters are the token's own; what stands before them belongs to earlier ones."""
    engine = object.__new__(Engine)
    engine.tokenizer = TOKENIZER
    end = "<|endoftext|>"
    assert TOKENIZER.decode([TOKENIZER.eot], skip_special=False) == end
    for token, new, offset in ((97, "a", 10), (97, "\ufffda", 11), (97, "", 10), (TOKENIZER.eot, "\ufffd" + end, 11),
                               (TOKENIZER.eot, "", 10), (TOKENIZER.eot, "|>", 10)):
        sequence = SimpleNamespace(length=10, top=2)
        entry = engine.entry(sequence, token, new, None)
        assert (entry.offset, sequence.length) == (offset, 10 + len(new))
    logprobs = torch.randn(TOKENIZER.vocab_size + 3).log_softmax(-1)  # rows beyond the vocabulary are named to nobody
    logprobs[-1] = 5.0
    entry = engine.entry(SimpleNamespace(length=0, top=2), 97, "a", logprobs)
    best = sorted(range(TOKENIZER.vocab_size), key=lambda i: -logprobs[i].item())[:2]
    assert entry.top == [(i, logprobs[i].item()) for i in best] and entry.logprob == logprobs[97].item()
