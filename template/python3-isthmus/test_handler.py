"""With TEST_ENABLED=true: the test of every image, beside the tests of its function."""

from __future__ import annotations

import sys
from pathlib import Path


def test_the_handler_can_be_imported_with_all_that_it_needs() -> None:
    here = Path(__file__).resolve().parent
    for folder in (here, here / "function", here / "function" / "shared"):  # as index.py does
        sys.path.insert(0, str(folder))
    from function.handler import create_app

    assert callable(create_app)
