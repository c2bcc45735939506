"""ONNX files, held against torch by onnxruntime, onnxruntime-genai and a browser."""
import copy
import functools
import http.server
import importlib
import json
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
import torch
from cases import send
from onnx import numpy_helper

from formats import onnx as onnx_format
from formats.check import Artefact, OnnxRuntime, check, onnx_weights
from formats.names import QUANTS
from thimble.files import UserError
from thimble.generate import generate
from thimble.load import deployed
from thimble.tokenizer import byte_tokenizer, char_tokenizer

BASE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 60, "block_size": 48}
CASES = {
    "dense": ("model", {}),
    "gqa": ("model", {"n_kv_head": 2}),
    "tied": ("model", {"n_kv_head": 1, "tie_embeddings": True, "qk_norm": True, "rope_theta": 500.0}),
    "gelu": ("model", {"mlp": "gelu", "n_embd": 72}),
    "ternary": ("ternary", {}),
    "groups": ("ternary", {"n_kv_head": 2, "act": "relu2", "group_size": 32, "n_hidden": 160, "sub_norm": False}),
    "static": ("ternary", {"n_streams": 2, "static_streams": True}),
    "streams": ("ternary", {"n_streams": 4}),
    "jamba": ("hybrid_ssm", {"ssm": "mamba1", "n_layer": 3, "attn_layer_period": 3, "n_kv_head": 2}),
    "mamba2": ("hybrid_ssm", {"attn_layer_period": 2, "ssm_head_dim": 16, "d_state": 8, "rope": True, "qk_norm": True}),
}
WORDS = char_tokenizer(map(chr, range(65, 124)))  # 60 ids, with the end of text


@functools.cache
def built(case, packed=False):
    """Far from the initial weights, where every part matters."""
    arch, extra = CASES[case]
    module = importlib.import_module(arch)
    torch.manual_seed(0)
    model = module.Model(module.Config(**BASE | extra))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return (deployed(model) if packed else model).eval()


def written(path, model, quant="fp32", window=False):
    """Write the graph -> its Artefact."""
    return Artefact(path, "onnx", quant, *onnx_format.write(path, model, quant, window))


@pytest.fixture
def ort():
    return pytest.importorskip("onnxruntime", reason="pip install onnxruntime runs the ONNX files")


FORMS = [(case, quant, packed) for case in CASES for quant in QUANTS["onnx"] for packed in (False, True)
         if CASES[case][0] == "ternary" or not (packed or quant == "q2")]


@pytest.mark.parametrize("case,quant,packed", FORMS)
def test_onnxruntime_says_what_torch_says(ort, tmp_path, case, quant, packed):
    model, path = built(case, packed), tmp_path / "model.onnx"
    found = check(written(path, model, quant), model, WORDS, {}, 14, 12)
    if CASES[case][0] != "ternary" and quant == "fp32":
        assert found["delta"] <= 1e-4 and found["same"] == 14
    if quant in ("fp32", "q2"):
        assert found["delta"] < 0.2 and abs(found["kl"]) < 1e-4  # 8-bit activations: a rounding may tip
    proto = onnx.load(path)
    assert {o.domain: o.version for o in proto.opset_import}[""] == 14 and proto.ir_version <= 8
    assert {node.domain for node in proto.graph.node} <= ({""} if quant == "fp32" else {"", "com.microsoft"})
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] == "ternary"])
@pytest.mark.parametrize("quant", ["fp32", "q2"])
def test_without_its_roundings_a_ternary_graph_is_exact(ort, tmp_path, monkeypatch, case, quant):
    """A rounding turns a last bit into 1/254 of a number; without them all else must agree to 1e-4."""
    model, path = built(case), tmp_path / "model.onnx"
    onnx_format.write(path, model, quant)
    proto = onnx.load(path)
    for node in proto.graph.node:
        if node.op_type == "Round":
            node.op_type = "Identity"
    onnx.save(proto, path)

    def absmax(x):
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return x * scale, scale
    monkeypatch.setattr("ternary.absmax", absmax)
    ids = torch.randint(60, (3, 48), generator=torch.Generator().manual_seed(2))
    run = OnnxRuntime(path)
    logits, _ = run.step(ids, run.empty_cache(3))
    with torch.no_grad():
        assert np.abs(logits - model(ids)[0].numpy()).max() <= 1e-4


