"""Chat templates: jinja from a model's authors, rendered as transformers renders it, and trusted with nothing.

    >>> render("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", messages=[...])

A template sees the variables that it is handed and nothing else, and there is a limit to its loops, its calls and the
texts that it builds: jinja2's own sandbox would let nested loops run for days and a doubled text fill the memory.
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
        # a new environment each time, since two threads of the server may render at once, each up to its own limits
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
    """Puts what a template loops over, and what it assigns, through filters of the Sandbox.

    jinja2 can intercept calls and operators, but not the rounds of a loop.
    """

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
    """The environment in which transformers renders chat templates, with limits. One serves a single rendering."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
        self.filters |= {"tojson": to_json, "counted": self.counted, "bounded": self.bounded}
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        del self.globals["lipsum"]  # writes any amount of Latin
        self.steps = 0

    def counted(self, items):
        """What a loop runs over, as a list whose length counts."""
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
        # jinja2 raises this only once the attribute is used, and prints nothing for it before
        raise SecurityError(f"it asks for {attribute} of a {type(value).__name__}")

    def call(self, context, function, *args, **kwargs):
        self.step()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context, operator, left, right):
        # a single product could fill the memory, and a power could take hours
        sizes = [len(value) if isinstance(value, (str, list, tuple)) else abs(value) for value in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > MOST_CHARS:
            raise SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


# ---- what transformers offers to a template
def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """jinja2's own filter would escape what HTML must not contain."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise TemplateError(message)


def strftime_now(form):
    return datetime.now().strftime(form)
