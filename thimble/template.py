"""Chat templates: jinja that somebody else may have written, rendered in a sandbox as transformers renders it.

    >>> render("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", messages=[...])

A template reaches nothing but what it is handed, and its work is limited: loops, calls and texts beyond any real
template end it. jinja2's own sandbox stops neither nested loops nor a text of terabytes.
"""
import functools
import json
from datetime import datetime

from jinja2 import ext, nodes, visitor
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from thimble.files import UserError, short

MOST_STEPS = 100_000  # rounds of loops, and calls, of one rendering; 1,000 messages take some 20,000
MOST_CHARS = 4_000_000  # in a text or a list


def render(source, **variables):
    """The text of a template with these variables. UserError with the reason if it cannot be rendered."""
    try:
        # with an environment of its own: two threads may render at the same time, each with its own limits
        sandbox = Sandbox()
        template = sandbox.template_class.from_code(sandbox, compiled(source), sandbox.globals)
        return sandbox.bounded(template.render(variables))
    except Exception as error:  # of the template: syntax, recursion, types, what it raises itself
        raise UserError(f"the chat template cannot be used ({type(error).__name__}: {short(error, 150)}): use another "
                        "--template") from None


@functools.lru_cache(maxsize=16)
def compiled(source):
    sandbox = Sandbox()
    return sandbox.compile(Limits().visit(sandbox.parse(source)))


class Limits(visitor.NodeTransformer):
    """Sends what a template loops over, and what it assigns, through filters of the Sandbox."""

    def visit_For(self, node):
        node = self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None)
        return node

    def visit_Assign(self, node):
        node = self.generic_visit(node)
        node.node = nodes.Filter(node.node, "bounded", [], [], None, None)
        return node


class Generation(ext.Extension):
    """{% generation %} marks an answer for transformers; here it is only read, see chat.encode."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that transformers has for chat templates, with limits; for one rendering."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
        self.filters |= {"tojson": to_json, "counted": self.counted, "bounded": self.bounded}
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        del self.globals["lipsum"]  # writes any amount of Latin
        self.steps = 0

    def counted(self, items):
        items = list(items)
        self.step(1 + len(items))
        return items

    def step(self, n=1):
        self.steps += n
        if self.steps > MOST_STEPS:
            raise SecurityError(f"it takes more than {MOST_STEPS:,} steps")

    def bounded(self, value):
        if isinstance(value, (str, list, tuple)) and len(value) > MOST_CHARS:
            raise SecurityError(f"it makes a text of more than {MOST_CHARS:,} characters")
        return value

    def unsafe_undefined(self, value, attribute):
        # jinja2 would print nothing where such an attribute is only shown
        raise SecurityError(f"it asks for {attribute} of a {type(value).__name__}")

    def call(self, context, function, *args, **kwargs):
        self.step()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context, operator, left, right):
        # one product could fill the memory, or take for ever
        sizes = [len(value) if isinstance(value, (str, list, tuple)) else abs(value) for value in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > MOST_CHARS:
            raise SecurityError(f"{operator} gives too much")
        return super().call_binop(context, operator, left, right)


# ---- what transformers offers to a template
def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """jinja2's own filter would escape what HTML must not contain."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise TemplateError(message)


def strftime_now(form):
    return datetime.now().strftime(form)
