"""Counts of bytes, tokens and words equal plain twins, however the text comes in blocks."""
import math
from collections import Counter

import numpy as np
import pytest
from conftest import prose

from prepare.text import prepare
from thimble import data, ngrams


def twin_baselines(train, val, vocab_size=256):
    """Witten-Bell, interpolated, by dictionaries; contexts are those of trigrams."""
    orders = [Counter(train[i + 2 - k : i + 3] for i in range(len(train) - 2)) for k in range(3)]

    def p(gram):
        if not gram:
            return 1 / vocab_size
        follow = {g: n for g, n in orders[len(gram) - 1].items() if g[:-1] == gram[:-1]}
        total, kinds, lower = sum(follow.values()), len(follow), p(gram[1:])
        return (follow.get(gram, 0) + kinds * lower) / (total + kinds) if total else lower

    grams = [val[i : i + 3] for i in range(len(val) - 2)]
    return [-sum(math.log2(p(gram[2 - k :])) for gram in grams) / len(grams) for k in range(3)]


def test_baselines_equal_a_plain_twin():
    document = prose(200).encode() + "é日".encode() * 5
    train, val = document[:700], document[700:]
    counts = []
    for part in (train, val):
        counter = ngrams.Counter(len(document))
        for i in range(0, len(part), 11):
            counter.add(part[i : i + 11])
            if i % 3 == 0:
                counter.flush()
        counter.flush(final=True)
        counts.append(counter.ngrams)
    ours = ngrams.baselines(*counts)
    assert list(ours.values()) == pytest.approx([8.0, *twin_baselines(train, val)], abs=1e-9)


# Counted by hand. The trigrams of "aabaa" are aab, aba, baa; that of "aab" is aab. An n-gram model of order n
# counts the last n bytes of each trigram and p(c|h) = (n(hc) + t(h) p(c|h')) / (n(h) + t(h)):
#   p(b) = (1 + 2/256) / (3 + 2); a and b follow the empty context, 3 times in all
#   p(b|a) = (1 + 2 p(b)) / (2 + 2); the last two bytes are ab, ba, aa, so that a is followed by b once and a once
#   p(b|aa) = (1 + 1 p(b|a)) / (1 + 1); aa is followed by b alone
P1 = (1 + 2 / 256) / 5
P2 = (1 + 2 * P1) / 4
P3 = (1 + P2) / 2
BY_HAND = {"uniform": 8.0, "unigram": -math.log2(P1), "bigram": -math.log2(P2), "trigram": -math.log2(P3)}


def test_baselines_by_hand():
    assert (P1, P2, P3) == (0.2015625, 0.35078125, 0.675390625)
    train, val = ngrams.NGrams(), ngrams.NGrams()
    train.add(np.frombuffer(b"aabaa", np.uint8))
    val.add(np.frombuffer(b"aab", np.uint8))
    assert ngrams.baselines(train, val) == pytest.approx(BY_HAND, abs=1e-12)


def test_the_baselines_of_a_dataset_by_hand(tmp_path):
    """One document whose last three bytes are val: what stands in meta.json is counted on train, scored on val."""
    folder = prepare(lambda: iter(["aabaaaab"]), "ds", "a test", "byte", val_fraction=3 / 8, data_dir=tmp_path)
    dataset = data.load(folder)
    assert bytes(dataset.train.astype(np.uint8)) == b"aabaa" and bytes(dataset.val.astype(np.uint8)) == b"aab"
    assert dataset.meta["baselines"] == pytest.approx(BY_HAND, abs=1e-12)


def test_a_large_vocabulary_equals_a_plain_twin():
    words = prose(1500).split()
    ids = [70_000 + sorted(set(words)).index(word) for word in words]
    train, val = ids[:1200], ids[1200:]
    ours = ngrams.witten_bell(ngrams.trigrams(train, 100_000), ngrams.trigrams(val, 100_000), 100_000)
    assert ours == pytest.approx(twin_baselines(tuple(train), tuple(val), 100_000), abs=1e-9)


def test_too_little_text_for_a_trigram_leaves_the_uniform():
    val = ngrams.trigrams([1, 2, 3, 4], 10)
    for train in ([], [1], [1, 2]):
        assert ngrams.witten_bell(ngrams.trigrams(train, 10), val, 10) == pytest.approx([math.log2(10)] * 3)


@pytest.mark.parametrize("block", [37, 1000, 10**6])
def test_overlap_equals_a_plain_twin(block):
    words = prose(3000, seed=2).split()
    train = ["  ".join(words[:1500]), " ".join(words[1500:1520]), "one two"]
    val = [" \n".join(words[1000:1100]), prose(200, seed=3), " ".join(words[1510:1530])]

    def grams(documents):
        split = [document.split() for document in documents]
        return {tuple(doc[i : i + 13]) for doc in split for i in range(len(doc) - 12)}

    found = []
    for documents in (train, val):
        counter = ngrams.WordGrams(10_000)
        stream = b"".join(document.encode() + counter.END for document in documents)
        for i in range(0, len(stream), block):
            counter.add(stream[i : i + block], final=i + block >= len(stream))
        found.append(set(counter.merge().tolist()))
    assert [len(part) for part in found] == [len(grams(train)), len(grams(val))]
    assert len(found[0] & found[1]) == len(grams(train) & grams(val)) > 50


def test_overlap_of_much_text_is_sampled(monkeypatch):
    monkeypatch.setattr(ngrams, "MAX_GRAMS", 500)
    stream = prose(30_000, seed=5).encode()
    counter = ngrams.WordGrams(len(stream))
    counter.add(stream, final=True)
    assert 300 < len(counter.merge()) < 1000


