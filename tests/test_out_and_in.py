"""What export.py writes, sample.py opens: every case in every form, as the model that it was."""
import pytest
import torch
from cases import CASES, built, out

import sample
from formats.names import QUANTS
from formats.reference import stock_architecture
from thimble import load
from thimble.files import UserError

# the largest difference of two logits, in units of their spread (standard deviation)
SAME = {"f32": 1e-5, "online": 1e-5, "packed": 1e-5, "plain": 1e-5, "f16": 0.02, "bf16": 0.2, "q8_0": 0.5, "q4_0": 5.0}
FORMS = [(case, "hf", "") for case in CASES] + [(case, "gguf", "f32") for case in CASES]
FORMS += [("bitnet", "hf", quant) for quant in QUANTS["hf, ternary"]] + [("relu2", "hf", "packed")]
FORMS += [(case, "hf", quant) for case in ("llama", "jamba", "granite", "qwen2") for quant in ("f16", "bf16")]
FORMS += [(case, "gguf", quant) for case in ("llama", "jamba", "granite") for quant in ("f16", "bf16", "q8_0")]
FORMS += [("wide", "gguf", "tq2_0"), ("wide", "gguf", "tq1_0")]
TIPPED = 0.3  # of a ternary model whose scales are halves: a last bit tips a rounding of activations


@torch.no_grad()
def off(case, path):
    """The largest difference between the logits of the case and of what is read at `path`, relative to their spread."""
    model, words = built(case)
    ids = torch.randint(words.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    ours = model(ids)[0]
    return ((ours - load.load(path).model(ids)[0]).abs().max() / ours.std()).item()


@pytest.mark.parametrize("case,form,quant", FORMS)
def test_what_is_written_is_read(tmp_path, case, form, quant):
    path = tmp_path / ("m.gguf" if form == "gguf" else "m")
    try:
        out(case, path, form, quant, check=False)
    except UserError as error:  # llama.cpp has no such architecture
        assert form == "gguf" and "use --format=hf" in str(error)
        return
    tolerance = SAME.get(quant or "f32", 1e-5)
    if case == "bitnet" and quant in ("f16", "bf16"):
        tolerance = TIPPED
    assert off(case, path) <= tolerance


def test_sample_opens_each(tmp_path, capsys):
    """The command itself, for a folder with its own code, a packed BitNet, a hybrid and a file."""
    for case, form, quant in (("streams", "hf", ""), ("bitnet", "hf", "packed"), ("granite", "hf", ""),
                              ("jamba", "gguf", "f32"), ("qwen3", "gguf", "f32")):
        path = tmp_path / f"{case}.{form}"
        out(case, path, form, quant, check=False)
        capsys.readouterr()
        sample.main(sample.Config(checkpoint=str(path), prompt="The", max_new_tokens=5))
        assert capsys.readouterr().out.startswith("The")


def test_an_embedding_that_ternary_cannot_hold_is_refused(tmp_path):
    out("wide", tmp_path / "m.gguf", "gguf", "q8_0", check=False)
    with pytest.raises(UserError, match="embedding does not fit float16"):
        load.read(tmp_path / "m.gguf")


def test_the_code_of_a_folder_must_be_the_one_here(tmp_path):
    out("streams", tmp_path / "m", "hf", check=False)
    with open(tmp_path / "m/ternary.py", "a") as file:
        file.write("# another one\n")
    with pytest.raises(UserError, match=r"written with another ternary.py"):
        load.read(tmp_path / "m")


def test_every_stock_architecture_is_among_the_cases():
    found = {stock_architecture(built(case)[0])[0] for case in CASES}
    assert found == {"", "llama", "mistral", "qwen2", "qwen3", "arcee", "bitnet", "jamba", "granitemoehybrid"}
