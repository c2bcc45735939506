"""How a model is spoken to: the one definition for training, sample.py --chat, evaluate.py, the server and exports.

    >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    >>> ids, counts = chat.encode(tokenizer, messages, "elite")         # counts: 1 where a token is in the loss
    >>> asked = chat.prompt(tokenizer, messages[:1], "elite")
    >>> assert ids[:len(asked)] == asked                                # the model is asked as it was taught

A tokenizer has a Record, which travels with it in Hugging Face's own files. A template is jinja, one of the three here
or the one that a foreign model came with. The rendered text is tokenized as a whole, so that no token ends merely
because a part of the text ended there. A message may have an "input" beside its "content", as Alpaca's records do.
"""
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from thimble.files import UserError, read_json

ROLES = ("system", "user", "assistant")
# Beside the tokenizer.json of datasets, checkpoints and exports; the last one only where there is a template
FILES = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
# Half of a surrogate pair, which is in no text: put into the special tokens that a message quotes, so that they are
# text. The rendered text is cut at it.
MARK = "\ud800"

# ---- templates
# User: question / Assistant: answer, each on a line. The space before an answer belongs to it: in most vocabularies it
# is part of the first word's token.
ELITE = """{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- 'Assistant: ' + message['content'] | trim + '\\n' + eos_token }}
    {%- elif message['role'] == 'system' %}
        {{- 'System: ' + message['content'] | trim + '\\n' }}
    {%- else %}
        {{- 'User: ' + message['content'] | trim + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
"""
# OpenAI's chat markup; where a tokenizer lacks <|im_end|>, its end of text closes a message
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# The headings of Stanford Alpaca's prompt, without the sentence above them
ALPACA = """{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '### Response:\\n' + message['content'] | trim + eos_token }}
    {%- elif message['role'] == 'system' %}
        {{- message['content'] | trim + '\\n\\n' }}
    {%- else %}
        {{- '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}
"""
TEMPLATES = {"elite": ELITE, "chatml": CHATML, "alpaca": ALPACA}
OWN = "own"  # what the template of a foreign model is called
JOINTS = {"elite": "\n\nInput: ", "alpaca": "\n\n### Input:\n"}  # between a message's content and its input


# ---- the record
@dataclass(frozen=True)
class Record:
    """How a model is spoken to. Ids are those of its tokenizer, None where it has none."""
    bos: int  # begins a text
    ends: tuple  # ids that end a text or an answer; the first is what templates call eos_token
    adds_bos: bool = False  # whether the model was trained with bos in front of every text
    pad: int | None = None
    unk: int | None = None
    template: str = ""  # jinja; empty: it was not taught to answer


def read(folder):
    """What Hugging Face's files in a folder say, as record() wants it. UserError if one of them is damaged."""
    folder = Path(folder)
    special = read_json(folder / "tokenizer_config.json", {})
    if "added_tokens_decoder" not in special:  # an older folder: transformers, too, believes its other file
        special |= read_json(folder / "special_tokens_map.json", {})
    generation = read_json(folder / "config.json", {}) | read_json(folder / "generation_config.json", {})
    # not add_bos_token: beside a tokenizer.json, whose post-processor adds bos or does not, transformers ignores it
    said = {}
    for role in ("bos", "eos", "pad", "unk"):
        token = special.get(f"{role}_token")
        if isinstance(token, dict):  # with its settings
            token = token.get("content")
        ids = generation.get(f"{role}_token_id")
        if not isinstance(ids, list):
            ids = [ids]
        # the token's name first, since it is what templates see
        said["ends" if role == "eos" else role] = [token, *ids]
    said["template"] = special.get("chat_template")
    if isinstance(said["template"], list):  # several under names, in older folders
        named = [entry for entry in said["template"] if isinstance(entry, dict) and entry.get("name") == "default"]
        said["template"] = named[0].get("template") if named else None
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            said["template"] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8 text: download it again") from None
    # datasets and checkpoints from before there was a record name their template in meta.json
    taught = str(read_json(folder / "meta.json", {}).get("template"))
    if taught in TEMPLATES and not said["template"]:
        said["template"] = TEMPLATES[taught]
        if taught == "chatml":
            said["ends"].insert(0, "<|im_end|>")
    return said


