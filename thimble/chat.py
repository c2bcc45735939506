"""How a conversation becomes tokens: the one definition for training, sample.py --chat, evaluate.py and the server.

    >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    >>> ids, counts = chat.encode(tokenizer, messages, "elite")         # counts: 1 where a token is in the loss
    >>> prompt, _ = chat.encode(tokenizer, messages[:1], "elite", reply=True)
    >>> assert ids[:len(prompt)] == prompt                              # the model is asked as it was taught

The text is tokenized as a whole, so that no token ends merely because a part of the text ended there. A message may
have an "input" beside its "content", as Alpaca's records do.
"""
from thimble.files import UserError

TEMPLATES = ("elite", "chatml", "alpaca")
ROLES = ("system", "user", "assistant")
START = ("<|im_start|>",)  # tuples, so that no text that a user types equals them
END = ("<|im_end|>",)


# ---- templates
def parts(messages, template, reply):
    """[(text, counts)] of a conversation: START and END stand for their tokens, counts is 1 in the loss and 0 outside.

    With `reply` it goes up to where the next answer begins.
    """
    if template not in TEMPLATES:
        raise UserError(f"there is no template {template!r}: choose one of {', '.join(TEMPLATES)}")
    # a message at a time, so that a prompt is always the beginning of a whole conversation
    write = {"elite": _elite, "chatml": _chatml, "alpaca": _alpaca}[template]
    out = []
    for message in messages:
        out += write(message)
    if reply:
        out += write({"role": "assistant"})  # without content, so only what stands before an answer
    return out


def _elite(message):
    """User: question / Assistant: answer, each on a line."""
    content = _content(message, "\n\nInput: ")
    if message["role"] != "assistant":
        return [(f"{message['role'].title()}: {content}\n", 0)]
    out = [("Assistant:", 0)]
    if "content" in message:
        # the space belongs to the answer: in most vocabularies it is part of the first word's token
        out += [(f" {content}\n", 1), (END, 1)]
    return out


def _chatml(message):
    """OpenAI's chat markup, in which <|im_start|> and <|im_end|> are tokens."""
    out = [(START, 0), (f"{message['role']}\n", 0)]
    if message["role"] != "assistant":
        out += [(_content(message, "\n\n"), 0), (END, 0)]
    elif "content" in message:
        out += [(message["content"].strip(), 1), (END, 1)]
    if "content" in message:  # behind the end of each message, and outside the loss: the model stops before it
        out.append(("\n", 0))
    return out


def _alpaca(message):
    """The headings of Stanford Alpaca's prompt, without the sentence above them."""
    if message["role"] == "assistant":
        out = [("### Response:\n", 0)]
        if "content" in message:
            out += [(message["content"].strip(), 1), (END, 1)]
        return out
    heading = "### Instruction:\n" if message["role"] == "user" else ""
    content = _content(message, "\n\n### Input:\n")
    return [(f"{heading}{content}\n\n", 0)]


def _content(message, joint):
    """The content of a message and, behind `joint`, its input if it has one."""
    content = message.get("content", "").strip()
    more = message.get("input", "").strip()
    return f"{content}{joint}{more}" if more else content


def end_id(tokenizer, template):
    """The id that ends a message: <|im_end|> in chatml if the tokenizer has it, else the end of text."""
    if template == "chatml" and tokenizer.special(*END) is not None:
        return tokenizer.special(*END)
    return tokenizer.eot


def template_of(meta, tokenizer):
    """The template that a checkpoint was trained with; if its meta.json does not say, a guess from its tokenizer."""
    if meta.get("template"):
        return meta["template"]
    return "elite" if tokenizer.special(*START) is None else "chatml"


# ---- tokens
def encode(tokenizer, messages, template, reply=False):
    """messages [{"role", "content"}] -> (ids, counts), both lists; counts is 1 on answers and on the id that ends them.

    With `reply` the ids are a prompt: they end where an answer begins. UserError where a token would hold both the end
    of a prompt and the beginning of an answer, since the prompt alone would then have other tokens.
    """
    special_ids = {START: tokenizer.special(*START), END: end_id(tokenizer, template)}
    ids = []
    counts = []
    text = ""  # not tokenized yet: as much as there is between two special tokens
    flags = []  # for each character of it, whether it counts
    for part, count in parts(messages, template, reply):
        special_id = special_ids.get(part)
        if special_id is None:
            if part == START:  # plain text to a tokenizer that lacks the token
                part = part[0]
            text += part
            flags += [count] * len(part)
        else:
            _append_text(ids, counts, tokenizer, text, flags, template)
            ids.append(special_id)
            counts.append(count)
            text = ""
            flags = []
    _append_text(ids, counts, tokenizer, text, flags, template)
    return ids, counts


def _append_text(ids, counts, tokenizer, text, flags, template):
    """Tokenize `text` and append its ids to `ids` and the flag of each to `counts`."""
    new_ids, offsets = tokenizer.encode_offsets(text)
    for i, (start, stop) in zip(new_ids, offsets, strict=True):
        # the range may be empty, where other tokens have taken all of a character already
        first = min(start, stop - 1)
        last = stop - 1
        if flags[first] != flags[last]:
            raise UserError(f"{tokenizer.name} has a token for {text[start:stop]!r}, which reaches from the prompt "
                            f"into the answer of the template {template}: use another template")
        ids.append(i)
        counts.append(flags[last])


def fit(tokenizer, messages, template, n_tokens):
    """The prompt for the next answer, in at most n_tokens ids: the oldest exchanges go first, a system message stays.

    If the last message alone is too long, its beginning is cut off.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(system):]
    while True:
        ids, _ = encode(tokenizer, system + rest, template, reply=True)
        if len(ids) <= n_tokens or len(rest) <= 1:
            return ids[-n_tokens:]  # the end, where the answer begins
        # a whole exchange: up to the next question
        rest = rest[1:]
        while rest[0]["role"] != "user" and len(rest) > 1:
            rest = rest[1:]
