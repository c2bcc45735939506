"""Text and token ids: one class around the `tokenizers` library, whatever the kind of tokenizer.

    >>> tokenizer = load_tokenizer("data/shakespeare_char")
    >>> tokenizer.decode(tokenizer.encode("To be"))
"""

import codecs
import functools
import re
from pathlib import Path

import numpy as np

from thimble.files import UserError

EOT = "<|endoftext|>"
# what other people's tokenizers call the end of a text, the likeliest first
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[EOS]")


@functools.cache
def byte_alphabet():
    """The 256 printable characters that stand for the bytes in a byte-level vocabulary (GPT-2's encoder.py)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]


def guard(what, function, *args, **kwargs):
    """Call into the tokenizers library, whose Rust panics arrive as a BaseException."""
    try:
        return function(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{what}: {reason:.200}") from None


class Tokenizer:
    """A tokenizers.Tokenizer with a certain end-of-text id, no silent losses and one-line errors.

    kind is "byte", "char", "bpe" or the lower-case name of another model of the tokenizers library.
    """

    def __init__(self, hf, name="tokenizer"):
        hf.no_truncation()
        hf.no_padding()
        vocab = hf.get_vocab(with_added_tokens=True)
        eot = next((token for token in EOT_NAMES if token in vocab), EOT)
        hf.add_special_tokens([eot])  # a new last id, or the id that it has
        vocab = hf.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        if len(set(vocab.values())) < len(vocab) or self.vocab_size > 2 * len(vocab):
            raise UserError(
                f"{name}: {len(vocab):,} tokens have {len(set(vocab.values())):,} different ids up to "
                f"{self.vocab_size - 1:,}; the ids must be 0 to N - 1"
            )
        self.eot = vocab[eot]
        self.name = name
        self.specials = {token.content: i for i, token in hf.get_added_tokens_decoder().items() if token.special}
        self.hf = hf
        self._json = hf.to_str()
        hf.encode_special_tokens = True  # whatever a user types is text
        model, decoder = type(hf.model).__name__, type(hf.decoder).__name__
        plain = {token: i for token, i in vocab.items() if token not in self.specials}
        self._table = None  # from byte or code point to id
        self.kind = model.lower()
        if model == "BPE" and hf.normalizer is None and all(len(token) == 1 for token in plain):
            if decoder == "ByteLevel" and set(plain) == set(byte_alphabet()) and not _adds_prefix(hf):
                self.kind = "byte"
                self._table = np.array([plain[token] for token in byte_alphabet()], np.uint32)
            elif decoder == "Fuse" and hf.pre_tokenizer is None and plain:
                self.kind = "char"
                self._table = np.full(0x110000, 2**32 - 1, np.uint32)
                self._table[[ord(token) for token in plain]] = list(plain.values())
        self._by_bytes = decoder == "ByteLevel" or self.kind == "char"

    def to_json(self):
        return self._json

    def encode(self, text, allow_special=False):
        """Ids of `text`; nothing is added. "<|endoftext|>" and the like are text unless `allow_special`."""
        if not allow_special:
            return self.encode_batch([text])[0].tolist()
        if self._table is None:
            return self._guarded([text], lambda: self._with_specials.encode(text, add_special_tokens=False).ids)
        parts = re.split("(" + "|".join(map(re.escape, self.specials)) + ")", text)
        return [
            i for part in parts for i in ([self.specials[part]] if part in self.specials else self.encode(part))
        ]

    def encode_batch(self, texts):
        """Ids of each text as uint32 arrays; byte and char tokenizers take a shortcut through a table."""
        if self._table is None:
            encodings = self._guarded(texts, lambda: self.hf.encode_batch_fast(texts, add_special_tokens=False))
            return [np.array(encoding.ids, np.uint32) for encoding in encodings]
        codec, unit = ("utf-8", np.uint8) if self.kind == "byte" else ("utf-32-le", np.dtype("<u4"))
        arrays = self._guarded(texts, lambda: [np.frombuffer(text.encode(codec), unit) for text in texts])
        arrays = [self._table[array] for array in arrays]
        for text, array in zip(texts, arrays, strict=True):
            self._check_known(text, array)
        return arrays

    def encode_offsets(self, text):
        """Ids of `text`, and for each the (start, end) of the characters that it stands for."""
        if self.kind == "char":
            self.encode(text)  # says which character it does not know
        encoding = self._guarded([text], lambda: self.hf.encode(text, add_special_tokens=False))
        return encoding.ids, encoding.offsets

    def special(self, name):
        """Id of a special token such as "<|im_end|>", or None."""
        return self.specials.get(name)

    def decode(self, ids, skip_special=True):
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        ids = np.asarray(ids, np.int64).tolist()
        for i in ids:
            self._check_id(i)
        return guard(self.name, self.hf.decode, ids, skip_special_tokens=skip_special)

    def token(self, token_id):
        """The name of an id, as tokenizer.json has it."""
        return self.hf.id_to_token(token_id)

    def stream(self, skip_special=True):
        return (ByteStream if self._by_bytes else TextStream)(self, skip_special)

    @functools.cached_property
    def pieces(self):
        """The bytes that each id stands for, where the tokenizer is byte-level or char."""
        byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        pieces = [b""] * self.vocab_size
        for token, i in self.hf.get_vocab(with_added_tokens=True).items():
            if self.kind == "char" or token in self.specials or not set(token) <= byte_of.keys():
                pieces[i] = token.encode()
            else:
                pieces[i] = bytes(byte_of[char] for char in token)
        return pieces

    @functools.cached_property
    def _with_specials(self):
        return library().Tokenizer.from_str(self._json)

    def _guarded(self, texts, call):
        try:
            return guard(self.name, call)
        except UserError:
            if any(re.search("[\ud800-\udfff]", text) for text in texts):
                message = f"{self.name}: the text holds half of a surrogate pair, which is no character"
                raise UserError(message) from None
            raise

    def _check_known(self, text, ids):
        unknown = np.flatnonzero(ids == 2**32 - 1)
        if unknown.size:
            chars = list(dict.fromkeys(text[i] for i in unknown[:1000]))[:5]
            raise UserError(
                f"the character tokenizer does not know {', '.join(map(repr, chars))}: leave such characters out, or "
                "prepare the data with --tokenizer=byte or --tokenizer=bpe"
            )

    def _check_id(self, i):
        if not 0 <= i < self.vocab_size:
            raise UserError(f"token id {i} is outside the vocabulary of {self.vocab_size:,} ids")


class ByteStream:
    """Text of ids that come one by one, each character as soon as all its bytes are there."""

    def __init__(self, tokenizer, skip_special=True):
        self.tokenizer, self.pieces = tokenizer, tokenizer.pieces
        self.silent = set(tokenizer.specials.values()) if skip_special else ()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id):
        self.tokenizer._check_id(token_id)
        return "" if token_id in self.silent else self.decoder.decode(self.pieces[token_id])

    def flush(self):
        return self.decoder.decode(b"", final=True)


class TextStream:
    """The same for tokenizers that are not byte-level: what a longer text has that a shorter one had not."""

    def __init__(self, tokenizer, skip_special=True):
        self.decode = functools.partial(tokenizer.decode, skip_special=skip_special)
        self.ids, self.start, self.done = [], 0, 0  # ids from start on are decoded, those before done have been given

    def step(self, token_id):
        self.ids.append(token_id)
        text = self._new()
        if not text or text.endswith("\ufffd"):
            return ""
        self.start, self.done = self.done, len(self.ids)
        return text

    def flush(self):
        return self._new()

    def _new(self):
        return self.decode(self.ids[self.start :])[len(self.decode(self.ids[self.start : self.done])) :]


def library():
    import tokenizers  # 30 ms, which a trainer need not wait for

    return tokenizers


def _adds_prefix(hf):
    pre = hf.pre_tokenizer
    return type(pre).__name__ != "ByteLevel" or pre.add_prefix_space or pre.use_regex


def load_tokenizer(path):
    """Tokenizer of a tokenizer.json, or of the folder (dataset, checkpoint) that holds one.

    Where it has no end-of-text token by any usual name, "<|endoftext|>" is added as a new last id.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"there is no tokenizer {file}")
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError:
        raise UserError(f"{file} is no UTF-8 text, so no tokenizer.json") from None
    what = f"{file} is no tokenizer that the tokenizers library can read"
    return guard(what, lambda: Tokenizer(library().Tokenizer.from_str(text), name=str(file)))


