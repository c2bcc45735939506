"""Damaged files of every kind that Thimble reads, and a process that loads them one by one.

    export PYTHONPATH=.
    python tests/damage.py files FOLDER SEED N           # row B1: every known case, and N mutations of each file
    python tests/damage.py mutate LOADER FOLDER SEED N   # row B2: N mutations of what one loader reads

For `files` each one is loaded in a process of its own, forked from this one, since importing torch a thousand
times would take an hour. One line of JSON for each load, or for all of them, is what it prints.
"""
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import test_checkpoint
import test_data
import test_gguf
import test_hf
import test_tokenizer
import torch

import model
from formats import check
from thimble import checkpoint, data, load
from thimble.files import UserError
from thimble.tokenizer import byte_tokenizer

V1 = Path(__file__).resolve().parent / "fixtures" / "v1"
CPU_SECONDS = 5  # after which a load counts as a hang
MEMORY = 2 << 30  # bytes that a load may add
SAMPLE = "some text, 1234 times: naïve café 🎉" + "a" * 60 + "!"


# ---- what is whole
def make_run(folder):
    torch.manual_seed(0)
    made = model.Model(model.Config(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=257))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json())
    meta = {"arch": "model", "model_config": asdict(made.config), "note": "made by a test"}
    moments = {"m": torch.randn(9), **checkpoint.random_state()}
    return checkpoint.save(folder / "run", 1, made.state_dict(), moments, meta, folder / "tokenizer.json")


def make_data(folder):
    mask = np.arange(1000) % 2
    return test_data.write(folder / "ds", byte_tokenizer(), np.arange(1000) % 256, np.arange(100), train_mask=mask)


def make_hf(folder):
    return Path(shutil.copytree(V1 / "hf", folder / "hf"))


def make_gguf(folder):
    (folder / "m.gguf").write_bytes(test_gguf.GOOD_GGUF)
    return folder / "m.gguf"


def make_tokenizer(folder):
    bpe = test_tokenizer.train_bpe(["to be or not to be, that is the question " * 9], 300)
    (folder / "tokenizer.json").write_text(bpe.to_json())
    return folder / "tokenizer.json"


def make_onnx(folder):
    return Path(shutil.copytree(V1 / "onnx" / "onnx", folder / "onnx")) / "model.onnx"


MAKE = {"run": make_run, "data": make_data, "hf": make_hf, "gguf": make_gguf, "tokenizer": make_tokenizer,
        "onnx": make_onnx}


# ---- loading: each returns what was loaded, once it has been used
@torch.no_grad()
def use_model(checkpoint_, path):
    made = checkpoint.load_model(checkpoint_).eval()
    made(torch.zeros(1, 4, dtype=torch.long))
    return use_tokenizer(path)


def use_tokenizer(path):
    tokenizer = load.read_tokenizer(path)
    return tokenizer.decode(tokenizer.encode(SAMPLE))


def use_run(path):
    found = checkpoint.load(path, optimizer=True)
    checkpoint.set_random_state(found.optimizer, path)
    text = use_model(found, path)
    tensors = {**found.model, **found.optimizer}
    return json.dumps(found.meta, sort_keys=True), text, {name: t.numpy().tobytes() for name, t in tensors.items()}


def use_data(path):
    dataset = data.load(path)
    test_data.use(dataset)
    return [getattr(dataset, name).tobytes() for name in ("train", "val", "train_mask")]


def use_foreign(path):
    return use_model(load.read(path), path)


STORED = {}  # tensors that the ONNX file must hold


def use_onnx(path):
    if not STORED:
        STORED.update(check.onnx_weights(V1 / "onnx" / "onnx" / "model.onnx"))
    check.read_back(check.Artefact(path, "onnx", "fp32", None, STORED))


USE = {"run": use_run, "data": use_data, "hf": use_foreign, "gguf": use_foreign, "tokenizer": use_tokenizer,
       "onnx": use_onnx}
# what has hashes, so that only a change which changes nothing may pass
HASHED = {"run", "data"}


# ---- the known cases: {kind: {name: function that damages what lies at a path}}
def write(content, name=""):
    def damage(path):
        (path / name if name else path).write_bytes(content)
    return damage


def forge(name, content):
    return lambda path: test_checkpoint.forge(path, name, content)


