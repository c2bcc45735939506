"""The command: what goes out is what its own program computes, a fork's own Python included."""
import dataclasses
import hashlib
import json
import shutil
import subprocess

import numpy as np
import pytest
import tokenizers
import torch
from cases import built, loaded, out, send, tokenizer

import export
from formats import ollama
from formats.weights import with_weights
from thimble import chat, checkpoint, files, load
from thimble.files import UserError
from thimble.generate import generate
from thimble.tokenizer import Tokenizer

EXACT = [("llama", "hf", "f32"), ("tied", "hf", "f32"), ("gelu", "hf", "f32"), ("groups", "hf", "f32"),
         ("streams", "hf", "f32"), ("jamba", "hf", "f32"), ("mamba2", "hf", "f32"), ("bitnet", "hf", "plain"),
         ("llama", "gguf", "f32"), ("tied", "gguf", "f32"), ("chars", "gguf", "f32"), ("bitnet", "gguf", "f32"),
         ("jamba", "gguf", "f32"), ("qwen3", "hf", "f32"), ("qwen3", "gguf", "f32"), ("arcee", "hf", "f32"),
         ("granite", "hf", "f32"), ("granite", "gguf", "f32"), ("granite, rope", "hf", "f32"),
         ("granite, rope", "gguf", "f32"), ("llama", "onnx", "fp32"), ("jamba", "onnx", "fp32"),
         ("mamba2", "onnx", "fp32"), ("qwen2", "onnx", "fp32")]
ROUNDED = [("llama", "hf", "bf16"), ("llama", "gguf", "f16"), ("llama", "gguf", "bf16"), ("llama", "gguf", "q8_0"),
           ("llama", "gguf", "q4_0"), ("tied", "gguf", "q4_1"), ("llama", "gguf", "q5_0"), ("chars", "gguf", "q5_1"),
           ("jamba", "gguf", "q8_0"), ("granite", "gguf", "q8_0"), ("wide", "gguf", "tq1_0"), ("wide", "gguf", "tq2_0"),
           ("bitnet", "onnx", "q2"), ("llama", "onnx", "int8"), ("jamba", "onnx", "int4"),
           ("qwen3 wide", "onnx", "int4"), ("qwen2", "onnx", "int8"), ("qwen2", "onnx", "int4")]


@pytest.mark.parametrize("case,form,quant", EXACT)
def test_its_own_program_says_the_same(tmp_path, case, form, quant):
    found = out(case, tmp_path / f"model.{form}", form, quant)
    assert found["delta"] <= 1e-4 and found["same"] == 6
    assert [path.name for path in tmp_path.iterdir()] == [f"model.{form}"]


@pytest.mark.parametrize("case,form,quant", ROUNDED)
def test_rounded_weights_are_the_rounded_weights(tmp_path, case, form, quant):
    found = out(case, tmp_path / f"model.{form}", form, quant)
    assert found["same"] + found["tied"] >= 5 and np.isfinite(found["kl"])


def test_a_form_that_rounds_too_much_is_warned_about(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="pip install -r requirements-test.txt")
    model, words = built("llama")

    def outlier(name, w):
        """The same function, with one column of each matrix so large that 4 bits leave little of the others."""
        factor = 1 / 20 if "norm" in name else 20.0 if w.size(-1) == 32 and not name.startswith("embed") else 1.0
        return w * torch.where(torch.arange(w.size(-1)) == 3, factor, 1.0) if "o_proj" not in name else w

    coarse = with_weights(model, outlier)
    with torch.no_grad():
        assert (coarse(torch.arange(20)[None])[0] - model(torch.arange(20)[None])[0]).abs().max() < 1e-3
    for fine, m in ((True, model), (False, coarse)):
        found = send(m, words, tmp_path / str(fine), "onnx", "int4", prompts=6, prompt_tokens=12)
        assert (found["kl"] < export.TOO_COARSE) == fine and (tmp_path / str(fine)).is_dir()
        assert ("too coarse" not in (said := capsys.readouterr().err)) == fine, said


