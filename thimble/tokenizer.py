"""Text and token ids: one class around the `tokenizers` library, whatever the kind of tokenizer.

    >>> tokenizer = load_tokenizer("data/shakespeare_char")
    >>> tokenizer.decode(tokenizer.encode("To be"))
"""
import codecs
import functools
import re
from pathlib import Path

import numpy as np

from thimble import chat
from thimble.files import UserError

EOT = "<|endoftext|>"
# what other people's tokenizers call the end of a text, the most likely first
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[EOS]")
UNKNOWN = 2**32 - 1  # in a table of ids: a character that the tokenizer does not know


def library():
    import tokenizers  # takes 30 ms, which training need not wait for
    return tokenizers


def guard(what, function, *args, **kwargs):
    """Call into the tokenizers library, whose Rust panics arrive as a BaseException; UserError "what: reason"."""
    try:
        return function(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{what}: {reason:.200}") from None


def load_tokenizer(path):
    """The Tokenizer of a tokenizer.json and of the files beside it that say how its model is spoken to.

    `path` may be the folder (dataset, checkpoint, Hugging Face's) that holds them. UserError if there is none. If
    nothing says what ends a text, and no token has a usual name, "<|endoftext|>" is added as a new last id.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"there is no tokenizer {file}: name a tokenizer.json or a folder that holds one")
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text, so it is not a tokenizer.json") from None
    what = f"{file} is not a tokenizer that the tokenizers library can read"
    said = chat.read(file.parent)
    return guard(what, lambda: Tokenizer(library().Tokenizer.from_str(text), str(file), said))


class Tokenizer:
    """A tokenizers.Tokenizer (`hf`) with a known end-of-text id (`eot`), no silent losses and one-line errors.

    kind is "byte", "char", "bpe" or the lower-case name of another model of the tokenizers library; specials is
    {token: id} of the special tokens, `eot` among them; record is the chat.Record of what `said` says (chat.read);
    name is for error messages.
    """

    def __init__(self, hf, name="tokenizer", said=None):
        # some files ask for these, and would lose text or add tokens
        hf.no_truncation()
        hf.no_padding()
        said = said or {}
        vocab = hf.get_vocab(with_added_tokens=True)
        eot = next((token for token in EOT_NAMES if token in vocab), EOT)
        ends = chat.known_ids(said.get("ends", ()), vocab)
        if eot not in vocab and ends:
            eot = hf.id_to_token(ends[0])
        hf.add_special_tokens([eot])  # gives it a new last id, or marks the one that it has as special
        vocab = hf.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        n_ids = len(set(vocab.values()))
        # a few unused ids are common; many would be rows of an embedding that nothing trains
        if n_ids < len(vocab) or self.vocab_size > 2 * len(vocab):
            raise UserError(f"{name}: {len(vocab):,} tokens have {n_ids:,} different ids up to "
                            f"{self.vocab_size - 1:,}; the ids must be 0 to N - 1")
        self.hf = hf
        self.name = name
        self.eot = vocab[eot]
        self.record = self._record(said, vocab)
        self.specials = {token.content: i for i, token in hf.get_added_tokens_decoder().items() if token.special}
        hf.encode_special_tokens = True  # whatever a user types is text; tokenizer.json does not hold this setting
        ordinary = {token: i for token, i in vocab.items() if token not in self.specials}
        self.kind, self._table = _kind_and_table(hf, ordinary)

    def _record(self, said, vocab):
        """The chat.Record, with which the special tokens and the post-processor of `hf` agree from here on."""
        hf = self.hf
        added = None
        if hf.post_processor is not None:  # which may add a token on either side, or none
            plain = hf.encode("a", add_special_tokens=False).ids
            whole = hf.encode("a").ids
            if len(whole) > len(plain) and whole[1:1 + len(plain)] == plain:
                added = whole[0]
                said = said | {"bos": [added], "adds_bos": True}
        record = chat.record(said, vocab, self.eot)
        special = hf.get_added_tokens_decoder()
        for i in (record.bos, *record.ends):
            if i not in special or not special[i].special:
                hf.add_special_tokens([hf.id_to_token(i)])
        if record.adds_bos and added is None:
            bos = hf.id_to_token(record.bos)
            hf.post_processor = library().processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, record.bos)])
        return record

    def to_json(self):
        """The content of its tokenizer.json."""
        return self.hf.to_str()

    # ---- text to ids
    def encode(self, text, allow_special=False):
        """List of the ids of `text`, nothing added; "<|endoftext|>" and the like are text unless `allow_special`."""
        if not allow_special:
            return self.encode_batch([text])[0].tolist()
        if self._table is None:
            return self._guarded([text], lambda: self._with_specials.encode(text, add_special_tokens=False).ids)
        # the table knows no special tokens: they are cut out of the text first
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, self.specials)) + ")", text):
            ids += [self.specials[part]] if part in self.specials else self.encode(part)
        return ids

    def encode_prompt(self, text):
        """The ids of a text to continue: behind bos if the model knows texts so; never none."""
        ids = self.encode(text)
        if self.record.adds_bos:
            return [self.record.bos, *ids]
        return ids or [self.eot]

    def encode_batch(self, texts):
        """The ids of each text as uint32 arrays; byte and char tokenizers take a shortcut through a table."""
        if self._table is None:
            encodings = self._guarded(texts, lambda: self.hf.encode_batch_fast(texts, add_special_tokens=False))
            return [np.array(encoding.ids, np.uint32) for encoding in encodings]
        if self.kind == "byte":
            codec, unit = "utf-8", np.uint8
        else:
            codec, unit = "utf-32-le", np.dtype("<u4")  # one code point is one number
        units = self._guarded(texts, lambda: [np.frombuffer(text.encode(codec), unit) for text in texts])
        arrays = [self._table[array] for array in units]
        for text, ids in zip(texts, arrays, strict=True):
            self._check_known(text, ids)
        return arrays

    @functools.cached_property
    def _with_specials(self):
        """A copy of `hf` that reads "<|endoftext|>" in a text as the token."""
        return library().Tokenizer.from_str(self.to_json())

    def _guarded(self, texts, call):
        try:
            return guard(self.name, call)
        except UserError:
            # Python alone allows half a pair in a str; the library's own message does not say that this is the matter
            if any(re.search("[\ud800-\udfff]", text) for text in texts):
                raise UserError(f"{self.name}: the text holds half of a surrogate pair, which is not a character "
                                "and has no UTF-8") from None
            raise

    def _check_known(self, text, ids):
        unknown = np.flatnonzero(ids == UNKNOWN)
        if unknown.size:
            chars = list(dict.fromkeys(text[i] for i in unknown[:1000]))[:5]  # the first five different ones
            raise UserError(f"the character tokenizer does not know {', '.join(map(repr, chars))}: leave out such "
                            "characters, or prepare the data with --tokenizer=byte or --tokenizer=bpe")

    # ---- ids to text
    def decode(self, ids, skip_special=True):
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(ids, np.int64).tolist()
        for i in ids:  # the library would skip an id that it does not know
            self.check_id(i)
        return guard(self.name, self.hf.decode, ids, skip_special_tokens=skip_special)

    def stream(self, skip_special=True):
        """A decoder for ids that come one by one: step(id) returns the new text, flush() the rest."""
        if self.kind == "char" or type(self.hf.decoder).__name__ == "ByteLevel":
            return ByteStream(self, skip_special)
        return TextStream(self, skip_special)

    def check_id(self, i):
        if not 0 <= i < self.vocab_size:
            raise UserError(f"token id {i} is outside the vocabulary of {self.vocab_size:,} ids")

    # ---- single tokens
    def special(self, name):
        """The id of a special token such as "<|im_end|>", or None."""
        return self.specials.get(name)

    def token(self, token_id):
        """The name of an id, as tokenizer.json has it."""
        return self.hf.id_to_token(token_id)

    @functools.cached_property
    def pieces(self):
        """[bytes that each id stands for]; only for byte-level and char tokenizers."""
        byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        pieces = [b""] * self.vocab_size  # stays empty where an id is not in use
        for token, i in self.hf.get_vocab(with_added_tokens=True).items():
            # added tokens are plain text even in a byte-level vocabulary
            if self.kind == "char" or token in self.specials or not set(token) <= byte_of.keys():
                pieces[i] = token.encode()
            else:
                pieces[i] = bytes(byte_of[char] for char in token)
        return pieces


def _kind_and_table(hf, vocab):
    """(kind, table from byte or code point to id, or None) of a tokenizer; vocab is without its special tokens.

    Where each byte or each character is a token and nothing is merged, looking up the table is all there is to encode.
    """
    # each test below rules out something that would make the table and the library disagree
    model = type(hf.model).__name__
    decoder = type(hf.decoder).__name__
    if model == "BPE" and hf.normalizer is None and all(len(token) == 1 for token in vocab):
        if decoder == "ByteLevel" and set(vocab) == set(byte_alphabet()) and not _adds_prefix(hf):
            return "byte", np.array([vocab[char] for char in byte_alphabet()], np.uint32)
        if decoder == "Fuse" and hf.pre_tokenizer is None and vocab:
            table = np.full(0x110000, UNKNOWN, np.uint32)  # Unicode ends at 0x10FFFF
            table[[ord(char) for char in vocab]] = list(vocab.values())
            return "char", table
    return model.lower(), None


def _adds_prefix(hf):
    """Whether the pre-tokenizer may do more to a text than turn it into bytes."""
    pre = hf.pre_tokenizer
    return type(pre).__name__ != "ByteLevel" or pre.add_prefix_space or pre.use_regex


# ---- streams
class ByteStream:
    """The text of ids that come one by one, each character as soon as all of its bytes are there."""

    def __init__(self, tokenizer, skip_special=True):
        self.tokenizer = tokenizer
        self.pieces = tokenizer.pieces
        self.silent = set(tokenizer.specials.values()) if skip_special else set()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back an unfinished character

    def step(self, token_id):
        self.tokenizer.check_id(token_id)
        if token_id in self.silent:
            return ""
        return self.decoder.decode(self.pieces[token_id])

    def flush(self):
        return self.decoder.decode(b"", final=True)


class TextStream:
    """The same for tokenizers that are not byte-level, by decoding again and returning what was added.

    ids[start:] is decoded each time: the tokens whose text was returned last, as context (a space may depend on it),
    and from `done` on those whose text was not returned yet.
    """

    def __init__(self, tokenizer, skip_special=True):
        self.decode = functools.partial(tokenizer.decode, skip_special=skip_special)
        self.ids = []
        self.start = 0
        self.done = 0

    def step(self, token_id):
        self.ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):  # bytes of a character that are not all there yet
            return ""
        self.start = self.done
        self.done = len(self.ids)
        return text

    def flush(self):
        return self._new_text()

    def _new_text(self):
        before = self.decode(self.ids[self.start:self.done])
        return self.decode(self.ids[self.start:])[len(before):]


# ---- making one
# how text is split into words before BPE; llama.cpp knows each of them (as gpt-2, smollm, llama-bpe)
PRETOKENIZERS = ("gpt2", "smollm", "llama3")
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")


@functools.cache
def byte_alphabet():
    """The 256 printable characters that stand for the bytes in a byte-level vocabulary (GPT-2's encoder.py)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    char_of = {byte: chr(byte) for byte in visible}
    # control characters, blanks and the soft hyphen would be lost or mistaken in a file
    char_of |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [char_of[byte] for byte in range(256)]


def byte_level(vocab, merges, pre_tokenizer, **options):
    """A byte-level BPE of the tokenizers library."""
    hf = library().Tokenizer(library().models.BPE(vocab=vocab, merges=merges, **options))
    hf.pre_tokenizer = pre_tokenizer
    hf.decoder = library().decoders.ByteLevel()
    return hf


def pre_tokenizer_of(preset):
    """The pre-tokenizer of a name in PRETOKENIZERS, or one that splits into the matches of a regular expression."""
    pre = library().pre_tokenizers
    if preset == "gpt2":
        return pre.ByteLevel(add_prefix_space=False)
    if preset == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    pattern = LLAMA3_PATTERN if preset == "llama3" else preset
    split = pre.Split(library().Regex(pattern), "isolated")  # both the matches and what lies between them are words
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_tokenizer():
    """257 ids: the values of a byte, then end of text."""
    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    whole = library().pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # no splitting into words
    return Tokenizer(byte_level(vocab, [], whole))


def char_tokenizer(chars):
    """The different characters in sorted order, then end of text."""
    vocab = {char: i for i, char in enumerate(sorted(set(chars)))}
    hf = library().Tokenizer(library().models.BPE(vocab=vocab, merges=[]))
    hf.decoder = library().decoders.Fuse()
    return Tokenizer(hf)


# strings on which two tokenizers that differ in any rule are likely to disagree
AWKWARD = (
    "", " ", "  ", "\n", " \n\n  \n x", "\r\n\r\n", "a\tb", "Hello, world!", "1234567 3.14159", "\x00\x01\x7f", "ÿþ",
    "don't DON'T we'll I'M they'd'VE", "naïve café ½ ² ٣", "日本語のテキスト、中文。", "🎉🎉👩‍👩‍👧‍👦 é", "ªº ⅷ ①",
    "if x:\n        return x\n\n\n    # done ", "aaaaaaaaaaaaaaaaaaaaaaaa", "https://example.org/a_b?c=d&e=%20f",
    "<|endoftext|> <|im_start|>", "\u00a0\u2028\u3000x", "(((((----=====>>>>>", "x" * 300, "ab " * 100,
    "!!!\n/path\n//\n", "देवनागरी ไทย עברית العربية",
)
