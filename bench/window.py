"""The ONNX form of a window, in onnxruntime from Python and from Node: the largest error, and milliseconds per call.

    python export.py --format=onnx --window --checkpoint=runs/cerebros_bible --out=window.onnx
    python bench/window.py --checkpoint=runs/cerebros_bible --file=window.onnx

Node finds onnxruntime-node where `npm install onnxruntime-node` in this folder puts it, or in NODE_PATH.
"""
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from formats.check import OnnxRuntime
from thimble import checkpoint, configurator, load
from thimble.files import UserError

NODE = """
const ort = require("onnxruntime-node"), fs = require("fs")
const [file, ids, out, calls] = process.argv.slice(1)
const rows = JSON.parse(fs.readFileSync(ids))
async function main() {
  const session = await ort.InferenceSession.create(file, { intraOpNumThreads: 1 })
  const run = (rows) => session.run({ input_ids: new ort.Tensor("int32", Int32Array.from(rows.flat()),
                                                                [rows.length, rows[0].length]) })
  const { logits } = await run(rows)
  fs.writeFileSync(out, Buffer.from(logits.data.buffer, logits.data.byteOffset, logits.data.byteLength))
  const times = []
  for (let i = 0; i < calls; i++) {
    const begun = performance.now()
    await run(rows.slice(0, 1))
    times.push(performance.now() - begun)
  }
  console.log(JSON.stringify(times))
}
main()
"""


@dataclass(frozen=True)
class Config:
    checkpoint: str = ""            # run or checkpoint folder; empty: the newest
    file: str = "window.onnx"       # what export.py --format=onnx --window wrote
    rows: int = 32                  # windows whose logits are compared
    calls: int = 1000               # timed calls with one window each, in one thread

    def __post_init__(self):
        configurator.check(self, positive=("rows", "calls"))


def node(file, ids, calls, folder):
    """ids (B, T) -> (logits (B, V), milliseconds of each call of one row), by onnxruntime-node."""
    given = Path(folder, "ids.json")
    out = Path(folder, "logits.bin")
    given.write_text(json.dumps(ids.tolist()))
    try:
        run = subprocess.run(["node", "-e", NODE, str(file), str(given), str(out), str(calls)], capture_output=True,
                             text=True, cwd=ROOT / "bench")
    except FileNotFoundError:
        raise UserError("the row of Node needs Node.js: install it") from None
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if "Error" in line] or ["it gives no reason"]
        raise UserError(f"Node does not run {file}: {lines[0]:.150}; is onnxruntime-node installed (npm install)?")
    return np.frombuffer(out.read_bytes(), np.float32).reshape(len(ids), -1), json.loads(run.stdout)


def python(file, ids, calls, _=None):
    """The same, by onnxruntime in this process."""
    session = OnnxRuntime(file).session
    logits = session.run(None, {"input_ids": ids})[0]
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        session.run(None, {"input_ids": ids[:1]})
        times.append(1e3 * (time.perf_counter() - begun))
    return logits, times


def main(cfg):
    torch.set_num_threads(1)
    model = checkpoint.load_model(load.read(cfg.checkpoint, "best")).eval()
    if not Path(cfg.file).is_file():
        raise UserError(f"--file={cfg.file}: there is no such file: "
                        "write it with python export.py --format=onnx --window")
    length = min(getattr(model.config, "window", 40), model.config.block_size)
    ids = torch.randint(model.config.vocab_size, (cfg.rows, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids)[0][:, -1].numpy()
    with tempfile.TemporaryDirectory() as folder:
        ids = ids.int().numpy()
        for name, run in (("Python", python), ("Node", node)):
            logits, times = run(Path(cfg.file).resolve(), ids, cfg.calls, folder)
            half, most = np.percentile(times, (50, 95))
            print(f"{name:<7} max |dlogit| {np.abs(logits - want).max():.1e}, p50 {half:.3f} ms, p95 {most:.3f} ms of "
                  f"{len(times)} calls with [1, {length}]", flush=True)


if __name__ == "__main__":
    configurator.run(main, Config)
