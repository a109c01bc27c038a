"""Tables and lines at the widths of terminals: nothing is wider, words and numbers stay whole, facts are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Candidate, Error, Measured, Sources, Terms
from isthmus_tools.cli import console, demo
from isthmus_tools.cli.table_layout import Column, fold, lay_out
from isthmus_tools.planner.publishing import publish_plan
from isthmus_tools.profiling import profiles
from isthmus_tools.usecases import profile as profiling
from isthmus_tools.usecases.demo import DemoResult
from isthmus_tools.usecases.demo_verdict import Range, Verdict, Way
from support.bundles import photo
from support.calibrated_photos import Known, known
from support.cli import isthmus
from support.plans import candidate, plan_for, profile_of

__all__ = ["known"]
WIDTHS = (60, 80, 120, 200)


@pytest.fixture(scope="module")
def registry(known: Known) -> Path:
    """The calibrated model, a plan of many candidates in force, profiles of both tiers."""
    published = known.published
    for tier, seconds in (("edge", 0.004), ("cloud", 0.001)):
        profiles.put(published.registry, profile_of(published, tier, seconds))
    terms = Terms(0.03386, 0.03196, 0.02, 0.0006, 0.0044, 0.02, 0.003, 0.0001, 0.001, 0.001, Sources("measured"))
    chosen = replace(candidate("split-6-transform-80-looks-2", "split"), cuts=("6",), predicted=terms, up_bytes=5232)
    names = ("split-65-sparse-50", "split-92-lossless", "cloud-jpeg-85-of-the-part-taken", "edge-float")
    others = [replace(candidate(name, seconds=0.2 + i / 100), up_bytes=197_000) for i, name in enumerate(names)]
    measured = [
        replace(c, measured=Measured(0.1344 + i / 100, 0.1291, 0.1699, 15), error=Error(0.032, 5))
        for i, c in enumerate((chosen, *others))
    ]
    refused = replace(candidate("edge-int8"), refused="its error is 0.65, of 0.05")
    why = ("split-6-transform-80-looks-2 is the best of 5 for latency, measured: 134.4 ms a request",)
    plan = replace(plan_for(published.bundle, measured[0]), candidates=(*measured, refused), why=why)
    publish_plan(published.registry, published.bundle, {}, plan, alias="prod")
    return published.folder


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A terminal of that many columns."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    # A dumb terminal, as editors and CI have one, is 80 columns wide to rich.
    monkeypatch.setenv("TERM", "xterm-256color")
    assert console.out.is_terminal
    assert console.out.width == request.param
    return int(request.param)


def check_width(text: str, width: int) -> None:
    """No line is wider than the terminal, but for one word, such as a path to copy."""
    for line in text.splitlines():
        words = [word for word in line.removesuffix(" \\").split() if not word.startswith("--")]
        assert len(line.rstrip()) <= width or len(words) == 1, line


def shown(width: int, *arguments: object) -> str:
    result = isthmus(*arguments)
    assert result.exit_code == 0, result.output
    check_width(result.output, width)
    return result.output


@pytest.mark.parametrize(
    ("command", "facts"),
    [
        (["cuts", "{model}"], ["→", "Conv", "r1 float32", "8.2 kB"]),
        (["models"], ["photos", "split-6-transform-80-looks-2", "at 6"]),
        (["show", "photos"], ["prod", "split-6-transform-80-looks-2", "at 6", "x float32[1, 3, 8, 8]"]),
        (["codec", "photos", "--all"], ["int8", "100.0", "offered"]),
        (
            ["explain", "photos"],
            ["134.4 (129.1–169.9)", "5.2 kB", "31.96", "% worse", "its error is 0.65, of 0.05"],
        ),
        (["explain", "photos", "--sweep"], ["where splitting pays", "160 ms", "100 k", "1 G", "100 M"]),
        (["plan", "photos", "--uplink", "1mbit", "--predict-only", "--no-publish"], ["edge-float", "predicted"]),
        (
            ["calibrate", "photos", "--data", "{data}", "--inputs", "16", "--cut", "6", "--alias", "new"],
            ["transform/4", "isthmus plan"],
        ),
        (["gc"], ["that no version reaches"]),
        (["doctor"], ["onnxruntime", "faas-cli", "isthmus import adds models"]),
        (["versions", "photos"], ["→ 3", "prod"]),
        (["diff", "photos:1", "3"], ["split-6-transform-80-looks-2", "agreement", "not measured"]),
        (["promote", "photos:3"], ["prod means photos:3"]),
        (["infer", "{photo}", "--local", "--model", "photos"], ["no plan; nothing sent over the link", "ape"]),
        (["why", "{photo}", "--local", "--model", "photos", "--grid", "4"], ["photos:3", "parts hidden at the cut"]),
        (["infer", "--tensor", "x={array}", "--local", "--model", "photos"], ["logits", "[1, 5]"]),
    ],
    ids=lambda v: " ".join(v[:2]) if isinstance(v, list) else "",
)
def test_every_command_fits_the_terminal_and_shows_the_facts(
    command: Sequence[str],
    facts: Sequence[str],
    width: int,
    registry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(registry.parent)
    (tmp_path / "p.png").write_bytes(photo())
    np.save(tmp_path / "x.npy", np.ones((1, 3, 8, 8), np.float32))
    (tmp_path / "data").mkdir()
    for i in range(16 if command[0] == "calibrate" else 0):
        (tmp_path / "data" / f"{i}.png").write_bytes(photo(seed=i))
    paths = {
        "model": "photos.onnx",
        "photo": tmp_path / "p.png",
        "array": tmp_path / "x.npy",
        "data": tmp_path / "data",
    }
    where = [] if command[0] == "cuts" else ["--registry", registry.name]
    text = shown(width, *(part.format(**paths) for part in command), *where)
    check_facts(text, facts)


def test_profiles_fit_the_terminal(
    width: int, known: Known, registry: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = {tier: profile_of(known.published, tier, 0.0123456) for tier in ("edge", "cloud")}
    costs = {"..6": measured["edge"].whole, "6..": measured["cloud"].whole}
    measured = {tier: replace(p, segments={**p.segments, **costs}) for tier, p in measured.items()}
    monkeypatch.setattr(profiling, "profile", lambda *_: profiling.ProfileResult("photos:1", {"6": 1024}, measured))
    (tmp_path / "token").write_text("token")
    functions = ["--head", "http://edge", "--tail", "http://cloud", "--token-file", tmp_path / "token"]
    text = shown(width, "profile", "photos", *functions, "--registry", registry)
    check_facts(text, ["12.35 ms", "1.0 kB", "head at"])


def test_the_demo_fits_the_terminal(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    measured = Measured(1.2345, 1.2, 1.3, 3, {"preprocess": 0.0, "pack": 0.0, "edge": 1.0004, "cloud_run": 0.034})
    names = {"edge-float": "the whole model at the edge", "split-65-transform-80": "a split, calibrated"}
    ways = [
        Way(what, Candidate(n, "split", Terms(), up_bytes=2345, measured=measured), {"cat.jpg": "tabby (281)"}, 1, 0.1)
        for n, what in names.items()
    ]
    ranges = (Range("edge-float", 1.0), Range("split-65-transform-80", 2.0))
    verdict = Verdict("split-65-transform-80", ("its seconds are the least of all that may serve",), ranges, ranges)
    result = DemoResult(
        "photos:1",
        "",
        "65",
        Conditions(5e6, 5e6, 0.02),
        32,
        "a quota",
        {"cat.jpg": "tabby (281)"},
        tuple(ways),
        verdict,
        verdict,
    )
    demo._show(result)
    text = capsys.readouterr().out
    check_width(text, width)
    check_facts(text, ["1234", "2.3 kB", "calibrated", "1 of 1", "split-65-transform-80 from"])


def check_facts(text: str, facts: Sequence[str]) -> None:
    for fact in facts:
        # Text is wrapped between words, and names of candidates in headings behind hyphens.
        assert "".join(fact.split()) in "".join(text.split()).replace("│", ""), fact


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("it takes 10 ms a call", ["it takes", "10 ms a", "call"]),
        ("2026-11-29 05:02", ["2026-11-29", "05:02"]),
        ("/a/long/path/to/copy is", ["/a/long/path/to/copy", "is"]),
    ],
)
def test_a_number_keeps_its_unit_and_a_long_word_stays_whole(text: str, lines: list[str]) -> None:
    assert fold(text, 10).split("\n") == lines


def test_a_table_loses_no_more_columns_than_it_must() -> None:
    columns = [Column(name, [name * 20]) for name in "abcd"]
    assert lay_out(columns, 70, ["d", "c", "b"])[1] == ["d"]
    assert lay_out(columns, 50, ["d", "c", "b"])[1] == ["c", "d"]
