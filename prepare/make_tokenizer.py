"""Tokenizers made here: byte-level BPE trained on a text, and exact twins of tiktoken's encodings."""

import re

from thimble.files import UserError
from thimble.tokenizer import AWKWARD, EOT, PRETOKENIZERS, Tokenizer, byte_alphabet, byte_level, guard, pre_tokenizer_of


def train_bpe(texts, vocab_size, pretokenizer="gpt2"):
    """Byte-level BPE of at most `vocab_size` ids, end of text included, trained on an iterable of strings."""
    from tokenizers import trainers

    check_bpe(vocab_size, pretokenizer)
    hf = byte_level({}, [], pre_tokenizer_of(pretokenizer))
    alphabet = byte_alphabet()  # all of it, so that any text can be told
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    guard("training the tokenizer", hf.train_from_iterator, texts, trainer=trainer)
    return Tokenizer(hf)


def check_bpe(vocab_size, pretokenizer):
    if pretokenizer not in PRETOKENIZERS:
        raise UserError(f"pretokenizer must be one of {', '.join(PRETOKENIZERS)}, not {pretokenizer!r}")
    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes and {EOT} need 257")


def tiktoken_tokenizer(name):
    """OpenAI's encoding `name` (gpt2, cl100k_base, ...) with the same ids, as a tokenizers.Tokenizer."""
    try:
        import tiktoken
    except ImportError:
        raise UserError(f"--tokenizer=tiktoken:{name} needs the package tiktoken: pip install tiktoken") from None
    if name not in tiktoken.list_encoding_names():
        names = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"tiktoken knows no encoding {name!r}; it has {names}")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # requests, its many errors, or ValueError where the hash of the file is wrong
        raise UserError(
            f"tiktoken could not fetch {name} ({type(error).__name__}). Without a network, let the environment "
            "variable TIKTOKEN_CACHE_DIR name a folder that holds its files from a machine that has one"
        ) from None
    return from_tiktoken(encoding)


def from_tiktoken(encoding):
    """The same for a tiktoken.Encoding; raises UserError if the two do not agree on a list of awkward strings."""
    ranks, specials = encoding._mergeable_ranks, encoding._special_tokens
    alphabet = byte_alphabet()

    def printable(token):
        return "".join(alphabet[byte] for byte in token)

    vocab = {printable(token): rank for token, rank in ranks.items()} | specials
    taken = set(vocab.values())
    vocab |= {f"<|unused_{i}|>": i for i in range(max(taken)) if i not in taken}  # cl100k_base has gaps
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        # all merges of lower rank leave the two halves whose merge this token is; a token that they do not lead to
        # is only ever found whole, which ignore_merges does
        halves = _merge(ranks, token)
        if len(halves) == 2:
            merges.append((printable(halves[0]), printable(halves[1])))
    # The regex engine reads {1,3}+ as "once or more of {1,3}"; there possessiveness makes no difference.
    pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", encoding._pat_str)
    preset = "gpt2" if encoding.name in ("gpt2", "r50k_base", "p50k_base") else pattern
    hf = byte_level(vocab, merges, pre_tokenizer_of(preset), ignore_merges=True)
    hf.add_special_tokens(sorted(specials, key=specials.get))
    tokenizer = Tokenizer(hf, name=encoding.name)
    for text in AWKWARD:
        if tokenizer.encode(text) != encoding.encode(text, disallowed_special=()):
            raise UserError(f"tiktoken's {encoding.name} has no exact twin: they differ on {text!r}")
    return tokenizer


def _merge(ranks, token):
    """Parts of `token` after all BPE merges of a rank below its own."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in zip(parts, parts[1:], strict=False)]
        best = min(pairs)
        if best >= limit:
            break
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