# what splits text into words before BPE; llama.cpp knows each of them (gpt-2, smollm, llama-bpe)
PRETOKENIZERS = ("gpt2", "smollm", "llama3")
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(vocab, merges, pre_tokenizer, **options):
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models

    hf = HF(models.BPE(vocab=vocab, merges=merges, **options))
    hf.pre_tokenizer = pre_tokenizer
    hf.decoder = decoders.ByteLevel()
    return hf


def pre_tokenizer_of(preset):
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre

    if preset == "gpt2":
        return pre.ByteLevel(add_prefix_space=False)
    if preset == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    if preset == "llama3":
        preset = LLAMA3_PATTERN
    split = pre.Split(Regex(preset), "isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_tokenizer():
    """257 ids: the value of the byte, then end of text."""
    from tokenizers import pre_tokenizers as pre

    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    return Tokenizer(byte_level(vocab, [], pre.ByteLevel(add_prefix_space=False, use_regex=False)))


def char_tokenizer(chars):
    """The characters in sorted order, then end of text."""
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models

    hf = HF(models.BPE(vocab={char: i for i, char in enumerate(sorted(set(chars)))}, merges=[]))
    hf.decoder = decoders.Fuse()
    return Tokenizer(hf)


AWKWARD = (
    "", " ", "  ", "\n", " \n\n  \n x", "\r\n\r\n", "a\tb", "Hello, world!", "1234567 3.14159", "\x00\x01\x7f", "ÿþ",
    "don't DON'T we'll I'M they'd'VE", "naïve café ½ ² ٣", "日本語のテキスト、中文。", "🎉🎉👩‍👩‍👧‍👦 é", "ªº ⅷ ①",
    "if x:\n        return x\n\n\n    # done ", "aaaaaaaaaaaaaaaaaaaaaaaa", "https://example.org/a_b?c=d&e=%20f",
    "<|endoftext|> <|im_start|>", "\u00a0\u2028\u3000x", "(((((----=====>>>>>", "x" * 300, "ab " * 100,
    "!!!\n/path\n//\n", "देवनागरी ไทย עברית العربية",
)  # fmt: skip
