"""Tokenizers made here: byte-level BPE trained on a text, and exact twins of tiktoken's encodings."""
import re

from thimble.files import UserError, need
from thimble.tokenizer import AWKWARD, EOT, PRETOKENIZERS, Tokenizer, byte_alphabet, byte_level, guard, pre_tokenizer_of


# ---- byte-level BPE
def check_bpe(vocab_size, pretokenizer):
    """UserError if train_bpe would refuse these, known before any text is read."""
    if pretokenizer not in PRETOKENIZERS:
        raise UserError(f"--pretokenizer={pretokenizer} is not one of {', '.join(PRETOKENIZERS)}")
    if vocab_size < 257:
        raise UserError(f"--vocab_size={vocab_size} is too small: 256 bytes and {EOT} need 257 ids")


def train_bpe(texts, vocab_size, pretokenizer="gpt2"):
    """Byte-level BPE of at most `vocab_size` ids, end of text included, trained on an iterable of strings."""
    from tokenizers import trainers  # 30 ms that --help need not wait for

    check_bpe(vocab_size, pretokenizer)
    hf = byte_level({}, [], pre_tokenizer_of(pretokenizer))
    # every byte has a token, whether it occurs in `texts` or not, so that any text can be encoded
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=byte_alphabet(),
                                  show_progress=False)
    guard("training the tokenizer", hf.train_from_iterator, texts, trainer=trainer)
    return Tokenizer(hf)


# ---- tiktoken's
def tiktoken_tokenizer(name):
    """OpenAI's encoding `name` (gpt2, cl100k_base, ...) with the same ids."""
    tiktoken = need("tiktoken", f"--tokenizer=tiktoken:{name}")
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise UserError(f"tiktoken has no encoding {name!r}; it has {', '.join(names)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # one of many errors of requests, or ValueError where the file has another hash
        raise UserError(f"tiktoken could not download {name} ({type(error).__name__}). Without a network, copy its "
                        "cache from a machine that has one and set TIKTOKEN_CACHE_DIR to that folder") from None
    return from_tiktoken(encoding)


def from_tiktoken(encoding):
    """The Tokenizer of a tiktoken.Encoding; UserError if the two do not agree on a list of awkward strings.

    tiktoken has only the tokens, each with a rank that is also its id: it joins the pair whose join has the lowest
    rank. The tokenizers library has a list of merges, which is worked out here.
    """
    ranks = encoding._mergeable_ranks
    specials = encoding._special_tokens
    vocab = {_printable(token): rank for token, rank in ranks.items()} | specials
    taken = set(vocab.values())
    for i in range(max(taken)):
        if i not in taken:  # cl100k_base has gaps
            vocab[f"<|unused_{i}|>"] = i

    merges = []
    for token in sorted(ranks, key=ranks.get):
        # all merges of a lower rank leave the two halves whose merge this token is. A token that merges do not lead to
        # is found only where it is a whole word, which is what ignore_merges is for
        halves = _merge(ranks, token)
        if len(halves) == 2:
            merges.append((_printable(halves[0]), _printable(halves[1])))

    if encoding.name in ("gpt2", "r50k_base", "p50k_base"):
        split = "gpt2"
    else:
        # the regex engine reads {1,3}+ as "once or more of {1,3}"; possessiveness makes no difference in these patterns
        split = re.sub(r"(\{\d+,\d*\})\+", r"\1", encoding._pat_str)
    hf = byte_level(vocab, merges, pre_tokenizer_of(split), ignore_merges=True)
    hf.add_special_tokens(sorted(specials, key=specials.get))
    tokenizer = Tokenizer(hf, name=encoding.name)
    for text in AWKWARD:
        if tokenizer.encode(text) != encoding.encode(text, disallowed_special=()):
            raise UserError(f"tiktoken's {encoding.name} cannot be converted exactly: the two differ on {text!r}")
    return tokenizer


def _printable(token):
    """Bytes in the alphabet of a byte-level vocabulary."""
    return "".join(byte_alphabet()[byte] for byte in token)


def _merge(ranks, token):
    """The parts of `token` after all BPE merges of a rank below its own; one part only if it is a single byte."""
    limit = ranks[token]
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in zip(parts, parts[1:], strict=False)]
        if min(pairs) >= limit:
            break
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
