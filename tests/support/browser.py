"""Chromium, for tests of what a person sees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, NAMES)), playwright.chromium.executable_path)
        if not os.path.exists(found):
            pytest.skip("no Chromium is installed")
        # The commands hide fonts from matplotlib, and Chromium ends without any.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FONTCONFIG")}
        browser = playwright.chromium.launch(executable_path=found, env=environment)
        yield browser
        browser.close()
