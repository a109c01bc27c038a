"""The text form of cuts: `20/40`, `a,b`, `deep=a,b`.

Cuts in order are separated by `/`, tensors of one cut by `,`; `NAME=` before the tensors names the cut. Tensor names of
TorchScript and TensorFlow models hold all of these characters, so known names are matched before anything is split.

Source: docs/cuts.md, "Naming a cut".
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated

from isthmus.artifacts.constraints import matching

_SEPARATOR = re.compile(r"[/,]")
_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}"
_CUT = re.compile(_NAME)
_NAMED = re.compile(rf"\s*({_NAME})\s*=")


@dataclass(frozen=True)
class CutText:
    """One cut as its text says it: `parts` are tensors, or one name or position of a cut; `name` is what `=` gave."""

    parts: tuple[str, ...]
    name: str | None = None

    @property
    def position(self) -> int | None:
        """The position that the cut is given by, if it is."""
        lone = self.parts[0] if len(self.parts) == 1 and self.name is None else ""
        return int(lone) if _is_position(lone) else None


CutName = Annotated[str, matching(_NAME)]


def is_cut_name(text: str) -> bool:
    """Whether `text` can name a cut: 1 to 63 letters, digits, '_' and '-', starting alphanumeric (so never '..')."""
    return _CUT.fullmatch(text) is not None


def parse_partition(text: str, known: Collection[str]) -> tuple[CutText, ...]:
    """The cuts of a partition, in order; of two readings of `text`, the one with the longer `known` name first wins.

    A decimal number that stands alone is a position. Of a text that is not made of known names and positions alone,
    what remains beside as many of them as possible is one cut, for the caller to refuse.
    """
    names = frozenset(known)
    if (cuts := _read(text, names)) is not None:
        return cuts
    slashes = [found.start() for found in re.finditer("/", text)]
    for at in reversed(slashes):
        if (cuts := _read(text[:at], names)) is not None:
            return (*cuts, _split(text[at + 1 :]))
    for at in slashes:
        if text[:at].strip() and (cuts := _read(text[at + 1 :], names)) is not None:
            return (_split(text[:at]), *cuts)
    return (_split(text),)


def parse_cut(text: str, known: Collection[str]) -> CutText:
    """The one cut that `text` says; a `/` in it belongs to a name."""
    cuts = _read(text, frozenset(known))
    return cuts[0] if cuts is not None and len(cuts) == 1 else _split(text)


def _read(text: str, known: frozenset[str]) -> tuple[CutText, ...] | None:
    """`text` as known names and positions; None where it is not made of these alone."""
    ends = [*(m.start() for m in _SEPARATOR.finditer(text)), len(text)]
    longest = max(map(len, known), default=0)

    @cache
    def cuts_from(start: int) -> tuple[CutText, ...] | None:
        named = _NAMED.match(text, start)
        if (plain := tensors_from(start, True)) is not None or named is None:
            return plain
        rest = tensors_from(named.end(), False)
        return None if rest is None else (CutText(rest[0].parts, named[1]), *rest[1:])

    @cache
    def tensors_from(start: int, lone: bool) -> tuple[CutText, ...] | None:
        for end, name in reversed(list(names_from(start))):
            if name not in known and not (lone and text[end : end + 1] != "," and _is_position(name)):
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
            name = raw if raw in known else raw.strip()
            yield end, name
            if len(name) > longest:
                return

    # From the last part on, so that no call goes deeper than the part that follows.
    for end in reversed(ends[:-1]):
        cuts_from(end + 1)
        tensors_from(end + 1, False)
    return cuts_from(0)


def _split(text: str) -> CutText:
    named = _NAMED.match(text)
    rest = text[named.end() :] if named else text
    return CutText(tuple(p.strip() for p in rest.split(",") if p.strip()), named[1] if named else None)


def _is_position(text: str) -> bool:
    return text.isascii() and text.isdecimal()
