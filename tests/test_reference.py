"""A fork keeps everything: a stock name, or an ONNX graph, only where it gives the logits of the model's own Python."""
import importlib
import importlib.util
import sys

import pytest
import torch
from cases import CASES, SHAPE, built, send, tokenizer
from conftest import ROOT

from formats import names
from formats import onnx as onnx_format
from formats.reference import FORWARD, stock_architecture
from thimble.files import UserError

STOCK = {"llama": "llama", "tied": "llama", "chars": "llama", "qwen3": "qwen3", "arcee": "arcee", "bitnet": "bitnet",
         "wide": "bitnet", "relu2": "bitnet", "jamba": "jamba", "granite": "granitemoehybrid",
         "granite, rope": "granitemoehybrid", "mistral": "mistral", "nemo": "llama", "llama3": "llama", "yarn": "llama",
         "linear": "llama", "qwen2": "qwen2", "qwen2 window": "qwen2", "qwen3 wide": "qwen3"}
WHY = {"odd": "its tensors are not those of Qwen3: model.layers.0.self_attn.q_proj.bias",
       "gelu": "qk_norm=True", "groups": "group_size=16", "streams": "n_streams=2", "mamba2": "qk_norm=True"}


@pytest.mark.parametrize("case", CASES)
def test_stock_architectures_are_found_by_their_logits(case):
    assert stock_architecture(built(case)[0]) == (STOCK.get(case, ""), WHY.get(case, ""))
    if CASES[case][0] == "ternary":
        assert stock_architecture(built(case, packed=True)[0])[0] == STOCK.get(case, "")


def test_two_norms_swapped_in_the_table_are_noticed(monkeypatch):
    swapped = {"input_layernorm": "pre_ff_layernorm", "pre_ff_layernorm": "input_layernorm"}
    table = []
    for ours, theirs, there in names.JAMBA:
        stem, _, last = theirs.rpartition(".")
        table.append((ours, f"{stem}.{swapped[last]}" if last in swapped else theirs, there))
    monkeypatch.setitem(names.TABLES, "jamba", table)
    assert stock_architecture(built("jamba")[0]) == ("", "it computes something other than Jamba")


