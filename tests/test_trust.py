"""Nothing that is loaded is executed: hostile text in every string of every format, watched by an audit hook."""
import ast
import json
import os
import shutil
import sys

import pytest
from conftest import ROOT, forked

import train
from thimble import checkpoint, configurator, machine

V1 = ROOT / "tests" / "fixtures" / "v1"

# In a child, since an audit hook stays until the process ends: load every kind of thing with every one of its strings
# replaced in turn, and print what was executed, started or called over the network meanwhile.
CHILD = """
import json, os, shutil, sys
from pathlib import Path
root, work, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
sys.path.insert(0, str(root))
import gguf
import train
from thimble import checkpoint, configurator, data, load

INSIDE = tuple(str(Path(p).resolve()) for p in (root, sys.prefix, sys.base_prefix, Path(os.__file__).parent))
HOSTILE = ["evil", str(work / "evil" / "evil.py"), "antigravity",
           "{{ ''.__class__.__mro__[1].__subclasses__() }}$(touch pwned)"]
seen = []
watching = False


def outside(name):
    return isinstance(name, str) and os.path.isabs(name) and not str(Path(name).resolve()).startswith(INSIDE)


def hook(event, args):
    if not watching:
        return
    if event == "exec" and outside(args[0].co_filename):
        seen.append((event, args[0].co_filename))
    elif event in ("compile", "import") and outside(args[1]):
        seen.append((event, args[1]))
    elif event == "import" and args[0] in ("evil", "antigravity"):
        seen.append((event, args[0]))
    elif event == "subprocess.Popen" and list(args[1][:2]) != ["git", "describe"]:
        seen.append((event, str(args[1])))
    elif event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "socket.connect",
                   "socket.getaddrinfo", "webbrowser.open", "pickle.find_class"):
        seen.append((event, str(args)))


def leaves(value, way=()):
    # the ways to all strings in JSON
    if isinstance(value, str):
        yield way
    elif isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], way + (key,))


def changed(value, way, text):
    value = json.loads(json.dumps(value))
    part = value
    for key in way[:-1]:
        part = part[key]
    part[way[-1]] = text
    return value


def attempt(use):
    global watching
    watching = True
    try:
        use()
        return True
    except (SystemExit, Exception):
        return False
    finally:
        watching = False


def resume():
    sys.argv = ["train.py", "--resume", f"--out_dir={work}/run"]
    configurator.run(train.main, train.Config, with_command=True)


def load_run():
    checkpoint.load_model(checkpoint.load_run(work / "run"))
    load.load(work / "run")


KINDS = {
    "run": (work / "run" / "step_000002" / "meta.json", load_run),
    "resume": (work / "run" / "step_000002" / "meta.json", resume),
    "data": (work / "data" / "meta.json", lambda: data.load(work / "data").tokenizer()),
    "hf": (work / "hf" / "config.json", lambda: load.load(work / "hf")),
    "gguf": (work / "model.gguf", lambda: load.load(work / "model.gguf")),
}
file, use = KINDS[kind]
use()  # whatever is imported late is imported here
sys.addaudithook(hook)
good = file.read_bytes()
n = 0
if kind == "gguf":
    for field in gguf.GGUFReader(file).fields.values():
        if field.types == [gguf.GGUFValueType.STRING]:
            was = bytes(field.parts[-1])
            for text in HOSTILE:  # of the same length
                file.write_bytes(good.replace(was, text.encode()[:len(was)].ljust(len(was))))
                n += 1
                attempt(use)
else:
    meta = json.loads(good)
    meta.pop("sha256", None)
    cases = [changed(meta, way, text) for way in leaves(meta) for text in HOSTILE[1::2]]
    if kind == "hf":
        cases += [meta | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True}]
    if kind in ("run", "resume"):
        for text in HOSTILE:
            cases.append(changed(meta, ("arch",), text))
            cases[-1]["config"] |= {"arch": text}
            cases.append(changed(meta, ("config", "dataset"), "nowhere"))
            cases[-1]["config"] |= {"prepare": text}
            cases[-1]["dataset"] |= {"path": "nowhere"}
    for case in cases:
        file.write_text(json.dumps(case))
        n += 1
        attempt(use)
file.write_bytes(good)
assert attempt(use), "what is not hostile loads"
print(json.dumps({"seen": sorted(set(seen)), "n": n}))
"""


