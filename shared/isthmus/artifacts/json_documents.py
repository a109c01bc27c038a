"""Typed JSON documents: bounded and validated when read, canonical when written.

A document is a msgspec struct whose tag is the document's format. Annotations of the struct check types, bounds and
unknown keys; a function checks rules between fields. Errors name the field and the rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import msgspec

from isthmus.artifacts.segment_id import SegmentId
from isthmus.errors import IsthmusError

T = TypeVar("T", bound=msgspec.Struct)

# Characters of a refused value in a message; documents are untrusted, and messages go to logs.
_MAX_SHOWN = 80


@dataclass(frozen=True)
class DocumentKind(Generic[T]):
    """A kind of document: its struct, name in messages, size bound and error class.

    `check` holds the rules between fields and raises ValueError. `hint` tells the user how to replace a refused
    document.
    """

    struct: type[T]
    name: str
    max_bytes: int
    error: type[IsthmusError]
    check: Callable[[T], None] = lambda _: None
    hint: str = ""

    @property
    def format(self) -> str:
        """The document's `format`, for example `isthmus.plan/2`."""
        return str(self.struct.__struct_config__.tag)

    def decode(self, data: bytes | memoryview) -> T:
        """Parse a document.

        Raises:
            IsthmusError: of the class `error`: too long, another format, or a broken rule; fact `where` names the
                field.
        """
        self.check_size(len(data))
        try:
            # The format first: a document of another version would fail on some field, with a misleading message.
            self._check_format(msgspec.json.decode(data, type=_Head).format)
            document = msgspec.json.decode(data, type=self.struct, dec_hook=decode_custom)
            self.check(document)
        except msgspec.ValidationError as e:
            field, rule = _explain(e, data)
            self._refuse(field, rule, e)
        except (msgspec.DecodeError, RecursionError) as e:
            self._refuse("", f"is not JSON: {e}", e)
        except ValueError as e:
            self._refuse("", str(e), e)
        except self.error:
            raise
        except IsthmusError as e:  # raised by __post_init__, for documents and constructor calls alike
            self._refuse("", f"cannot be: {e.message}", e)
        return document

    def check_size(self, size: int) -> None:
        """Refuse a document beyond the size bound.

        Raises:
            IsthmusError: of the class `error`.
        """
        if size > self.max_bytes:
            raise self.error(
                f"a {self.name} of {size} bytes; at most {self.max_bytes}", limit=self.max_bytes, where=self.name
            )

    def _check_format(self, written: str) -> None:
        if written == self.format:
            return
        where = f"{self.name}.format"
        if written.startswith(self.format.partition("/")[0] + "/"):
            raise self.error(
                f"the {self.name} was written by another version of Isthmus: it is {written[:_MAX_SHOWN]!r}, and"
                f" this version reads {self.format!r}",
                **self._facts(where),
            )
        raise self.error(
            f"{where} is {written[:_MAX_SHOWN]!r}; this version reads {self.format!r}", **self._facts(where)
        )

    def _refuse(self, where: str, rule: str, cause: Exception) -> NoReturn:
        where = ".".join(part for part in (self.name, where) if part)
        raise self.error(f"{where} {rule}"[:500], **self._facts(where)) from cause

    def _facts(self, where: str) -> dict[str, str]:
        return {"where": where} | ({"hint": self.hint} if self.hint else {})


def builtins(document: msgspec.Struct) -> Any:
    """A document as dictionaries, lists, strings and numbers, ready for `json`."""
    return msgspec.to_builtins(document, enc_hook=str)


