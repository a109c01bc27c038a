"""Pictures of real models: readable on light and dark pages, no text over another or cut off, units as in tables."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from msgspec.structs import replace
from PIL import Image

from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.fidelity import Fidelity, from_json, offered
from isthmus.artifacts.plan import Candidate, Measured, Plan, Terms
from isthmus.errors import ModelError
from isthmus.units import format_size
from isthmus_tools.figures import cuts, fidelity, plan, regions
from isthmus_tools.figures.labels import Label, place
from isthmus_tools.figures.style import FAMILIES, INK, new_figure, save, scheme_rules, settle, style
from isthmus_tools.graph.cuts import default_cuts
from isthmus_tools.graph.model import open_model
from isthmus_tools.planner.regions import RegionMap, region_map
from isthmus_tools.zoo.calibration import FOLDER
from support.models import REAL
from support.plans import DIGEST

WHITE, DARK = "#ffffff", "#0d1117"
"""Pages of a site in its light and in its dark scheme."""
HUES = tuple(colour for family in FAMILIES.values() for colour in family)
RULES = dict(re.findall(r"scheme: (\w+)\) \{(.*)\}", scheme_rules()))
NODES = 94


def measured_fidelity() -> Fidelity:
    return from_json((FOLDER / "efficientnet-lite0" / "fidelity.json").read_bytes())


def real_plan() -> Plan:
    """A plan with times that are made up, such that all regions, and splits at two cuts, are best somewhere."""
    edge = Candidate("edge-float", "edge", Terms(preprocess=0.004, edge_run=0.04))
    cloud = Candidate("cloud-photo", "cloud", Terms(cloud_run=0.01), input="photo", up_bytes=197_000)
    jpeg = Candidate("cloud-jpeg-95", "cloud", Terms(preprocess=0.008, cloud_run=0.01), up_bytes=24_100)
    early = Terms(preprocess=0.004, edge_run=0.006, pack=0.001, cloud_run=0.0075)
    late = Terms(preprocess=0.004, edge_run=0.012, pack=0.001, cloud_run=0.003)
    splits = [
        Candidate("split-31-transform-73", "split", early, ("31",), up_bytes=9_500),
        Candidate("split-65-int4", "split", late, ("65",), up_bytes=5_200),
        Candidate("split-91-sparse", "split", replace(late, edge_run=0.038), ("91",), up_bytes=2_400),
    ]
    candidates = [replace(c, measured=Measured(c.predicted.total, 0.01, 0.5, 5)) for c in (edge, cloud, jpeg, *splits)]
    return Plan(
        model="efficientnet-lite0",
        subject=DIGEST,
        objective="latency",
        conditions=Conditions(2e6, 2e6, 0.02),
        constraints=Constraints(edge_memory_bytes=10**9, max_disagreement=0.01),
        profiles=(),
        candidates=tuple(candidates),
        chosen="split-31-transform-73",
        why=("it is a test",),
        made_at="2026-01-01T00:00:00+00:00",
        isthmus="0",
    )


def real_map() -> RegionMap:
    return region_map(real_plan())


def real_cuts(name: str) -> Callable[[], Any]:
    def build() -> Any:
        model = open_model(REAL[name].path(), **REAL[name].open_arguments())
        return cuts.build(model, name, default_cuts(model)[0].name)

    return build


def real_codecs(*names: str) -> Callable[[], Any]:
    """The measurements of a real model, at one cut or as if at several."""

    def build() -> Any:
        document = measured_fidelity()
        every = tuple(replace(e, cut=name) for name in names for e in document.entries)
        document = replace(document, entries=every)
        return fidelity.build(document, {name: offered(document, name)[0] for name in names}, "efficientnet-lite0:2")

    return build


def along_the_graph() -> Any:
    names = ("4", "9", "20", "31", "37", "43", "65", "90", "91", "92")
    rng = np.random.default_rng(0)
    positions, sizes = tuple(range(NODES)), tuple(int(b) for b in 10 ** rng.uniform(3.7, 6.6, NODES))
    seconds = tuple(np.linspace(0, 0.048, NODES))
    curves = plan.GraphCurves(positions, sizes, seconds, tuple(s / 5 for s in seconds), {n: int(n) for n in names})
    splits = [Candidate(f"split-{n}-raw", "split", Terms(edge_run=9.0), (n,), up_bytes=9_999_999) for n in names]
    known = real_plan()
    return plan.build(replace(known, candidates=(*known.candidates, *splits)), curves)


FIGURES: dict[str, Callable[[], Any]] = {
    **{f"cuts-{name}": real_cuts(name) for name in ("efficientnet-lite0", "ocr-detector", "silero", "magika")},
    "codec": real_codecs("31"),
    "codec-three-cuts": real_codecs("31", "65", "a-name-of-a-cut-that-is-long"),
    "plan": along_the_graph,
    "map": lambda: regions.build(real_plan(), real_map()),
}


@cache
def figure_of(name: str) -> Any:
    with style():
        return FIGURES[name]()


@pytest.fixture(params=FIGURES)
def figure(request: pytest.FixtureRequest) -> Iterator[Any]:
    with style():
        yield figure_of(request.param)


def texts(figure: Any) -> list[Text]:
    """The texts that are drawn: ticks beyond their axis exist and are not."""
    every = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible() and artist.get_text())
    beyond = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    return [text for text in every if text not in beyond]


def boxes(figure: Any) -> list[tuple[str, Any]]:
    renderer = figure.canvas.get_renderer()
    # A label's own box, without the line to its point.
    return [(t.get_text(), Text.get_window_extent(t, renderer)) for t in texts(figure)]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of the Web Content Accessibility Guidelines."""

    def luminance(colour: str) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_no_text_of_a_picture_lies_over_another_or_beyond_its_edge(figure: Any) -> None:
    figure.draw_without_rendering()
    found = boxes(figure)
    assert len(found) > 10
    for i, (text, box) in enumerate(found):
        # A text that is not drawn has a box of one pixel.
        assert min(box.width, box.height) > 4, text
        assert min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) >= 0, text
        assert [other for other, there in found[i + 1 :] if box.overlaps(there)] == [], text


