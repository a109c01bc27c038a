"""Masking of patterns in texts: what is masked, what is not, and that no text or expression takes endless time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.artifacts.redaction import BUILTIN_PATTERNS, TextPattern
from isthmus.errors import ModelError, RequestMalformed
from isthmus.processing import text_masking
from isthmus.processing.text_masking import MAX_MATCH, WINDOW, TextMasker

ALL = TextMasker(BUILTIN_PATTERNS)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to max.müller+x@exämple.co.uk, now", "write to [EMAIL], now"),
        ("<a@b.de>;c@d.org", "<[EMAIL]>;[EMAIL]"),
        ("IBAN DE89 3704 0044 0532 0130 00 AND MORE", "IBAN [IBAN] AND MORE"),
        ("gb82west12345698765432", "[IBAN]"),
        ("NO93 8601 1117 947.", "[IBAN]."),
        ("card 4111 1111 1111 1111, 5500-0000-0000-0004", "card [CARD], [CARD]"),
        ("4111 1111 1111 1111 2026", "[CARD] 2026"),
        ("12 4111111111111111", "12 [CARD]"),
        ("call +49 30 1234567 or (212) 555-0123", "call [PHONE] or [PHONE]"),
        ("030/1234567, 0049 30 123456, 1-212-555-0123", "[PHONE], [PHONE], [PHONE]"),
        ("am 05.11.2025 030 1234567", "am 05.11.2025 [PHONE]"),
        ("(+44 20 7946 0958)", "[PHONE])"),
    ],
)
def test_patterns_are_masked(text: str, masked: str) -> None:
    assert ALL.mask(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # Luhn's check fails
        "order 41111111111111110000 of 2026",  # a longer number
        "2026-11-29 12:30, 29.11.2026, 01/02/2026",
        "192.168.0.1 and 10.0.30.123",
        "0.123456789 and 3.14159265358979",
        "version 1.2.3-4567890, a@b, @home, 5551234567",
        "x0123456789",
    ],
)
def test_what_only_looks_alike_stays(text: str) -> None:
    counts: dict[str, int] = {}
    assert ALL.mask(text, counts) == text
    assert counts == {}


@pytest.mark.parametrize("text", ["DE89 3704 0044 0532 0130 01", "DE89 3704 0044 0532 0130", "AB89370400440532013000"])
def test_an_iban_has_a_country_its_length_and_check_digits(text: str) -> None:
    assert TextMasker(["iban"]).mask(text) == text


def test_matches_are_counted_by_pattern_and_an_overlap_once() -> None:
    masker = TextMasker([TextPattern("ticket", "TK-[0-9]{4,}"), TextPattern("mail", "[a-z]+@[a-z]+"), "email"])
    counts: dict[str, int] = {"email": 1}
    assert masker.mask("TK-12345 a@b c@d.org TK-1", counts) == "[TICKET] [MAIL] [EMAIL] TK-1"
    assert counts == {"ticket": 1, "mail": 1, "email": 2}


@settings(max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.integers(0, 3 * WINDOW))
def test_a_match_is_found_wherever_windows_end(around: str, before: int) -> None:
    around = around.replace("@", "").translate(str.maketrans("", "", "0123456789+"))
    text = f"{'-ä ' * (before // 4)}{'y' * (before % 4)} {around} a.person@example.org {around}"
    assert "person" not in TextMasker(["email"]).mask(text)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        (r"(?=a)b", "look-ahead"),
        (r"(a)\1", "escape"),
        ("((((a{1,100}){1,100}){1,100}){1,100})", "repetition"),
        (r"\p{L}{1,1000}\p{L}{1,1000}", "too large"),
        ("(a", "missing )"),
        ("a*", "empty text"),
    ],
)
def test_expressions_that_may_take_long_are_refused(expression: str, reason: str) -> None:
    with pytest.raises(ModelError) as refused:
        TextMasker([TextPattern("own", expression)])
    assert reason in f"{refused.value.message} {refused.value.hint}"
    assert refused.value.facts["pattern"] == "own"


class _Recorded:
    """An expression, and the bytes that its searches saw."""

    def __init__(self, expression: Any) -> None:
        self._expression, self.seen = expression, 0

    def search(self, data: bytes, start: int, stop: int) -> Any:
        self.seen += stop - start
        return self._expression.search(data, start, stop)


@pytest.mark.parametrize("expression", ["(?:.*@)|c", "(a+)+$", "(x+x+)+y", "c"])
def test_the_work_of_an_expression_is_bounded_by_the_text(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = _Recorded(text_masking._compiled("own", expression))
    monkeypatch.setattr(text_masking, "_compiled", lambda *_: recorded)
    size = 8 * WINDOW
    for letter in "acx":
        recorded.seen = 0
        TextMasker([TextPattern("own", expression)]).mask(letter * size)
        # Without windows the first of them would see the square: 33 million bytes.
        assert recorded.seen <= WINDOW * size
    recorded.seen = 0
    TextMasker([TextPattern("own", expression)]).mask("q " * size)
    assert recorded.seen <= 2 * size * WINDOW / (WINDOW - MAX_MATCH) + WINDOW


def test_masking_stops_at_the_deadline_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Passed(Exception): ...

    class Deadline:
        def check(self, what: str) -> None:
            raise Passed

    monkeypatch.setattr(text_masking, "current_deadline", Deadline)
    with pytest.raises(Passed):
        TextMasker(["email"]).mask("a@b.c " * 2000)


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(RequestMalformed):
        ALL.mask("\ud800")
