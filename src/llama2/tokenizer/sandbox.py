"""Chat templates are programs from strangers: Jinja in a sandbox, with bounds on its steps and on the size of values.

Jinja's own sandbox keeps attributes and mutation away. Here every turn of a loop and every call counts as a step, and
no value or text grows beyond a bound, so that a faulty template ends in one error, soon, whatever it does.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import cache, lru_cache, wraps
from typing import Any

from llama2.errors import TokenizerError

MAX_STEPS = 400_000  # turns of loops and calls of one rendering
MAX_SECONDS = 0.7  # of the thread's processor time, whatever else runs; and a thousandth more for each message
MAX_SIZE = 10_000_000  # characters of a text, items of a list
_WIDE = re.compile(r"\d{7,}")  # a width in a format, such as "%9999999999d"


class _Budget:
    """The remaining budget of one rendering."""

    def __init__(self, seconds: float) -> None:
        self.steps, self.seconds = 0, seconds
        self._end = time.thread_time() + seconds

    def spend(self, steps: int) -> None:
        """Raises _TooMuch once a bound is passed; looks at the clock every 32 steps."""
        before, self.steps = self.steps, self.steps + steps
        if self.steps > MAX_STEPS:
            raise _TooMuch(f"it takes more than {MAX_STEPS:,} steps")
        if before >> 5 != self.steps >> 5 and time.thread_time() > self._end:
            raise _TooMuch(f"it takes more than {self.seconds:.1f} seconds")


_budget: ContextVar[_Budget | None] = ContextVar("budget of this rendering", default=None)


class _TooMuch(Exception):
    """A template went beyond a bound."""


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text of a template. Any fault in it is one TokenizerError that says what happened."""
    template = compiled(source)
    token = _budget.set(_Budget(MAX_SECONDS + len(variables.get("messages", ())) / 1000))
    pieces, size = [], 0
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_SIZE:
                raise _TooMuch(f"it writes more than {MAX_SIZE:,} characters")
    except Exception as error:  # a template may raise anything: ZeroDivisionError, TypeError, RecursionError, ...
        raise TokenizerError(f"the chat template failed: {_told(error)}") from error
    finally:
        _budget.reset(token)
    return "".join(pieces)


def _told(error: Exception) -> str:
    import jinja2

    said = " ".join(str(error).split())[:500]
    if isinstance(error, (jinja2.TemplateError, _TooMuch)):
        return said
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    return f"{type(error).__name__}: {said}"


@lru_cache(maxsize=32)
def compiled(source: str) -> Any:
    """The compiled template; TokenizerError where it is not valid Jinja."""
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    except (RecursionError, ValueError, OverflowError, MemoryError) as error:
        raise TokenizerError(f"the chat template cannot be compiled: {type(error).__name__}") from error


@lru_cache(maxsize=32)
def reads_parts(source: str) -> bool:
    """Whether a template looks into a message's content: loops over it or asks for its type, rather than print it."""
    from jinja2 import nodes

    compiled(source)
    tree = _environment().parse(source)
    names = {"content"}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    loops = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    asks = any(
        test.name in ("string", "iterable", "sequence", "mapping") and _is_content(test.node, names)
        for test in tree.find_all(nodes.Test)
    )
    return loops or asks


def _is_content(node: Any, names: set[str]) -> bool:
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


# -- bounds ------------------------------------------------------------------------------------------------------


def _step(steps: int = 1) -> None:
    budget = _budget.get()
    if budget is not None:
        budget.spend(steps)


def _bounded(value: Any) -> Any:
    """The value; a large one costs steps by its size, so that many large ones come to an end too."""
    if isinstance(value, (str, list, tuple)):
        if len(value) > MAX_SIZE:
            raise _TooMuch(f"it makes a {type(value).__name__} of more than {MAX_SIZE:,} items")
        _charge(value)
    return value


