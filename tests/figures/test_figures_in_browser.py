"""Pictures in Chromium: an SVG's texts follow the colour scheme of the page that embeds it."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isthmus_tools.figures.style import headline, new_figure, save, settle, style
from support.browser import browser as browser


@pytest.fixture(scope="module")
def svg(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with style():
        figure = new_figure(8, 3)
        figure.add_subplot()
        headline(figure, "a title " * 8, "a note " * 12)
        settle(figure)
        return save(figure, tmp_path_factory.mktemp("picture") / "figure.svg")


@pytest.mark.parametrize(("scheme", "paper"), [("light", "#ffffff"), ("dark", "#0d1117")])
def test_texts_of_an_svg_follow_the_scheme_of_the_page_and_not_the_systems(
    browser: Any, svg: bytes, scheme: str, paper: str
) -> None:
    # The system prefers the other scheme.
    system = "dark" if scheme == "light" else "light"
    page = browser.new_page(viewport={"width": 840, "height": 340}, color_scheme=system)
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    page.set_content(
        f"<html style='color-scheme: {scheme}'><body style='background: {paper}'><img width=800 src='{source}'>"
    )
    page.wait_for_function("document.images[0].complete")
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"), np.float64)
    page.close()
    # A middle tone, as in a PNG, is about 120.
    assert pixels.min() < 85 if scheme == "light" else pixels.max() > 170
