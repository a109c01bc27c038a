"""Chat templates: Jinja by a model's authors, in a sandbox with a budget of work.

The sandbox keeps a template from Python's internals; the budget keeps it from time and memory: loops, calls, and the
characters and elements that an operation may make, are paid before they are done.
Source: Jinja documentation, "Sandbox", "Security Considerations".
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isthmus.errors import ModelError, RequestMalformed

# Units of work of one rendering: 4,096 messages take a twentieth in published templates, and all of it 3 s at most.
MAX_WORK = 2**25
# In the time of an iteration, of a filter and of a call, so that none gets the other's share of the time for less.
_STEP_WORK, _FILTER_WORK, _CALL_WORK = 16, 32, 64
_MAX_REASON_LENGTH = 200
# Filters that write all that their value holds, at any depth.
_DEEP_FILTERS = frozenset({"join", "pprint", "string", "tojson", "urlencode", "xmlattr"})
# Arguments before the value of some filters.
_JINJAS_OWN = (jinja2.Environment, Context, nodes.EvalContext)
_NUMBER = re.compile(r"\d+")
_left: ContextVar[list[int]] = ContextVar("work_left")


class ChatTemplate:
    """A compiled template; thread-safe."""

    def __init__(self, source: str) -> None:
        """Compile the template.

        Raises:
            ModelError: the template cannot be compiled.
        """
        token = _left.set([MAX_WORK])  # compiling evaluates constant expressions
        try:
            environment = _BoundedEnvironment()
            self._template = environment.from_string(_counted(environment.parse(source)))
        except Exception as e:  # deep nesting is a RecursionError
            raise ModelError(f"the bundle's chat template cannot be read: {_reason(e)}") from e
        finally:
            _left.reset(token)

    def render(self, **variables: Any) -> str:
        """The text for these variables, and for `raise_exception`, by which templates refuse messages.

        Raises:
            RequestMalformed: the template fails, or takes more than MAX_WORK.
        """
        token = _left.set([MAX_WORK])
        try:
            text = self._template.render(raise_exception=_refuse, **variables)
            text.encode()  # half of a surrogate pair is no text
        except Exception as e:  # templates raise whatever Python's operators raise
            raise RequestMalformed(
                f"the chat template refuses these messages: {_reason(e)}", parameter="messages"
            ) from e
        finally:
            _left.reset(token)
        return text


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=_finalized
        )
        del self.globals["lipsum"]
        self.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        for name, function in self.filters.items():
            self.filters[name] = _paid(function, deep=name in _DEEP_FILTERS)
        self.filters |= {"counted": _iterated, "joined": _joined, "copied": _copied}

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join the output of a template, macro or block."""
        return _joined(pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See the sandbox; pays for the result."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            _pay(bits // 8)
        elif operator == "+":
            _pay(_size(left) + _size(right))
        elif isinstance(left, str) and operator == "%":
            _pay(_size(left) * _deep_size(right) + _widths(left))
        else:
            _pay(_size(left) * _size(right))
        return super().call_binop(context, operator, left, right)

    # The sandbox's own parameters: a template's keywords may have any other name.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """See the sandbox; pays for the call, and for the result of a string's method."""
        _pay(_CALL_WORK)
        # The sandbox wraps `format`.
        if isinstance(method := getattr(__obj, "__wrapped__", __obj), BuiltinMethodType):
            owner = method.__self__
            arguments = [*args, *kwargs.values()]
            _pay(_size(owner) * max(map(_deep_size, arguments), default=1))
            if isinstance(owner, str):  # replace has two
                _pay(_size(owner) * sum(map(_size, arguments)) + (_widths(owner) if "{" in owner else 0))
        return super().call(__context, __obj, *args, **kwargs)


def _counted(template: nodes.Template) -> nodes.Template:
    """The template with filters that pay for loops, for joined texts and for slices."""
    for loop in template.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
    for item in template.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Slice):
            item.node = nodes.Filter(item.node, "copied", [], [], None, None, lineno=item.lineno)
    _replace_joins(template)
    if template.environment is not None:
        template.set_environment(template.environment)
    return template


def _replace_joins(node: nodes.Node) -> None:
    for name, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_with_paid_join(each) for each in value]
        else:
            setattr(node, name, _with_paid_join(value))


def _with_paid_join(value: Any) -> Any:
    if not isinstance(value, nodes.Node):
        return value
    _replace_joins(value)
    if isinstance(value, nodes.Concat):
        return nodes.Filter(
            nodes.List(value.nodes, lineno=value.lineno), "joined", [], [], None, None, lineno=value.lineno
        )
    return value


def _pay(work: int) -> None:
    """Take from the budget of the rendering.

    Raises:
        SecurityError: nothing is left.
    """
    left = _left.get()
    left[0] -= work
    if left[0] < 0:
        raise SecurityError(f"it takes more than {MAX_WORK} units of work")


def _size(value: Any) -> int:
    """How many characters or elements an operation may make of a value, at least 1; a number may be a width."""
    if isinstance(value, int):
        return max(1, min(abs(value), MAX_WORK + 1))
    return max(1, len(value)) if isinstance(value, str | list | tuple | dict | range) else 1


def _deep_size(value: Any) -> int:
    """The size of a value with all that it holds; paid for, since a value may hold another many times over."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list | tuple):
        return _size(value)
    _pay(len(value))
    return 1 + sum(map(_deep_size, value))


def _widths(form: str) -> int:
    return sum(min(int(digits[:9]), MAX_WORK + 1) for digits in _NUMBER.findall(form))


def _paid(function: Callable[..., Any], *, deep: bool) -> Callable[..., Any]:
    """The filter, paid for by the sizes of its value and arguments."""

    @functools.wraps(function)  # with Jinja's marks of filters that take the environment
    def filtered(*args: Any, **kwargs: Any) -> Any:
        values = [each for each in (*args, *kwargs.values()) if not isinstance(each, _JINJAS_OWN)]
        sizes = [_deep_size(each) if deep else _size(each) for each in values]
        _pay(_FILTER_WORK + (sizes[0] * max(1, sum(sizes[1:])) if sizes else 0))
        return function(*args, **kwargs)

    return filtered


def _iterated(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _pay(_STEP_WORK)
        yield value


def _joined(pieces: Iterable[Any]) -> str:
    texts = []
    for piece in pieces:
        texts.append(str(_finalized(piece)))
        _pay(1 + len(texts[-1]))
    return "".join(texts)


def _copied(value: Any) -> Any:
    if isinstance(value, str):
        _pay(len(value))
    return value


def _finalized(value: Any) -> Any:
    """A value that becomes text next."""
    if not isinstance(value, str):
        _pay(_deep_size(value) if isinstance(value, list | tuple | dict) else 1)
    return value


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _reason(error: Exception) -> str:
    return str(error)[:_MAX_REASON_LENGTH] or type(error).__name__
