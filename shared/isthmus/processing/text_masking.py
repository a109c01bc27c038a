"""Masking of patterns in texts: e-mail addresses, phone numbers, IBANs, payment cards, and a bundle's own expressions.

RE2 runs the expressions: it has no backtracking, so that no expression takes more than linear time for a search.
All matches of a text could still take the square of its length, for a search may scan to the end and match near its
begin; searches are therefore bounded to windows. Source: docs/how-to/redaction.md.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from isthmus.admission import current_deadline
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.redaction import BuiltinPattern, TextPattern
from isthmus.errors import ModelError, RegistryError, RequestMalformed

# Bytes of a text that one search sees, and of the longest match that is certain to be masked whole.
WINDOW, MAX_MATCH = 1024, 256
# Of a compiled expression and its automata: 256 characters of plain expressions take a tenth.
_MAX_EXPRESSION_BYTES = 2**20
_CHECK_EVERY = 1024
# ISO/IEC 7812: a card's number has 13 to 19 digits in use. ITU-T E.164: a phone's has 15 at most.
_CARD_DIGITS = range(13, 20)
_MIN_PHONE, _MAX_PHONE = 7, 15
# Characters of an IBAN by its country. Source: ISO 13616, registry of SWIFT.
_IBANS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 "
    "EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 "
    "KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 "
    "PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 "
    "UA29 VA22 VG24 XK20 YE30"
)
_IBAN_LENGTHS = {entry[:2].encode(): int(entry[2:]) for entry in _IBANS.split()}

# Numbers of North America are often written without a prefix: (212) 555-0123. Others begin with + or 0.
_NORTH_AMERICAN = r"(?:1[ .\-]?)?\(?[0-9]{3}\)?[ .\-]?[0-9]{3}[ .\-][0-9]{4}\b"
_EXPRESSIONS: dict[BuiltinPattern, str] = {
    "email": r"[\p{L}\p{N}._%+'\-]+@[\p{L}\p{N}\-]+(?:\.[\p{L}\p{N}\-]+)+",
    "iban": r"\b[A-Za-z]{2}[0-9]{2}(?:[ \-]?[0-9A-Za-z]){11,30}",
    "card": r"[0-9](?:[ \-]?[0-9]){12,}",
    "phone": rf"\(?(?:\+[0-9]|0)(?:[ ()./\-]{{0,3}}[0-9]){{6,19}}|{_NORTH_AMERICAN}",
}
_SEPARATORS = b" ()./-"
_DATE = re.compile(rb"(?:\d{1,2}([./-])\d{1,2}\1(?:\d{2}|\d{4})|0\.\d+)(?!\d)")

Span = tuple[int, int]
# Spans to mask within a match, and where the search goes on.
_Verify = Callable[[bytes, int, int], tuple[list[Span], int]]


class _Finder(NamedTuple):
    label: str
    expression: Any
    verify: _Verify


class TextMasker:
    """Replaces the matches of patterns by their names: [EMAIL]. Thread-safe."""

    def __init__(self, patterns: Sequence[BuiltinPattern | TextPattern]) -> None:
        """Compile the patterns.

        Raises:
            ModelError: an expression is not RE2's, takes too much memory, or matches the empty text.
        """
        self._finders = [_finder(pattern) for pattern in patterns]

    def mask(self, text: str, counts: MutableMapping[str, int] | None = None) -> str:
        """The text with its matches replaced; `counts` gets their numbers by the pattern's name.

        Where matches overlap, one replacement takes the name of the first.

        Raises:
            RequestMalformed: half of a surrogate pair, which is no text.
            DeadlineExceeded: the request's deadline passed.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as e:
            raise RequestMalformed("a text holds half of a surrogate pair") from e
        found = sorted((start, -end, finder.label) for finder in self._finders for start, end in _spans(finder, data))
        if not found:
            return text
        pieces, at = list[bytes](), 0
        for start, negative_end, label in found:
            if start < at:
                at = max(at, -negative_end)  # the rest of a match that overlaps the one before
                continue
            pieces += [data[at:start], f"[{label.upper()}]".encode()]
            at = -negative_end
            if counts is not None:
                counts[label] = counts.get(label, 0) + 1
        # An own expression may match within a character, where it names bytes.
        return b"".join([*pieces, data[at:]]).decode("utf-8", "replace")


def masker_of(bundle: Bundle) -> TextMasker | None:
    """The masker of a bundle's texts; None for a bundle that masks nothing.

    Raises:
        RegistryError: an expression of the manifest cannot be used.
    """
    if bundle.redaction is None or not bundle.redaction.patterns:
        return None
    try:
        return TextMasker(bundle.redaction.patterns)
    except ModelError as e:
        raise RegistryError(f"bundle {bundle.name}: {e.message}") from e


def refuse_token_ids(parameter: str) -> RequestMalformed:
    """The refusal of token ids for a model whose texts are masked: a pattern may hide in any tokens."""
    return RequestMalformed(
        f"{parameter} is token ids, and this model masks patterns of texts", parameter=parameter, hint="send the text"
    )


def _finder(pattern: BuiltinPattern | TextPattern) -> _Finder:
    if isinstance(pattern, TextPattern):
        return _Finder(pattern.name, _compiled(pattern.name, pattern.expression), _whole)
    return _Finder(pattern, _compiled(pattern, _EXPRESSIONS[pattern]), _VERIFY.get(pattern, _whole))


