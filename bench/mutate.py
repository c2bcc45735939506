"""Does the suite notice mistakes? Plants one at a time in a copy of the tree and runs the tests that may notice it.

    python bench/mutate.py --count=100 --seed=0                 # over all files, in proportion to their length
    python bench/mutate.py --count=20 --files=train.py,optim.py
    python bench/mutate.py --count=100 --seed=0 --retry --seconds=60   # go on: what nobody noticed or looked at so far

The mistakes are those that people make (see `mistakes`), drawn by the seed: the kind first, then the place. The tests
whose text has most in common with the function around it run first (see `nearest`), until one fails or the time is up.
A mistake is noticed if a test fails, or if they do not end; tests that fail without the mistake as well are named at
the end. Left alone are messages (`raise`, `print`, f-strings), docstrings, annotations, imports, and the defaults of a
Config, which are choices. tests/test_copies.py and tests/test_house.py read the source itself and would notice
anything, so they have no say.

Each run is a fork of this process, which has the large libraries in memory, with mounts and processes of its own: a
mistake in tasks/worker.py could hide this machine's files, one in a kill end other processes. Hence Linux, and root.
"""
import ast
import contextlib
import copy
import ctypes
import functools
import importlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from thimble import configurator

ROOMS = ("", "thimble", "formats", "tasks", "prepare", "kernels")
RESULTS = ROOT / "runs" / "mutate"
SHARE = 12  # test functions that are collected together
READ_SOURCE = ("tests/test_copies.py", "tests/test_house.py")
LIBRARIES = ("torch", "numpy", "safetensors.torch", "tokenizers", "transformers", "starlette", "uvicorn", "pydantic",
             "gguf", "onnx", "onnxruntime", "optuna", "matplotlib.pyplot")
MEMORY = 12 << 30  # address space of each run, for mistakes that allocate without end
# linux/sched.h, linux/mount.h
CLONE_NEWNS, CLONE_NEWPID, MS_REC, MS_PRIVATE = 0x20000, 0x20000000, 0x4000, 0x40000

OPERATORS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}
CONFIGS = ("cfg", "config", "c", "self.cfg", "self.config", "cfg.model", "model.config")
TWINS = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}
MESSAGES = ("print", "warn", "UserError", "log", "say")  # calls whose arguments are text for people
LOOKS = ("indent", "flush", "name", "label", "color", "alpha", "fontsize", "ha", "linewidth", "textcoords")  # keywords
NO_MISTAKE = ("strict", "ensure_ascii")  # keywords that only matter where something else is wrong already
NEVER_SWAPPED = ("isinstance", "issubclass", "getattr", "hasattr", "suppress")


@dataclass(frozen=True)
class Config:
    # what to plant
    count: int = 100                # mistakes
    seed: int = 0
    files: tuple[str, ...] = ()     # only in these; empty: in all
    # how to look
    retry: bool = False             # go on with the last run of this seed
    seconds: float = 15.0           # of processor time for the tests of each mistake
    workers: int = 2

    def __post_init__(self):
        configurator.check(self, positive=("count", "seconds", "workers"))


# ---- the mistakes
def changed(node, **fields):
    """Source of `node` with these fields; in brackets, so that it stays one operand of what is around it."""
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return f"({ast.unparse(other)})"


def swapped(items, i):
    return [*items[:i], items[i + 1], items[i], *items[i + 2:]]


def is_text(node):
    """Text, or the name of a file behind the / of a path."""
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)


def one_more(node):
    return ast.BinOp(node, ast.Add(), ast.Constant(1))


