"""GSM8K: word problems of grade-school arithmetic (Cobbe et al. 2021), from a file under --gsm8k.

Its solutions write each sum as <<a+b=c>> and the result after ####. Three scores, apart: whether the form is kept,
whether the sums agree, and whether the result is right.
"""
import ast
import operator
import re

from tasks import problems
from tasks.problems import share
from tasks.skills import numbers

ARITHMETIC = r"[-+*/().\d\s]+"
SUM = re.compile(f"<<({ARITHMETIC})=({ARITHMETIC})>>")      # (expression, result), both of numbers and + - * /
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def run(speaker, cfg):
    records = problems.read(cfg.gsm8k, "--gsm8k", cfg.limit, ("question", "answer"))
    form = []
    sums = []
    right = []
    for record in records:
        text = speaker.answer(record["question"], cfg.max_new_tokens).replace("\u2212", "-")  # the minus sign
        found = SUM.findall(text)
        form.append(bool(found) and "####" in text)
        sums.append(bool(found) and all(agrees(expression, result) for expression, result in found))
        # a model that does not keep the form may still be right: then its last number counts
        results = numbers(text.partition("####")[2])[:1] or numbers(text)[-1:]
        expected = numbers(record["answer"].rpartition("####")[2])[-1:]
        right.append(bool(expected) and results == expected)
    return {"accuracy": share(right), "format": share(form), "sums agree": share(sums)}


def agrees(expression, result):
    """Whether two texts of numbers and + - * / have one value. Only syntax trees are read, nothing is executed."""
    try:
        left, right = (ast.parse(text.strip(), mode="eval") for text in (expression, result))
        return abs(value(left.body) - value(right.body)) < 0.01  # results are written rounded
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return False


def value(node):
    """The number that a syntax tree stands for; ValueError for anything but arithmetic."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -value(inner)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):  # some of GSM8K's own sums begin with +
            return value(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:  # without **, which could take forever
            return OPERATORS[type(op)](value(left), value(right))
    raise ValueError("not arithmetic")
