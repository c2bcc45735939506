"""An ONNX graph in the folder that transformers.js and onnxruntime-genai read, and as a page that runs in a browser."""
import shutil
import subprocess
import tempfile
from pathlib import Path

from formats import hf
from formats import onnx as onnx_format
from formats.names import head_dim, n_hidden, n_kv_head
from thimble.files import UserError

SUFFIX = {"fp32": "", "int8": "_quantized", "int4": "_q4", "q2": "_q2"}  # transformers.js asks for these names
DTYPE = {"fp32": "fp32", "int8": "q8", "int4": "q4", "q2": "q2"}  # and calls them so
PACKAGES = {  # of npm, and the files of each that the page needs: with WebGPU, without it, tokenizer, chat template
    "onnxruntime-web@1.30.0": ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs",
                               "ort-wasm-simd-threaded.asyncify.wasm", "ort.wasm.min.mjs",
                               "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"],
    "@huggingface/tokenizers@0.2.0": ["tokenizers.min.mjs"],
    "@huggingface/jinja@0.5.11": ["index.js"],
}
PAGE = Path(__file__).resolve().parent.parent / "web"


def write(folder, model, tokenizer, quant):
    """Write a folder with a graph, its configs and the tokenizer -> what onnx.write returns.

    config.json names an architecture that transformers.js knows and whose cache has the same form; what computes is
    the graph. onnxruntime-genai has no cache like a hybrid's, so it gets no genai_config.json.
    """
    file = f"onnx/model{SUFFIX[quant]}.onnx"
    twin, stored = onnx_format.write(folder / file, model, quant)
    record = tokenizer.record
    ids = {"bos_token_id": record.bos, "eos_token_id": list(record.ends)}
    pad = record.ends[0] if record.pad is None else record.pad
    about = architecture(model) | ids
    about["transformers.js_config"] = {"dtype": DTYPE[quant]}
    if hasattr(model.blocks[0], "mixer"):  # a hybrid: keys and values in some layers, states in the others
        kinds = ["attention" if hasattr(block.mixer, "q_proj") else "mamba" for block in model.blocks]
        about |= {"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"],
                  "layers_block_type": kinds}
    else:
        hf.write_json(folder / "genai_config.json", genai_config(model, file, ids, pad))
    hf.write_json(folder / "config.json", about)
    hf.write_side_files(folder, model, tokenizer)
    return twin, stored


def heads(config):
    return {"num_attention_heads": config.n_head, "num_key_value_heads": n_kv_head(config)}


def architecture(model):
    """What config.json says of the model's shape: transformers.js derives number and shape of its caches from it."""
    config = model.config
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"],
            "original_model_type": type(model).__module__, "head_dim": head_dim(config),
            "intermediate_size": n_hidden(model), "max_position_embeddings": config.block_size,
            "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "hidden_act": "silu",
            "tie_word_embeddings": False, "vocab_size": config.vocab_size, "hidden_size": config.n_embd,
            "num_hidden_layers": config.n_layer} | heads(config)


def genai_config(model, file, ids, pad):
    """genai_config.json: the names of the graph's inputs and outputs, and greedy decoding."""
    config = model.config
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids",
              "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    outputs = {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {"filename": file, "session_options": {"provider_options": []},
               "head_size": head_dim(config), "inputs": inputs, "outputs": outputs,
               "hidden_size": config.n_embd, "num_hidden_layers": config.n_layer} | heads(config)
    genai = {"type": "llama", "context_length": config.block_size, "vocab_size": config.vocab_size,
             "pad_token_id": pad, "decoder": decoder} | ids
    search = {"max_length": config.block_size, "past_present_share_buffer": False, "do_sample": False,
              "num_beams": 1, "top_k": 1, "top_p": 1.0, "temperature": 1.0}
    return {"model": genai, "search": search}


def write_page(folder, model, tokenizer, quant):
    """What `write` writes, the page of web/, and in lib/ what it needs, of npm and ours: it asks no other server."""
    fetch_packages(folder / "lib")
    twin, stored = write(folder, model, tokenizer, quant)
    shutil.copyfile(PAGE / "index.html", folder / "index.html")
    shutil.copyfile(PAGE / "chat.mjs", folder / "lib" / "chat.mjs")
    return twin, stored


def fetch_packages(folder):
    """Copy the files of PACKAGES, as npm installs them, into `folder`."""
    if shutil.which("npm") is None:
        raise UserError("--format=web takes the files of onnxruntime-web from npm, which is missing: install Node.js")
    folder.mkdir()
    with tempfile.TemporaryDirectory() as work:
        command = ["npm", "install", "--prefix", work, "--ignore-scripts", "--no-audit", "--no-fund", *PACKAGES]
        # --ignore-scripts: only the files are wanted
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            reason = errors[0] if errors else "it gives no reason"
            raise UserError(f"npm could not install {' and '.join(PACKAGES)}: {reason:.200}")
        for package, files in PACKAGES.items():
            dist = Path(work, "node_modules", package.rpartition("@")[0], "dist")
            for name in files:
                shutil.copyfile(dist / name, folder / name)
