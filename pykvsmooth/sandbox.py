"""Chat templates are programs of strangers: what one may use, how long it may run, and how much it may make.

jinja2's immutable sandbox keeps a template away from Python's insides; it does not bound work. Here a template is parsed, what it may not
use is refused, and its tree is rewritten so that every turn of a loop, call, filter, test, operator and comparison passes the meter:
processor time of the thread, and the size of every value, before it is made where it can be much larger than what it is made of. Filters
and methods of strings are those of a list, because each has to be bounded by its arguments; there is no loader, so no other file is read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 64 << 10  # characters
MAX_NESTING = 60  # of brackets and blocks, and of the tree that comes of them
MAX_SECONDS = 1.0  # processor time of one rendering
MAX_VALUE = 1 << 20  # characters; an entry of a list counts ENTRY of them. Four times the conversation's size come on top
MAX_MADE = 16 << 20  # of all values together; 64 times the conversation's size come on top
MAX_CALLS = 50  # inside one another
MAX_FORMAT = 999  # width or precision
MAX_INDENT = 32
MAX_BITS = 4096  # of a whole number
ENTRY = 16

FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float format indent int items join last length list lower map max min "
    "reject rejectattr replace reverse round safe select selectattr sort string title trim unique upper"
).split()
METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace istitle isupper "
    "join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip "
    "swapcase title upper".split()
)
_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)
_VIEWS = (KeysView, ValuesView, ItemsView)


class Exceeded(jinja2.TemplateError):
    """A template does more than it may."""


# ---- the meter ----


class Meter:
    """Of one rendering, or of one compilation: some expressions are computed there."""

    def __init__(self, given: int) -> None:
        self._until = time.thread_time() + MAX_SECONDS
        self._value = MAX_VALUE + 4 * given
        self._left = MAX_MADE + 64 * given
        self.depth = 0

    def tick(self) -> None:
        if time.thread_time() > self._until:
            raise Exceeded(f"it runs for more than {MAX_SECONDS:g} s")

    def weigh(self, *values: Any) -> int:
        """Characters, and entries of what holds others: as a text of it is long, and as long as a comparison may take."""
        self.tick()
        total, waiting = 0, [(value, 0) for value in values]
        while waiting:
            value, depth = waiting.pop()
            total += 1
            if isinstance(value, (str, bytes)):
                total += len(value)
            elif isinstance(value, (list, tuple, set, frozenset, dict, Namespace, *_VIEWS)):
                inside = _inside(value)
                total += ENTRY * len(inside)
                if depth > MAX_NESTING:
                    raise Exceeded("its lists are nested too deeply")
                if total <= self._value:
                    waiting += [(v, depth + 1) for v in inside]
            self.fits(total)
        return total

    def fits(self, size: int) -> None:
        if size > self._value:
            raise Exceeded(f"it makes a value of more than {self._value} characters")

    def made(self, value: Any) -> Any:
        self.spend(self.weigh(value))
        return value

    def spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise Exceeded("all that it makes is too much")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


_meter: ContextVar[Meter] = ContextVar("pykvsmooth_template")


@contextlib.contextmanager
def _metered(given: int) -> Iterator[None]:
    token = _meter.set(Meter(given))
    try:
        yield
    finally:
        _meter.reset(token)


# ---- what may grow: checked before it is made ----


def _check_times(left: Any, right: Any) -> None:
    for many, n in ((left, right), (right, left)):
        if isinstance(many, (str, bytes, list, tuple)) and isinstance(n, int):
            _meter.get().fits(_meter.get().weigh(many) * max(n, 0))
    _check_bits(_bits(left) + _bits(right))


def _check_power(left: Any, right: Any) -> None:
    _check_bits(_bits(left) * abs(right) if isinstance(right, int) else 0)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise Exceeded(f"it makes a number of more than {MAX_BITS} bits")


def _check_format(left: Any, _: Any = None) -> None:
    """'%1000000d', and '%*d', whose width is an argument."""
    if isinstance(left, (str, bytes)):
        text = left if isinstance(left, str) else left.decode("latin-1")
        for spec in re.findall(r"%(?:\([^)]*\))?([^A-Za-z%]*)", text):
            if "*" in spec or any(int(n[:9]) > MAX_FORMAT for n in re.findall(r"\d+", spec)):
                raise Exceeded("it formats to a width that is not a small number")


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    _meter.get().fits(len(text) + text.count(old) * len(new))


def _check_join(glue: Any, values: Any) -> None:
    n = len(values) if hasattr(values, "__len__") else 0
    _meter.get().fits(_meter.get().weigh(values) + n * len(str(glue)))


def _check_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    if (len(width) if isinstance(width, str) else int(width)) > MAX_INDENT:
        raise Exceeded(f"it indents by more than {MAX_INDENT}")


_BEFORE_OPERATOR: dict[str, Callable[[Any, Any], None]] = {"*": _check_times, "**": _check_power, "%": _check_format}
_BEFORE_FILTER: dict[str, Callable[..., None]] = {"replace": _check_replace, "format": _check_format, "indent": _check_indent}


def _drawn(value: Any) -> Any:
    """An iterator as the list of what it gives: its size must be known before something is done with it."""
    if not isinstance(value, Iterator) or isinstance(value, LoopContext):
        return value
    found, meter = [], _meter.get()
    for item in value:
        meter.spend(ENTRY)
        meter.tick()
        found.append(item)
    return found


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test: what it is given is weighed, and what it gives."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context or an environment comes first

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        meter = _meter.get()
        args = (*args[:skip], *map(_drawn, args[skip:]))
        meter.weigh(*args[skip:], *kwargs.values())
        if name == "join":
            _check_join(args[skip + 1] if len(args) > skip + 1 else kwargs.get("d", ""), args[skip])
        elif name in _BEFORE_FILTER:
            _BEFORE_FILTER[name](*args[skip:], **kwargs)
        return meter.made(function(*args, **kwargs))

    return guarded


# ---- the environment ----


class Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_shown)
        self.filters = {name: _guarded(name, self.filters[name]) for name in FILTERS if name in self.filters}
        self.filters["tojson"] = _guarded("tojson", _to_json)
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: _guarded(name, test) for name, test in tests.items()}
        allowed = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals = {**allowed, "raise_exception": _fail, "strftime_now": _strftime_now}

    # what the rewritten tree calls

    def counted(self, iterable: Any, static: int) -> Iterator[Any]:
        """The turns of a loop; static: characters of plain text in it."""
        meter = _meter.get()
        for item in iterable:
            meter.tick()
            meter.spend(static)
            yield item

    def weighed(self, value: Any) -> Any:
        _meter.get().weigh(value)
        return value

    def joined(self, *values: Any) -> str:
        meter = _meter.get()
        meter.fits(meter.weigh(*values))
        return "".join(map(str, values))

    # what jinja2's sandbox calls

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _meter.get()
        meter.weigh(left, right)
        _BEFORE_OPERATOR.get(operator, lambda *_: None)(left, right)
        return meter.made(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """jinja2 makes an exception for str.format, whose widths may come from arguments."""
        if isinstance(obj, str) and attribute not in METHODS:
            return self.unsafe_undefined(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, str) and isinstance(argument, str):
            return self.getattr(obj, argument)
        found = super().getitem(obj, argument)
        return _meter.get().made(found) if isinstance(argument, slice) else found

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in METHODS
        return not isinstance(obj, (int, float, complex, bytes)) and bool(super().is_safe_attribute(obj, attr, value))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Named as jinja2 has it: self may be an argument. It adds variables of loops and blocks, whose names begin with _."""
        meter = _meter.get()
        name, of = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if of is __self:  # what the rewritten tree calls
            return __obj(*args)
        args = tuple(map(_drawn, args))
        meter.weigh(args, *(value for key, value in kwargs.items() if not key.startswith("_")))
        if isinstance(of, str) and name in ("replace", "join"):
            (_check_replace if name == "replace" else _check_join)(of, *args)
        if isinstance(__obj, LoopContext) and args:  # {{ loop(children) }}
            args = (__self.counted(args[0], 0), *args[1:])
        meter.depth += 1
        if meter.depth > MAX_CALLS:
            raise Exceeded(f"more than {MAX_CALLS} calls are inside one another")
        try:
            return meter.made(super().call(__context, __obj, *args, **kwargs))
        finally:
            meter.depth -= 1