@torch.no_grad()
@pytest.mark.parametrize("stock", ["llama", "bitnet", "jamba"])
def test_the_definitions_are_those_of_transformers(stock):
    """Names, shapes and formulas, beside a model that is all theirs. BitNet without its roundings: those need a GPU's
    compiler there, and test_bitnet_of_transformers runs them."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    about = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48}
    if stock == "jamba":
        about |= {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1,
                  "expert_layer_period": 1, "expert_layer_offset": 0, "mamba_dt_rank": 5, "mamba_d_state": 8}
    torch.manual_seed(0)
    name = names.CLASSES[stock]
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**about)
    there = getattr(transformers, name)(config).eval()
    for p in there.parameters():
        p += (0.2 if p.dim() < 2 else 0.15) * torch.randn_like(p)
    tensors = dict(there.state_dict())
    settings = config.to_dict()
    if stock != "jamba":
        settings["rope_theta"] = config.rope_parameters["rope_theta"]
    ids = torch.randint(60, (2, 40), generator=torch.Generator().manual_seed(0))
    forward = FORWARD["llama" if stock == "bitnet" else stock]
    assert (forward(tensors, settings, ids) - there(ids).logits).abs().max() <= 1e-4
    assert not tensors  # every tensor of theirs was used


# ---- forks: a model file with one change, in its place or as a copy under another name
SETTINGS = {"model": {"n_kv_head": 2}, "ternary": {"n_hidden": 64},
            "hybrid_ssm": {"ssm": "mamba1", "n_layer": 3, "attn_layer_period": 3},
            "cerebros": {"n_embd": 16, "window": 12}}
CHANGES = {  # model file, what stands there, what stands there instead
    "an activation": ("model", "F.silu(", "torch.sin("),
    "a rotation": ("model", "theta ** (-pairs", "theta ** (-1.1 * pairs"),
    "a ternary MLP's activation": ("ternary", "F.silu(", "torch.sin("),
    "a rounding": ("ternary", "weight.abs().mean()", "weight.abs().median()"),
    "a step of the scan": ("hybrid_ssm", "F.softplus(", "torch.relu("),
    "a hybrid's MLP": ("hybrid_ssm", "F.silu(", "torch.sin("),
    "a unit's activation": ("cerebros", '"silu": F.silu', '"silu": torch.sin'),
}


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """fork("model", "mine", old, new) -> a model of mine.py, a copy of model.py with `new` for `old`."""
    def make(arch, name, old="", new="", **more):
        source = (ROOT / f"{arch}.py").read_text()
        assert old in source
        path = tmp_path / "forks" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source.replace(old, new) if old else source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        settings = ({} if arch == "cerebros" else SHAPE) | SETTINGS[arch] | {"block_size": 48, "vocab_size": 257} | more
        torch.manual_seed(0)
        model = module.Model(module.Config(**settings))
        with torch.no_grad():
            for p in model.parameters():
                p += (0.2 if p.dim() < 2 else 0.15) * torch.randn_like(p)
        return model.eval()
    return make


@pytest.mark.parametrize("seed", range(4))
def test_an_untrained_ternary_model_is_a_bitnet(tmp_path, seed):
    ternary = importlib.import_module("ternary")
    torch.manual_seed(seed)
    model = ternary.Model(ternary.Config(n_layer=2, n_embd=256, vocab_size=64)).eval()
    assert stock_architecture(model) == ("bitnet", "")
    onnx_format.write(tmp_path / "m.onnx", model, "q2")


@pytest.mark.parametrize("in_place", [True, False], ids=["in its place", "copied"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_fork_leaves_as_what_it_computes_or_not_at_all(fork, tmp_path, change, in_place):
    arch, old, new = CHANGES[change]
    model = fork(arch, arch if in_place else f"mine_{arch}", old, new)
    words, folder = tokenizer("byte"), tmp_path / f"{arch}-{in_place}"
    window = arch == "cerebros"
    refusals = {"gguf": "llama.cpp has no architecture for this model",
                "onnx": "computes something other than the ONNX form of its layers"}
    if change == "a rounding":  # the graph holds what the model's own Python rounded
        del refusals["onnx"]
        assert send(model, words, tmp_path / "right.onnx", "onnx", prompts=4, prompt_tokens=8).get("delta", 0) < 0.05
    for form, why in refusals.items():  # also where nothing would run what was written
        with pytest.raises(UserError, match=why) as error:
            send(model, words, tmp_path / f"m.{form}", form, window=window and form == "onnx", check=False)
        assert "\n" not in str(error.value) and not (tmp_path / f"m.{form}").exists()
    send(model, words, folder, "hf", prompts=4, prompt_tokens=8)
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-test.txt")
    there = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    ids = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))
    assert (there(ids).logits - model(ids)[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("arch,stock", [("model", "llama"), ("ternary", "bitnet"), ("hybrid_ssm", "jamba"),
                                        ("cerebros", "")])
def test_a_copy_that_computes_the_same_leaves_as_the_same(fork, tmp_path, arch, stock):
    """The name of a file says nothing: mine.py that still is a Llama goes to llama.cpp."""
    pytest.importorskip("onnxruntime", reason="pip install -r requirements-test.txt")
    model, words = fork(arch, "mine"), tokenizer("byte")
    assert stock_architecture(model)[0] == stock
    found = send(model, words, tmp_path / "m.onnx", "onnx", window=arch == "cerebros", prompts=4, prompt_tokens=8)
    assert found["same"] + found["tied"] == 4
    if stock:
        pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
        found = send(model, words, tmp_path / "m.gguf", "gguf", prompts=4, prompt_tokens=8)
        assert found["same"] + found["tied"] == 4


def test_a_method_of_another_name_is_no_other_model(fork, tmp_path):
    model = fork("model", "mine", "unembed", "to_logits")
    assert stock_architecture(model)[0] == "llama"
    send(model, tokenizer("byte"), tmp_path / "m.onnx", "onnx", "int8", check=False)


def test_a_fork_that_sees_less_far_is_noticed(fork):
    """A sliding window shows only behind its width, so a whole context is compared."""
    model = fork("model", "mine", ".triu(1 + S - T)", ".triu(1 + S - T) + torch.full((T, S), -torch.inf).tril(-40)")
    assert stock_architecture(model) == ("", "it computes something other than Llama")


@pytest.mark.parametrize("arch,settings,old,new,title", [
    ("model", {"qk_norm": True}, "rotate(self.q_norm(q), *rope)", "self.q_norm(rotate(q, *rope))", "Qwen3"),
    ("model", {"mlp": "gelu"}, "F.gelu(self.up_proj(x))", "F.gelu(self.up_proj(x), approximate='tanh')", "Arcee"),
    ("hybrid_ssm", {"ssm": "mamba2", "ssm_head_dim": 16}, "self.norm(y * F.silu(z))", "self.norm(y) * F.silu(z)",
     "GraniteMoeHybrid"),
    ("hybrid_ssm", {"ssm": "mamba2", "ssm_head_dim": 16}, "F.softplus(dt.to(wide) + self.dt_bias)",
     "F.softplus(dt.to(wide))", "GraniteMoeHybrid")])
def test_a_fork_that_is_almost_a_stock_architecture_is_noticed(fork, arch, settings, old, new, title):
    """Norms on the other side of a rotation or a gate, GELU's approximation, a bias that is left out."""
    model = fork(arch, "mine", old, new, **settings)
    assert stock_architecture(model) == ("", f"it computes something other than {title}")


