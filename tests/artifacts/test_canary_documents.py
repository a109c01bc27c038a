"""The canary of an alias document: who gets it, and its rule as text."""

from __future__ import annotations

import msgspec
import pytest

from isthmus.artifacts.canary import Canary, CanaryRule, parse_rule, parse_share
from isthmus.errors import RegistryError

DIGEST = "sha256:" + "a" * 64
CALLERS = [f"caller {i}" for i in range(4000)]


def canary(share: float, began: int = 3) -> Canary:
    return Canary(8, DIGEST, share, began)


def taken(each: Canary) -> set[str]:
    return {caller for caller in CALLERS if each.takes(caller)}


def test_a_share_of_the_callers_gets_the_canary() -> None:
    # Of 4,000 fair draws the standard deviation is 19.
    assert 300 < len(taken(canary(0.1))) < 500


def test_no_caller_leaves_a_canary_whose_share_grows() -> None:
    assert taken(canary(0.1)) < taken(canary(0.3))


def test_another_canary_gets_other_callers() -> None:
    first, second = taken(canary(0.1)), taken(canary(0.1, began=4))
    assert len(first & second) < len(first) / 2


def test_a_rule_as_text_changes_the_fields_that_it_names() -> None:
    assert parse_rule("errors=5%, latency=1.5,requests=200") == CanaryRule(200, 0.05, 0.1, 1.5)
    assert parse_rule("") == CanaryRule()


@pytest.mark.parametrize(
    "text", ["errors", "errors=x", "mistakes=1%", "errors=200%", "latency=0.5", "requests=0", "requests=inf"]
)
def test_a_rule_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(RegistryError):
        parse_rule(text)


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.25", 0.25)])
def test_a_share_is_a_percentage_or_a_fraction(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "0", "100%", "1", "-5%", "nan", "ten"])
def test_a_share_of_none_or_all_is_refused(text: str) -> None:
    with pytest.raises(RegistryError):
        parse_share(text)


def test_a_canary_document_refuses_unknown_fields_and_comes_back_whole() -> None:
    data = msgspec.json.encode(canary(0.1))
    assert msgspec.json.decode(data, type=Canary) == canary(0.1)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(data.replace(b'"share"', b'"shares"'), type=Canary)
