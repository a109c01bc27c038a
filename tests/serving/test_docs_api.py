"""docs/reference/api.md says what the code does."""

from __future__ import annotations

import re

from isthmus.errors import HTTP_STATUS
from isthmus.oip import messages as oip
from isthmus.processing.image_decoding import MAX_SCANS
from isthmus.processing.image_spec import INTERPOLATIONS
from support.paths import ROOT

TEXT = (ROOT / "docs" / "reference" / "api.md").read_text()
PROSE = " ".join(TEXT.split())


def test_the_status_table_is_the_codes() -> None:
    rows = {name: int(status) for status, name in re.findall(r"^\| (\d+) \| (\w+) \|", TEXT, re.MULTILINE)}
    assert rows == {cls.__name__: status for cls, status in HTTP_STATUS.items()}


def test_bounds_and_names_are_the_codes() -> None:
    assert f"at most {MAX_SCANS} scans" in PROSE
    assert f"at most {oip.MAX_JSON_BYTES // 2**20} MiB" in PROSE
    assert f"`interpolation`: {', '.join(INTERPOLATIONS)}" in PROSE
    assert oip.HEADER_LENGTH in PROSE