def test_every_text_and_mark_is_readable_on_light_and_dark_pages(figure: Any) -> None:
    for text in texts(figure):
        colour = to_hex(text.get_color())
        if colour == WHITE:
            # On an opaque cell.
            assert any(contrast(WHITE, hue) >= 4.5 for hue in cells(figure))
            continue
        # The best that one colour can have with both pages is 4.3.
        assert min(contrast(colour, WHITE), contrast(colour, DARK)) >= 4.1, text.get_text()
        for scheme, page in (("light", WHITE), ("dark", DARK)):
            (tone,) = re.findall(rf'"{colour}"\] {{fill: (#\w+) !', RULES[scheme])
            assert contrast(tone, page) >= 4.5, (scheme, text.get_text())
    lines = [line for axes in figure.axes for line in axes.lines]
    marks = {to_hex(line.get_color()) for line in lines}
    # Translucent areas repeat a line.
    opaque = [each for axes in figure.axes for each in axes.collections if not each.get_alpha()]
    marks |= {to_hex(colour) for each in opaque for colour in each.get_edgecolors()}
    assert all(min(contrast(colour, WHITE), contrast(colour, DARK)) >= 3 for colour in marks)


def cells(figure: Any) -> set[str]:
    patches = [p for axes in figure.axes for p in axes.patches if isinstance(p, Rectangle) and p.get_fill()]
    return {to_hex(p.get_facecolor()) for p in patches}


def test_a_label_stands_at_a_point_in_view_or_not_at_all() -> None:
    with style():
        figure = new_figure(8, 3)
        axes = figure.add_subplot()
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        labels = [Label("seen", [(5, 5), (0.5, 0.5)]), Label("far", [(2, 2)]), Label("long " * 60, [(0.5, 0.5)])]
        settle(figure)
        placed = place(axes, labels)
    assert [(each.get_text(), each.xy) for each in placed] == [("seen", (0.5, 0.5))]


def test_white_is_readable_on_every_colour_of_a_cell() -> None:
    assert min(contrast(WHITE, hue) for hue in (*HUES, INK)) >= 4.35
    assert min(contrast(WHITE, hue) for hue in HUES) >= 4.5


def test_a_pictures_background_is_clear_and_an_svg_is_the_same_twice(tmp_path: Path) -> None:
    with style():
        with Image.open(io.BytesIO(save(figure_of("codec")))) as image:
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
        one, other = (save(figure_of("codec"), tmp_path / f"{n}.svg") for n in "ab")
    assert (alpha == 0).mean() > 0.7
    assert one == other