def config(**changes):
    """Another model_config, with the hashes right, as one who means harm would leave it."""
    def damage(path):
        meta = json.loads((path / "meta.json").read_text())
        test_checkpoint.edit(path, model_config=meta["model_config"] | changes)
    return damage


def tensors(change):
    def damage(path):
        found = checkpoint.load(path, optimizer=True)
        change(found.model)
        test_checkpoint.forge(path, "model.safetensors", checkpoint.pack_tensors(found.model))
    return damage


def random_state(change):
    def damage(path):
        found = checkpoint.load(path, optimizer=True)
        found.optimizer["random.torch"] = change(found.optimizer["random.torch"])
        test_checkpoint.forge(path, "optimizer.safetensors", checkpoint.pack_tensors(found.optimizer))
    return damage


def file_name(name):
    def damage(path):
        files = json.loads((path / "meta.json").read_text())["files"]
        test_checkpoint.edit(path, files=files | {name: files["tokenizer.json"]})
    return damage


def link(name):
    def damage(path):
        os.replace(path / name, path.parent / "elsewhere")
        os.symlink(path.parent / "elsewhere", path / name)
    return damage


def run_cases():
    cases = {}
    for name in ("model.safetensors", "optimizer.safetensors"):
        for what, content in test_checkpoint.MALFORMED.items():
            cases[f"{name}: {what}"] = forge(name, content)
        cases[f"{name}: another hash"] = lambda path, name=name: test_data.flip(path / name, -3)
        cases[f"{name}: a link"] = link(name)
    for key, values in {"n_layer": ("2", -1, 1e308, 2**63, True, None, 3, 0, 10**9, [2]), "n_head": (3, 0, -1),
                        "n_embd": (7, 10**9, 2**62, 0, -8), "vocab_size": (12, 2**40, 10**6, 0),
                        "block_size": (0, -1, "16"), "unknown": (1,), "rope_theta": ("x", -1.0)}.items():
        for value in values:
            cases[f"{key}={value}"] = config(**{key: value})
    for what, content in {"empty": b"", "cut": b'{"step": 1, ', "a list": b"[]", "NaN": b'{"step": NaN}',
                          "Infinity": b'{"step": Infinity}', "deep": b"[" * 10**5, "not UTF-8": b"\xff\xfe{}"}.items():
        cases[f"meta.json: {what}"] = write(content, "meta.json")
    for name in test_checkpoint.NAMES:
        cases[f"a file named {name!r:.30}"] = file_name(name)
    for key, values in {"format_version": (2, "1", True), "step": (-1, "1", 1e9), "files": ("DELETE", [], {}),
                        "arch": ("os", "../model", None, "nowhere"), "model_config": ("DELETE", [])}.items():
        for value in values:
            cases[f"{key}={value}"] = lambda path, edit={key: value}: test_checkpoint.edit(path, **edit)
    cases["a missing tensor"] = tensors(lambda t: t.pop("norm.weight"))
    cases["an extra tensor"] = tensors(lambda t: t.update(extra=torch.ones(1)))
    cases["another shape"] = tensors(lambda t: t.update({"head.weight": t["head.weight"].T}))
    cases["NaN"] = tensors(lambda t: t["norm.weight"].fill_(float("nan")))
    cases["Inf"] = tensors(lambda t: t["head.weight"][3].fill_(float("inf")))
    cases["a short random state"] = random_state(lambda state: state[:-5])
    cases["a random state of text"] = random_state(lambda state: torch.zeros(3))
    return cases


def tokenizer_cases():
    good = json.loads(byte_tokenizer().to_json())
    cases = dict(test_tokenizer.damaged_tokenizers())
    vocab = good["model"]["vocab"]
    for bomb in ("(a+)+$", "(a|aa)+b"):
        split = {"type": "Split", "pattern": {"Regex": bomb}, "behavior": "Isolated", "invert": False}
        both = {"type": "Sequence", "pretokenizers": [split, good["pre_tokenizer"]]}
        cases[f"the regular expression {bomb}"] = json.dumps(good | {"pre_tokenizer": both})
    cases["a gap in the ids"] = json.dumps(good | {"model": good["model"] | {"vocab": vocab | {"x1": 9999}}})
    return {name: write(content if isinstance(content, bytes) else content.encode())
            for name, content in cases.items()}