def _charge(value: Any) -> None:
    """Steps for going over all of a value."""
    if isinstance(value, (list, tuple, range, dict)):
        _step(len(value) // 10)
    elif isinstance(value, str):
        _step(len(value) // 200)


def _check_widths(arguments: Iterable[Any]) -> None:
    """No width or format that asks for millions of characters at once."""
    for value in arguments:
        if isinstance(value, int) and abs(value) > MAX_SIZE // 10:
            raise _TooMuch(f"it asks for {value:,} characters at once")
        if isinstance(value, str) and ("%" in value or "{" in value) and _WIDE.search(value):
            raise _TooMuch("it asks for a very wide format")


def _check_growth(name: str, value: Any, arguments: tuple[Any, ...]) -> None:
    """replace and join make long texts of short ones."""
    size = 0
    if name == "replace" and len(arguments) > 1 and isinstance(value, str):
        size = value.count(str(arguments[0])) * len(str(arguments[1]))
    elif name == "join" and isinstance(value, (list, tuple)):
        size = sum(len(item) for item in value if isinstance(item, str))
        size += len(value) * (len(arguments[0]) if arguments and isinstance(arguments[0], str) else 0)
    if size > MAX_SIZE:
        raise _TooMuch(f"it makes a text of more than {MAX_SIZE:,} characters")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for text, count in ((left, right), (right, left)):
            if isinstance(text, (str, list, tuple)) and isinstance(count, int) and len(text) * count > MAX_SIZE:
                raise _TooMuch(f"it makes a {type(text).__name__} of more than {MAX_SIZE:,} items")
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > 10_000:
            raise _TooMuch(f"it computes a number of {bits:,} bits")
    if operator == "%" and isinstance(left, str):
        _check_widths([left])


class _Turns:
    """The items of a loop, each of which counts as a step."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _step()
            yield item


_WIDTHS = ("center", "indent", "wordwrap", "truncate", "batch", "slice", "round", "format")


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # in front of the value comes what jinja2 passes by itself

    @wraps(function)  # carries over the marks of jinja2.pass_context and its kin
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _step()
        _charge(args[at])
        if name in _WIDTHS:
            _check_widths([*args[at + (name != "format") :], *kwargs.values()])
        _check_growth(name, args[at], args[at + 1 :])
        return _bounded(function(*args, **kwargs))

    return bounded


# -- the environment ---------------------------------------------------------------------------------------------


@cache
def _environment() -> Any:
    """One sandbox without file access, attribute tricks or mutation of what it is given."""
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %}: text that the assistant produces."""

        tags = {"generation"}  # noqa: RUF012 - the name and type that jinja2 reads

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = nodes.ContextReference()
            call = self.call_method("_mark", [marks])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, context: Any, caller: Callable[[], str]) -> str:
            opening, closing = context.get("_generation_marks") or ("", "")
            return f"{opening}{caller()}{closing}"

    class Bounded(ImmutableSandboxedEnvironment):
        """Counts turns and calls, and looks at the operands that can make something large of something small."""

        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
            for loop in list(source.find_all(nodes.For)):
                loop.iter = nodes.Filter(loop.iter, "_turns", [], [], None, None, lineno=loop.lineno)
            for concat in list(source.find_all(nodes.Concat)):
                inner = nodes.Concat(concat.nodes, lineno=concat.lineno)
                concat.nodes = [nodes.Filter(inner, "_bounded", [], [], None, None, lineno=concat.lineno)]
            return str(super()._generate(source, *args, **kwargs))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return _bounded(super().call_binop(context, operator, left, right))

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            _step()
            owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # str.format comes wrapped
            if isinstance(owner, str):
                _check_widths([owner, *args, *kwargs.values()] if obj.__name__ == "format" else args)
                _check_growth(obj.__name__, *((args[0], (owner,)) if obj.__name__ == "join" else (owner, args)))
            return _bounded(super().call(context, obj, *args, **kwargs))

    environment = Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"], finalize=_bounded
    )
    del environment.globals["lipsum"]  # random filling text, without a bound
    environment.filters = {name: _filter(name, function) for name, function in environment.filters.items()}
    bounds: dict[str, Any] = {"_turns": _Turns, "_bounded": _bounded}
    environment.filters |= {"tojson": _filter("tojson", _tojson)} | bounds
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
