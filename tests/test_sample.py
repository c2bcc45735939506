"""The command line as a user sees it."""
import inspect
import io
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT

import model
import sample
import ternary
from prepare.make_tokenizer import train_bpe
from thimble import checkpoint, configurator, generate
from thimble.files import UserError
from thimble.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer


def untrained(folder, tokenizer):
    torch.manual_seed(0)
    m = model.Model(model.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.vocab_size, block_size=16))
    (folder.parent / "tokenizer.json").write_text(tokenizer.to_json())
    checkpoint.save(folder, 3, m.state_dict(), None, {"arch": "model", "model_config": asdict(m.config)},
                    folder.parent / "tokenizer.json", best=True)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of an untrained char model."""
    return untrained(tmp_path_factory.mktemp("runs") / "untrained", char_tokenizer("\n abcdeé"))


@pytest.fixture
def cli(run, monkeypatch, capsys):
    """Call the script as the command line does, in this process -> (exit code, stdout, stderr)."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--checkpoint={run}", "--max_new_tokens=20", *args])
        try:
            configurator.run(sample.main, sample.Config)
            code = 0
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()
    return call


def test_it_speaks(run):
    out = subprocess.run([sys.executable, ROOT / "sample.py", f"--checkpoint={run}", "--prompt", "abc"],
                         capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.startswith("abc") and "tokens/s" in out.stderr


def test_seeds_files_beams_and_several_samples(cli, tmp_path):
    text = cli("--prompt", "abc")[1]
    assert cli("--prompt", "abc")[1] == text != cli("--prompt", "abc", "--seed=2")[1]
    (tmp_path / "p.txt").write_text("bad é")
    assert cli(f"--prompt=FILE:{tmp_path / 'p.txt'}", "--beam=3")[1].startswith("bad é")
    _, out, err = cli("--prompt=a", "--num_samples=3")
    texts = out.removesuffix("\n").split(f"\n{'-' * 40}\n")
    assert len(texts) == 3 and f"\n{sum(map(len, texts)) - 3} tokens, " in err  # a token is a character here


def test_a_stop_text_ends_each_sample(cli):
    seed = 0
    text = ""
    while len(text) < 10:                                  # until one does not end early by itself
        seed += 1
        text = cli("--prompt=abc", f"--seed={seed}")[1].removeprefix("abc")
    cut = cli("--prompt=abc", f"--seed={seed}", f"--stop={text[3:5]},é é é")[1]
    assert cut == "abc" + text.partition(text[3:5])[0] + "\n"


def test_an_answer_also_to_a_prompt_that_looks_like_a_command(cli, tmp_path):
    flags = ["--chat", f"--checkpoint={untrained(tmp_path / 'bytes', byte_tokenizer())}"]
    for prompt in ("abc", "/quit"):
        code, out, err = cli(*flags, f"--prompt={prompt}")
        assert code == 0 and len(out) > 1 and err.endswith("step 3\n")
    assert cli(*flags, "--prompt=FILE:nowhere.txt")[0] == 1


def test_empty_and_long_prompts_are_defined(cli):
    assert cli("--prompt=")[0] == 0
    code, _, err = cli("--prompt", "abc de" * 10)
    assert code == 0 and "has 60 tokens, the model sees the last 16" in err
    assert "sees the last" not in cli("--prompt", "abcd" * 4)[2]


@pytest.mark.parametrize("args, reason", [
    (["--prompt=xyz"], "x"), (["--prompt=FILE:nowhere.txt"], "nowhere.txt"), (["--temperature=-1"], "temperature"),
    (["--top_p=0"], "top_p"), (["--tempratur=1"], "did you mean 'temperature'"), (["--device=warp"], "warp"),
    (["--checkpoint=nowhere"], "nowhere"), (["--which=worst"], "worst"), (["--num_samples=0"], "num_samples=0"),
    (["--num_samples=3", "--beam=4"], "num_samples=3"), (["--seed=9223372036854775808"], "below 2**63"),
    (["--length_penalty=11"], "at most 10"), (["--length_penalty=-1"], "length_penalty=-1.0 must not be negative"),
    (["--top_p=1.5"], "top_p=1.5"), (["--min_p=2"], "min_p=2.0"), (["--repetition_penalty=0"], "must be above 0"),
    (["--max_new_tokens=0"], "max_new_tokens=0"), (["--beam=-1"], "beam=-1"), (["--top_k=-1"], "top_k=-1"),
    (["--packed=there"], "only ternary models"),
])
def test_mistakes_end_in_one_clear_line(cli, args, reason):
    code, _, err = cli(*args)
    assert code == 1 and reason in err and len(err.strip().splitlines()) == 1


# ---- every key counts
@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run whose best and latest checkpoints differ, another run, and a ternary one."""
    root = tmp_path_factory.mktemp("keys")
    tokenizer = char_tokenizer("User: System: Assistant: ### Instruction: ### Response: Be brief.\nabc")
    (root / "tokenizer.json").write_text(tokenizer.to_json())
    for name, module in (("first", model), ("second", model), ("ternary", ternary)):
        torch.manual_seed(len(name))
        m = module.Model(module.Config(n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.vocab_size,
                                       block_size=48))
        meta = {"arch": module.__name__, "model_config": asdict(m.config)}
        for step in (1, 2):
            with torch.no_grad():
                for p in m.parameters():
                    p += 0.3 * torch.randn_like(p)
            checkpoint.save(root / name, step, m.state_dict(), None, meta, root / "tokenizer.json", best=step == 1)
    (root / "prompt.txt").write_text("cab")
    return root


# key: (what it is changed to, further keys that it needs to be changed for it to count)
KEYS = {
    "checkpoint": ("{root}/second", {}), "which": ("latest", {}), "prompt": ("FILE:{root}/prompt.txt", {}),
    "num_samples": (2, {}), "max_new_tokens": (9, {}), "stop": (("a", "e", "i"), {}),
    "chat": (True, {}), "template": ("alpaca", {"chat": True}), "system": ("Be brief.", {"chat": True}),
    "temperature": (0.0, {}), "top_k": (1, {}), "top_p": (0.05, {}), "min_p": (1.0, {}),
    "repetition_penalty": (1e6, {"temperature": 0.0}), "beam": (3, {}),
    "length_penalty": (0.0, {"beam": 3}), "seed": (7, {}), "device": ("cuda:99", {}),
    "packed": ("{root}/packed", {"checkpoint": "{root}/ternary"}),
}


def test_every_key_is_listed():
    assert KEYS.keys() == sample.Config.__dataclass_fields__.keys()


@pytest.mark.parametrize("key", KEYS)
def test_every_key_changes_what_is_written(places, capsys, key):
    """Texts, notes and files; not the speed, nor the length penalty that the last line repeats."""
    def result(**settings):
        given = {"checkpoint": "{root}/first", "prompt": "abc", "max_new_tokens": 40} | settings
        for name, value in given.items():
            given[name] = value.format(root=places) if isinstance(value, str) else value
        error = ""
        try:
            sample.main(sample.Config(**given))
        except UserError as e:
            error = str(e)
        out, err = capsys.readouterr()
        err = re.sub(r"[\d,]+ tokens/s|length\^\S+", "", err)
        return out, err, error, sorted(path.name for path in places.iterdir())

    value, needed = KEYS[key]
    plain = result(**needed)
    assert plain == result(**needed) and not plain[2]
    assert result(**needed | {key: value}) != plain


def test_each_value_reaches_the_decoder_under_its_name(run, monkeypatch):
    """A swapped pair would still change the result."""
    asked = []

    def record(name, result):
        signature = inspect.signature(getattr(generate, name))

        def call(*args, **options):
            asked.append(signature.bind(*args, **options).arguments)
            return result
        monkeypatch.setattr(sample, name, call)

    record("generate", iter(()))
    record("beam_search", ([], -1.0))
    eot = char_tokenizer("\n abcdeé").eot
    shared = {"checkpoint": str(run), "prompt": "ab", "max_new_tokens": 7}
    sampling = {"temperature": 0.9, "top_k": 3, "top_p": 0.7, "min_p": 0.2, "repetition_penalty": 1.1}
    sample.main(sample.Config(**shared, **sampling, seed=5))
    sample.main(sample.Config(**shared, beam=2, length_penalty=0.6))
    sample.main(sample.Config(**shared | {"prompt": ""}))
    common = {"ids": [2, 3], "max_new_tokens": 7, "stop_ids": {eot}, "vocab_size": 9}
    ours, beams, empty = asked
    assert {name: ours[name] for name in common} == {name: beams[name] for name in common} == common
    assert ours["sampling"] == sampling and ours["generator"].initial_seed() == 5
    assert (beams["beam"], beams["length_penalty"]) == (2, 0.6) and empty["ids"] == [eot]


# ---- where a text ends
@pytest.mark.parametrize("flags", [["--seed=2"], ["--temperature=0"], ["--beam=3"]], ids=str)
def test_a_stop_text_ends_it_and_half_of_one_does_not(cli, flags):
    flags = [*flags, "--prompt=abc"]
    _, out, err = cli(*flags)
    text = out.removeprefix("abc").removesuffix("\n")
    assert len(text) > 9
    _, out, note = cli(*flags, f"--stop={text[4:7]}")
    assert out == f"abc{text[:text.index(text[4:7])]}\n"
    # the tokens that came until then, of one character each
    assert f"\n{text.index(text[4:7]) + 3} tokens" in note
    assert cli(*flags, f"--stop={text[-3:]}x")[1] == f"abc{text}\n"  # held back until it is known to be no stop text


def smollm_like():
    """A tokenizer with the two special tokens of chatml."""
    tokenizer = train_bpe(["user assistant hello system\n"] * 9, 290, "smollm")
    tokenizer.hf.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(tokenizer.hf)


@pytest.fixture
def parrot(tmp_path):
    """A run of chatml that answers "Yo" to anything, and would write "X" after the end of its message."""
    tokenizer = smollm_like()
    size = -(-tokenizer.vocab_size // 8) * 8
    m = model.Model(model.Config(n_layer=1, n_head=1, n_embd=size, vocab_size=size, block_size=96))
    line_break, y, o, x = (tokenizer.encode(c)[0] for c in "\nYoX")
    end = tokenizer.special("<|im_end|>")
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
        for name, p in m.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
        # a token's embedding is one-hot, and passes the empty layer as it is: the head says what follows it
        m.embed.weight.copy_(torch.eye(size))
        for before, after in ((line_break, y), (y, o), (o, end), (end, x), (x, x)):
            m.head.weight[after, before] = 1.0
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    meta = {"arch": "model", "model_config": asdict(m.config), "template": "chatml"}
    return checkpoint.save(tmp_path / "run", 1, m.state_dict(), None, meta, tmp_path / "tokenizer.json", best=True)


def test_a_chat_ends_its_answers_and_forgets_on_reset(parrot, monkeypatch, capsys):
    asked = []

    def listen(model, ids, *args, **options):
        asked.append(tokenizer.decode(ids, skip_special=False))
        return generate.generate(model, ids, *args, **options)

    tokenizer = smollm_like()
    monkeypatch.setattr(sample, "generate", listen)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n /reset \n three \n/quit\nfour\n"))
    sample.main(sample.Config(checkpoint=str(parrot), chat=True, temperature=0, system="S", max_new_tokens=20))
    assert capsys.readouterr().out == "> Yo\n> Yo\n> > Yo\n> "  # neither <|im_end|> nor what would follow it
    begin = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n"
    reply = "<|im_end|>\n<|im_start|>assistant\n"
    assert asked == [f"{begin}one{reply}", f"{begin}one{reply}Yo<|im_end|>\n<|im_start|>user\ntwo{reply}",
                     f"{begin}three{reply}"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("five"))  # the end of the input ends it, too
    sample.main(sample.Config(checkpoint=str(parrot), chat=True, temperature=0, max_new_tokens=20))
    assert capsys.readouterr().out == "> Yo\n> \n"


def test_the_end_of_a_message_ends_a_plain_text_too(parrot, capsys):
    sample.main(sample.Config(checkpoint=str(parrot), prompt="\n", temperature=0, max_new_tokens=5))
    assert capsys.readouterr().out == "\nYo\n"  # it is among the model's end ids, as in generation_config.json