@pytest.mark.parametrize("case", ["gqa", "tied", "jamba", "mamba2"])
def test_padding_on_the_left_and_any_chopping_change_nothing(ort, tmp_path, case):
    model, path = built(case), tmp_path / "model.onnx"
    onnx_format.write(path, model)
    run = OnnxRuntime(path)
    ids = torch.randint(60, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = np.stack([model(ids[:1])[0][0, -5:], model(ids[1:, 12:])[0][0, -5:]])
    mask = np.ones((2, 30), np.int64)
    mask[1, :12] = 0
    cache, start = run.empty_cache(2), 0
    for end in (7, 25, 30):
        logits, cache = run.step(ids[:, start:end], cache, mask[:, :end])
        start = end
    assert np.abs(logits - want).max() <= 1e-4


@pytest.mark.parametrize("case", ["dense", "tied", "streams", "jamba", "mamba2"])
def test_window_form(ort, tmp_path, case):
    """The form that the Elixir service of a seed loads: int32 in, the last position's logits out."""
    model, path = built(case), tmp_path / "window.onnx"
    found = check(written(path, model, window=True), model, WORDS, {}, 14, 4)
    assert found["same"] == 14
    run = OnnxRuntime(path).session
    (given,), (got,) = run.get_inputs(), run.get_outputs()
    assert (given.name, given.type, given.shape) == ("input_ids", "tensor(int32)", ["batch", "block"])
    assert (got.name, got.type, got.shape) == ("logits", "tensor(float)", ["batch", 60])
    assert run.run(None, {"input_ids": np.zeros((5, 40), np.int32)})[0].shape == (5, 60)


WIRED = {"silu": {"window": 40, "block_size": 96}, "gelu": {"tie_embeddings": True, "p_lateral": 1.0, "window": 7},
         "softplus": {"n_layer": 1, "n_rank": 24, "window": 1}}


@pytest.mark.parametrize("act", list(WIRED))
def test_window_form_of_a_wiring(ort, tmp_path, act):
    """(batch, 40) int32 -> (batch, V) float32, opset 14; -1 stands where there is no token yet."""
    import cerebros
    torch.manual_seed(0)
    model = cerebros.Model(cerebros.Config(n_embd=16, vocab_size=60, act=act, **WIRED[act])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    path = tmp_path / "window.onnx"
    artefact = written(path, model, window=True)
    assert [(o.domain, o.version) for o in onnx.load(path).opset_import] == [("", 14)]
    assert check(artefact, model, WORDS, {}, 14, 60)["same"] == 14
    run = OnnxRuntime(path).session
    assert (run.get_inputs()[0].type, run.get_outputs()[0].shape) == ("tensor(int32)", ["batch", 60])
    texts = [torch.randint(60, (n,)) for n in (1, 12, 40)]
    rows = torch.stack([torch.cat((torch.full((40 - len(t),), -1), t)) for t in texts])
    got = run.run(None, {"input_ids": rows.int().numpy()})[0]
    with torch.no_grad():
        want = torch.cat([model(t[None])[0][:, -1] for t in texts])
    assert got.dtype == np.float32 and np.abs(got - want.numpy()).max() <= 1e-4
    for wrong in ({"window": False}, {"window": True, "quant": "int8"}):
        with pytest.raises(UserError, match="one ONNX form.*add --window, without --quant"):
            onnx_format.write(path, model, **wrong)


def test_the_benches_say_which_file_they_lack(ort, tmp_path, monkeypatch, capsys):
    from bench import foreign, window
    with pytest.raises(UserError, match="is not a GGUF file"):
        foreign.main(foreign.Config())
    small = importlib.import_module("model")
    model = small.Model(small.Config(n_layer=1, n_embd=32, block_size=16, vocab_size=60)).eval()
    monkeypatch.setattr(window.load, "read", lambda *_: None)
    monkeypatch.setattr(window.checkpoint, "load_model", lambda _: model)
    monkeypatch.setattr(window, "node", window.python)     # which is in an optional package
    with pytest.raises(UserError, match="absent.onnx: there is no such file"):
        window.main(window.Config(file=str(tmp_path / "absent.onnx")))
    onnx_format.write(tmp_path / "w.onnx", model, window=True)
    window.main(window.Config(file=str(tmp_path / "w.onnx"), calls=1))
    assert "with [1, 16]" in capsys.readouterr().out       # no longer than the model's context


@pytest.mark.slow
def test_window_form_in_node(ort, tmp_path, monkeypatch):
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("needs Node.js")
    command = ["npm", "install", "--ignore-scripts", "--prefix", str(tmp_path), "onnxruntime-node@1.20.1"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("npm could not install onnxruntime-node")
    import cerebros
    from bench import window
    monkeypatch.setenv("NODE_PATH", str(tmp_path / "node_modules"))
    torch.manual_seed(0)
    model = cerebros.Model(cerebros.Config(n_embd=16, vocab_size=60)).eval()
    onnx_format.write(tmp_path / "w.onnx", model, window=True)
    ids = torch.randint(60, (3, 40))
    logits, times = window.node(tmp_path / "w.onnx", ids.int().numpy(), 5, tmp_path)
    with torch.no_grad():
        assert np.abs(logits - model(ids)[0][:, -1].numpy()).max() <= 1e-4 and len(times) == 5
    with pytest.raises(UserError, match="Node does not run"):
        window.node(tmp_path / "absent.onnx", ids.int().numpy(), 5, tmp_path)


def test_files_are_as_small_as_they_should_be(tmp_path):
    config = importlib.import_module("model").Config(n_embd=256, vocab_size=2048, tie_embeddings=True)
    ternary = importlib.import_module("ternary")
    dense, small = importlib.import_module("model").Model(config), ternary.Model(ternary.Config(
        n_embd=256, vocab_size=64))
    for model, quant, bits in ((dense, "fp32", 32), (dense, "int8", 8.5), (dense, "int4", 5), (small, "q2", 2)):
        onnx_format.write(tmp_path / "m.onnx", model, quant)
        n = sum(p.numel() for p in model.parameters())
        extra = 2048 * 256 / 2 if quant == "int4" else 64 * 256 * 4 if quant == "q2" else 0  # 8 bits, float32
        assert 0.99 * n * bits / 8 < (tmp_path / "m.onnx").stat().st_size < 1.15 * n * bits / 8 + extra + 60_000


# ---- rounded weights, read from the file by what the operators' documentation says, with no code of the exporter
def by_hand(path):
    """{name of a matrix: its values (N, K), float64}.

    com.microsoft.MatMulNBits: B is uint8 (N, blocks, block_size * bits / 8), a byte's first code in its low bits, and
    a code stands for (code - 2^(bits - 1)) * scale of its block. At 4 bits the graph adds the sum of each block's
    inputs times NAME_middles (blocks, N): each weight of a block is larger by that.
    """
    proto = onnx.load(path)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        about = {attribute.name: attribute.i for attribute in node.attribute}
        name = node.input[1].rpartition("_")[0]
        packed = arrays[node.input[1]]
        codes = np.stack([packed >> shift & 2 ** about["bits"] - 1 for shift in range(0, 8, about["bits"])], -1)
        codes = codes.reshape(about["N"], -1, about["block_size"]).astype(float)
        values = (codes - 2 ** (about["bits"] - 1)) * arrays[f"{name}_scales"][..., None].astype(float)
        if f"{name}_middles" in arrays:
            values += arrays[f"{name}_middles"].T[..., None]
        found[name] = values.reshape(about["N"], -1)[:, :about["K"]]
    if "embed" not in found:  # which is looked up; where it is the head, too, the node above has it
        values = (arrays["embed_q8"].astype(float) - 128) * arrays["embed_scales"][..., None].astype(float)
        width = arrays["norm.weight"].size
        found["embed"] = values.reshape(len(values), -1)[:, :width]
    return found


def in_blocks(w):
    return np.pad(w, ((0, 0), (0, -w.shape[1] % 32))).reshape(len(w), -1, 32)


def squares_of_plain_rounding(w):
    """(N, blocks): squared error of each block of w (N, K), its numbers at the nearest of 16 between least and largest.
    """
    blocks = in_blocks(w)
    least = blocks.min(-1, keepdims=True)
    step = np.maximum(blocks.max(-1, keepdims=True) - least, 1e-12) / 15
    error = np.round((blocks - least) / step) * step + least - blocks
    return np.square(error).sum(-1), step


@pytest.mark.parametrize("case", ["dense", "gelu", "tied", "jamba"])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_rounded_weights_are_as_near_as_rounding_allows(tmp_path, case, quant):
    model = built(case)
    onnx_format.write(tmp_path / "model.onnx", model, quant)
    found = by_hand(tmp_path / "model.onnx")
    weights = {name.removesuffix(".weight"): p.detach().numpy().astype(float) for name, p in model.named_parameters()}
    for name, values in found.items():
        w = weights[name]
        error = in_blocks(values - w)
        if quant == "int8" or name in ("embed", "head"):  # 254 steps from minus the largest of a block to the largest
            half_a_step = np.abs(in_blocks(w)).max(-1, keepdims=True) / 127 / 2
            assert (np.abs(error) <= half_a_step * 1.1).all(), name  # a scale is off by up to 1/2048: a float16
            continue
        squares, step = squares_of_plain_rounding(w)
        assert (np.abs(error) <= step).all(), name
        found_squares = np.square(error).sum(-1)
        assert (found_squares <= squares * 1.02).all() and found_squares.sum() < 0.97 * squares.sum(), name
    # and every matrix is among them, but those that stay as they are
    matrices = {name for name, w in weights.items() if w.ndim == 2 and not name.endswith(("A_log", "dt_proj"))}
    assert set(found) == matrices


def edit(path, name, change):
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor).copy())), name))
    onnx.save(proto, path)


