"""The page of the trigger's configuration has every key, and its examples can be used."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from isthmus.events.configuration import (
    Broker,
    ClaimsTable,
    Place,
    RecordsTable,
    RouterTable,
    SpoolTable,
    TriggerConfiguration,
    parse_configuration,
)
from isthmus.events.loops import check_loops
from support.paths import ROOT

PAGE = (ROOT / "docs" / "reference" / "trigger.md").read_text()
HOW_TO = (ROOT / "docs" / "how-to" / "events.md").read_text()
EXAMPLES = [*re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL), *re.findall(r"<<'END'\n(.*?)END\n", HOW_TO, re.DOTALL)]
TABLES = [TriggerConfiguration, RouterTable, RecordsTable, ClaimsTable, SpoolTable, *get_args(Place)]


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_is_a_configuration(text: str) -> None:
    check_loops(parse_configuration(text, {}))


def test_every_broker_has_an_example() -> None:
    kinds = {type(parse_configuration(text, {}).source) for text in EXAMPLES}
    assert kinds == set(get_args(Broker))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_the_page_has_every_key(table: Any) -> None:
    keys = {*re.findall(r"`(\w+)`", PAGE), *re.findall(r"^\[?\[?(\w+)", PAGE, re.MULTILINE)}
    assert set(table.__struct_fields__) <= keys