def record(said, vocab, eot):
    """The Record of what `read` or a GGUF file says: {"bos", "pad", "unk", "ends": [tokens or ids], "adds_bos", ...}.

    vocab is {token: id}. What is not in it is ignored; without a bos or an end, eot serves.
    """
    # a file may name several candidates for one role: a token that the vocabulary lacks, and behind it an id
    first = {role: next(iter(known_ids(said.get(role, ()), vocab)), None) for role in ("bos", "pad", "unk")}
    if first["bos"] is None:
        first["bos"] = eot
    ends = known_ids(said.get("ends", ()), vocab)
    if eot not in ends:
        ends.append(eot)  # it stands between documents, so it never belongs to an answer
    template = said.get("template")
    if not isinstance(template, str):
        template = ""
    return Record(**first, ends=tuple(ends), adds_bos=said.get("adds_bos") is True, template=template)


def known_ids(values, vocab):
    """The different ids among `values`, which are tokens or ids; what is not in the vocabulary is ignored."""
    known = set(vocab.values())
    ids = []
    for value in values:
        i = vocab.get(value) if isinstance(value, str) else value
        if type(i) is int and i in known and i not in ids:  # true is an int, too
            ids.append(i)
    return ids


def special_tokens(tokenizer, record):
    """{"bos_token": its name, ...}, by the names that they have in templates and in Hugging Face's files."""
    ids = {"bos": record.bos, "eos": record.ends[0], "pad": record.pad, "unk": record.unk}
    return {f"{role}_token": tokenizer.token(i) for role, i in ids.items() if i is not None}