def swapped(array):
    array[[0, 1]] = array[[1, 0]]
    return array


def test_weights_from_16_levels_get_their_levels_back(tmp_path):
    """As llama.cpp's Q4_1 has them, code * d + m with halves d and m. A grid laid over another would round twice."""
    model = copy.deepcopy(built("dense"))
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (192, 2, 32))
    codes[..., 0], codes[..., 1] = 0, 15  # a file's maker has used the least and the largest
    d, m = rng.uniform(0.001, 0.1, (192, 2, 1)).astype(np.float16), rng.normal(size=(192, 2, 1)).astype(np.float16)
    w = (codes * d.astype(np.float32) + m.astype(np.float32)).reshape(192, 64)
    model.blocks[0].mlp.up_proj.weight.data = torch.from_numpy(w)
    onnx_format.write(tmp_path / "model.onnx", model, "int4")
    error = in_blocks(by_hand(tmp_path / "model.onnx")["blocks.0.mlp.up_proj"] - w)
    assert (np.abs(error) <= 0.02 * d + np.abs(m) / 2048).all()  # the middle of a block is a float16


SABOTAGE = [("dense", "fp32", "blocks.1.attn.o_proj", lambda w: w * 0),
            ("dense", "fp32", "blocks.0.attn.q_proj", lambda w: w.T),
            ("dense", "fp32", "blocks.0.attn_norm.weight", lambda w: w * 1.001),
            ("dense", "fp32", "embed", swapped),
            ("dense", "int8", "blocks.0.mlp.down_proj_q8", swapped),
            ("dense", "int8", "embed_scales", lambda w: w * 2),
            ("dense", "int4", "blocks.1.mlp.up_proj_scales", lambda w: w * 2),
            ("dense", "int4", "blocks.1.mlp.gate_proj_middles", lambda w: w + np.float16(0.1)),
            ("dense", "int4", "blocks.0.attn.v_proj_q4", lambda w: w[:, ::-1]),
            ("ternary", "q2", "blocks.0.mlp.gate_proj_q2", swapped),
            ("ternary", "fp32", "blocks.0.attn.sub_norm.weight", lambda w: w * np.linspace(0.95, 1.05, 64, dtype="f4")),
            ("streams", "q2", "blocks.1.mlp_residual.proj", lambda w: w * 0)]