@pytest.fixture(scope="module")
def things(toy, tmp_path_factory):
    work = tmp_path_factory.mktemp("trust")
    (work / "evil").mkdir()
    (work / "evil" / "evil.py").write_text(f"open({str(work / 'pwned')!r}, 'w')\n"
                                           "class Config: pass\nclass Model: pass\n")
    shutil.copytree(toy, work / "data")
    train.train(configurator.load(train.Config, dataset=str(work / "data"), out_dir=str(work / "run"), n_layer=1,
                                  n_head=1, n_embd=16, block_size=16, batch_size=2, max_steps=2, keep_last=1,
                                  device="cpu", dtype="float32"))
    shutil.rmtree(work / "run" / "step_000000", ignore_errors=True)
    shutil.copytree(V1 / "hf", work / "hf")
    shutil.copy(V1 / "model.gguf", work / "model.gguf")
    return work


@pytest.mark.score("B3")
@pytest.mark.parametrize("kind", ["run", "resume", "data", "hf", "gguf"])
def test_nothing_loaded_is_executed(things, kind, score, monkeypatch):
    monkeypatch.setattr(machine, "matmul_rate", lambda *_: 1e11)  # of each resumed run most of the time
    def child():
        os.chdir(things)
        sys.argv = ["child", str(ROOT), str(things), kind]
        sys.path.insert(0, str(things / "evil"))
        sys.dont_write_bytecode = True
        exec(CHILD, {"__name__": "child"})
    code, out, err = forked(child)()
    assert code == 0, err[-2000:]
    found = json.loads(out.splitlines()[-1])
    score(found["n"] - len(found["seen"]), found["n"], f"{kind}: {len(found['seen'])} events")
    assert found["seen"] == [] and found["n"] > 5
    assert not (things / "pwned").exists()


def test_a_model_file_is_beside_train_py(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    for arch in ("evil", "numpy", "pytest"):
        with pytest.raises(checkpoint.UserError, match=f"needs {arch}.py, which is not here"):
            checkpoint.model_file(tmp_path, arch)
    assert checkpoint.model_file(tmp_path, "model").Model


# ---- what could execute something is in no file
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "torch.save", "os.system", "os.popen",
         "yaml.load", "pickle.load", "pickle.loads", "np.load", "numpy.load"}
KNOWN = {("tasks/worker.py", "exec"), ("tasks/worker.py", "compile")}  # inside the sandbox
SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if path.parts[len(ROOT.parts)] not in ("tests", "data", "runs")]


def dangerous(path):
    """Imports and calls of one file that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            found += [name for name in names if name.partition(".")[0] in LOADERS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] * (name in CALLS)
            found += [keyword.arg for keyword in node.keywords if keyword.arg == "shell" or
                      keyword.arg in ("allow_pickle", "weights_only")]
    where = str(path.relative_to(ROOT))
    return [name for name in found if (where, name) not in KNOWN]


@pytest.mark.score("B3")
def test_no_source_file_could_unpickle_or_evaluate(score):
    found = {str(path.relative_to(ROOT)): dangerous(path) for path in SOURCES}
    found = {path: names for path, names in found.items() if names}
    score(len(SOURCES) - len(found), len(SOURCES), "source files")
    assert not found and len(SOURCES) > 40


@pytest.mark.parametrize("code", ["import pickle", "from pickle import loads", "torch.load(f)", "eval(x)",
                                  "import dill", "np.load(f, allow_pickle=True)", "run(x, shell=True)"])
def test_the_check_notices_what_could(code):
    path = ROOT / "tests" / "no_such_file.py"
    fake = type("Fake", (), {"read_text": lambda self: code, "relative_to": lambda self, root: path})()
    assert dangerous(fake)
