"""The sampler against brute force, decoding against full recomputation, one row or many."""
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

import model
from thimble.generate import Decoder, StopTexts, beam_search, draw, filter_logits, generate, greedy, write_texts
from thimble.tokenizer import char_tokenizer

V = 5


def tiny(seed=0, block_size=16):
    torch.manual_seed(seed)
    m = model.Model(model.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=V, block_size=block_size)).eval()
    with torch.no_grad():
        for p in m.parameters():
            p += 0.5 * torch.randn_like(p)
    return m


# ---- filter_logits
def by_hand(logits, seen=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Probabilities after every filter, with plain lists, straight from the definitions."""
    x = [v / repetition_penalty if v > 0 else v * repetition_penalty for v in logits]
    x = [a if i in set(seen) else b for i, (a, b) in enumerate(zip(x, logits, strict=True))]
    x = [v / temperature for v in x]

    def probs(kept):
        top = max(x)
        e = [math.exp(v - top) if i in kept else 0.0 for i, v in enumerate(x)]
        return [v / sum(e) for v in e]

    order = sorted(range(len(x)), key=lambda i: -x[i])
    kept = set(order[:top_k] if top_k else order)
    p, total, nucleus = probs(kept), 0.0, set()
    for i in order:
        if i in kept and (total < top_p or not nucleus):
            nucleus.add(i)
            total += p[i]
    p = probs(nucleus)
    return probs({i for i in nucleus if p[i] >= min_p * max(p)})


@pytest.mark.parametrize("how", [
    {}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"repetition_penalty": 1.7},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.3},
    {"top_p": 0.01}, {"top_k": 1}, {"top_k": 99},
])
@pytest.mark.score("E6")
def test_filters_equal_their_definitions(how, count, score):
    rng = np.random.default_rng(0)
    n = count(50, 2000)
    held = 0
    for _ in range(n):
        logits = rng.normal(size=8) * 3
        seen = rng.integers(8, size=4).tolist() * 3        # repeats: the penalty counts once per distinct token
        got = filter_logits(torch.tensor(logits), seen, **how).softmax(-1).tolist()
        held += np.allclose(got, by_hand(logits.tolist(), seen, **how), atol=1e-6)
    score(held, n, f"the sampler with {how or 'no filter'}")
    assert held == n


def test_top_p_keeps_the_token_that_crosses_it():
    p = filter_logits(torch.tensor([0.9, 0.06, 0.04]).log(), top_p=0.5).softmax(-1)
    assert p.tolist() == [1, 0, 0]                         # not all masked, as where the top token alone exceeds p
    p = filter_logits(torch.tensor([0.5, 0.3, 0.2]).log(), top_p=0.6).softmax(-1)
    assert p[2] == 0 and p[1] > 0.3


def test_the_penalty_never_makes_a_token_likelier():
    logits = torch.tensor([2.0, -2.0, 0.5])
    for token in range(3):
        after = filter_logits(logits, [token], repetition_penalty=1.5)
        assert after.softmax(-1)[token] < logits.softmax(-1)[token]


def test_temperature_zero_is_greedy_also_with_ties():
    assert filter_logits(torch.tensor([1.0, 3.0, 3.0]), temperature=0).softmax(-1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6, 1e300])
def test_extreme_temperatures_stay_numbers(temperature):
    p = filter_logits(torch.tensor([1.0, 3.0, 2.0]), temperature=temperature).softmax(-1)
    assert torch.allclose(p, torch.tensor([0.0, 1, 0] if temperature < 1 else [1 / 3] * 3), atol=1e-5)


def test_the_caller_keeps_his_logits():
    logits = torch.randn(5)
    kept = logits.clone()
    filter_logits(logits, [1], 0.5, 2, 0.5, 0.1, 2.0)
    assert torch.equal(logits, kept)


# ---- generate
def test_greedy_equals_recomputing_everything():
    m = tiny()
    ids = [1, 2, 3]
    got = list(generate(m, ids, 12, temperature=0))
    for _ in range(12):
        ids.append(int(m(torch.tensor([ids]))[0][0, -1].argmax()))
    assert got == ids[3:]


def test_draws_follow_the_distribution():
    m = tiny()
    p = m(torch.tensor([[1, 2]]))[0][0, -1].softmax(-1).tolist()
    g = torch.Generator().manual_seed(0)
    n = 4000
    counts = Counter(next(generate(m, [1, 2], 1, g)) for _ in range(n))
    for token in range(V):                                 # 5 standard deviations: a false alarm in a million
        assert abs(counts[token] - n * p[token]) < 5 * math.sqrt(n * p[token] * (1 - p[token])) + 1


def test_same_seed_same_text_and_another_seed_another():
    m = tiny()

    def text(seed):
        return list(generate(m, [0], 40, torch.Generator().manual_seed(seed)))
    assert text(1) == text(1) != text(2)


def test_long_prompts_and_long_texts_slide_the_window():
    m = tiny(block_size=16)
    long = torch.randint(V, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    assert next(generate(m, long, 1, temperature=0)) == int(m(torch.tensor([long[-16:]]))[0][0, -1].argmax())
    text = list(generate(m, [1], 60, temperature=0))
    assert len(text) == 60
    # when 16 tokens fill the context, the next one sees the last 8
    ids = [1, *text]
    assert ids[17] == int(m(torch.tensor([ids[9:17]]))[0][0, -1].argmax())


def test_it_ends_before_a_stop_id():
    m = tiny()
    free = list(generate(m, [1], 30, temperature=0))
    stop = free[5]
    assert list(generate(m, [1], 30, temperature=0, stop_ids={stop})) == free[:free.index(stop)]


@torch.no_grad()
def test_rows_without_a_token_are_never_chosen():
    m = tiny()
    assert set(generate(m, [1], 200, torch.Generator().manual_seed(0), vocab_size=3)) == {0, 1, 2}
    assert max(beam_search(m, [1], 8, beam=3, vocab_size=3)[0]) < 3


# ---- many rows
def test_a_draw_is_an_id_and_a_generator_repeats_it():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    def ids(seed):
        generator = torch.Generator().manual_seed(seed)
        return [draw(logits, generator) for _ in range(100)]
    assert ids(1) == ids(1) != ids(2) and set(ids(1)) == {0, 1, 3}
    assert draw(logits, temperature=0) == 3 and draw(logits, top_k=1) == 3
    assert draw(logits, seen=[3], temperature=0, repetition_penalty=3.0) == 1


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 16, 20])
def test_rows_equal_the_same_prompts_one_by_one(length):
    m = tiny(block_size=16)
    prompts = torch.randint(V, (4, length), generator=torch.Generator().manual_seed(length))
    new = greedy(m, prompts, 30)                           # past the context
    assert new.shape == (4, 30)
    for row, prompt in zip(new.tolist(), prompts.tolist(), strict=True):
        assert row == list(generate(m, prompt, 30, temperature=0))


@torch.no_grad()
def test_selected_rows_continue_as_if_they_were_alone():
    m = tiny(block_size=16)
    prompts = torch.randint(V, (3, 4), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(m, prompts, 12)
    decoder()
    decoder.select(torch.tensor([2, 0, 2]))                # a row twice, one dropped, the order changed
    assert torch.equal(decoder.idx, prompts[[2, 0, 2]])
    new = torch.randint(V, (3, 1), generator=torch.Generator().manual_seed(2))
    logits = decoder(new)
    whole = m(torch.cat((prompts[[2, 0, 2]], new), 1))[0][:, -1]
    assert torch.allclose(logits, whole, atol=1e-5)


def test_texts_side_by_side_equal_those_written_alone():
    tokenizer = char_tokenizer("abcd")
    m = tiny()
    assert tokenizer.vocab_size == V                       # the end of text is one of them
    seeds = [None, 1, 2, None, 3]
    found = write_texts(m, tokenizer, [1, 2], 40, {tokenizer.eot}, seeds=seeds, temperature=0.9)
    expected = []
    for seed in seeds:
        how = {"temperature": 0.0}
        if seed is not None:
            how = {"temperature": 0.9, "generator": torch.Generator().manual_seed(seed)}
        expected.append(tokenizer.decode(list(generate(m, [1, 2], 40, stop_ids={tokenizer.eot}, **how))))
    assert found == expected
    assert len({len(text) for text in found}) > 1          # some ended early, and the others went on without them


def test_texts_end_before_the_first_stop_text():
    tokenizer = char_tokenizer("abcd")
    m = tiny()
    free = write_texts(m, tokenizer, [1, 2], 40, seeds=[1, 2, 3, 4])
    assert len(free) == 4 and all(len(text) > 30 for text in free)
    stops = [free[0][5:7], free[1][9:12]]
    cut = write_texts(m, tokenizer, [1, 2], 40, stops=stops, seeds=[1, 2, 3, 4])
    for text, short in zip(free, cut, strict=True):
        assert short == text[:min(text.find(stop) if stop in text else len(text) for stop in stops)]
    assert len(cut[0]) <= 5 and len(cut[1]) <= 9


# ---- beam search
def log_p(m, ids, texts):
    """{text: log p} of every text after ids."""
    found = {}
    for _, same in itertools.groupby(sorted(texts, key=len), len):
        same = list(same)
        new = torch.tensor(same)                                                             # (texts, length)
        idx = torch.cat((torch.tensor(ids).expand(len(same), -1), new), 1)
        logp = m(idx)[0].double().log_softmax(-1)[:, len(ids) - 1:-1]
        found |= zip(same, logp.gather(2, new[..., None]).sum((1, 2)).tolist(), strict=True)
    return found


@torch.no_grad()
def test_a_wide_beam_finds_the_best_of_all_texts():
    for seed in range(5):
        m = tiny(seed)
        new, score = beam_search(m, [1, 2], 4, beam=V**4, length_penalty=0.0)
        all_ = log_p(m, [1, 2], itertools.product(range(V), repeat=4))
        best = max(all_, key=all_.get)
        assert tuple(new) == best and abs(score - all_[best]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0, 2.0])
def test_finished_texts_compete_by_their_length(alpha):
    for seed in range(5):
        m = tiny(seed)
        new, score = beam_search(m, [1], 4, beam=V**4, length_penalty=alpha, stop_ids={0})
        full = list(itertools.product(range(1, V), repeat=4))
        ended = [t + (0,) for n in range(4) for t in itertools.product(range(1, V), repeat=n)]
        scores = {t: p / len(t) ** alpha for t, p in log_p(m, [1], full + ended).items()}
        best = max(scores, key=scores.get)
        assert tuple(new) == tuple(t for t in best if t)
        assert abs(score - scores[best]) < 1e-4


@torch.no_grad()
def test_beam_1_is_greedy_and_a_wider_one_is_no_worse():
    for seed in range(5):
        m = tiny(seed, block_size=32)
        likeliest = list(generate(m, [1, 2], 12, temperature=0))
        new, score = beam_search(m, [1, 2], 12, beam=1)
        assert new == likeliest
        assert beam_search(m, [1, 2], 12, beam=8)[1] >= score - 1e-6


@torch.no_grad()
def test_beam_search_goes_on_past_the_context():
    m = tiny(block_size=8)
    assert beam_search(m, [1, 2, 3], 20, beam=1)[0] == list(generate(m, [1, 2, 3], 20, temperature=0))


# ---- stop texts
@pytest.mark.parametrize("pieces, stops, shown", [
    (["ab", "cd"], [], "abcd"), (["ab", "cd"], ["bc"], "a"), (["ab", "cx"], ["bcd"], "abcx"),
    (["a", "b", "c", "d"], ["cd", "b"], "a"), (["one\n", "\ntwo"], ["\n\n"], "one"), (["aab"], ["ab"], "a"),
    (["x"], ["x"], ""), (["ab"], ["", "b"], "a"),
])
def test_stop_texts_across_tokens(pieces, stops, shown):
    held, out = StopTexts(stops), ""
    for piece in pieces:
        out += held(piece)
        if held.done:
            break
    if not held.done:
        out += held("", last=True)
    assert out == shown