def harmless_tokenizers():
    """What stops other programs changes nothing here, since nothing is truncated and no token is added."""
    good = json.loads(byte_tokenizer().to_json())
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}], "pair": [],
                "special_tokens": {}}
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 3}
    return {"a template of a missing token": good | {"post_processor": template},
            "truncation": good | {"truncation": cut}}


def external(location, offset=None, length=None, before=None):
    """The first tensor's numbers are somewhere else, as an ONNX file may say."""
    def damage(path):
        if before:
            before(path)
        proto = onnx.load(path)
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": location(path) if callable(location) else location, "offset": offset, "length": length}
        for key, value in entries.items():
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))
        path.write_bytes(proto.SerializeToString())
    return damage


def secret(path):
    """A file outside of the folder of the graph, large enough for any of its tensors."""
    target = path.parent.parent / "secret.bin"
    target.write_bytes(bytes(10**6))
    return target


def onnx_cases():
    return {
        "empty": write(b""), "a page": write(b"404: Not Found"), "noise": write(bytes(range(256)) * 9),
        "a path up": external("../secret.bin", before=secret),
        "nested dots": external("a/../../secret.bin", before=secret),
        "an absolute path": external(lambda path: str(secret(path))),
        "a link": external("link.bin", before=lambda path: os.symlink(secret(path), path.parent / "link.bin")),
        "a hard link": external("hard.bin", before=lambda path: os.link(secret(path), path.parent / "hard.bin")),
        "a linked folder": external("up/secret.bin", before=lambda path: os.symlink(secret(path).parent,
                                                                                   path.parent / "up")),
        "a length of 2^60": external("w.bin", 0, 2**60, lambda path: (path.parent / "w.bin").write_bytes(bytes(9))),
        "an offset of -1": external("w.bin", -1, 4, lambda path: (path.parent / "w.bin").write_bytes(bytes(9))),
        "a missing file": external("nowhere.bin"),
    }


def known_cases():
    found = {"run": run_cases(), "data": {name: damage for name, (_, damage) in test_data.DAMAGE.items()}}
    found["hf"] = dict(test_hf.BAD_HF)
    found["gguf"] = {name: write(content) for name, content in test_gguf.BAD_GGUF.items()}
    found["tokenizer"] = tokenizer_cases()
    for name, changed in harmless_tokenizers().items():
        found["tokenizer"][f"harmless: {name}"] = write(json.dumps(changed).encode())
    found["onnx"] = onnx_cases()
    del found["hf"]["a shard twice"]  # which needs a second file
    return found


# ---- mutations
def mutated(good, dice):
    """Bytes cut short, or with a few of them changed."""
    bad = bytearray(good)
    if dice.random() < 0.4:
        return bytes(bad[:dice.randrange(len(bad))])
    near = min(len(bad), 1500) if dice.random() < 0.5 else len(bad)  # half of them in the header
    for _ in range(dice.choice([1, 1, 2, 4])):
        at = dice.randrange(near)
        if dice.random() < 0.5:
            bad[at] ^= 1 << dice.randrange(8)
        else:
            bad[at] = dice.choice([0, 1, 127, 128, 255, dice.randrange(256)])
    return bytes(bad)


def files_of(path):
    return sorted(path.iterdir()) if path.is_dir() else [path]


