"""Whom the suites question: a model, or one of the floors that know nothing and say what a score means.

    speaker = Speaker("runs/tiny_cpu", evaluate.Config())
    speaker.complete("To be, or not", 20)          # continues a text
    speaker.answer("Who wrote Hamlet?", 20)        # answers a question, written in the chat template
"""
import copy
from dataclasses import replace

import numpy as np
import torch

from tasks.bpb import window_nats
from thimble import chat
from thimble.files import UserError
from thimble.generate import StopTexts, write_texts
from thimble.load import deployed, load
from thimble.ngrams import NGrams


class Speaker:
    """A model and its tokenizer. `complete` and `answer` return the new text only, without the prompt."""

    def __init__(self, path, cfg):
        self.cfg = cfg
        self.loaded = load(path, cfg.which, cfg.device, cfg.template)
        self.path = self.loaded.path
        self.model = self.loaded.model
        self.tokenizer = self.loaded.tokenizer
        self.template = self.loaded.template
        # completions end at these too: a model that was taught to answer closes its texts with the end of a message
        self.stop_ids = self.loaded.answer_ids
        self.name = self.path.name
        if self.name.startswith("step_"):
            self.name = f"{self.path.parent.name}/{self.name}"

    def untrained(self):
        """The same speaker with its network as it was before the first step of training."""
        config = self.model.config
        if hasattr(config, "packed"):  # a packed ternary model cannot be initialised
            config = replace(config, packed=False)
        torch.manual_seed(self.cfg.seed)  # its initial weights are the same in every evaluation
        model = deployed(type(self.model)(config))
        twin = copy.copy(self)
        twin.name = "random"
        twin.model = model.to(self.cfg.device).eval()
        return twin

    # ---- writing

    def complete(self, prompt, max_new_tokens, stops=()):
        """The greedy continuation of a text, up to the first of the texts `stops`."""
        return self.completions(prompt, max_new_tokens, stops)[0]

    def completions(self, prompt, max_new_tokens, stops=(), seeds=(None,)):
        """A continuation for each seed, side by side in one batch: greedy for None, else drawn at cfg.temperature."""
        return self.write(self.tokenizer.encode_prompt(prompt), max_new_tokens, stops, seeds)

    def answer(self, question, max_new_tokens):
        """The greedy answer to a question, put to the model in the template that it was taught with."""
        messages = [{"role": "user", "content": question}]
        if self.cfg.system:
            messages.insert(0, {"role": "system", "content": self.cfg.system})
        return self.write(chat.prompt(self.tokenizer, messages, self.template), max_new_tokens)[0]

    def write(self, ids, max_new_tokens, stops=(), seeds=(None,)):
        """A text after the prompt `ids` for each seed."""
        return write_texts(self.model, self.tokenizer, ids, max_new_tokens, self.stop_ids, stops, seeds,
                           self.cfg.temperature)

    # ---- reading

    @torch.no_grad()
    def nats(self, tokens, mask=None, row_length=0):
        """-log p of every token but the first, each once -> (sums, counts) of the windows, float64, on the CPU.

        row_length: that of a dataset whose rows must not be cut into other windows; UserError if a row is too long.
        """
        block_size = self.model.config.block_size
        if row_length > block_size:
            raise UserError(f"the dataset has rows of {row_length} tokens, but {self.path} sees only {block_size}: use "
                            "a model with a longer context")
        # windows beyond 2,048 tokens cost memory and time, and the loss hardly changes
        size = row_length or min(block_size, 2048)
        sums, counts = window_nats(self.model, tokens, size, mask)
        return sums.cpu(), counts.cpu()

    def text_nats(self, text):
        """The same for a whole text; its first token is predicted from bos or the end-of-text token."""
        ids = [*self.tokenizer.encode_prompt(""), *self.tokenizer.encode(text)]
        return self.nats(np.array(ids, np.int64))

    @torch.no_grad()
    def rank(self, prompt, target):
        """1 + how many tokens are more likely than the right one: the first in which prompt + target leaves prompt."""
        before = self.tokenizer.encode_prompt(prompt)
        whole = self.tokenizer.encode_prompt(prompt + target)
        # a tokenizer may merge the end of the prompt with the target: the two are compared token by token
        n = 0
        while n < len(before) and before[n] == whole[n]:
            n += 1
        context = whole[:n][-self.model.config.block_size:] or [self.tokenizer.eot]
        device = next(self.model.parameters()).device
        logits, _ = self.model(torch.tensor([context], device=device))
        logits = logits[0, -1, :self.tokenizer.vocab_size]                       # (V,) of the next token
        return 1 + int((logits > logits[whole[n]]).sum())


# ---- floors
class Floor:
    """A speaker without a model: write(prompt, max_new_tokens) -> text."""

    def __init__(self, name, write):
        self.name = name
        self.write = write

    def complete(self, prompt, max_new_tokens, stops=()):
        return StopTexts(stops)(self.write(prompt, max_new_tokens), last=True)

    def answer(self, question, max_new_tokens):
        return self.write(question, max_new_tokens)


def trigram_writer(text):
    """write() for a Floor: the most likely continuation by the byte trigrams of `text` (bytes)."""
    ngrams = NGrams()
    ngrams.add(np.frombuffer(text, np.uint8))
    counts = ngrams.counts.reshape(1 << 16, 256)           # (two bytes, the byte after them)
    likeliest = counts.argmax(1)
    seen = counts.any(1)

    def write(prompt, max_new_tokens):
        context = bytearray(b"  " + prompt.encode())  # two spaces, so that an empty prompt has a context too
        start = len(context)
        for _ in range(4 * max_new_tokens):  # a token stands for about four bytes
            key = context[-2] << 8 | context[-1]
            context.append(int(likeliest[key]) if seen[key] else ord(" "))
        return context[start:].decode("utf-8", "replace")  # the last character may be cut off

    return write


def floors(speaker, text):
    """What scores without knowledge: an empty answer, the prompt repeated, the untrained network, trigrams of text."""
    return [
        Floor("empty", lambda prompt, max_new_tokens: ""),
        Floor("echo", lambda prompt, max_new_tokens: prompt),
        speaker.untrained(),
        Floor("n-gram", trigram_writer(text)),
    ]