def test_a_fork_with_squared_relu_goes_to_llama_cpp_as_arcee(fork, tmp_path):
    pytest.importorskip("xllamacpp", reason="pip install -r requirements-test.txt")
    model = fork("model", "mine", "F.gelu(self.up_proj(x))", "F.relu(self.up_proj(x)).square()", mlp="relu2")
    assert stock_architecture(model) == ("arcee", "")
    for form in ("hf", "gguf"):
        found = send(model, tokenizer("byte"), tmp_path / f"m.{form}", form, prompts=4, prompt_tokens=8)
        assert found["delta"] <= 1e-4 and found["same"] == 4


def test_an_mlp_without_a_gate_is_refused_for_llama_cpp(tmp_path):
    with pytest.raises(UserError, match="llama.cpp computes ReLU.2 in every MLP without a gate, this model has gelu"):
        send(*built("arcee"), tmp_path / "m.gguf", "gguf", check=False)


@pytest.mark.parametrize("arch,settings,stock", [
    ("model", {"qk_norm": True}, "qwen3"), ("model", {"mlp": "gelu"}, "arcee"),
    ("hybrid_ssm", {"ssm": "mamba2", "ssm_head_dim": 16}, "granitemoehybrid"),
    ("hybrid_ssm", {"ssm": "mamba2", "ssm_head_dim": 16, "rope": True}, "granitemoehybrid")])
def test_a_copy_of_a_recipe_s_model_opens_without_its_code(fork, arch, settings, stock):
    assert stock_architecture(fork(arch, "mine", **settings)) == (stock, "")


def traced_fork(fork, arch):
    changes = {"model": ("F.silu(", "torch.sin("), "hybrid_ssm": ("F.softplus(", "torch.relu(")}
    return fork(arch, "mine", *changes[arch])


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("arch,files", [("model", ["forward.onnx", "step.onnx"]), ("hybrid_ssm", ["step.onnx"])])
def test_a_fork_leaves_as_its_own_step_in_onnx(fork, tmp_path, arch, files):
    """No mapping of ours: torch traces what the file says. Mamba's loop over tokens has no forward of any length."""
    ort = pytest.importorskip("onnxruntime", reason="pip install -r requirements-test.txt")
    pytest.importorskip("onnxscript", reason="pip install -r requirements-test.txt")
    model = traced_fork(fork, arch)
    found = send(model, tokenizer("byte"), tmp_path / "m", "onnx", prompts=4, prompt_tokens=30)
    assert found["delta"] <= 1e-4 and found["same"] == 4
    graphs = sorted((tmp_path / "m" / "onnx").iterdir())
    assert [path.name for path in graphs] == files
    ids = torch.randint(257, (1, 37))
    if len(graphs) == 2:
        logits, = ort.InferenceSession(graphs[0]).run(None, {"input_ids": ids.numpy()})
        assert (torch.from_numpy(logits) - model(ids)[0]).abs().max() <= 1e-4


def test_a_fork_needs_onnxscript_to_be_traced(fork, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="needs the package onnxscript"):
        send(traced_fork(fork, "model"), tokenizer("byte"), tmp_path / "m", "onnx")
    assert not list(tmp_path.glob("m*"))
