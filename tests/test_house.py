"""The plan of the house: who may import whom, and nobody uses another file's private names."""
import ast
import sys

import pytest
from conftest import ROOT

COMMANDS = {"train", "sample", "export", "evaluate", "serve", "search"}
MODELS = {"model", "llama", "ternary", "hybrid_ssm", "cerebros"}
ROOMS = ("thimble", "formats", "tasks", "kernels", "prepare", "bench")
FILES = [path for folder in (ROOT, *(ROOT / room for room in ROOMS)) for path in sorted(folder.glob("*.py"))]
# documented or without a public way: of named tuples, of tensors, of tiktoken's encodings
PUBLIC = {"_replace", "_fields", "_version", "_mergeable_ranks", "_special_tokens", "_pat_str"}
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def imports(path, lazy=True):
    """Names of this project's files that `path` imports; without `lazy` only those at its top level."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & NAMES.keys()


def circle(graph):
    """A list of names, each importing the next and the last the first; empty if there is none."""
    done, way = set(), []

    def visit(name):
        if name in way:
            return way[way.index(name):]
        if name in done:
            return []
        way.append(name)
        for other in sorted(graph[name]):
            found = visit(other)
            if found:
                return found
        way.pop()
        done.add(name)
        return []

    for name in sorted(graph):
        found = visit(name)
        if found:
            return found
    return []


def private(name):
    return name.startswith("_") and not name.startswith("__")


def private_reaches(path):
    """What `path` uses of others' private names: from x import _y, x._y, and object._y that it does not define."""
    tree = ast.parse(path.read_text())
    own, modules, found = set(), set(), []
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                own.add(node.name)
            case ast.Name(ctx=ast.Store()):
                own.add(node.id)
            case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                own.add(node.attr)
            case ast.Import():
                modules |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            case ast.ImportFrom() if node.module.split(".")[0] not in sys.stdlib_module_names:
                found += [alias.name for alias in node.names if private(alias.name)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not private(node.attr) or node.attr in own:
            continue
        root = node.value
        while isinstance(root, ast.Attribute):
            root = root.value
        inherited = isinstance(root, ast.Name) and root.id in ("self", "cls")
        foreign = isinstance(root, ast.Name) and root.id in modules - NAMES.keys()   # torch._foreach_mul_
        if not inherited and not foreign and node.attr not in PUBLIC:
            found.append(ast.unparse(node))
    return found


def test_no_circle():
    graph = {name: imports(path) - {name} for name, path in NAMES.items()}
    assert circle(graph) == []


def test_the_check_notices_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("name", sorted(NAMES))
def test_rooms_import_only_what_they_may(name):
    used = imports(NAMES[name])
    if name in COMMANDS:
        assert used & COMMANDS <= ({"train"} if name == "search" else set())
    elif name in MODELS:
        assert all(other.startswith("kernels.") for other in used)
    elif not name.startswith("bench."):
        assert not used & COMMANDS
    if name.startswith("kernels."):
        assert not used
    if name == "thimble.files":
        assert not used
    if name.startswith("thimble.") and name != "thimble.load":
        assert all(other.startswith("thimble.") for other in used)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_private_reach(name):
    assert private_reaches(NAMES[name]) == []


def test_the_check_notices_a_private_reach(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("from model import _a\nimport train\n\ntrain.x._b()\nthing = train.Thing()\nthing._c = 1\n"
                    "thing._own()\n\n\ndef _own():\n    pass\n")
    assert sorted(private_reaches(path)) == ["_a", "thing._c", "train.x._b"]
