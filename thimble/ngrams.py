"""Counting bytes: what a model must beat to have learned anything."""

import numpy as np


class NGrams:
    """Counts of byte trigrams in fixed memory; bigrams and unigrams are their sums."""

    def __init__(self):
        self.counts = np.zeros(1 << 24, np.uint32)
        self.last = np.zeros(0, np.uint8)

    def add(self, block):
        block = np.concatenate([self.last, block])
        self.last = block[-2:]
        if len(block) > 2:
            wide = block.astype(np.uint32)
            keys, n = np.unique(wide[:-2] << 16 | wide[1:-1] << 8 | wide[2:], return_counts=True)
            self.counts[keys] += n.astype(np.uint32)


def baselines(train, val):
    """Bits per byte of n-gram models counted on `train` and scored on `val` (two NGrams), whole split, no tuning.

    Interpolated Witten-Bell (Chen and Goodman 1998): p(c|h) = (n(hc) + t(h) p(c|h')) / (n(h) + t(h)), where h' is h
    without its first byte, n counts and t(h) is how many different bytes follow h; below the unigrams lies 1/256.
    """

    def sums(keys, weights, size):
        return np.bincount(keys, weights, minlength=size)

    k3 = np.flatnonzero(train.counts)
    n3 = train.counts[k3].astype(float)
    n2, n1 = sums(k3 & 0xFFFF, n3, 65536), sums(k3 & 0xFF, n3, 256)
    k2, k1 = np.flatnonzero(n2), np.flatnonzero(n1)

    v3 = np.flatnonzero(val.counts)
    weight = val.counts[v3] / max(1, val.counts[v3].sum())
    v2, v1 = v3 & 0xFFFF, v3 & 0xFF
    p1 = (n1[v1] + len(k1) / 256) / (n1.sum() + len(k1))
    context, kinds = sums(k2 >> 8, n2[k2], 256)[v2 >> 8], sums(k2 >> 8, None, 256)[v2 >> 8]
    p2 = np.where(kinds, (n2[v2] + kinds * p1) / np.maximum(context + kinds, 1), p1)
    context, kinds = sums(k3 >> 8, n3, 65536)[v3 >> 8], sums(k3 >> 8, None, 65536)[v3 >> 8]
    p3 = np.where(kinds, (train.counts[v3] + kinds * p2) / np.maximum(context + kinds, 1), p2)
    bits = [float(-(weight * np.log2(p)).sum()) for p in (p1, p2, p3)]
    return {"uniform": 8.0} | dict(zip(("unigram", "bigram", "trigram"), bits, strict=True))
