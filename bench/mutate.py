"""Does the suite notice mistakes? Plants one at a time in a copy of the tree and runs the tests that reach it.

    python bench/mutate.py --count=100 --seed=0                      # over all files, in proportion to their length
    python bench/mutate.py --count=20 --files=train.py,optim.py
    python bench/mutate.py --count=100 --seed=0 --retry              # only those that nobody noticed, with all tests
                                                                     # that reach them and the tests written since

The mistakes are those that people make (see `mistakes`), drawn by the seed: the kind first, then the place. Which
tests reach a line is measured by coverage.py, in one pass of the quick suite that also follows the processes that tests
start (about 15 minutes, once: it is kept in runs/mutate/reach.json; delete that to measure again). A mistake is noticed
if one of these tests fails, or takes far longer than it did. Left alone are messages (`raise`, `print`, f-strings),
docstrings, annotations, imports, and the defaults of a Config, which are choices. tests/test_copies.py and test_house.py
read the source itself and would notice anything, so they have no say.

Each run has its own mounts and processes (`unshare`, so Linux only): a mistake in tasks/worker.py could hide the files
of this machine, one in a kill end other processes.
"""
import ast
import contextlib
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from thimble import configurator

ROOMS = ("", "thimble", "formats", "tasks", "prepare", "kernels")
RESULTS = ROOT / "runs" / "mutate"
READS_SOURCE = ("tests/test_copies.py", "tests/test_house.py")
JAIL = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
if os.geteuid() != 0:
    JAIL += ["--user", "--map-root-user"]

OPERATORS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}
CONFIGS = ("cfg", "config", "c", "self.cfg", "self.config", "cfg.model", "model.config")
TWINS = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}
MESSAGES = ("print", "warn", "UserError", "log", "say")  # calls whose arguments are text for people
LOOKS = ("indent", "flush", "name", "label", "color", "alpha", "fontsize", "ha", "va", "xytext", "textcoords")  # keywords
NEVER_SWAPPED = ("isinstance", "issubclass", "getattr", "hasattr", "suppress")


@dataclass(frozen=True)
class Config:
    # what to plant
    count: int = 100                # mistakes
    seed: int = 0
    files: tuple[str, ...] = ()     # only in these; empty: in all
    # how to look
    retry: bool = False             # only the survivors of the last run with this seed
    seconds: float = 20.0           # of tests for each mistake, the fastest first; four times as many with retry
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

    known: names that the function has assigned before. configs: {field: type} of each Config of the project.
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
                if keyword.arg and keyword.arg not in LOOKS:
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
            if isinstance(child, ast.AST) and not (is_config and isinstance(child, ast.AnnAssign)):
                yield child


def in_file(name, configs, rng):
    """All mistakes of a file, as dicts; `lines` are those of which a test must reach one to meet the mistake."""
    source = (ROOT / name).read_bytes()
    tree = ast.parse(source)
    starts = [0]  # of the lines, in bytes as the columns of ast
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    known = defaultdict(set)  # function: names that it has assigned so far
    found = []

    def reached(node, statement, function):
        if function and statement is not function:
            return list(range(statement.lineno, node.end_lineno + 1))
        if function:  # the default of an argument
            return list(range(function.lineno + 1, function.end_lineno + 1))
        names = {target.id for target in getattr(statement, "targets", []) if isinstance(target, ast.Name)}
        uses = {other.lineno for other in ast.walk(tree) if isinstance(other, ast.Name) and other.id in names}
        uses -= set(range(statement.lineno, statement.end_lineno + 1))
        return sorted(uses) or list(range(1, len(starts)))

    def visit(node, statement, function):
        if is_left_alone(node):
            return
        if isinstance(node, ast.stmt):
            statement = node
        for kind, at, after in mistakes(node, known[function], configs, rng):
            start = starts[at.lineno - 1] + at.col_offset
            end = starts[at.end_lineno - 1] + at.end_col_offset
            found.append({"file": name, "line": at.lineno, "kind": kind, "before": source[start:end].decode(),
                          "after": after, "start": start, "end": end, "lines": reached(at, statement, function)})
        if isinstance(node, ast.arg):
            known[function].add(node.arg)
        inside = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        for child in parts(node):
            visit(child, statement, inside)
        if isinstance(node, ast.Assign):
            known[function] |= {target.id for target in node.targets if isinstance(target, ast.Name)}

    for statement in tree.body:
        visit(statement, statement, None)
    return found