def mistakes(node, known, configs, rng):
    """Yields (kind, the node it replaces, its new source) for each mistake that a person could make at this node.

    known: names that the function has assigned before. configs: {field: type} of each Config, that of this file first.
    """
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                ops = [*node.ops[:i], OPERATORS[type(op)](), *node.ops[i + 1:]]
                yield "comparison", node, changed(node, ops=ops)
        case ast.BinOp() if type(node.op) in OPERATORS and not is_text(node.left) and not is_text(node.right):
            yield "arithmetic", node, changed(node, op=OPERATORS[type(node.op)]())
        case ast.BoolOp():
            yield "and/or", node, changed(node, op=OPERATORS[type(node.op)]())
        case ast.Constant(value=bool()):
            yield "constant", node, str(not node.value)
        case ast.Constant(value=int()):
            yield "constant", node, str(node.value + 1)
        case ast.Constant(value=float()):
            yield "constant", node, str(2 * node.value or 1.0)
        case ast.Call():
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            for i in range(len(node.args) - 1):
                if name not in NEVER_SWAPPED:
                    yield "arguments swapped", node, changed(node, args=swapped(node.args, i))
            for keyword in node.keywords:
                if keyword.arg and keyword.arg not in LOOKS + NO_MISTAKE:
                    rest = [other for other in node.keywords if other is not keyword]
                    yield "keyword dropped", node, changed(node, keywords=rest)
            if name in TWINS:
                field = "id" if isinstance(node.func, ast.Name) else "attr"
                function = copy.copy(node.func)
                setattr(function, field, TWINS[name])
                yield "min/max", node, changed(node, func=function)
        case ast.Subscript(slice=ast.Slice() as part):
            for side in ("lower", "upper"):
                if getattr(part, side):
                    cut = copy.copy(part)
                    setattr(cut, side, one_more(getattr(part, side)))
                    yield "index", node, changed(node, slice=cut)
        case ast.Subscript(slice=ast.Constant(value=int()) | ast.UnaryOp()):
            yield "index", node, changed(node, slice=one_more(node.slice))
        case ast.Attribute(ctx=ast.Load()) if ast.unparse(node.value) in CONFIGS:
            fields = next((fields for fields in configs if node.attr in fields), {})
            others = [name for name, kind in fields.items() if kind == fields[node.attr] and name != node.attr]
            if others:
                yield "wrong key", node, changed(node, attr=rng.choice(others))
        case ast.If() | ast.IfExp() | ast.While():
            yield "condition", node.test, f"(not ({ast.unparse(node.test)}))"
            if not isinstance(node, ast.While):
                yield "condition", node.test, "True"
                yield "condition", node.test, "False"
        case ast.comprehension() if node.ifs:
            yield "condition", node.ifs[0], "True"
        case ast.Return(value=ast.Tuple(elts=[_, _, *_])):
            yield "order", node.value, changed(node.value, elts=swapped(node.value.elts, 0))
        case ast.Assign(targets=[ast.Tuple(elts=[ast.Name(), ast.Name(), *_]) as names]):
            yield "order", names, changed(names, elts=swapped(names.elts, 0))
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield "statement dropped", node, "pass"
        case ast.Assign(targets=[ast.Name(id=name)]) if name in known:  # otherwise it would only be a NameError
            yield "statement dropped", node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement dropped", node, "pass"


def is_left_alone(node):
    match node:
        case ast.Raise() | ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.Assert():
            return True
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name in MESSAGES
        case ast.Expr(value=value):
            return isinstance(value, ast.Constant) or is_left_alone(value)
        case ast.If():
            return "__name__" in ast.unparse(node.test)
    return False


def parts(node):
    """The children of `node` without annotations, decorators and the defaults of a Config."""
    is_config = isinstance(node, ast.ClassDef) and node.name == "Config"
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or is_config and isinstance(child, ast.AnnAssign):
                continue
            if isinstance(child, ast.keyword) and child.arg in LOOKS + NO_MISTAKE:
                continue
            yield child


def in_file(name, configs, rng):
    """All mistakes of a file, as dicts; start and end are the bytes that `after` replaces."""
    source = (ROOT / name).read_bytes()
    tree = ast.parse(source)
    starts = [0]  # of the lines, in bytes as the columns of ast
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    known = defaultdict(set)  # function or statement of the file: names that it has assigned so far
    found = []

    def visit(node, around):
        if is_left_alone(node):
            return
        for kind, at, after in mistakes(node, known[around], configs, rng):
            start = starts[at.lineno - 1] + at.col_offset
            end = starts[at.end_lineno - 1] + at.end_col_offset
            found.append({"file": name, "line": at.lineno, "kind": kind, "before": source[start:end].decode(),
                          "after": after, "start": start, "end": end, "around": (around.lineno, around.end_lineno)})
        if isinstance(node, ast.arg):
            known[around].add(node.arg)
        inside = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else around
        for child in parts(node):
            visit(child, inside)
        if isinstance(node, ast.Assign):
            known[around] |= {target.id for target in node.targets if isinstance(target, ast.Name)}

    for statement in tree.body:
        visit(statement, statement)
    return found


