"""Render chat templates of anybody: a Jinja sandbox that also bounds the time and the memory of a template.

A template comes with a downloaded tokenizer and is a program. Work is counted in units, of which a rendering may use
`_MAX_UNITS` and more for a longer conversation: a pass of a loop, a call, a filter, a comparison, an output, each more
for a larger value. No value may be larger than `_MAX_SIZE`, nested values counted as often as they would be printed;
where an operation multiplies (`*`, `replace`, `join`, `format`, `indent`), its result is estimated before it is made.
"""

import datetime
import functools
import itertools
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, LoopContext, Macro, markup_join, str_join
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE_BYTES = 1 << 16
"""Maximum size of a template; those of published models have 30 KB at most."""
_MAX_UNITS, _UNITS_PER_CHARACTER = 250_000, 4
"""Work of one rendering; templates of published models take some hundreds of units and a few for each turn."""
_MAX_SIZE, _MAX_BITS, _MAX_WIDTH, _MAX_DEPTH = 1 << 24, 1 << 13, 10_000, 64
"""Limits on the characters of a value (an element counts as `_ELEMENT`), the bits of a number, a width or count given
to a filter, and the nesting of a value."""
_ELEMENT, _CALL, _MESSAGE = 64, 4, 256
"""Size of an element or number of a value, in characters; units of a call, at least; characters that a turn counts as,
besides its text."""
_MAX_INDENT = 16

_CONTAINERS: tuple[type, ...] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
    Namespace,
)
_REMOVED = ("urlize", "wordwrap", "xmlattr", "striptags", "pprint", "random")
"""Filters whose cost grows faster than their input, or whose result is not a function of it; chat needs none."""
_CHEAP = ("length", "count", "first", "last", "default", "d", "safe")
"""Filters that do not look at all of their input."""
_COUNTED = ("batch", "slice", "center", "indent", "truncate", "round")
"""Filters with a width or a count as an argument."""
_COMPARING = ("eq", "==", "equalto", "ne", "!=", "gt", "greaterthan", ">", "ge", ">=", "lt", "lessthan", "<", "le",
              "<=", "in", "lower", "upper")  # fmt: skip
_ENCODINGS = ("utf-8", "utf8", "ascii", "latin-1")


class Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Jinja environment with the options, filters and globals of transformers' chat templates, within the limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        """Wrap all filters and the tests that compare."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.units = _MAX_UNITS
        self.body = 1
        """Units for a call of the largest macro, block or recursive loop."""
        self.filters["tojson"] = _tojson
        self.filters = {name: self._guarded(name, f) for name, f in self.filters.items() if name not in _REMOVED}
        own = {"_looped": self._looped, "_held": self._held, "_seen": self._seen, "_joined": self._joining()}
        self.filters |= own
        self.tests |= {name: self._comparing(self.tests[name]) for name in _COMPARING}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def begin(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> None:
        """Start counting for a rendering of these messages and tools."""
        size = _MESSAGE * len(messages) + (len(repr(tools)) if tools else 0)
        for message in messages:
            for value in message.values():
                size += len(value) if type(value) is str else len(repr(value))
        self.units = _MAX_UNITS + _UNITS_PER_CHARACTER * size

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an object of a template within the limits."""
        if isinstance(obj, Macro | BlockReference):
            self._spend(2 * _CALL + self.body)
        elif isinstance(obj, LoopContext):
            args = (self._looped(args[0], self.body), *args[1:]) if args else args
        else:
            owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
            given = (*args, *kwargs.values())
            if isinstance(owner, str | bytes):
                _check_method(obj.__name__, owner, given)
            if owner is not None and any(isinstance(value, int) and abs(value) > _MAX_SIZE for value in given):
                raise SecurityError(f"a width or count of more than {_MAX_SIZE:,}")
            size = len(owner) if isinstance(owner, str | bytes) else 0
            self._spend(_CALL + (size + sum(map(_weight, given)) >> 8))
        return self._held(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator within the limits."""
        if operator == "+" and type(left) is str and type(right) is str:  # most of what templates do
            if (size := len(left) + len(right)) > 256:
                _refuse_size(size)
                self._spend(size >> 8)
            return left + right
        # Estimated before the operation: a check of its result would come after the memory was allocated.
        size = 0
        if isinstance(left, int) and isinstance(right, int):
            power = operator == "**"
            bits = left.bit_length() * max(abs(right), 1) if power else left.bit_length() + right.bit_length()
            _refuse(bits > _MAX_BITS, f"a number of more than {_MAX_BITS:,} bits")
        elif operator == "%" and isinstance(left, str | bytes):
            size = _formatted(left, right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            size = _weight(value) * abs(times) if isinstance(times, int) else 0
        elif operator == "+":
            size = _weight(left) + _weight(right)
        _refuse_size(size)
        self._spend(size >> 8)
        return self._held(super().call_binop(context, operator, left, right))

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """Join the parts of an output within the limits."""
        held = list(parts)
        _refuse_size(sum(map(len, held)))
        return "".join(held)

    def _guarded(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter with the limits applied to its arguments and result."""
        first = int(hasattr(filter_, "jinja_pass_arg"))

        @functools.wraps(filter_)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if name in _CHEAP:
                self._spend(1)
                return filter_(*args, **kwargs)
            if len(args) == first + 1 and not kwargs and type(args[first]) is str:
                self._spend(_CALL + (len(args[first]) >> 7))
                return self._held(filter_(*args))
            if len(args) > first and isinstance(args[first], types.GeneratorType):
                args = (*args[:first], self._looped(args[first]), *args[first + 1 :])
            given = (*args[first + 1 :], *kwargs.values())
            if len(args) > first:
                _check_filter(name, args[first], given)
            self._spend(_CALL + (sum(map(_weight, args[first:])) + sum(map(_weight, kwargs.values())) >> 7))
            return self._held(filter_(*args, **kwargs))

        return guarded

    def _comparing(self, test: Any) -> Callable[..., Any]:
        """Return a test that counts the size of what it compares."""

        @functools.wraps(test)
        def comparing(*values: Any) -> Any:
            return test(*map(self._seen, values))

        return comparing

    def _joining(self) -> Callable[..., Any]:
        """Return the filter that concatenates a list of values as `~` does."""

        @jinja2.pass_eval_context
        def joined(context: nodes.EvalContext, parts: list[Any]) -> str:
            size = sum(map(_weight, parts))
            _refuse_size(size)
            self._spend(size >> 8)
            return (markup_join if context.autoescape else str_join)(parts)

        return joined

    def _looped(self, value: Any, units: int = 1) -> Any:
        """Return the items that a loop iterates over, after counting them.

        Args:
            units: units for one pass.
        """
        items = value
        if not hasattr(value, "__len__"):
            items = list(itertools.islice(value, max(self.units, 0) // units + 2))
        self._spend(1 + units * len(items))
        return items

    def _held(self, value: Any) -> Any:
        """Return a value unchanged; raise SecurityError if it is too large."""
        kind = type(value)
        if kind is str:
            if len(value) > _MAX_SIZE:
                _refuse_size(len(value))
        elif kind is int:
            _refuse(value.bit_length() > _MAX_BITS, f"a number of more than {_MAX_BITS:,} bits")
        else:
            size = _weight(value)
            _refuse_size(size)
            self._spend(size >> 7)
        return value

    def _seen(self, value: Any) -> Any:
        """Return a value that is compared, sliced or printed unchanged, after counting its size."""
        if type(value) is str:
            if len(value) > 256:
                self._spend(len(value) >> 8)
        elif isinstance(value, _CONTAINERS):
            self._spend(1 + (_weight(value) >> 7))
        return value

    def _spend(self, units: int) -> None:
        """Count work; raise SecurityError beyond the limit."""
        self.units -= units
        if self.units < 0:
            raise SecurityError(f"more work than a chat template needs ({_MAX_UNITS:,} loop passes and calls)")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse a template and insert the limits into its syntax tree."""
        _refuse(len(source) > MAX_SOURCE_BYTES, f"a template of more than {MAX_SOURCE_BYTES:,} characters")
        tree = super()._parse(source, name, filename)
        for kind in (nodes.Macro, nodes.CallBlock, nodes.Block, nodes.For):
            self.body = max(self.body, *map(_units, tree.find_all(kind)), 1)
        tree = _Limits().visit(tree)
        tree.set_environment(self)
        return tree


class _Limits(NodeTransformer):
    """Wrap what is compiled to plain Python, out of reach of `call` and `call_binop`, into filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Count the passes of a loop, by the size of its body."""
        units = _units(node)
        self.generic_visit(node)
        node.iter = _filter("_looped", node.iter, nodes.Const(units))
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        """Bound the value of a `{% set %}` block."""
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, "_held", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        """Bound a concatenation before it is made."""
        self.generic_visit(node)
        return _filter("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """Count the sizes of what is compared."""
        self.generic_visit(node)
        node.expr = _seen(node.expr)
        for operand in node.ops:
            operand.expr = _seen(operand.expr)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        """Count the sizes of what is printed."""
        self.generic_visit(node)
        node.nodes = [_seen(one) for one in node.nodes]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:
        """Count the size of what is sliced."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _seen(node.node)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        """Bound a list, whose elements may be lists."""
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _filter("_held", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        """Bound a dictionary."""
        self.generic_visit(node)
        return _filter("_held", node) if node.items else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        """Bound a tuple that is a value."""
        self.generic_visit(node)
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        return node if node.ctx != "load" or constant else _filter("_held", node)


def _filter(name: str, value: Any, *args: nodes.Expr) -> nodes.Filter:
    """Return a node that applies a filter."""
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def _seen(value: nodes.Expr) -> nodes.Expr:
    """Return a node that counts the size of a value that is not in the template itself."""
    return value if isinstance(value, nodes.Const | nodes.TemplateData) else _filter("_seen", value)


def _units(node: nodes.Node) -> int:
    """Return the units for one pass through a part of a template."""
    return 1 + (sum(1 for _ in node.find_all(nodes.Node)) >> 4)


def _weight(value: Any) -> int:
    """Return the number of characters of a value, with `_ELEMENT` for each number or element.

    A value that is contained several times counts several times, as often as it would be printed or compared.

    Raises:
        SecurityError: more than `_MAX_SIZE`, or nested too deeply.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, _CONTAINERS):
        return _ELEMENT
    size, depth = 0, [iter((value,))]
    while depth:
        for item in depth[-1]:
            size += _ELEMENT
            if isinstance(item, str | bytes):
                size += len(item)
            elif isinstance(item, _CONTAINERS):
                depth.append(_elements(item))
                break
            if size > _MAX_SIZE:
                _refuse_size(size)
        else:
            depth.pop()
        _refuse(len(depth) > _MAX_DEPTH, f"a value nested more than {_MAX_DEPTH} levels deep")
    return size


def _elements(value: Any) -> Iterator[Any]:
    """Return the elements of a container, of a dictionary its keys and values."""
    if isinstance(value, Namespace):
        value = value._Namespace__attrs  # type: ignore[attr-defined]
    return itertools.chain(value, value.values()) if isinstance(value, dict) else iter(value)


def _refuse(wrong: bool, what: str) -> None:
    """Raise SecurityError if a limit is exceeded."""
    if wrong:
        raise SecurityError(what)


def _refuse_size(size: int) -> None:
    """Raise SecurityError for a value that is too large."""
    if size > _MAX_SIZE:
        raise SecurityError(f"a value of more than {_MAX_SIZE:,} characters")


def _check_filter(name: str, value: Any, given: Sequence[Any]) -> None:
    """Estimate the result of a filter; raise SecurityError if it is too large."""
    if name in _COUNTED and any(isinstance(one, int | float) and not abs(one) <= _MAX_WIDTH for one in given):
        raise SecurityError(f"{name}: a width or count of more than {_MAX_WIDTH:,}")
    text = str(value) if isinstance(value, int | float) else value
    if name == "indent" and isinstance(text, str):
        width = max(
            (one if isinstance(one, int) else len(one) for one in given if isinstance(one, int | str)), default=4
        )
        _refuse_size(len(text) + (text.count("\n") + 1) * width)
    elif name == "join" and hasattr(value, "__len__"):
        _refuse_size(_weight(value) + len(value) * max(map(_weight, given), default=0))
    elif name == "sum":
        _refuse(any(not isinstance(one, int | float | str) for one in given), "sum: not of numbers")
    elif name == "replace" and isinstance(text, str):
        _check_method("replace", text, given)
    elif name == "format" and isinstance(text, str):
        _refuse_size(_formatted(text, given))


def _check_method(name: str, owner: str | bytes, given: Sequence[Any]) -> None:
    """Estimate the result of a method of a text; raise SecurityError if it is too large, or takes too long."""
    if name == "replace" and len(given) >= 2 and all(isinstance(one, str | bytes) for one in given[:2]):
        _refuse_size(len(owner) + owner.count(given[0]) * len(given[1]))  # type: ignore[arg-type]
    elif name == "join" and given:
        items = given[0]
        _refuse(not hasattr(items, "__len__"), "join: not a list")
        _refuse_size(_weight(items) + len(items) * len(owner))
    elif name == "expandtabs":
        tabs = owner.count("\t") if isinstance(owner, str) else owner.count(b"\t")
        _refuse_size(len(owner) + tabs * max((*given, 8)))
    elif name in ("format", "format_map"):
        _refuse_size(_formatted(owner, given))
    elif name == "translate" and given and isinstance(given[0], dict):
        _refuse_size(len(owner) * max(map(_weight, given[0].values()), default=1))
    elif name in ("encode", "decode"):
        _refuse(bool(given) and str(given[0]).lower() not in _ENCODINGS, f"{name}: {str(given[:1])[:40]}")
    else:
        _refuse(name == "striptags", "striptags")


def _formatted(form: str | bytes, given: Sequence[Any]) -> int:
    """Return an upper bound of the size of a formatted text."""
    text = form if isinstance(form, str) else form.decode("latin-1")
    fields = text.count("%") + text.count("{")
    widths = (
        sum(int(number) if len(number) < 9 else _MAX_SIZE + 1 for number in re.findall(r"\d+", text)) if fields else 0
    )
    largest = max(map(_weight, given), default=0)
    # A width may also be an argument: `%*d`, `{:{}}`.
    if "*" in text or "{" in text:
        largest += max((abs(one) for one in given if isinstance(one, int)), default=0)
    return len(text) + widths + fields * (largest + 400)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return a value as JSON, as transformers' filter does."""
    width = len(indent) if isinstance(indent, str) else 0 if indent is None else indent
    _refuse(
        type(width) is not int or not 0 <= width <= _MAX_INDENT, f"tojson: an indent that is not 0 to {_MAX_INDENT}"
    )
    short = separators is None or (
        isinstance(separators, list | tuple) and all(isinstance(s, str) and len(s) <= _MAX_INDENT for s in separators)
    )
    _refuse(not short, f"tojson: separators that are not texts of up to {_MAX_INDENT} characters")
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    parts, size = [], 0
    for part in encoder.iterencode(value):
        size += len(part)
        _refuse_size(size)
        parts.append(part)
    return "".join(parts)


def _raise_exception(message: str) -> None:
    """Let a template reject a conversation."""
    raise jinja2.TemplateError(str(message)[:1000])


def _strftime_now(form: str) -> str:
    """Return the current time as a template formats it."""
    _refuse(len(form) > 200 or bool(re.search(r"%[^a-zA-Z]*\d", form)), "strftime_now: not a plain format")
    return datetime.datetime.now().strftime(form)


class _Generation(ext.Extension):
    """The `{% generation %}` tag, which marks the assistant's text in some templates; rendered as its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the tag and its content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
