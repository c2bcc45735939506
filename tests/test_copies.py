"""Definitions marked `# copied from model.py` are equal to their origin, character for character."""
import ast
import re

import pytest
from conftest import ROOT

FILES = [p for p in sorted(ROOT.glob("*.py")) if "# copied from " in p.read_text()]


def definitions(path):
    """{name: (first line, source)} of the top-level classes and functions, and of the methods as Class.method."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        for sub in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(sub, (ast.ClassDef, ast.FunctionDef)):
                name = sub.name if sub is node else f"{node.name}.{sub.name}"
                line = min([sub.lineno, *(d.lineno for d in sub.decorator_list)])
                found[name] = line, ast.get_source_segment(source, sub)
    return found


def drifted(path):
    """Names of marked definitions in `path` that are not what their origin says."""
    marks = {n: re.match(r" *# copied from (\w+)\.py$", line) for n, line in enumerate(path.read_text().split("\n"), 1)}
    marks = {n + 1: path.with_name(mark[1] + ".py") for n, mark in marks.items() if mark}
    marked = {name: (marks[line], source) for name, (line, source) in definitions(path).items() if line in marks}
    assert len(marked) == len(marks), f"{path.name}: a mark that marks nothing"
    return [name for name, (origin, source) in marked.items() if source != definitions(origin).get(name, (0, ""))[1]]


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
