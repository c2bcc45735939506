"""How a model is spoken to: beside transformers and llama.cpp, and templates that must not be believed."""
import json
import re
import shutil
import subprocess
import time

import pytest
import torch
from cases import SHAPE, TEXT, edit_json, loaded, send
from tokenizers import processors

import export
import model
import train
from formats import gguf, web
from formats.check import LlamaCpp
from prepare import sft
from prepare.make_tokenizer import train_bpe
from thimble import chat, configurator, load
from thimble.files import UserError
from thimble.generate import generate
from thimble.tokenizer import Tokenizer, byte_tokenizer

# Short forms of what these families of models came with: (special tokens, what Hugging Face's files say, template)
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'
+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +
message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set
content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{
'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
QWEN25 = """{%- if tools %}{{- 'tools' }}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and
    not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(seen=false, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not ns.seen %}{%- set ns.seen = true %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FAMILIES = {
    "SmolLM2": (CHATML_TOKENS, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
                                "unk_token": "<|endoftext|>"}, {}, SMOLLM2),
    "Zephyr": (["<unk>", "<s>", "</s>"], {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"},
                                          "pad_token": "</s>", "unk_token": "<unk>"},
               {}, ZEPHYR),
    "Llama-3": (["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
                {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
                {"eos_token_id": ["<|end_of_text|>", "<|eot_id|>"]}, LLAMA3),
    "Qwen2.5": (CHATML_TOKENS, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
                {"eos_token_id": ["<|im_end|>", "<|endoftext|>"]}, QWEN25),
    "Qwen3": ([*CHATML_TOKENS, "<think>", "</think>"], {"bos_token": None, "eos_token": "<|im_end|>"}, {}, QWEN3),
}
TALK = [{"role": "user", "content": "Say ä 日本"}, {"role": "assistant", "content": "Yes.\n\n1 2"},
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
SYSTEM = {"role": "system", "content": "Be brief."}


def family(name, folder):
    """The Tokenizer of a foreign folder with a template."""
    tokens, settings, generation, template = FAMILIES[name]
    split = {"SmolLM2": "smollm", "Zephyr": "gpt2"}.get(name, "llama3")
    hf = train_bpe([TEXT + "<|user|> system user assistant\n\n"], 400, split).hf
    # <think> and </think> of Qwen3 are tokens, but not special ones
    hf.add_special_tokens([token for token in tokens if "think" not in token])
    hf.add_tokens([token for token in tokens if "think" in token])
    if name in ("Zephyr", "Llama-3"):
        bos = {"Zephyr": "<s>", "Llama-3": "<|begin_of_text|>"}[name]
        hf.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, hf.token_to_id(bos))])
    text = hf.to_str().replace("<|endoftext|>", "<|unused|>") if "<|endoftext|>" not in tokens else hf.to_str()
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    ids = {key: [hf.token_to_id(token) for token in value] for key, value in generation.items()}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    return load.read_tokenizer(folder)


def untrained(tokenizer):
    torch.manual_seed(0)
    shape = SHAPE | {"n_layer": 1, "block_size": 256, "vocab_size": tokenizer.vocab_size}
    return model.Model(model.Config(**shape)).eval()


def taught(name):
    """A tokenizer with chatml's special tokens whose model was taught with one of our templates."""
    tokenizer = train_bpe([TEXT], 400)
    tokenizer.hf.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Tokenizer(tokenizer.hf)
    tokenizer.record = chat.record_for(tokenizer, name)
    return tokenizer


# ---- beside the programs
@pytest.mark.parametrize("name", [*chat.TEMPLATES, *FAMILIES])
def test_conversations_are_the_same_ids_in_transformers_and_llama_cpp(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
    tokenizer = taught(name) if name in chat.TEMPLATES else family(name, tmp_path / "there")
    template = name if name in chat.TEMPLATES else chat.OWN
    assert chat.template_of(tokenizer) == template
    made = untrained(tokenizer)
    send(made, tokenizer, tmp_path / "hf", "hf", check=False)
    send(made, tokenizer, tmp_path / "m.gguf", "gguf", check=False)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    server = LlamaCpp(tmp_path / "m.gguf")
    try:
        for talk in (TALK[:1], TALK[:3], [SYSTEM, *TALK[:3]]):
            ids = chat.prompt(tokenizer, talk, template)
            how = {"add_generation_prompt": True, "return_dict": False}
            assert theirs.apply_chat_template(talk, **how) == ids
            there = server.conversation(talk)
            if name == "Zephyr":  # llama.cpp puts bos in front of everything
                there = there[1:]
            assert there == ids
        whole = chat.encode(tokenizer, [SYSTEM, *TALK], template)[0]
        assert theirs.apply_chat_template([SYSTEM, *TALK], return_dict=False) == whole
        ends = list(tokenizer.record.ends)
        assert server.ends(ends) == ends == transformers.GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id
        # what comes back has the same record
        for path in ("hf", "m.gguf"):
            again = load.load(tmp_path / path)
            assert again.tokenizer.record == tokenizer.record and again.template == template
            assert chat.prompt(again.tokenizer, TALK[:3], again.template) == chat.prompt(tokenizer, TALK[:3], template)
    finally:
        server.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_only_answers_of_a_foreign_template_count(tmp_path, name):
    tokenizer = family(name, tmp_path / "there")
    ids, counts = chat.encode(tokenizer, [SYSTEM, *TALK], chat.OWN)
    answers = [[]]
    for i, count in zip(ids, counts, strict=True):
        if count:
            answers[-1].append(i)
        elif answers[-1]:
            answers.append([])
    answers = [answer for answer in answers if answer]
    thought = "<think>\n\n</think>\n\n" if name == "Qwen3" else ""
    assert [tokenizer.decode(answer) for answer in answers] == ["Yes.\n\n1 2", thought + "So."]
    assert all(answer[-1] == tokenizer.record.ends[0] for answer in answers)
    for n in (2, 4):
        prompt = chat.prompt(tokenizer, [SYSTEM, *TALK][:n], chat.OWN)
        assert ids[:len(prompt)] == prompt and counts[len(prompt) - 1:len(prompt) + 1] == [0, 1]


def test_a_model_is_asked_with_its_own_system_prompt(tmp_path):
    tokenizer = family("SmolLM2", tmp_path / "there")
    text = tokenizer.decode(chat.prompt(tokenizer, TALK[:1], chat.OWN), skip_special=False)
    assert text.startswith("<|im_start|>system\nYou are SmolLM<|im_end|>\n<|im_start|>user\nSay")
    assert tokenizer.record.pad == tokenizer.special("<|im_end|>")
    assert tokenizer.record.unk == tokenizer.eot == tokenizer.special("<|endoftext|>")


def test_nobody_can_type_a_special_token_of_a_foreign_template(tmp_path):
    tokenizer = family("Llama-3", tmp_path / "there")
    typed = "".join(tokenizer.specials)
    quiet = chat.prompt(tokenizer, [{"role": "user", "content": "x"}], chat.OWN)
    ids = chat.prompt(tokenizer, [{"role": "user", "content": f"x{typed}"}], chat.OWN)
    special = set(tokenizer.specials.values())
    assert [i for i in ids if i in special] == [i for i in quiet if i in special]
    assert typed in tokenizer.decode(ids, skip_special=False)


# ---- bos
def test_a_tokenizer_that_adds_bos_is_asked_with_bos(tmp_path):
    """By its post-processor, as Llama 3's, or by what a GGUF file says."""
    pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    tokenizer = family("Llama-3", tmp_path / "there")
    bos = tokenizer.special("<|begin_of_text|>")
    plain = byte_tokenizer()
    assert not plain.record.adds_bos and plain.encode_prompt("a") == plain.encode("a") == [97]
    assert plain.encode_prompt("") == [plain.eot]
    made = untrained(tokenizer)
    send(made, tokenizer, tmp_path / "m.gguf", "gguf", check=False)
    for one in (tokenizer, load.read_tokenizer(tmp_path / "m.gguf")):
        assert one.record.adds_bos and one.record.bos == bos
        assert one.encode_prompt("a") == [bos, *one.encode("a")] and one.encode_prompt("") == [bos]
        assert bos not in one.encode("a")
        assert one.hf.encode("a").ids == one.encode_prompt("a")  # whoever reads its tokenizer.json alone
    # a GGUF file of Llama 3's kind that does not say it
    for pre, adds in (("llama-bpe", True), ("gpt-2", False)):
        assert gguf.read_record({"tokenizer.ggml.pre": pre})["adds_bos"] is adds
    # one of our templates, too, begins with it
    assert chat.prompt(tokenizer, TALK[:1], "elite")[0] == bos


def test_whoever_asks_begins_with_bos(tmp_path, monkeypatch):
    from evaluate import Config
    from tasks.speaker import Speaker

    tokenizer = family("Llama-3", tmp_path / "there")
    send(untrained(tokenizer), tokenizer, tmp_path / "hf", "hf", check=False)
    speaker = Speaker(tmp_path / "hf", Config())
    asked = []
    monkeypatch.setattr(Speaker, "write", lambda self, ids, *a: asked.append(ids) or [""])
    speaker.complete("the", 3)
    speaker.answer("the", 3)
    bos = tokenizer.record.bos
    assert [ids[0] for ids in asked] == [bos, bos] and asked[1].count(bos) == 1
    assert speaker.text_nats("the")[1].sum() == len(tokenizer.encode("the"))


def test_the_server_begins_with_bos(tmp_path):
    pytest.importorskip("openai", reason="pip install -r requirements-test.txt")
    from test_serve import ask, running

    import serve

    tokenizer = family("Llama-3", tmp_path / "there")
    send(untrained(tokenizer), tokenizer, tmp_path / "hf", "hf", check=False)
    with running(None, serve.build(serve.Config(checkpoint=str(tmp_path / "hf"), port=0, log=False))) as (port, _):
        def n_read(path, **body):
            return ask(port, path, body | {"max_tokens": 1})[1]["usage"]["prompt_tokens"]

        plain = tokenizer.encode("the")
        assert n_read("/v1/completions", prompt="the") == 1 + len(plain)
        assert n_read("/v1/completions", prompt=plain) == len(plain)
        talk = chat.prompt(tokenizer, TALK[:1], chat.OWN)
        assert n_read("/v1/chat/completions", messages=TALK[:1]) == len(talk)
        assert ask(port, "/tokenize", {"prompt": "the"})[1]["tokens"] == [tokenizer.record.bos, *plain]
        given = ask(port, "/v1/completions", {"prompt": "the", "echo": True, "logprobs": 1, "max_tokens": 0})[1]
        given = given["choices"][0]["logprobs"]  # bos is a token of the prompt, but not in its text
        assert given["text_offset"][:2] == [0, 0] and len(given["tokens"]) == 1 + len(plain)
        for token, offset in zip(given["tokens"][1:], given["text_offset"][1:], strict=True):
            assert "the"[offset:].startswith(token)
        assert ask(port, "/tokenize", {"prompt": "the", "add_special_tokens": False})[1]["tokens"] == plain


# ---- end tokens
def test_an_end_token_of_another_name(tmp_path):
    """Its id is the last one of the vocabulary, so that no other may be added to it."""
    pytest.importorskip("gguf", reason="pip install -r requirements-test.txt")
    hf = train_bpe([TEXT], 300).hf
    text = hf.to_str().replace("<|endoftext|>", "<|finish|>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|finish|>"}')
    tokenizer = load.read_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 300 and tokenizer.token(tokenizer.eot) == "<|finish|>"
    made = untrained(tokenizer)
    send(made, tokenizer, tmp_path / "hf", "hf", check=False)
    send(made, tokenizer, tmp_path / "m.gguf", "gguf", check=False)
    for path in ("hf", "m.gguf"):
        again = load.load(tmp_path / path)
        assert again.stop_ids == {tokenizer.eot} and again.tokenizer.vocab_size == 300


def test_llama_cpp_stops_at_the_three_end_ids_of_a_gguf_file(tmp_path):
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
    hf = train_bpe([TEXT], 300).hf
    hf.add_special_tokens(["<stop>", "<halt>", "<other>"])
    tokenizer = Tokenizer(hf, said={"ends": ["<stop>", "<halt>"]})
    send(untrained(tokenizer), tokenizer, tmp_path / "three.gguf", "gguf", prompts=1, prompt_tokens=4)
    ends = ["<stop>", "<halt>", "<|endoftext|>"]
    back = load.read_tokenizer(tmp_path / "three.gguf")
    assert [back.token(i) for i in back.record.ends] == ends
    program = LlamaCpp(tmp_path / "three.gguf")
    ids = [back.special(name) for name in (*ends, "<other>")]
    assert program.ends(ids) == ids[:3]
    program.close()


# ---- templates that must not be believed
HOSTILE = {
    "a class": "{{ messages.__class__ }}", "its bases": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "a filter": "{{ messages|attr('__class__') }}", "a format": "{{ '{0.__class__}'.format(messages) }}",
    "a change": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}", "a huge range": "{% for i in range(999999999) %}{% endfor %}",
    "loops in loops": "{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "calls in calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop in itself": "{% for x in [[1]] recursive %}{{ loop([[x]]) }}{% endfor %}",
    "a long text": "{{ 'a' * 10000000000 }}", "a large number": "{{ 9 ** 9 ** 9 }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a text doubled": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}", "ifs": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "half a template": "{% for m in messages", "an unknown name": "{{ user.name }}", "no function": "{{ user() }}",
    "what it raises": "{{ raise_exception('roles must\nalternate') }}", "Latin": "{{ lipsum(100000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_line(name):
    tokenizer = byte_tokenizer()
    tokenizer.record = chat.record({"template": HOSTILE[name]}, {}, tokenizer.eot)
    begun = time.monotonic()
    with pytest.raises(UserError, match="the chat template cannot be used") as error:
        chat.prompt(tokenizer, TALK[:1], chat.OWN)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 and time.monotonic() - begun < 5


UNTEACHABLE = {
    # as Mistral's, which writes the system message into the last question
    "writes what comes before": "{% for m in messages[1:] %}{% if loop.last %}{{ messages[0].content }}{% endif %}"
                                "{{ m.content }}{{ eos_token }}{% endfor %}",
    "without a special token": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}assistant:{% endif %}",
}


@pytest.mark.parametrize("reason", UNTEACHABLE)
def test_a_template_that_cannot_be_taught_is_refused(reason):
    tokenizer = byte_tokenizer()
    tokenizer.record = chat.record({"template": UNTEACHABLE[reason]}, {}, tokenizer.eot)
    assert chat.prompt(tokenizer, [SYSTEM, *TALK[:1]], chat.OWN)  # but asking is possible
    with pytest.raises(UserError, match=reason) as error:
        chat.encode(tokenizer, [SYSTEM, *TALK], chat.OWN)
    assert "\n" not in str(error.value)


def test_what_transformers_offers_to_templates():
    from thimble import template

    assert template.render("{% generation %}{{ x }}{% endgeneration %}!", x="a") == "a!"
    assert template.render("{{ x | tojson }}", x={"b": "<é>"}) == '{"b": "<é>"}'
    assert template.render("{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert template.render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


# ---- files
def test_records_in_older_files(tmp_path):
    """A list of templates, ids alone, tokens with their settings, and what is not in the vocabulary."""
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": {"content": "a", "lstrip": False}, "pad_token": "nosuch", "unk_token": None,
        "chat_template": [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": "{{ 2 }}"}]}))
    (tmp_path / "config.json").write_text('{"eos_token_id": [98, -1, true, 99999], "pad_token_id": 99}')
    tokenizer = load.read_tokenizer(tmp_path)
    assert tokenizer.record == chat.Record(97, (98, 256), False, 99, None, "{{ 2 }}")
    for name, content in (("chat_template.jinja", b"\xff"), ("special_tokens_map.json", b"{")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} (cannot be read|is not UTF-8)"):
            load.read_tokenizer(tmp_path)


def test_a_model_that_was_not_taught_is_exported_without_a_template(tmp_path):
    tokenizer = byte_tokenizer()
    send(untrained(tokenizer), tokenizer, tmp_path / "hf", "hf", check=False)
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    assert load.load(tmp_path / "hf").template == "elite" == loaded(None, tokenizer).template


# ---- from an import to an export
def test_what_a_model_came_with_leaves_with_what_it_was_taught(tmp_path):
    """A foreign folder is fine-tuned, here with its own template or one of ours, and exported again."""
    tokenizer = family("SmolLM2", tmp_path / "there")
    send(untrained(tokenizer), tokenizer, tmp_path / "base", "hf", check=False)
    records = [{"question": f"{i}?", "answer": f"{i}!"} for i in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    for name, template in (("auto", chat.OWN), ("elite", "elite")):
        sft.main(sft.Config(input=(str(tmp_path / "in.jsonl"),), name=name, tokenizer=str(tmp_path / "base"),
                            block_size=64, val_fraction=0.2, template=name, data_dir=str(tmp_path)))
        cfg = configurator.load(train.Config, dataset=str(tmp_path / name), init_from=str(tmp_path / "base"),
                                max_steps=1, compile=False, out_dir=str(tmp_path / f"run-{name}"), batch_size=2,
                                block_size=64, device="cpu", dtype="float32")
        train.train(cfg)
        tuned = load.load(tmp_path / f"run-{name}")
        assert tuned.template == template
        export.export(tuned, export.Config(out=str(tmp_path / f"out-{name}"), check=False))
        record = load.read_tokenizer(tmp_path / f"out-{name}").record
        assert record == tuned.tokenizer.record == chat.record_for(tokenizer, template)
        assert record.bos == tokenizer.record.bos and record.pad == tokenizer.record.pad
        main = tokenizer.record.ends[0] if template == chat.OWN else tokenizer.eot
        assert record.ends[0] == main and set(record.ends) == set(tokenizer.record.ends)


def test_a_checkpoint_from_before_there_was_a_record(tmp_path):
    """Its meta.json names one of our templates, in which it is asked and exported."""
    tokenizer = Tokenizer(taught("chatml").hf)
    for name in ("chatml", "elite"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(tokenizer.to_json())
        (folder / "meta.json").write_text(json.dumps({"template": name}))
        old = load.read_tokenizer(folder)
        assert chat.template_of(old) == name and old.record == chat.record_for(tokenizer, name)


# ---- what the check sees
def replace_bytes(old, new, name=None):
    def damage(path):
        file = path / name if name else path
        content = file.read_bytes()
        assert len(old) == len(new) and content.count(old) == 1
        file.write_bytes(content.replace(old, new))
    return damage


SABOTAGE = {
    "another template": ("hf", replace_bytes(b"'<|eot_id|>'", b"'<|EOT_ID|>'", "chat_template.jinja")),
    "a text without bos": ("hf", edit_json("tokenizer.json", post_processor=None)),
    "an end less": ("hf", edit_json("generation_config.json", eos_token_id=[404])),
    "another template in a file": ("gguf", replace_bytes(b"'<|eot_id|>'", b"'<|EOT_ID|>'")),
    "a file without bos": ("gguf", replace_bytes(b"add_bos_token\x07\0\0\0\x01", b"add_bos_token\x07\0\0\0\0")),
    "another template in a folder": ("onnx", replace_bytes(b"'<|eot_id|>'", b"'<|EOT_ID|>'", "chat_template.jinja")),
}


@pytest.mark.parametrize("name", ["nothing", *SABOTAGE])
def test_the_check_sees(tmp_path, monkeypatch, name):
    for package in ("transformers", "xllamacpp", "onnxruntime"):
        pytest.importorskip(package, reason="pip install -r requirements-test.txt")
    forms = {"nothing": ("gguf", lambda path: None)} | SABOTAGE
    form, damage = forms[name]
    tokenizer = family("Llama-3", tmp_path / "there")
    check = export.check

    def sabotaged(artefact, *args):
        damage(artefact.path)
        return check(artefact, *args)
    monkeypatch.setattr(export, "check", sabotaged)
    settings = {"prompts": 2, "prompt_tokens": 4}
    if name == "nothing":
        assert send(untrained(tokenizer), tokenizer, tmp_path / "m", form, **settings)["same"] == 2
        return
    with pytest.raises(UserError, match="check failed: (a conversation is|a text begins|texts end)") as error:
        send(untrained(tokenizer), tokenizer, tmp_path / "m", form, **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "m").exists()


def test_what_llama_cpp_adds_to_a_template_is_told(tmp_path, capsys):
    """Zephyr's template does not write bos, which transformers therefore leaves out of a conversation."""
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
    tokenizer = family("Zephyr", tmp_path / "there")
    send(untrained(tokenizer), tokenizer, tmp_path / "m", "gguf", prompts=2, prompt_tokens=4)
    assert "llama.cpp puts bos in front of a conversation" in capsys.readouterr().err


# ---- the page
NODE = """
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";
import { Template } from "@huggingface/jinja";
import { Speaker } from "./chat.mjs";
const read = path => JSON.parse(readFileSync(path));
const out = read("asked.json").map(({ folder, talks, texts }) => {
  const [vocabulary, settings, generation] =
    ["tokenizer", "tokenizer_config", "generation_config"].map(name => read(`${folder}/${name}.json`));
  const speaker = new Speaker(Tokenizer, Template, vocabulary, settings, generation.eos_token_id);
  return [...talks.map(talk => speaker.conversation(talk)), ...texts.map(text => speaker.prompt(text)),
          speaker.fit([...talks[1]], 20), speaker.decode(speaker.prompt("the 日本"))];
});
console.log(JSON.stringify(out));
"""


@pytest.mark.slow  # npm asks its registry
def test_the_page_speaks_as_we_do(tmp_path):
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("needs npm and node")
    packages = [package for package in web.PACKAGES if "/jinja" in package or "/tokenizers" in package]
    command = ["npm", "install", "--ignore-scripts", "--prefix", str(tmp_path), *packages]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("npm could not install the page's packages")
    asked, want = [], []
    talks = [TALK[:1], TALK[:3], [SYSTEM, *TALK[:3]]]
    talks.append([{"role": "user", "content": "<|im_end|></s><|eot_id|> <think>"}])
    for name in (*chat.TEMPLATES, *FAMILIES):
        ours = name in chat.TEMPLATES
        tokenizer = taught(name) if ours else family(name, tmp_path / f"{name}-there")
        template = name if ours else chat.OWN
        folder = tmp_path / name
        send(untrained(tokenizer), tokenizer, folder, "hf", check=False)
        texts = ["the 1234", "", "<|im_end|></s> a"]
        asked.append({"folder": str(folder), "talks": talks, "texts": texts})
        found = [chat.prompt(tokenizer, talk, template) for talk in talks]
        found += [tokenizer.encode_prompt(text) for text in texts]
        want.append([*found, chat.fit(tokenizer, TALK[:3], template, 20), "the 日本"])
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    shutil.copyfile(web.PAGE / "chat.mjs", tmp_path / "chat.mjs")
    (tmp_path / "ask.mjs").write_text(NODE)
    done = subprocess.run(["node", "ask.mjs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == want


# What the page needs of a browser. It sends two questions, or two texts to continue, and prints what it wrote.
BROWSER = """
import { readFileSync } from "node:fs";
const elements = {}, at = name => new URL(name, import.meta.url);
const element = id => elements[id] ??= { value: { n: "9", temperature: "0", top_k: "0" }[id] ?? "", children: [],
  append(...more) { this.children.push(...more); }, replaceChildren(...all) { this.children = all; },
  hasChildNodes() { return this.children.length > 0; } };
Object.assign(globalThis, {
  self: globalThis, navigator: { hardwareConcurrency: 1 }, location: { search: process.argv[2], href: at(".").href },
  document: { getElementById: element, createElement: () => ({}), createTextNode: data => ({ data }),
              body: { dataset: {} } },
  fetch: async name => {
    const bytes = readFileSync(at(name));
    return { ok: true, json: async () => JSON.parse(bytes), arrayBuffer: async () => Uint8Array.from(bytes).buffer };
  } });
await import("./page.mjs");
while (!/running|error/.test(element("status").textContent)) await new Promise(done => setTimeout(done, 50));
const written = [];
for (const text of ["Say 1", "Why?"]) {
  element("prompt").value = text;
  await element("go").onclick();
  written.push(document.body.dataset.ids);
}
console.log(JSON.stringify([element("mode").hidden, document.body.dataset.state, ...written]));
process.exit();
"""


@pytest.mark.slow  # npm asks its registry
def test_the_page_chats_if_the_model_was_taught_to(tmp_path):
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("needs npm and node")
    tokenizer = family("Llama-3", tmp_path / "there")
    made, folder = untrained(tokenizer), tmp_path / "web"
    send(made, tokenizer, folder, "web", check=False)
    page = (folder / "index.html").read_text()
    (folder / "page.mjs").write_text(re.search('<script type="module">(.*)</script>', page, re.S)[1])
    (folder / "browser.mjs").write_text(BROWSER)

    def write(ids):
        return list(generate(made, ids, 9, temperature=0, stop_ids=tokenizer.record.ends))

    talk, answers = [], []
    for text in ("Say 1", "Why?"):
        talk.append({"role": "user", "content": text})
        answers.append(write(chat.prompt(tokenizer, talk, chat.OWN)))
        talk.append({"role": "assistant", "content": tokenizer.decode(answers[-1])})
    for search, want in (("", answers), ("?chat=0", [write(tokenizer.encode_prompt(t)) for t in ("Say 1", "Why?")])):
        done = subprocess.run(["node", "browser.mjs", search], cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [False, "done", *(" ".join(map(str, ids)) for ids in want)]


def test_small_products_are_computed_and_no_power_is():
    from thimble import template
    assert template.render("{{ 2 * 3 }}") == "6"
    with pytest.raises(UserError):
        template.render("{{ 2 ** 3 }}")


def test_products_in_a_template_are_bounded_and_powers_refused():
    from thimble import template

    for source, text in (("{{ 'ab' * 3 }}", "ababab"), ("{{ 3 * 'ab' }}", "ababab"), ("{{ 6 * 7 }}", "42"),
                         ("{{ -6 * 7 }}", "-42"), ("{{ ([1] * 2) | length }}", "2")):
        assert template.render(source) == text
    most = template.MOST_CHARS
    assert template.render(f"{{{{ ('a' * {most}) | length }}}}") == str(most)
    for source in (f"{{{{ 'a' * {most + 1} }}}}", f"{{{{ {most + 1} * 'a' }}}}", f"{{{{ [1] * {most + 1} }}}}",
                   f"{{{{ -{most + 1} * 1 }}}}", "{{ 2 ** 2 }}"):
        with pytest.raises(UserError, match="SecurityError: the result of .* is too large"):
            template.render(source)
