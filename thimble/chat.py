"""How a conversation becomes tokens: the one definition for training, sample.py --chat, evaluate.py and the server.

    >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    >>> ids, counts = chat.encode(tokenizer, messages, "elite")         # counts: 1 where a token is in the loss
    >>> prompt, _ = chat.encode(tokenizer, messages[:1], "elite", reply=True)
    >>> assert ids[:len(prompt)] == prompt                              # the model is asked as it was taught

The text is tokenized as a whole, so that no token ends where only a part of the text ended. A message may have an
"input" beside its "content", as Alpaca's records do.
"""
from thimble.files import UserError

TEMPLATES = ("elite", "chatml", "alpaca")
ROLES = ("system", "user", "assistant")
START, END = ("<|im_start|>",), ("<|im_end|>",)            # tuples, so that nobody's text can be one


def parts(messages, template, reply):
    """[(text, counts)]: START and END stand for themselves. With `reply`, up to where the next answer begins."""
    out = []
    for message in [*messages, {"role": "assistant"}] if reply else messages:
        role, content, more = message["role"], message.get("content", "").strip(), message.get("input", "").strip()
        answer = [(content, 1), (END, 1)] if "content" in message else []
        if template == "elite":                            # the space belongs to the answer's first word
            content += f"\n\nInput: {more}" if more else ""
            answer = [(f" {content}\n", 1), (END, 1)] if answer else []
            out += [("Assistant:", 0), *answer] if role == "assistant" else [(f"{role.title()}: {content}\n", 0)]
        elif template == "chatml":
            content += f"\n\n{more}" if more else ""
            out += [(START, 0), (f"{role}\n", 0)]
            out += answer if role == "assistant" else [(content, 0), (END, 0)]
            out += [("\n", 0)] if "content" in message else []
        elif template == "alpaca":                         # its headings, without the sentence that stands above them
            content += f"\n\n### Input:\n{more}" if more else ""
            heading = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}[role]
            out += [(heading, 0), *answer] if role == "assistant" else [(f"{heading}{content}\n\n", 0)]
        else:
            raise UserError(f"template {template!r} is none of {', '.join(TEMPLATES)}")
    return out


def end_id(tokenizer, template):
    """What ends a message: <|im_end|> in chatml where the tokenizer has it, else the end of text."""
    end = tokenizer.special(*END) if template == "chatml" else None
    return tokenizer.eot if end is None else end


def encode(tokenizer, messages, template, reply=False):
    """messages [{"role", "content"}] -> (ids, counts), both lists; counts is 1 on answers and on the id that ends them.

    With `reply` the ids are a prompt: they end where an answer begins. UserError where a token would hold both the end
    of a prompt and the beginning of an answer, since then the prompt alone has other tokens.
    """
    ids, counts, text, flags = [], [], "", []

    def flush():
        for i, (start, stop) in zip(*tokenizer.encode_offsets(text), strict=True):
            start = min(start, stop - 1)
            if flags[start] != flags[stop - 1]:
                raise UserError(f"{tokenizer.name} has a token for {text[start:stop]!r}, which reaches from the prompt "
                                f"into the answer of the template {template}: use another template")
            ids.append(i)
            counts.append(flags[stop - 1])

    for part, count in parts(messages, template, reply):
        special = {START: tokenizer.special(*START), END: end_id(tokenizer, template)}.get(part)
        if special is None:                                # <|im_start|> is text to a tokenizer that lacks it
            part = part if isinstance(part, str) else part[0]
            text, flags = text + part, flags + [count] * len(part)
        else:
            flush()
            text, flags = "", []
            ids.append(special)
            counts.append(count)
    flush()
    return ids, counts


def fit(tokenizer, messages, template, n_tokens):
    """The prompt for the next answer, in at most n_tokens ids: the oldest exchanges go first, the system's stays."""
    head = [m for m in messages[:1] if m["role"] == "system"]
    rest = messages[len(head):]
    while True:
        ids = encode(tokenizer, head + rest, template, reply=True)[0]
        if len(ids) <= n_tokens or len(rest) <= 1:
            return ids[-n_tokens:]
        rest = rest[1:]
        while rest[0]["role"] != "user" and len(rest) > 1:
            rest = rest[1:]


def template_of(meta, tokenizer):
    """The template that a checkpoint was trained with; a guess by its tokenizer where its meta.json does not say."""
    return meta.get("template") or ("elite" if tokenizer.special(*START) is None else "chatml")