def test_the_plans_cell_is_framed_and_the_frame_hides_no_text() -> None:
    figure, known = figure_of("map"), real_map()
    figure.draw_without_rendering()
    (frame,) = figure.findobj(lambda artist: artist.get_gid() == "requested")
    requested = known.requested()
    assert requested is not None
    row = next(y for y, each in enumerate(known.cells) if requested in each)
    column = known.cells[row].index(requested)
    assert frame.get_xy() == (pytest.approx(column - 0.42), pytest.approx(row - 0.42))
    assert to_hex(frame.get_edgecolor()) == WHITE
    inner = frame.get_window_extent().padded(-2)
    inside = [(text, box) for text, box in boxes(figure) if inner.contains(*box.get_points().mean(axis=0))]
    assert inside
    assert all(inner.x0 < box.x0 and box.x1 < inner.x1 and inner.y0 < box.y0 and box.y1 < inner.y1 for _, box in inside)


def test_regions_and_cuts_have_a_colour_and_a_name_each() -> None:
    figure, known = figure_of("map"), real_map()
    wins = {cell.best for row in known.cells for cell in row}
    kinds = {cell.region for row in known.cells for cell in row}
    assert kinds == {"edge", "cloud", "split"}
    (legend,) = figure.legends
    names = " ".join(t.get_text() for t in legend.get_texts())
    assert all(name in names for name in wins)
    hues = plan.hues_of(c for c in real_plan().candidates if c.name in wins)
    assert len(cells(figure)) == len(set(hues.values())) == len({plan_cuts(name) for name in wins})
    assert {t.get_text() for t in texts(figure)} >= {f"cut {n}" for n in {plan_cuts(w) for w in wins} if n.isdigit()}


def plan_cuts(name: str) -> str:
    return name.split("-")[1] if name.startswith("split") else name


def test_a_map_states_constraints_and_the_link() -> None:
    said = figure_of("map").axes[0].get_title(loc="left")
    assert "at most 1.0 GB at the edge, at least 99.0% unchanged predictions" in said
    assert "2 Mbit/s and 4 times slower than the cloud" in said


@pytest.mark.parametrize(
    ("constraints", "text"),
    [
        (Constraints(), "errors of at most 0.05 of an output"),
        (Constraints(private_depth=3), "raw inputs stay, the first 3 nodes run at the edge"),
        (Constraints(latency_s=0.05), "at most 50 ms a request"),
        (Constraints(max_error=0.2), "errors of at most 0.2"),
    ],
)
def test_every_constraint_has_its_words(constraints: Constraints, text: str) -> None:
    assert text in plan.constraints_text(replace(real_plan(), constraints=constraints))


def test_the_chosen_codec_is_marked_with_its_bytes_as_tables_write_them() -> None:
    best = offered(measured_fidelity(), "31")[0]
    said = {t.get_text() for t in texts(figure_of("codec"))}
    (label,) = [text for text in said if text.startswith("chosen: ")]
    assert label.endswith(f"{format_size(best.bytes)}, {best.agreement:.1%}")
    assert {"JPEG of the input", "WebP of the input", "5 kB", "200 B"} <= said


def test_a_picture_of_another_suffix_is_refused_with_both_names(tmp_path: Path) -> None:
    with style(), pytest.raises(ModelError, match=r"neither \.png nor \.svg"):
        save(figure_of("map"), tmp_path / "map.gif")
    with style(), pytest.raises(ModelError, match="cannot be written: No such file"):
        save(figure_of("map"), tmp_path / "nowhere" / "map.svg")


def test_an_svg_holds_its_texts_as_text_in_the_colours_of_the_scheme(tmp_path: Path) -> None:
    with style():
        text = save(figure_of("map"), tmp_path / "map.svg").decode()
    assert (tmp_path / "map.svg").read_text() == text
    assert ">cut 31<" in text
    assert "prefers-color-scheme: dark" in text
    colours = set(re.findall(r"<text style=\"[^\"]*fill: (#\w+)", text))
    assert INK in colours
    assert all(f'"{colour}"' in RULES["dark"] for colour in colours - {WHITE})