@pytest.mark.slow  # transformers compiles these: they need a C++ compiler, and half a minute
@pytest.mark.parametrize("quant,packed", [("online", False), ("packed", False), ("packed", True)])
def test_bitnet_of_transformers(tmp_path, quant, packed):
    found = out("bitnet", tmp_path / "model", "hf", quant, packed)
    assert found["delta"] < 0.05 and found["same"] + found["tied"] == 6


def test_relu2_is_refused_for_llama_cpp(tmp_path):
    """Every BitNet of llama.cpp has SiLU: the file would write wrong text there."""
    with pytest.raises(UserError, match="llama.cpp computes SiLU in every BitNet.*act=relu2"):
        out("relu2", tmp_path / "m.gguf", "gguf", check=False)
    assert not list(tmp_path.iterdir())


# ---- the command
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, words = built("tied")
    (tmp_path / "t.json").write_text(words.to_json())
    meta = {"arch": "model", "model_config": dataclasses.asdict(model.config)}
    checkpoint.save(tmp_path / "runs" / "mine", 5, model.state_dict(), None, meta, tmp_path / "t.json", best=True)
    export.main(export.Config(format="hf", check=False))
    assert sorted(path.name for path in (tmp_path / "exports" / "mine-hf").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json"]
    for wrong, words in (({"format": "hf"}, "already exists"), ({"quant": "q9", "out": "x"}, "use f32, f16, bf16"),
                         ({"window": True, "out": "x"}, "--window is a form of ONNX"),
                         ({"format": "gguf", "quant": "tq2_0"}, "use --quant=q8_0")):
        with pytest.raises(files.UserError, match=words):
            export.main(export.Config(**wrong))
    assert not (tmp_path / "x").exists()
    export.main(export.Config(checkpoint="exports/mine-hf", format="onnx", window=True, check=False))
    assert (tmp_path / "exports" / "mine-hf-window.onnx").is_file()


# ---- every key counts
# key: (what it is changed to, further keys that it needs to be changed for it to count)
KEYS = {
    "checkpoint": ("{root}/other", {}), "which": ("latest", {}), "format": ("onnx", {}), "quant": ("bf16", {}),
    "out": ("{root}/there", {}), "window": (True, {"format": "onnx", "out": "{root}/model.onnx"}),
    "check": (True, {"format": "onnx"}), "prompts": (3, {"format": "onnx", "check": True}),
    "prompt_tokens": (5, {"format": "onnx", "check": True}),
}


def test_every_key_is_listed():
    assert KEYS.keys() == export.Config.__dataclass_fields__.keys()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run whose best and latest checkpoints differ, and another run of the same shape."""
    root = tmp_path_factory.mktemp("keys")
    first, words = built("tied")
    (root / "t.json").write_text(words.to_json())
    meta = {"arch": "model", "model_config": dataclasses.asdict(first.config)}
    for seed, (name, step) in enumerate((("first", 1), ("first", 2), ("other", 1))):
        state = {key: w + 0.1 * seed for key, w in first.state_dict().items()}
        checkpoint.save(root / name, step, state, None, meta, root / "t.json", best=step == 1)
    return root


@pytest.mark.parametrize("key", KEYS)
def test_every_key_changes_what_is_exported(places, tmp_path, capsys, key):
    """Which files there are, what is in them, and the figures of the check."""
    def result(**settings):
        # a fixed name: the default one tells the format and the quant
        given = {"checkpoint": "{root}/first", "out": "{root}/model", "check": False, "prompts": 2, "prompt_tokens": 3}
        given |= settings
        for name, value in given.items():
            given[name] = value.format(root=tmp_path if name == "out" else places) if type(value) is str else value
        export.main(export.Config(**given))
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        found = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in written}
        for path in tmp_path.iterdir():
            files.remove(path)
        return found, [line for line in capsys.readouterr().out.splitlines() if line.startswith("checked")]

    pytest.importorskip("onnxruntime", reason="pip install -r requirements-test.txt")
    value, needed = KEYS[key]
    plain = result(**needed)
    assert plain == result(**needed)
    assert result(**needed | {key: value}) != plain


@pytest.mark.parametrize("settings, name", [
    ({}, "mine-hf"), ({"quant": "bf16"}, "mine-hf-bf16"), ({"format": "gguf"}, "mine-gguf"),
    ({"format": "gguf", "quant": "q8_0"}, "mine-gguf-q8_0"), ({"format": "onnx", "quant": "int4"}, "mine-onnx-int4"),
    ({"format": "onnx", "window": True}, "mine-window.onnx"),
    ({"format": "onnx", "window": True, "quant": "int8"}, "mine-window-int8.onnx"), ({"format": "web"}, "mine-web")])
def test_what_is_exported_is_named_after_its_form(settings, name):
    assert export.default_name(loaded(*built("tied"), "mine"), export.Config(**settings)) == name


@pytest.mark.parametrize("form, stock, packed, quant", [
    ("hf", "llama", False, "f32"), ("hf", "bitnet", False, "online"), ("hf", "bitnet", True, "packed"),
    ("gguf", "llama", False, "f32"), ("onnx", "llama", False, "fp32"), ("web", "llama", False, "fp32")])
def test_without_quant_no_weight_is_rounded(form, stock, packed, quant):
    exact = "online" if quant == "packed" else quant
    assert export.choose_quant(export.Config(format=form), stock, packed) == (quant, exact)


# ---- Ollama
def go(template, system="", prompt="", response=None):
    """What Ollama makes of a template: `if` with text inside, and names; without a response, up to where it stands."""
    values = {"System": system, "Prompt": prompt, "Response": response or ""}
    for name, value in values.items():
        before, opened, rest = template.partition(f"{{{{ if .{name} }}}}")
        if opened:
            inside, _, after = rest.partition("{{ end }}")
            template = before + (inside if value else "") + after
    for name, value in values.items():
        template = template.replace(f"{{{{ .{name} }}}}", value)
    assert "{{" not in template
    return template


@pytest.mark.parametrize("template", chat.TEMPLATES)
def test_a_modelfile_speaks_to_the_model_as_it_was_taught(template):
    words = tokenizer("byte")
    words.record = chat.record_for(words, template)
    text = ollama.modelfile("m.gguf", words, 48)
    head, _, rest = text.partition('TEMPLATE """')
    assert head == 'FROM ./m.gguf\nPARAMETER num_ctx 48\nPARAMETER stop "<|endoftext|>"\n'
    made = rest.removesuffix('"""\n')
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Who are you?"}]
    written = go(made, "Be kind.", "Hi", "Hello.") + go(made, prompt="Who are you?")
    ids = []
    for n, part in enumerate(written.split("<|endoftext|>")):  # Ollama reads the names of special tokens as those
        ids += [words.eot] * (n > 0) + words.encode(part)
    assert ids == chat.prompt(words, talk, template)


@pytest.mark.parametrize("end", ['"', '"stop', 'stop"', '""', 'a"b'])
def test_an_end_token_with_a_quote(end):
    """Read as Ollama's parser/parser.go reads a value: without its three quotes, or else without its one."""
    hf = tokenizers.Tokenizer.from_str(tokenizer("byte").to_json())
    hf.add_special_tokens([tokenizers.AddedToken(end, special=True, normalized=False)])
    words = Tokenizer(hf, said={"ends": [end]})
    values = [line.removeprefix("PARAMETER stop ") for line in ollama.modelfile("m.gguf", words, 48).splitlines()
              if line.startswith("PARAMETER stop ")]
    read = []
    for value in values:
        quote = '"""' if value.startswith('"""') else '"'
        assert value.endswith(quote) and len(value) > 2 * len(quote)
        read.append(value[len(quote):-len(quote)])
    assert read == [end, "<|endoftext|>"]


def test_a_template_that_cannot_be_rendered_leaves_as_it_came(tmp_path, capsys):
    model, words = built("llama")
    said = {"template": "{{ raise_exception('not like this') }}"}
    words = Tokenizer(tokenizers.Tokenizer.from_str(words.to_json()), said=said)
    pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    found = send(model, words, tmp_path / "hf", "hf", prompts=2, prompt_tokens=8)
    told = capsys.readouterr().err
    assert found["same"] == 2 and "--template" not in told and "no conversation was compared" in told
    assert load.read_tokenizer(tmp_path / "hf").record.template == words.record.template
    assert 'TEMPLATE """{{ .Prompt }}"""' in ollama.modelfile("m.gguf", words, 48)
    assert "has a plain prompt in its place" in capsys.readouterr().err


def test_a_template_with_a_system_text_of_its_own():
    words = tokenizer("byte")
    template = ("{% if messages[0].role != 'system' %}S:Be brief.\n{% endif %}{% for m in messages %}"
                "{{ m.role[0] | upper }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}")
    words.record = dataclasses.replace(words.record, template=template)
    _, _, made = ollama.modelfile("m.gguf", words, 48).partition("SYSTEM")
    system, _, made = made.partition("TEMPLATE")
    assert system == ' """Be brief."""\n'
    made = made.strip(' "\n')
    assert go(made, "Be brief.", "Hi", "Yes.") + go(made, prompt="So?") == "S:Be brief.\nU:Hi\nA:Yes.\nU:So?\nA:"


TEXT = "{% if m.role == 'user' %}Q:{{ m.content }}\n{% elif m.role == 'assistant' %}A:{{ m.content }}\n{% endif %}"
ODD = {
    # as Mistral's first
    "refuses a system text": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
                             f"{TEXT}{{% endfor %}}{{% if add_generation_prompt %}}A:{{% endif %}}",
    # as Mistral's later ones
    "puts it before the last question": "{% for m in messages %}{% if loop.last and messages[0].role == 'system' %}"
                                        "Q:{{ messages[0].content + m.content }}\n{% else %}"
                                        f"{TEXT}{{% endif %}}{{% endfor %}}"
                                        "{% if add_generation_prompt %}A:{% endif %}",
    # as Qwen3's
    "thinks before the last answer": "{% for m in messages %}{% if loop.last and m.role == 'assistant' %}A:<think>"
                                     f"</think>{{{{ m.content }}}}\n{{% else %}}{TEXT}{{% endif %}}{{% endfor %}}"
                                     "{% if add_generation_prompt %}A:{% endif %}"}


@pytest.mark.parametrize("kind", ODD)
def test_templates_that_treat_some_message_otherwise(kind):
    words = tokenizer("byte")
    words.record = dataclasses.replace(words.record, template=ODD[kind])
    head, _, made = ollama.modelfile("m.gguf", words, 48).partition("TEMPLATE")
    assert "SYSTEM" not in head and ".System" not in made
    made = made.strip(' "\n')
    assert go(made, prompt="Hi", response="Yes.") + go(made, prompt="So?") == "Q:Hi\nA:Yes.\nQ:So?\nA:"


def test_a_gguf_folder_has_a_modelfile(tmp_path):
    folder = tmp_path / "m"
    found = out("llama", folder, "gguf", "f16")
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "model.gguf"] and found["same"] == 6
    text = (folder / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n") and text.endswith('TEMPLATE """{{ .Prompt }}"""\n')
    loaded = load.load(folder)
    assert loaded.name == "model" and loaded.tokenizer.to_json() == load.read_tokenizer(folder).to_json()


# ---- transformers.js
NODE = """
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = ".";
const written = {};
for (const name of process.argv.slice(2)) {
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const model = await AutoModelForCausalLM.from_pretrained(name);
  const out = await model.generate({ ...tokenizer("The quick"), max_new_tokens: 12, do_sample: false });
  written[name] = Array.from(out.data, Number);
}
console.log(JSON.stringify(written));
"""


@pytest.mark.slow  # npm fetches 500 MB
def test_transformers_js_opens_the_folder_unchanged(tmp_path):
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("needs Node.js")
    command = ["npm", "install", "--ignore-scripts", "--prefix", str(tmp_path), "@huggingface/transformers@4.3.1"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("npm could not install @huggingface/transformers")
    (tmp_path / "run.mjs").write_text(NODE)
    want = {}
    for case in ("llama", "qwen3", "arcee", "bitnet", "streams", "jamba", "granite", "mamba2"):
        model, words = built(case)
        send(model, words, tmp_path / case, "onnx", check=False)
        ids = words.encode("The quick")
        want[case] = ids + list(generate(model, ids, 12, temperature=0))
    done = subprocess.run(["node", "run.mjs", *want], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]
    assert json.loads(done.stdout.splitlines()[-1]) == want