def config_fields():
    """{field: type} of each Config of the project."""
    found = []
    for name in files():
        for node in ast.parse((ROOT / name).read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == "Config":
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                found.append({field.target.id: ast.unparse(field.annotation) for field in fields})
    return found


def files():
    paths = (path for room in ROOMS for path in sorted((ROOT / room).glob("*.py")))
    return [str(path.relative_to(ROOT)) for path in paths if path.read_text().strip()]


def draw(cfg):
    """cfg.count mistakes: the files by their length, in each the kind first, then the place."""
    rng = random.Random(cfg.seed)
    configs = config_fields()
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
        for mistake in in_file(name, configs, rng):
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


def planted(mistake, source):
    return source[:mistake["start"]] + mistake["after"].encode() + source[mistake["end"]:]


def is_another(mistake):
    """Whether it is still Python, and another program."""
    source = (ROOT / mistake["file"]).read_bytes()
    try:
        return ast.dump(ast.parse(planted(mistake, source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


# ---- which tests reach a line
def pytest_runtest_logstart(nodeid):
    """As a plugin of the pass that measures: what runs from here on is this test's."""
    if "MUTATE_REACH" in os.environ:
        import coverage
        coverage.Coverage.current().switch_context(nodeid)


def pytest_runtest_logreport(report):
    if "MUTATE_REACH" in os.environ:
        with open(os.environ["MUTATE_REACH"], "a") as f:
            f.write(json.dumps([report.nodeid, report.outcome, report.duration]) + "\n")


def pytest_collection_modifyitems(config, items):
    """As a plugin of a run with a mistake: the tests of the plan in its order; before them those written since."""
    if "MUTATE_PLAN" not in os.environ:
        return
    plan = json.loads(Path(os.environ["MUTATE_PLAN"]).read_text())
    order = {nodeid: i for i, nodeid in enumerate(plan["tests"])}
    old = set(plan["known"]) - order.keys()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in old])
    items[:] = sorted((item for item in items if item.nodeid not in old), key=lambda item: order.get(item.nodeid, -1))


def copy_tree(to):
    """The files that git tracks, and the new ones."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listing.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def environment(tree, **more):
    own = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tree.parent), **more}
    return {**os.environ, **own}


def test_command(tree, *arguments):
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.mutate", f"--basetemp={tree.parent}/basetemp",
            *arguments]


def measure():
    """Runs the quick suite once and writes reach.json: seconds of each test that passes, and the tests of each line."""
    import coverage
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        # Processes that a test starts import this first; pytest tells them in the environment which test it is.
        start = Path(folder) / "start"
        start.mkdir()
        (start / "sitecustomize.py").write_text("import coverage\ncoverage.process_startup()\n")
        settings = Path(folder) / "settings.ini"
        settings.write_text(f"[run]\nsource = {tree}\nomit = {tree}/tests/*,{tree}/bench/*\nparallel = true\n"
                            f"data_file = {folder}/coverage\nsigterm = true\ncontext = ${{PYTEST_CURRENT_TEST-}}\n")
        env = environment(tree, MUTATE_REACH=f"{folder}/tests.jsonl", PYTHONPATH=str(start),
                          COVERAGE_PROCESS_START=str(settings))
        subprocess.run([*JAIL, sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", *test_command(tree)],
                       cwd=tree, env=env)
        seconds = defaultdict(float)
        failed = set()
        for line in Path(folder, "tests.jsonl").read_text().splitlines():
            nodeid, outcome, duration = json.loads(line)
            seconds[nodeid] += duration
            if outcome != "passed":
                failed.add(nodeid)
        found = coverage.Coverage(data_file=f"{folder}/coverage", config_file=str(settings))
        found.combine([folder])
        lines = {}
        for name in files():
            contexts = found.get_data().contexts_by_lineno(str(tree / name))
            lines[name] = {line: sorted({c.rsplit(" (", 1)[0] for c in tests}) for line, tests in contexts.items()}
    tests = {nodeid: round(seconds[nodeid], 3) for nodeid in seconds if nodeid not in failed}
    (RESULTS / "reach.json").write_text(json.dumps({"tests": tests, "lines": lines, "left out": sorted(failed)}))


# ---- to plant one and look
def plan(mistake, reach, seconds):
    """(tests that reach the mistake, the fastest first, as many as run in `seconds`; files to collect)"""
    own = f"tests/test_{Path(mistake['file']).stem}"
    tests = {test for line in mistake["lines"] for test in reach["lines"][mistake["file"]].get(str(line), ())}
    tests &= reach["tests"].keys()
    if not tests:  # reached by none, or only by processes that end without a word, as those of the sandbox
        of_file = reach["lines"][mistake["file"]].values()
        tests = {test for tests in of_file for test in tests if test in reach["tests"]}
    ordered = sorted(tests, key=lambda test: (not test.startswith(own), reach["tests"][test]))
    chosen = []
    for test in ordered:
        if not test.startswith(READS_SOURCE) and reach["tests"][test] <= seconds:
            chosen.append(test)
            seconds -= reach["tests"][test]
    collected = {test.split("::")[0] for test in chosen}
    measured = (RESULTS / "reach.json").stat().st_mtime
    for path in ROOT.glob("tests/test_*.py"):
        name = str(path.relative_to(ROOT))
        if name not in READS_SOURCE and path.stat().st_mtime > measured:
            collected.add(name)
    return chosen, sorted(collected)


def look(mistake, reach, seconds, tree):
    """Plants it in `tree`, runs its tests, takes it back; writes "result" and "by" into it."""
    tests, collected = plan(mistake, reach, seconds)
    if not collected:
        mistake |= {"result": "unreached", "by": "", "seconds": 0}
        return
    plan_file = tree.parent / "plan.json"
    plan_file.write_text(json.dumps({"tests": tests, "known": list(reach["tests"]) + reach["left out"]}))
    path = tree / mistake["file"]
    source = path.read_bytes()
    limit = 90 + 3 * sum(reach["tests"][test] for test in tests)
    command = [*JAIL, sys.executable, *test_command(tree, "-x", *collected)]
    begin = time.monotonic()
    path.write_bytes(planted(mistake, source))
    process = subprocess.Popen(command, cwd=tree, env=environment(tree, MUTATE_PLAN=str(plan_file)), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output = process.communicate(timeout=limit)[0]
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        result = "survived" if process.returncode in (0, 5) else "caught"  # 5: nothing was collected
        by = failed[0] if failed else output.strip().splitlines()[-1]
    except subprocess.TimeoutExpired:
        process.kill()  # unshare, and with it all that it started
        process.communicate()
        result = "caught"
        by = f"still running after {limit:.0f} s"
    finally:
        path.write_bytes(source)
    mistake |= {"result": result, "by": by[:200], "tests": len(tests), "seconds": round(time.monotonic() - begin, 1)}


def show(mistake):
    before = " ".join(mistake["before"].split())
    return f"{mistake['file']}:{mistake['line']}  [{mistake['kind']}]  {before}  ->  {mistake['after']}"


def main(cfg):
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not (RESULTS / "reach.json").exists():
        measure()
    reach = json.loads((RESULTS / "reach.json").read_text())
    written = RESULTS / f"seed_{cfg.seed}.json"
    drawn = json.loads(written.read_text()) if cfg.retry else draw(cfg)
    todo = [mistake for mistake in drawn if mistake.get("result") != "caught"]
    seconds = 4 * cfg.seconds if cfg.retry else cfg.seconds
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(cfg.workers) as pool:
        trees = SimpleQueue()
        for _ in range(cfg.workers):
            trees.put(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tree")

        def work(mistake):
            tree = trees.get()
            if not tree.exists():
                copy_tree(tree)
            look(mistake, reach, seconds, tree)
            trees.put(tree)
            print(f"{mistake['result']:9} {mistake['seconds']:5.0f} s  {show(mistake)}  {mistake['by']}", flush=True)
            written.write_text(json.dumps(drawn, indent=1))

        list(pool.map(work, todo))
    print()
    caught = Counter(mistake["file"] for mistake in drawn if mistake["result"] == "caught")
    for name, count in sorted(Counter(mistake["file"] for mistake in drawn).items()):
        print(f"{name:28} {caught[name]:3} of {count}")
    print(f"\n{sum(caught.values())} of {len(drawn)} noticed. Not noticed:")
    for mistake in drawn:
        if mistake["result"] != "caught":
            print(f"{mistake['result']:9} {show(mistake)}")


if __name__ == "__main__":
    configurator.run(main, Config)