# ---- row B1: a process for each file
def forked(kind, path, whole):
    """Load in a process of its own -> {"outcome": refused | accepted | ..., "message", "seconds" of the CPU}."""
    reading, writing = os.pipe()
    log = os.open(path.parent.parent / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(log, 2)
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # data and stack
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(60)
        os.write(writing, json.dumps(outcome(kind, path, whole)).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    os.lseek(log, 0, 0)
    stderr = os.read(log, 10**5).decode("utf-8", "replace")
    os.close(log)
    found = {"outcome": f"died ({status})", "message": stderr[-300:]}
    if status == 0 and answer:
        found = json.loads(answer)
    if "Traceback" in stderr:
        found = {"outcome": "traceback", "message": stderr[-300:]}
    return found | {"seconds": usage.ru_utime + usage.ru_stime}


def outcome(kind, path, whole):
    """Load and use what lies at the path. `whole` is what must come of it if anything does; None: it may differ."""
    try:
        got = USE[kind](path)
    except UserError as error:
        message = str(error)
        clear = "\n" not in message and len(message) < 1200 and (kind == "onnx" or str(path.parent) in message)
        return {"outcome": "refused" if clear else "unclear", "message": message}
    except BaseException as error:
        return {"outcome": "error", "message": f"{type(error).__name__}: {error}"[:300]}
    if whole is not None and got != whole:
        return {"outcome": "accepted, though not as it was", "message": ""}
    return {"outcome": "accepted", "message": ""}


def fresh(kind, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return MAKE[kind](folder)


def report(kind, name, found):
    print(json.dumps({"kind": kind, "case": name, **found}), flush=True)


def files(folder, seed, n):
    torch.set_num_threads(1)  # a fork has no other threads
    with torch.device("meta"):  # a load must not pay for what is imported here
        model.Model(model.Config(n_layer=1, vocab_size=9))
    dice = random.Random(seed)
    for kind, cases in known_cases().items():
        path = fresh(kind, folder / kind)
        whole = USE[kind](path)
        whole = whole if kind in HASHED else None
        found = forked(kind, path, whole)
        assert found["outcome"] == "accepted", (kind, found)
        for name, damage in cases.items():
            path = fresh(kind, folder / kind)
            damage(path)
            report(kind, f"known: {name}", forked(kind, path, whole))
        path = fresh(kind, folder / kind)
        for file in files_of(path):
            good = file.read_bytes()
            for i in range(n):
                file.write_bytes(mutated(good, dice))
                report(kind, f"mutation {i} of {file.name}", forked(kind, path, whole))
            file.write_bytes(good)


# ---- row B2: a loader at a time, in this process
def true_manifest(path, name, content):
    """Mutated tensors behind hashes that are right: only the library's own checks are left."""
    test_checkpoint.forge(path, name, content)


def without_hash(path, name, content):
    """A mutated meta.json whose own hash is gone, as it is after somebody has edited it."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        meta = json.loads(content)
        meta.pop("sha256", None)
        content = json.dumps(meta).encode()
    (path / name).write_bytes(content)


def as_it_is(path, name, content):
    (path / name if path.is_dir() else path).write_bytes(content)


LOADERS = {  # name -> (kind, the file, how the mutation is written)
    "checkpoint tensors": ("run", "model.safetensors", true_manifest),
    "optimizer tensors": ("run", "optimizer.safetensors", true_manifest),
    "checkpoint meta.json": ("run", "meta.json", without_hash),
    "dataset meta.json": ("data", "meta.json", as_it_is),
    "dataset tokens": ("data", "val.bin", as_it_is),
    "Hugging Face config.json": ("hf", "config.json", as_it_is),
    "Hugging Face tensors": ("hf", "model.safetensors", as_it_is),
    "GGUF": ("gguf", "m.gguf", as_it_is),
    "tokenizer.json": ("tokenizer", "tokenizer.json", as_it_is),
    "ONNX": ("onnx", "model.onnx", as_it_is),
}


def mutate(name, folder, seed, n):
    """Load n mutations -> {"outcomes": {outcome: how many}, "escapes": [[number, message]], "slowest": CPU seconds}."""
    kind, file, put = LOADERS[name]
    dice = random.Random(seed)
    path = fresh(kind, folder)
    good = (path / file if path.is_dir() else path).read_bytes()
    original = (path / "meta.json").read_bytes() if kind == "run" else b""
    whole = USE[kind](path) if kind == "data" else None
    outcomes = {}
    escapes = []
    slowest = 0.0
    for i in range(n):
        if kind == "run":
            (path / "meta.json").write_bytes(original)
        put(path, file, mutated(good, dice))
        begun = time.process_time()
        found = outcome(kind, path, whole)
        slowest = max(slowest, time.process_time() - begun)
        outcomes[found["outcome"]] = outcomes.get(found["outcome"], 0) + 1
        if found["outcome"] not in ("refused", "accepted"):
            escapes.append([i, found["message"]])
    return {"outcomes": outcomes, "escapes": escapes[:20], "slowest": slowest}


if __name__ == "__main__":
    if sys.argv[1] == "files":
        files(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        torch.set_num_threads(1)
        print(json.dumps(mutate(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))))