def files(tokenizer, **more):
    """{name: text} of the files that hold a tokenizer's record; `more` goes into tokenizer_config.json."""
    record = tokenizer.record
    # clean_up_... true, once the default, would remove spaces before punctuation
    settings = {**special_tokens(tokenizer, record), "add_bos_token": record.adds_bos,
                "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **more}
    generation = {"bos_token_id": record.bos, "eos_token_id": list(record.ends)}
    if record.pad is not None:
        generation["pad_token_id"] = record.pad
    out = {}
    if record.template:
        settings["chat_template"] = record.template  # transformers 4 reads it here, 5 in its own file
        out["chat_template.jinja"] = record.template
    for name, value in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
        out[name] = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return out


def record_for(tokenizer, template):
    """The Record under which a conversation is written: the tokenizer's own, or with one of the three templates."""
    own = tokenizer.record
    if template == OWN:
        return own
    if template not in TEMPLATES:
        raise UserError(f"there is no template {template!r}: choose one of {', '.join(TEMPLATES)}")
    # what the template calls eos_token; the end of text ends an answer, too, where another token comes first
    end = tokenizer.eot
    if template == "chatml" and tokenizer.special("<|im_end|>") is not None:
        end = tokenizer.special("<|im_end|>")
    text = TEMPLATES[template]
    # transformers adds nothing to what a template writes, llama.cpp adds bos where it is missing: so it writes it
    if own.adds_bos:
        text = "{{- bos_token }}" + text
    others = [i for i in own.ends if i != end]
    return replace(own, ends=(end, *others), template=text)


def template_of(tokenizer):
    """The name of the template that a model was taught with; if it was not, a guess from its special tokens."""
    own = tokenizer.record.template
    if not own:
        return "elite" if tokenizer.special("<|im_start|>") is None else "chatml"
    for name in TEMPLATES:
        if own == record_for(tokenizer, name).template:
            return name
    return OWN


# ---- conversations to ids
def render(tokenizer, messages, template, reply=False):
    """The text of a conversation, up to where the next answer begins if `reply`; MARK is in quoted special tokens."""
    from thimble import template as jinja  # 30 ms, which training need not wait for

    record = record_for(tokenizer, template)
    quoted = re.compile("|".join(map(re.escape, tokenizer.specials)))
    given = []
    for message in messages:
        content = message.get("content", "")
        more = message.get("input", "").strip()
        if more:
            content = content.strip() + JOINTS.get(template, "\n\n") + more
        # "<|im_end|>" that a user types must not end the message
        content = quoted.sub(lambda found: found[0][0] + MARK + found[0][1:], content)
        given.append({"role": message["role"], "content": content})
    # the variables are those of transformers' apply_chat_template; templates ask whether tools is none
    return jinja.render(record.template, messages=given, add_generation_prompt=reply, tools=None, documents=None,
                        **special_tokens(tokenizer, record))


def tokens(tokenizer, messages, template, reply=False):
    """The ids of a rendered conversation."""
    ids = []
    for part in render(tokenizer, messages, template, reply).split(MARK):
        ids += tokenizer.encode(part, allow_special=True)
    return ids


def prompt(tokenizer, messages, template):
    """The ids of messages [{"role", "content"}], up to where the next answer begins."""
    return tokens(tokenizer, messages, template, reply=True)


def encode(tokenizer, messages, template):
    """messages [{"role", "content"}] -> (ids, counts), both lists; counts is 1 on answers and on the id that ends them.

    An answer begins where its prompt ends. UserError where the prompt of an answer is not the beginning of the whole
    conversation, since the model would then be asked otherwise than it was taught.
    """
    ids = tokens(tokenizer, messages, template)
    counts = [0] * len(ids)
    stop_ids = answer_ends(tokenizer, template)
    which = "the model's own template" if template == OWN else f"the template {template}"
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # in ids and not in characters: so a token across the border is found as well
        before = prompt(tokenizer, messages[:n], template)
        start = len(before)
        if ids[:start] != before:
            whole = render(tokenizer, messages, template)
            if whole.startswith(render(tokenizer, messages[:n], template, reply=True)):
                raise UserError(f"{tokenizer.name} has a token that reaches from the prompt into the answer of "
                                f"{which}: use another --template")
            raise UserError(f"{which} writes what comes before an answer otherwise once the answer is there, so it "
                            "cannot be taught: use another --template")
        # what the template writes behind the end (chatml: a line break) is never sampled, so it does not count
        stop = next((i for i in range(start, len(ids)) if ids[i] in stop_ids), None)
        if stop is None:
            raise UserError(f"{which} ends an answer without a special token, so that nothing would teach the model to "
                            "stop: use another --template")
        counts[start:stop + 1] = [1] * (stop + 1 - start)
    return ids, counts


def answer_ends(tokenizer, template):
    """The ids that end an answer: those of the record, and the special token that the template writes behind one."""
    ids = set(record_for(tokenizer, template).ends)
    talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        behind = render(tokenizer, talk, template).rpartition("answer")[2]
    except UserError:  # whoever asks with this template will see it
        return ids
    # such as <|eot_id|>, where a file names <|end_of_text|> alone
    special = re.search("|".join(map(re.escape, tokenizer.specials)), behind)
    if special:
        ids.add(tokenizer.special(special[0]))
    return ids


def fit(tokenizer, messages, template, n_tokens):
    """The prompt for the next answer, in at most n_tokens ids: the oldest exchanges go first, a system message stays.

    If the last message alone is too long, its beginning is cut off.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    rest = messages[len(system):]
    while True:
        ids = prompt(tokenizer, system + rest, template)
        if len(ids) <= n_tokens or len(rest) <= 1:
            return ids[-n_tokens:]  # the end, where the answer begins
        # a whole exchange: up to the next question
        rest = rest[1:]
        while rest[0]["role"] != "user" and len(rest) > 1:
            rest = rest[1:]
