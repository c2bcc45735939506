"""Counting: the bits per byte that a model must beat to have learned more than which characters follow which.

    counts = {"train": NGrams(), "val": NGrams()}
    counts["train"].add(block)                             # (n,) uint8, as often as there is more
    baselines(counts["train"], counts["val"])              # {"uniform": 8.0, "unigram": ..., "bigram": ..., ...}
"""
import numpy as np

# of byte trigrams: 2^24 counters of 4 bytes are 64 MB, however long the text is
N_BYTE_TRIGRAMS = 256**3


class NGrams:
    """Counts of the byte trigrams of a text that comes in blocks, in fixed memory."""

    def __init__(self):
        self.counts = np.zeros(N_BYTE_TRIGRAMS, np.uint32)
        self.last = np.zeros(0, np.uint8)                  # the end of the block before, where a trigram may begin

    def add(self, block):
        """Count on with `block`, (n,) uint8."""
        block = np.concatenate([self.last, block])
        self.last = block[-2:]
        keys, counts = trigrams(block, 256)
        self.counts[keys] += counts.astype(np.uint32)

    def trigrams(self):
        """The (keys, counts) of `trigrams` for the whole text."""
        keys = np.flatnonzero(self.counts)
        return keys, self.counts[keys].astype(np.int64)


def trigrams(ids, vocab_size):
    """ids (n,) below vocab_size -> (keys, counts) of the different trigrams abc, sorted by key (a V + b) V + c."""
    ids = np.asarray(ids, np.int64)                        # V^3 fits up to a vocabulary of 2 million
    return np.unique((ids[:-2] * vocab_size + ids[1:-1]) * vocab_size + ids[2:], return_counts=True)


def baselines(train, val):
    """Bits per byte of n-gram models counted on `train` and scored on `val` (two NGrams), the whole split."""
    bits = witten_bell(train.trigrams(), val.trigrams(), 256)
    return {"uniform": 8.0} | dict(zip(("unigram", "bigram", "trigram"), bits, strict=True))


def witten_bell(train, val, vocab_size):
    """[bits per symbol of a unigram, a bigram and a trigram model], counted on `train` and scored on `val`.

    Both are (keys, counts) of `trigrams`; shorter n-grams are the tails of trigrams, so all three models score the
    same symbols. Interpolated Witten-Bell (Chen and Goodman 1998), which has nothing to tune:

        p(c|h) = (n(hc) + t(h) p(c|h')) / (n(h) + t(h))

    n counts, t(h) is how many different symbols follow h, and h' is h without its first symbol; below the unigrams
    lies the uniform 1/V.
    """
    keys, counts = train
    val_keys, val_counts = val
    weights = val_counts / max(1, val_counts.sum())
    p = np.full(len(val_keys), 1 / vocab_size)             # of the last symbol of each trigram in val
    bits = []
    for n in (1, 2, 3):
        # the last n symbols of a key are its rest by V^n, and all of them but the last are that divided by V
        grams, place = np.unique(keys % vocab_size**n, return_inverse=True)
        n_gram = np.bincount(place, counts)
        contexts, place, kinds = np.unique(grams // vocab_size, return_inverse=True, return_counts=True)
        n_context = np.bincount(place, n_gram)

        gram = val_keys % vocab_size**n
        context = gram // vocab_size
        total = look_up(contexts, n_context, context)
        t = look_up(contexts, kinds, context)
        # a context that train does not have says nothing: the shorter one speaks
        p = np.where(t, (look_up(grams, n_gram, gram) + t * p) / np.maximum(total + t, 1), p)
        bits.append(float(-(weights * np.log2(p)).sum()))
    return bits


def look_up(keys, values, wanted):
    """The value of each wanted key in the sorted `keys`; 0 for those that are not there."""
    at = np.searchsorted(keys, wanted)
    keys = np.append(keys, -1)                             # for what is beyond the last key
    values = np.append(values, 0)
    return np.where(keys[at] == wanted, values[at], 0)