@functools.cache
def config_fields(name):
    """{field: type} of the Config of a file; empty if it has none."""
    for node in ast.parse((ROOT / name).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            return {field.target.id: ast.unparse(field.annotation) for field in fields}
    return {}


def files():
    paths = (path for room in ROOMS for path in sorted((ROOT / room).glob("*.py")))
    return [str(path.relative_to(ROOT)) for path in paths if path.read_text().strip()]


def draw(cfg):
    """cfg.count mistakes: the files by their length, in each the kind first, then the place."""
    rng = random.Random(cfg.seed)
    names = list(cfg.files) or files()
    lengths = [len((ROOT / name).read_text().splitlines()) for name in names]
    offset = rng.random()
    chosen = []
    for i in range(cfg.count):  # evenly spaced over the length of all files, so that each gets its share
        place = (i + offset) * sum(lengths) / cfg.count
        file = 0
        while place >= lengths[file]:
            place -= lengths[file]
            file += 1
        chosen.append(names[file])
    drawn = []
    for name, count in Counter(chosen).items():
        kinds = defaultdict(list)
        for mistake in in_file(name, [config_fields(file) for file in (name, *files())], rng):
            kinds[mistake["kind"]].append(mistake)
        while count and kinds:
            kind = rng.choice(sorted(kinds))
            mistake = kinds[kind].pop(rng.randrange(len(kinds[kind])))
            if not kinds[kind]:
                del kinds[kind]
            if is_another(mistake):
                drawn.append(mistake)
                count -= 1
    return drawn


def is_another(mistake):
    """Whether it is still Python, and another program."""
    source = (ROOT / mistake["file"]).read_bytes()
    try:
        return ast.dump(ast.parse(planted(mistake, source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


# ---- which tests may notice it
def terms(text):
    return set(re.findall(r"[A-Za-z_]{3,}", text))


@functools.cache
def test_functions():
    """{"FILE::FUNCTION": terms} of all tests."""
    found = {}
    for path in sorted(ROOT.glob("tests/test_*.py")):
        name = str(path.relative_to(ROOT))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and name not in READ_SOURCE:
                found[f"{name}::{node.name}"] = terms(ast.unparse(node))
    return found


def nearest(mistake):
    """All test functions, as pytest names them; first those that share most terms with the function of the mistake.

    A term weighs the logarithm of how rare it is among the tests. Those of the mistake itself and of the function's
    first line weigh four times as much, and tests of the file's own name three times; so does the contract, which finds
    the model files by itself.
    """
    tests = test_functions()
    common = Counter(term for found in tests.values() for term in found)
    source = (ROOT / mistake["file"]).read_text()
    first, last = mistake["around"]
    lines = source.splitlines()[first - 1:last]
    stem = Path(mistake["file"]).stem
    weights = Counter()
    for times, text in ((1, f"{stem} {' '.join(lines)}"), (3, f"{lines[0]} {mistake['before']}")):
        for term in terms(text):
            weights[term] += times * math.log(len(tests) / max(1, common[term]))
    score = {}
    for test, found in tests.items():
        score[test] = sum(weights[term] for term in found) / math.sqrt(len(found))
        is_contract = "class Model(" in source and test.startswith("tests/test_contract")
        if is_contract or test.startswith(f"tests/test_{stem}"):
            score[test] *= 3
    return sorted(tests, key=score.get, reverse=True)


class Watch:
    """A pytest plugin: orders the tests, notes what fails, and stops where the time is up."""

    def __init__(self, seconds, stem):
        self.end = used() + seconds
        self.stem = stem
        self.failed = []

    def pytest_collection_modifyitems(self, items):
        cases = Counter()
        places = {}
        for place, item in enumerate(items):
            # of the contract, the cases of this model file before the others
            other = "test_contract" in item.nodeid and f"[{self.stem}-" not in item.nodeid
            function = item.nodeid.split("[")[0], other
            cases[function] += 1
            # one case of each function, then the second of each: they notice different things
            places[item] = (other, cases[function], place)
        items.sort(key=places.get)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport

    def pytest_runtest_protocol(self, item):
        if used() > self.end:
            item.session.shouldstop = "the time is up"


def used():
    """Processor seconds of this process and of those that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# ---- one run
def copy_tree(to):
    """The files that git tracks, and the new ones."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listing.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def planted(mistake, source):
    return source[:mistake["start"]] + mistake["after"].encode() + source[mistake["end"]:]


def run_tests(tree, tests, seconds, stem):
    """The name of the first test that fails, or "". To be called in a process of its own."""
    os.chdir(tree)
    for name in [name for name in sys.modules if name.split(".")[0] == "thimble"]:
        del sys.modules[name]  # that of the copy counts
    sys.path[:] = [str(tree), *(path for path in sys.path if path != str(ROOT))]
    watch = Watch(seconds, stem)
    while tests:
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={tree.parent}/basetemp"]
        code = pytest.main([*options, *tests[:SHARE]], [watch])
        tests = tests[SHARE:]
        if watch.failed:
            return watch.failed[0]
        if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
            return f"pytest: {code.name}"
        if used() > watch.end:
            break
    return ""


def start(tree, tests, seconds, stem):
    """Process id of a run of these tests, which writes its result to result.txt beside the tree."""
    pid = os.fork()
    if pid:
        return pid
    try:
        confine()
        os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", TMPDIR=str(tree.parent),
                          PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # it wants to see them imported
        tempfile.tempdir = None  # look at TMPDIR again
        output = os.open(tree.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(4 * seconds) + 30,) * 2)  # a loop without end
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        (tree.parent / "result.txt").write_text(run_tests(tree, tests, seconds, stem))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # nothing of the parent's may be cleaned up from here


def confine():
    """Goes on in a process with mounts and processes of its own, which all end when that one ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWPID) or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "unshare: this needs root")
    first = os.fork()  # process 1 of the namespace
    if first:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
        os.waitpid(first, 0)
        os._exit(0)
    libc.mount(b"proc", b"/proc", b"proc", 0, None)
    child = os.fork()
    while child:
        if os.wait()[0] == child:
            os._exit(0)


def look(todo, seconds, workers, done):
    """Runs the tests of each mistake of `todo`, `workers` at a time; calls done(mistake, first failure, seconds)."""
    todo = list(todo)[::-1]
    running = {}  # process id: (mistake, tree, source of the file, begin)
    with contextlib.ExitStack() as stack:
        trees = []
        for _ in range(workers):
            trees.append(Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))) / "tree")
            copy_tree(trees[-1])
        while todo or running:
            while todo and trees:
                mistake = todo.pop()
                tree = trees.pop()
                source = (tree / mistake["file"]).read_bytes()
                (tree / mistake["file"]).write_bytes(planted(mistake, source))
                (tree.parent / "result.txt").unlink(missing_ok=True)
                tests = mistake.get("only") or nearest(mistake)
                pid = start(tree, tests, seconds, Path(mistake["file"]).stem)
                running[pid] = (mistake, tree, source, time.monotonic())
            time.sleep(0.1)
            for pid, (mistake, tree, source, begin) in list(running.items()):
                passed = time.monotonic() - begin
                if passed > 300 + 20 * seconds:  # waits for something; a loop has met the limit of processor time
                    os.kill(pid, signal.SIGTERM)
                    os.waitpid(pid, 0)
                elif os.waitpid(pid, os.WNOHANG)[0] == 0:
                    continue
                del running[pid]
                (tree / mistake["file"]).write_bytes(source)
                result = tree.parent / "result.txt"
                by = result.read_text() if result.exists() else f"no result after {passed:.0f} s"
                done(mistake, by, passed)
                trees.append(tree)


def show(mistake):
    before = " ".join(mistake["before"].split())
    return f"{mistake['file']}:{mistake['line']}  [{mistake['kind']}]  {before}  ->  {mistake['after']}"


def main(cfg):
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    RESULTS.mkdir(parents=True, exist_ok=True)
    written = RESULTS / f"seed_{cfg.seed}.json"
    drawn = json.loads(written.read_text()) if cfg.retry else draw(cfg)

    def done(mistake, by, passed):
        mistake["by"] = by
        print(f"{'noticed' if by else 'SURVIVED':8} {passed:4.0f} s  {show(mistake)}  {by}", flush=True)
        written.write_text(json.dumps(drawn, indent=1))

    look([mistake for mistake in drawn if not mistake.get("by")], cfg.seconds, cfg.workers, done)

    # the same tests without a mistake: what fails here says nothing
    broken = []
    nothing = {"file": "model.py", "start": 0, "end": 0, "after": ""}
    tests = sorted({mistake["by"] for mistake in drawn if "::" in mistake["by"]})
    look([nothing | {"only": [test]} for test in tests], cfg.seconds, cfg.workers,
         lambda run, by, _: broken.append(run["only"][0]) if by else None)

    print(f"\nFail without a mistake: {', '.join(broken) or 'none'}")
    print(f"{sum(bool(mistake['by']) for mistake in drawn)} of {len(drawn)} noticed. Not noticed:")
    for mistake in drawn:
        if not mistake["by"]:
            print(f"  {show(mistake)}")


if __name__ == "__main__":
    configurator.run(main, Config)
