"""The text form of cuts: `20/40`, `a,b`, `deep=a,b`.

`/` separates cuts in order, `,` the tensors of a cut; `NAME=` before the tensors names the cut. Tensor names of
TorchScript and TensorFlow models may contain all of these characters, so that known names are matched before any split.

Source: docs/explanation/cuts.md, "Naming a cut".
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated

from isthmus.artifacts.constraints import matching
from isthmus.errors import CutError

SYNTAX = "a cut is a position such as 20, its tensors a,b, or NAME=a,b; cuts in order are separated by '/': 20/65"
"""The form of cuts, for help and for errors."""

_SEPARATOR = re.compile(r"[/,]")
_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}"
_CUT = re.compile(_NAME)
_NAMED = re.compile(rf"\s*({_NAME})\s*=")
LAYER_PREFIX = "layer_"
# Far more digits than any model's layers have.
_MAX_DIGITS = 8


@dataclass(frozen=True)
class CutText:
    """A parsed cut: `parts` are tensors, or a single name or position; `name` is the text before `=`."""

    parts: tuple[str, ...]
    name: str | None = None

    @property
    def position(self) -> int | None:
        """The position of the cut; None for a cut given by name or tensors."""
        lone = self.parts[0] if len(self.parts) == 1 and self.name is None else ""
        return int(lone) if _is_position(lone) else None


CutName = Annotated[str, matching(_NAME)]


def is_cut_name(text: str) -> bool:
    """Whether `text` is a valid cut name: 1 to 63 letters, digits, '_' and '-', starting alphanumeric (and so never
    '..').
    """
    return _CUT.fullmatch(text) is not None


def parse_partition(text: str, names: Collection[str]) -> tuple[CutText, ...]:
    """The cuts of a partition, in order. `names` are the known tensor and cut names; longer names take precedence.

    A decimal number alone is a position. If `text` is not a sequence of known names and positions, the remainder beside
    the longest readable part becomes a single cut, for the caller to refuse.
    """
    name_set = frozenset(names)
    if (cuts := _read(text, name_set)) is not None:
        return cuts
    slashes = [match.start() for match in re.finditer("/", text)]
    # For an error message: keep the longest readable prefix, else suffix, and leave the rest to the caller.
    for at in reversed(slashes):
        if (cuts := _read(text[:at], name_set)) is not None:
            return (*cuts, _split(text[at + 1 :]))
    for at in slashes:
        if text[:at].strip() and (cuts := _read(text[at + 1 :], name_set)) is not None:
            return (_split(text[:at]), *cuts)
    return (_split(text),)


def parse_cut(text: str, names: Collection[str]) -> CutText:
    """Parse a single cut; a `/` in `text` belongs to a name."""
    cuts = _read(text, frozenset(names))
    return cuts[0] if cuts is not None and len(cuts) == 1 else _split(text)


def layer_cut(layers: int) -> str:
    """The name of the cut behind the first `layers` layers of a model of text, and of the residual stream there."""
    return f"{LAYER_PREFIX}{layers}"


def layer_numbers(text: str, layers: int) -> list[int]:
    """The numbers of layers in a partition's text, such as `10/20` or `layer_10/layer_20`, in its order.

    Raises:
        CutError: a part is no number from 1 to `layers` - 1.
    """
    numbers = []
    for part in text.split("/"):
        number = part.strip().removeprefix(LAYER_PREFIX)
        if not (number.isdecimal() and len(number) <= _MAX_DIGITS and 0 < int(number) < layers):
            raise CutError(
                f"{part[:80]!r} is no cut of this model; its cuts are 1 to {layers - 1}, the number of layers before",
                cut=part[:80],
            )
        numbers.append(int(number))
    return numbers


def _read(text: str, names: frozenset[str]) -> tuple[CutText, ...] | None:
    """`text` as known names and positions; None if any part is neither."""
    ends = [*(m.start() for m in _SEPARATOR.finditer(text)), len(text)]
    longest = max(map(len, names), default=0)

    @cache
    def cuts_from(start: int) -> tuple[CutText, ...] | None:
        prefix = _NAMED.match(text, start)
        if (plain := tensors_from(start, True)) is not None or prefix is None:
            return plain
        rest = tensors_from(prefix.end(), False)
        return None if rest is None else (CutText(rest[0].parts, prefix[1]), *rest[1:])

    @cache
    def tensors_from(start: int, lone: bool) -> tuple[CutText, ...] | None:
        # Longest name first.
        for end, name in reversed(list(names_from(start))):
            if name not in names and not (lone and text[end : end + 1] != "," and _is_position(name)):
                continue
            if end == len(text):
                return (CutText((name,)),)
            if text[end] == "/":
                if (cuts := cuts_from(end + 1)) is not None:
                    return (CutText((name,)), *cuts)
            elif (rest := tensors_from(end + 1, False)) is not None:
                return (CutText((name, *rest[0].parts)), *rest[1:])
        return None

    def names_from(start: int) -> Iterator[tuple[int, str]]:
        for end in ends[bisect_left(ends, start) :]:
            raw = text[start:end]
            # Blanks around separators are ignored, unless the name itself has blanks.
            name = raw if raw in names else raw.strip()
            yield end, name
            if len(name) > longest:
                return

    # Fill the memo from the end, so that recursion never goes deeper than one part; texts of thousands of parts are
    # legal.
    for end in reversed(ends[:-1]):
        cuts_from(end + 1)
        tensors_from(end + 1, False)
    return cuts_from(0)


def _split(text: str) -> CutText:
    prefix = _NAMED.match(text)
    rest = text[prefix.end() :] if prefix else text
    return CutText(tuple(p.strip() for p in rest.split(",") if p.strip()), prefix[1] if prefix else None)


def _is_position(text: str) -> bool:
    # int() refuses texts of thousands of digits.
    return text.isascii() and text.isdecimal() and len(text) <= 9
