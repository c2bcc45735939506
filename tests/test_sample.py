"""The command line as a user sees it."""
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT

import model
import sample
from thimble import checkpoint, configurator
from thimble.tokenizer import byte_tokenizer, char_tokenizer


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
    assert cli("--prompt=a", "--num_samples=3")[1].count("-" * 40) == 2


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
