"""Definitions marked `# copied from model.py` are equal to their origin, character for character."""
import ast
import re

import pytest
from conftest import ROOT

FILES = [p for p in sorted(ROOT.glob("*.py")) if "# copied from " in p.read_text()]


def definitions(path):
    """{name: source} of the top-level classes and functions, and of the methods as Class.method."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = ast.get_source_segment(source, node)
            for sub in getattr(node, "body", []):
                if isinstance(node, ast.ClassDef) and isinstance(sub, ast.FunctionDef):
                    found[f"{node.name}.{sub.name}"] = ast.get_source_segment(source, sub)
    return found


def drifted(path):
    """Names of marked definitions in `path` that are not what their origin says."""
    marked = re.findall(r"^( *)# copied from (\w+)\.py\n(?: *@.*\n)* *(?:class|def) (\w+)", path.read_text(), re.M)
    assert len(marked) == path.read_text().count("# copied from "), f"{path.name}: a mark that marks nothing"
    wrong = []
    for indent, origin, name in marked:
        ours, theirs = definitions(path), definitions(path.with_name(origin + ".py"))
        keys = [k for k in ours if k.split(".")[-1] == name and ("." in k) == bool(indent)]
        wrong += [k for k in keys if ours[k] != theirs.get(k)] or ([] if keys else [name])
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_copies_have_not_drifted(path):
    wrong = drifted(path)
    assert not wrong, f"{path.name}: {', '.join(wrong)} drifted from the original; copy again or drop the comment"


def test_the_check_notices_a_drift(tmp_path):
    (tmp_path / "model.py").write_text("def f(x):\n    return x\n\n\nclass A:\n    def g(self):\n        return 1\n")
    same = ("# copied from model.py\ndef f(x):\n    return x\n\n\n"
            "class A:\n    # copied from model.py\n    def g(self):\n")
    (tmp_path / "fork.py").write_text(same + "        return 1\n")
    assert drifted(tmp_path / "fork.py") == []
    (tmp_path / "fork.py").write_text(same + "        return 2\n")
    assert drifted(tmp_path / "fork.py") == ["A.g"]
