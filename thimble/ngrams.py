"""Counting a text: the bits per byte that a model must beat, and how much of val is in train too.

    train, val = Counter(n_bytes), Counter(n_bytes)
    train.add(b"some text")                                # and so on; flush(final=True) once at the end of each
    baselines(train.ngrams, val.ngrams)                    # {"uniform": 8.0, "unigram": ..., "bigram": ..., ...}
    overlap(train.words, val.words)                        # 0.01: one 13-gram of words in a hundred
"""
import numpy as np

MB = 1 << 20
GRAM = 13  # words; the length that GPT-3's authors took for the overlap between training and test sets
MAX_GRAMS = 4_000_000  # hashes kept of a split; of more, a fixed share


class Counter:
    """Both counts of one split, in blocks of a MB, so that many short documents cost no more than a long one."""

    def __init__(self, n_bytes):
        self.ngrams = NGrams()
        self.words = WordGrams(n_bytes)
        self.parts = []  # not counted yet
        self.size = 0  # bytes in them

    def add(self, part):
        self.parts.append(part)
        self.size += len(part)
        if self.size >= MB:
            self.flush()

    def flush(self, final=False):
        block = b"".join(self.parts)
        self.parts = []
        self.size = 0
        self.words.add(block, final)
        self.ngrams.add(np.frombuffer(block.replace(WordGrams.END, b""), np.uint8))


# ---- n-grams of bytes or tokens
class NGrams:
    """Counts of the byte trigrams of a text that comes in blocks, in fixed memory."""

    def __init__(self):
        self.counts = np.zeros(256**3, np.uint32)  # 64 MB, however long the text is
        self.last = np.zeros(0, np.uint8)  # the end of the block before: a trigram may begin in it

    def add(self, text):
        """Count `text`, (n,) uint8, which continues the text so far."""
        for start in range(0, len(text), MB):
            block = np.concatenate([self.last, text[start:start + MB]])
            self.last = block[-2:]
            keys, counts = trigrams(block, 256)
            self.counts[keys] += counts.astype(np.uint32)

    def trigrams(self):
        """The (keys, counts) of `trigrams` for the whole text."""
        keys = np.flatnonzero(self.counts)
        return keys, self.counts[keys].astype(np.int64)


def trigrams(ids, vocab_size):
    """ids (n,) below vocab_size -> (keys, counts) of the different trigrams abc, sorted by key (a V + b) V + c."""
    ids = np.asarray(ids, np.int64)  # V^3 fits up to a vocabulary of 2 million
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
    p = np.full(len(val_keys), 1 / vocab_size)  # of the last symbol of each trigram in val
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
        # a context that train does not have falls back to the shorter one
        p = np.where(t, (look_up(grams, n_gram, gram) + t * p) / np.maximum(total + t, 1), p)
        bits.append(float(-(weights * np.log2(p)).sum()))
    return bits


def look_up(keys, values, wanted):
    """The value of each wanted key in the sorted `keys`; 0 for those that are not there."""
    at = np.searchsorted(keys, wanted)
    keys = np.append(keys, -1)  # for what is beyond the last key
    values = np.append(values, 0)
    return np.where(keys[at] == wanted, values[at], 0)


# ---- n-grams of words
class WordGrams:
    """The different 13-grams of words in a text that comes in blocks, as 64-bit hashes; of too many, a fixed share."""

    END = b" \0 "  # stands between documents: a word of its own, and 13-grams across it are left out

    def __init__(self, n_bytes):
        # about 5 bytes a word. A hash is kept or not by its value, so that train and val keep the same 13-grams
        share = min(1.0, MAX_GRAMS / (n_bytes / 5 + 1))
        self.limit = np.uint64(min(share * 2**64, 2**64 - 2048))  # the largest float below 2^64
        self.seen = np.zeros(0, np.uint64)  # sorted, each once
        self.fresh = []  # arrays that are not merged into `seen` yet
        self.carry = b""  # the last 13 words and what follows: the next block's 13-grams may begin there

    def add(self, block, final=False):
        """Count `block`, bytes, which continues the text so far. final: nothing follows, its last word is complete."""
        block = self.carry + block
        text = np.frombuffer(block, np.uint8)
        is_word = (text > 32) | (text == 0)  # all but white space and control characters
        edges = np.flatnonzero(np.diff(is_word, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        if len(starts) < GRAM:
            self.carry = block
            return
        self.carry = block[starts[-GRAM]:]
        words = hash_words(text[is_word], ends - starts)

        n = len(words) - GRAM + 1
        grams = np.zeros(n, np.uint64)  # of the 13 words from each word on
        for k in range(GRAM):
            grams = grams * PRIME + words[k:k + n]  # modulo 2^64, as everywhere here
        grams = mix(grams)

        ends_before = np.concatenate([[0], np.cumsum(text[starts] == 0)])  # of documents, before each word
        within = ends_before[GRAM:] == ends_before[:-GRAM]
        keep = within & (grams <= self.limit)
        if not final:
            keep[-1] = False  # its last word may continue in the next block
        self.fresh.append(np.unique(grams[keep]))
        if sum(map(len, self.fresh)) > MAX_GRAMS // 4:
            self.merge()

    def merge(self):
        """The hashes so far, (n,) uint64, sorted, each once."""
        self.seen = np.unique(np.concatenate([self.seen, *self.fresh]))
        self.fresh = []
        return self.seen


PRIME = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio; any odd number with mixed bits does


def hash_words(letters, lengths):
    """The bytes of words, one word after another, and the length of each -> (n_words,) uint64.

    A word is a polynomial in PRIME, whose coefficients are its bytes plus 1, so that leading zeros count too.
    """
    first = np.cumsum(lengths) - lengths  # where each word begins
    place = np.arange(len(letters)) - np.repeat(first, lengths)  # of each byte in its word
    powers = np.full(lengths.max(), PRIME)
    powers[0] = 1
    powers = np.cumprod(powers)
    return mix(np.add.reduceat((letters.astype(np.uint64) + np.uint64(1)) * powers[place], first))


def mix(x):
    """MurmurHash3's finalizer on uint64: every bit of the result depends on every bit of x."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))


def overlap(train, val):
    """The share of val's different 13-grams that train (both WordGrams) has too; None if val has no 13-gram."""
    grams = val.merge()
    if not len(grams):
        return None
    return float(np.isin(grams, train.merge()).mean())