def canonical(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8; equal values give equal bytes.

    Raises:
        ValueError: a number is not finite.
    """
    # Published digests depend on the number format of `json`; another encoder would change the digests.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def schema(kind: DocumentKind[Any]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a kind of document, generated from the struct."""
    # Errors by condition are for Python callers, not for readers of a schema.
    generated = msgspec.json.schema(kind.struct, schema_hook=_schema_of_custom)
    for part in generated["$defs"].values():
        if "description" in part:
            part["description"] = " ".join(part["description"].partition("Raises:")[0].split())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": kind.format, **generated}


def refuse_constant(text: str) -> NoReturn:
    """A `parse_constant` for JSON decoders: NaN and Infinity are not JSON.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{text} is not JSON")


def decode_custom(kind: type, value: Any) -> Any:
    """The `dec_hook` of documents: parses segment ids.

    Raises:
        ValueError: not a segment id.
    """
    if kind is SegmentId and isinstance(value, str):
        return SegmentId.parse(value)
    raise ValueError(f"is no {kind.__name__}")


def _schema_of_custom(kind: type) -> dict[str, Any]:
    if kind is SegmentId:
        return {"type": "string", "pattern": r"^[A-Za-z0-9_-]*\.\.[A-Za-z0-9_-]*(~[A-Za-z0-9][A-Za-z0-9_-]*)?$"}
    raise NotImplementedError(kind)


class _Head(msgspec.Struct):
    format: str


_MESSAGE = re.compile(r"(?P<text>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)
# msgspec reports rules as text only. A message that matches no pattern is passed on as it is.
_RULES = (
    (r"Expected `\w+` >= (\S+)", "it is at least {}"),
    (r"Expected `\w+` > (\S+)", "it is above {}"),
    (r"Expected `\w+` <= (\S+)", "it is at most {}"),
    (r"Expected `str` of length <= (\d+)", "it has at most {} characters"),
    (r"Expected `\w+` of length <= (\d+)", "it has at most {} items"),
    (r"Expected `\w+` of length >= (\d+)", "it has at least {} items"),
    (r"Expected `str` matching regex '\^\(\?:(.*)\)\$.*'", "it is one of {}"),
    (r"Expected `str` matching regex '(.*)\$.*'", "it matches {}$"),
    (r"Expected `array` of (?:at (?:least|most) )?length (\d+).*", "it has {} items"),
    (r"Expected (.*), got .*", "it is {}"),
    (r"Expected (`[^`]*`).*", "it is {}"),
    (r"(Number out of range)", "a number has at most 64 bits"),
)


_TYPES = {
    "object": "an object",
    "array": "a list",
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}


def _explain(error: msgspec.ValidationError, data: bytes | memoryview) -> tuple[str, str]:
    """The field at fault, and a sentence with the value and the rule, from msgspec's message."""
    message = _MESSAGE.fullmatch(str(error))
    text, path = (message["text"], message["path"] or "") if message else (str(error), "")
    where = path.removeprefix(".") + (" (a key)" if message and message["key"] else "")
    if error.__cause__ is not None:  # raised by __post_init__, with a complete sentence
        return where, text
    if field := re.fullmatch(r"Object missing required field `(.*)`", text):
        return ".".join(part for part in (where, field[1]) if part), "is missing"
    if field := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        return where, f"has an unknown key: {field[1][:_MAX_SHOWN]!r}"
    value = _shown(data, path)
    for pattern, rule in _RULES:
        if match := re.fullmatch(pattern, text):
            says = rule.format(_plain(match[1]))
            return where, f"is {value}; {says}" if value else f"departs from the format: {says}"
    return where, f"departs from the format: {text}"


def _plain(text: str) -> str:
    """A type or pattern in words."""
    if text.startswith("`"):
        return " or ".join(_TYPES.get(name, name) for name in text.strip("`").split(" | "))
    return text.replace("\\\\", "").replace("|", ", ")


def _shown(data: bytes | memoryview, path: str) -> str:
    """The value at `path`, abbreviated; empty if absent or long."""
    try:
        value = json.loads(bytes(data))
        for key, index in re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", path):
            value = value[key] if key else value[int(index)]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    try:
        return json.dumps(value)[:_MAX_SHOWN]
    except ValueError:  # an integer beyond Python's limit on digits
        return ""