@functools.lru_cache(64)
def _compiled(name: str, expression: str) -> Any:
    import re2  # functions of models without patterns need no second engine

    options = re2.Options()
    options.max_mem, options.log_errors = _MAX_EXPRESSION_BYTES, False
    try:
        compiled = re2.compile(expression.encode(), options)
    except (re2.error, UnicodeEncodeError) as e:
        reason = e.args[0].decode("utf-8", "replace") if isinstance(e.args[0], bytes) else str(e)
        raise ModelError(
            f"the pattern {name} cannot be used: {reason[:200]}",
            pattern=name,
            hint="the syntax is RE2's: no look-ahead, no look-behind, no references to groups",
        ) from e
    if compiled.search(b"") is not None:
        raise ModelError(f"the pattern {name} matches the empty text", pattern=name)
    return compiled


def _spans(finder: _Finder, data: bytes) -> Iterator[Span]:
    """The spans of a pattern, in order. A search sees WINDOW bytes, so that each byte is seen WINDOW times at most."""
    deadline, searches, at = current_deadline(), 0, 0
    while at < len(data):
        searches += 1
        if deadline is not None and searches % _CHECK_EVERY == 0:
            deadline.check("the texts were masked")
        stop = min(at + WINDOW, len(data))
        match = finder.expression.search(data, at, stop)
        if match is None:
            if stop == len(data):
                return
            # The end of the window may hold the begin of a match.
            at = _character(data, stop - MAX_MATCH)
            continue
        start, end = match.span()
        if end == stop < len(data) and start > at:
            at = start  # the window may have cut the match off
            continue
        spans, at = finder.verify(data, start, max(end, start + 1))
        yield from spans


def _character(data: bytes, at: int) -> int:
    """The begin of the character of UTF-8 at `at`."""
    while at > 0 and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _whole(data: bytes, start: int, end: int) -> tuple[list[Span], int]:
    return [(start, end)], end


def _cards(data: bytes, start: int, end: int) -> tuple[list[Span], int]:
    """Numbers of cards within a run of digits: whole groups of it that pass Luhn's check.

    Source: ISO/IEC 7812-1, annex B.
    """
    run = np.frombuffer(data, np.uint8, end - start, start)
    places = np.flatnonzero(run >= ord("0"))  # separators are below
    digits = run[places].astype(np.int64) - ord("0")
    # Prefix sums with the digits of even and of odd places doubled: the check doubles every second from the right.
    doubled = 2 * digits - 9 * (digits > 4)
    is_even = np.arange(len(digits)) % 2 == 0
    sums = [np.append(0, np.cumsum(np.where(mask, doubled, digits))) for mask in (is_even, ~is_even)]
    gaps = np.diff(places) > 1
    begins, ends = np.append(True, gaps), np.append(gaps, True)
    # Groups of a number are linked: +1 where it begins, -1 where it ends.
    links = np.zeros(len(digits) + 1, np.int64)
    for length in _CARD_DIGITS:
        firsts = np.arange(max(0, len(digits) - length + 1))
        stops = firsts + length
        total = np.where(stops % 2 == 0, sums[0][stops] - sums[0][firsts], sums[1][stops] - sums[1][firsts])
        numbers = firsts[(total % 10 == 0) & begins[firsts] & ends[stops - 1]]
        np.add.at(links, numbers, 1)
        np.add.at(links, numbers + length - 1, -1)
    edges = np.diff(np.concatenate(([0], np.cumsum(links) > 0, [0])).astype(np.int8))
    firsts, lasts = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return [(start + int(places[i]), start + int(places[j]) + 1) for i, j in zip(firsts, lasts, strict=True)], end


def _iban(data: bytes, start: int, end: int) -> tuple[list[Span], int]:
    """An IBAN at the begin of a match, which may hold words after it too: its length and check digits decide.

    Source: ISO 13616-1; ISO/IEC 7064, MOD 97-10.
    """
    left = _IBAN_LENGTHS.get(data[start : start + 2].upper(), 0)
    stop = start
    while left and stop < end:
        left -= data[stop] not in b" -"
        stop += 1
    if left or stop == start or data[stop : stop + 1].isalnum():
        return [], start + 4
    number = data[start:stop].translate(None, b" -").decode()
    # Letters count from A = 10.
    is_iban = int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1
    return ([(start, stop)], stop) if is_iban else ([], start + 4)


def _phone(data: bytes, start: int, end: int) -> tuple[list[Span], int]:
    """A phone number at the begin of a run of digits, of as many of its groups as make one."""
    group = next((i for i in range(start + 2, end) if data[i] in _SEPARATORS), end)
    before = data[max(0, start - 2) : start]
    follows_digits = before[:1].isdigit() and before[1:] == b" " and data[start] not in b"+(0"
    if before[-1:].isalnum() or before[-1:] in (b".", b"/", b"-", b"_", b"@") or follows_digits:
        return [], group
    # A date before a number is no part of it.
    if (date := _DATE.match(data, start, end)) is not None:
        return [], date.end()
    for stop in range(end, start + _MIN_PHONE - 1, -1):
        if data[stop : stop + 1].isalnum() or data[stop - 1] in _SEPARATORS:
            continue
        digits = data[start:stop].translate(None, b"+" + _SEPARATORS)
        if _MIN_PHONE <= len(digits) <= _MAX_PHONE + 2 * digits.startswith(b"00"):
            return [(start, stop)], stop
    return [], group


_VERIFY: dict[BuiltinPattern, _Verify] = {"card": _cards, "iban": _iban, "phone": _phone}