@pytest.mark.parametrize("case,quant,name,change", SABOTAGE, ids=lambda v: v if isinstance(v, str) else "")
def test_the_check_sees_a_wrong_weight(ort, tmp_path, case, quant, name, change):
    model, path = built(case), tmp_path / "model.onnx"
    artefact = written(path, model, quant)
    check(artefact, model, WORDS, {}, 14, 12)
    edit(path, name, change)
    with pytest.raises(UserError, match=f"check failed: {name} is not in the file as it should be"):
        check(artefact, model, WORDS, {}, 14, 12)
    with pytest.raises(UserError, match="check failed: (logits|.* greedy texts) differ"):  # nor do its logits pass
        check(artefact._replace(stored=onnx_weights(path)), model, WORDS, {}, 14, 12)


def test_refusals_are_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.onnx"
    fork = type("Model", (torch.nn.Module,), {"__module__": "mine"})()
    for model, quant, words in ((built("dense"), "int3", "choose one of fp32, int8, int4, q2"),
                                (built("dense"), "q2", "for ternary models"), (fork, "fp32", "mine.py has no ONNX")):
        with pytest.raises(UserError, match=words) as error:
            onnx_format.write(path, model, quant)
        assert "\n" not in str(error.value) and not path.exists()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        assert check(written(path, built("dense")), built("dense"), WORDS, {}) == {}
        assert "needs the package onnxruntime: pip install onnxruntime" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install Node.js"):
        send(built("dense"), byte_tokenizer(), tmp_path / "web", "web")