def _shown(value: Any) -> Any:
    return _meter.get().made(value)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    if indent is not None and indent > 8:
        raise Exceeded("tojson: indent is at most 8")
    allowed = {name: options[name] for name in ("separators", "sort_keys") if name in options}
    return json.dumps(value, ensure_ascii=False, indent=indent, **allowed)


def _fail(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 100:
        raise Exceeded("the format of its date is too long")
    return datetime.now().strftime(form)


# ---- the tree ----


class _Rewriter(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.Node:
        static = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = _call("counted", [node.iter, nodes.Const(static)], node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes, node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        self.generic_visit(node)
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def _literal(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _weighed(node)

    visit_List = visit_Dict = _literal

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self._literal(node)


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _call("weighed", [node], node)


def _call(name: str, args: list[Any], near: nodes.Node) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None, lineno=near.lineno)


def _check_tree(tree: nodes.Node) -> None:
    waiting = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, _FILES):
            raise Exceeded("it wants other templates, or blocks of them")
        if depth > MAX_NESTING:
            raise Exceeded(f"its expressions or blocks are nested more than {MAX_NESTING} deep")
        waiting += [(child, depth + 1) for child in node.iter_child_nodes()]


def _check_nesting(environment: Environment, source: str) -> None:
    """Before the parser, which recurses: brackets, blocks, and what stands in front of an operand."""
    depth = row = 0
    for _, kind, value in environment.lex(source):
        depth += (kind == "operator" and value in "([{") - (kind == "operator" and value in ")]}")
        front = (kind == "operator" and value in ("-", "+", "**")) or (kind == "name" and value in ("not", "if", "else"))
        row = 0 if kind in ("block_end", "variable_end") else row + front
        if depth > MAX_NESTING or row > 4 * MAX_NESTING:
            raise Exceeded(f"its expressions are nested more than {MAX_NESTING} deep")


class Compiled:
    """A template that is known to be sound. One of them may be used by many threads."""

    def __init__(self, source: str) -> None:
        """jinja2.TemplateError and whatever else a parser of hostile text raises."""
        if len(source) > MAX_SOURCE:
            raise Exceeded(f"it has {len(source)} characters; at most {MAX_SOURCE} are read")
        environment = Environment()
        with _metered(0):
            _check_nesting(environment, source)
            tree = environment.parse(source)
            _check_tree(tree)
            self._template = environment.from_string(_Rewriter().visit(tree))

    def render(self, **names: Any) -> str:
        """Processor time at most MAX_SECONDS and one step; whatever the template raises, as it is."""
        with _metered(_size(names)):
            meter, parts, total = _meter.get(), list[str](), 0
            for part in self._template.generate(**names):
                total += len(part)
                meter.fits(total)
                parts.append(part)
            return "".join(parts)


def _size(value: Any) -> int:
    """Characters of a conversation: it is ours, so plain lists and dicts."""
    if isinstance(value, str):
        return len(value)
    inside: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ENTRY + sum(map(_size, inside))