def test_the_check_refuses_files_that_are_not_ours(ort, tmp_path):
    path = tmp_path / "model.onnx"
    artefact = written(path, built("dense"))
    for content in (b"", b"no protobuf", np.random.default_rng(0).bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="onnxruntime does not load it") as error:
            OnnxRuntime(path)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="check failed") as error:
            check(artefact, built("dense"), WORDS, {})
        assert "\n" not in str(error.value)
    written(path, built("ternary"))
    with pytest.raises(UserError, match="check failed"):
        check(artefact, built("dense"), WORDS, {})


@functools.cache
def spoken():
    """A model of bytes, and its tokenizer."""
    module, tokenizer = importlib.import_module("model"), byte_tokenizer()
    torch.manual_seed(0)
    model = module.Model(module.Config(n_layer=2, n_embd=64, block_size=96, vocab_size=tokenizer.vocab_size)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    ids = tokenizer.encode("To be, or not")
    want = list(generate(model, ids, 40, temperature=0, stop_ids={tokenizer.eot}))
    return model, tokenizer, ids, want


def test_onnxruntime_genai_reads_the_folder(tmp_path):
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai reads the folder")
    model, tokenizer, ids, want = spoken()
    folder = tmp_path / "out"
    send(model, tokenizer, folder, "onnx", check=False)
    loaded = genai.Model(str(folder))
    settings = genai.GeneratorParams(loaded)
    settings.set_search_options(max_length=len(ids) + len(want))
    generator = genai.Generator(loaded, settings)
    generator.append_tokens([ids])
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == ids + want
    assert list(genai.Tokenizer(loaded).encode("To be, or not")) == ids


@pytest.mark.slow
def test_the_page_writes_the_same_text_in_a_browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("npm")):
        pytest.skip("needs chromium and npm")
    model, tokenizer, _, want = spoken()
    folder = tmp_path / "web"
    send(model, tokenizer, folder, "web", check=False)
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "onnx" / "model.onnx").is_file() and config["transformers.js_config"] == {"dtype": "fp32"}
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = http.server.SimpleHTTPRequestHandler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/?prompt=To%20be,%20or%20not&n=40&temperature=0&run=1"
        page = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                               "--virtual-time-budget=60000", url], capture_output=True, text=True, timeout=120).stdout
        server.shutdown()
    assert re.search('data-state="done"', page), page[-1500:]
    assert [int(i) for i in re.search('data-ids="([^"]*)"', page)[1].split()] == want
    assert re.search(r"model, fp32, [\d.]+ MB, running on (WASM|WebGPU)", page) and re.search(r"[\d.]+ tokens/s", page)
