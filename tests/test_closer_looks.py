"""Closer looks: what they are called, which answers are clear, which of them targets choose, and the guard's ladder."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.artifacts.agreement import Measure
from isthmus.artifacts.choice import GRADED, MAX_LOOKS, MAX_MARGIN, RAW, Choice, Look
from isthmus.artifacts.fidelity import choose, offered
from isthmus.errors import CalibrationError
from isthmus.pipeline.agreement import margin, margin_of
from isthmus.routing.guard import fallback_chain
from support.closer_looks import FIDELITY, LOOKED, ONE, TWICE, TWO, entry, of

# What they are called


MARGINS = st.builds(lambda digits, exponent: float(f"{digits}e{exponent}"), st.integers(1, 999), st.integers(-9, 0))


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """Of a codec with qualities, which are thousandths, and as many looks as there may be."""
    qualities = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=MAX_LOOKS + 1, unique=True).map(sorted))
    first, *finer = (q / 1000 for q in qualities)
    return Choice(draw(st.sampled_from(sorted(GRADED))), first, tuple(Look(q, draw(MARGINS)) for q in finer))


@given(choices())
def test_a_choice_with_closer_looks_reads_as_it_is_written(choice: Choice) -> None:
    assert choice.is_valid()
    assert Choice.parse(str(choice)) == choice
    assert str(choice.once) == str(choice).partition("+")[0]
    assert choice.once.once == choice.once == Choice(choice.codec, choice.quality)
    finest = choice.looks[-1].quality if choice.looks else choice.quality
    assert choice.last.last == choice.last == Choice(choice.codec, finest)


def test_they_are_written_as_the_documents_say() -> None:
    assert str(ONE) == "transform/4@0.4+0.6:0.2"
    assert str(TWO) == "transform/4@0.2+0.4:1.5+0.6:0.7"
    assert Choice.parse(" transform/4@0.2+0.4:1.5+0.6:0.7\n") == TWO
    longer = Choice.parse("transform/4@0.12345678+0.4444444444:1.23456789")
    assert longer == Choice("transform/4", 0.123457, (Look(0.444444, 1.23457),)) == Choice.parse(str(longer))
    assert (Choice("int8/1").once, Choice("int8/1").last) == (Choice("int8/1"), Choice("int8/1"))
    assert Choice.parse(f"sparse/2@0+1:{MAX_MARGIN:g}").looks == (Look(1.0, MAX_MARGIN),)


@pytest.mark.parametrize(
    "text",
    [
        *(f"transform/4@0.4{rest}" for rest in ("+", "+:", "+0.8", "+0.8:", "+:0.2", "+0.8:0.2:0.3", "++0.8:0.2")),
        *(f"transform/4@0.4+0.8:0.2{rest}" for rest in ("+", "+0.9", "+0.8:0.1", "+0.6:0.1", "+1.1:1", "+0.9:0")),
        *(f"transform/4@0.4+{q}:0.2" for q in ("0.4", "0.3", "-1", "1.01", "nan", "inf", "", "fine")),
        *(f"transform/4@0.4+0.8:{m}" for m in ("0", "-0.2", "nan", "inf", "-inf", "1001", "wide", "0.2 nats", "0.2;")),
        *(f"{first}+0.8:0.2" for first in ("int8/1", "raw", "lossless/3", "transform/4", "transform/4@", "sparse/2@2")),
        *(f"{codec}@0.4+0.8:0.2" for codec in ("int8/1", "layers/2", "photo/1", "transform/1", "transform")),
        "transform/4@0" + "".join(f"+{(n + 1) / 10}:1" for n in range(MAX_LOOKS + 1)),
        "transform/4+0.8@0.4:0.2",
        "+0.8:0.2",
        "layers/2",
    ],
)
def test_what_are_no_closer_looks_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"closer look is a higher quality|has a quality|is no codec") as e:
        Choice.parse(text)
    assert len(str(e.value)) < 300


# How clear an answer is


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=9))
def test_log_odds_and_probabilities_give_the_same_nats(scores: list[float]) -> None:
    odds = np.array([scores], np.float32)
    shares = np.exp(odds.astype(np.float64))
    shares /= shares.sum()
    top, second = sorted(scores)[:-3:-1]
    assert margin_of(odds) == pytest.approx(top - second, abs=1e-6)
    assert margin_of(shares) == pytest.approx(top - second, abs=1e-6)
    assert margin_of(shares.astype(np.float32)) == pytest.approx(top - second, abs=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int32])
def test_every_dtype_of_scores_has_a_margin(dtype: Any) -> None:
    assert margin_of(np.array([[1, 4, 9]], dtype)) == 5


@pytest.mark.parametrize(
    ("scores", "margin"),
    [
        ([[3.0, 1.0], [5.0, 4.5], [0.0, 9.0]], 0.5),
        ([[[[3.0]], [[1.0]]]], 2.0),
        ([[[3.0, 1.0], [5.0, 4.5]]], 0.5),
        ([3.0, 1.0], 2.0),
        ([2.0, 2.0, 1.0], 0.0),
        ([[math.nan, 1.0, 2.0]], 0.0),
        ([[3.0, 1.0], [math.nan, math.nan]], 0.0),
        ([[math.inf, math.inf, 1.0]], 0.0),
        ([[-math.inf, -math.inf]], 0.0),
        ([[math.inf, 1.0]], math.inf),
        ([[0.0, -math.inf]], math.inf),
        ([[1.0, 0.0]], -math.log(1e-12)),
        ([[7.0], [8.0]], math.inf),
        (7.0, math.inf),
        ([], math.inf),
        ([[], []], math.inf),
    ],
)
def test_the_margin_is_that_of_the_least_clear_row(scores: Any, margin: float) -> None:
    assert margin_of(np.array(scores)) == pytest.approx(margin)
    assert margin_of(np.zeros((0, 5))) == math.inf


def test_only_classes_have_a_margin() -> None:
    answer = {"y": np.array([[1.0, 3.0]]), "z": np.array([[1.0, 9.0]])}
    assert margin(Measure("top1", "y"), answer) == 2
    assert margin(Measure("close"), answer) == math.inf


# Which of them targets choose


def test_targets_and_plans_find_closer_looks_where_they_are_the_smallest() -> None:
    assert next(e.choice for e in offered(FIDELITY, "6")) == LOOKED.choice == ONE
    assert choose(FIDELITY, "6", agreement=0.99) == LOOKED
    assert choose(FIDELITY, "6", agreement=0.98) == TWICE
    assert TWICE.choice == TWO
    assert choose(FIDELITY, "6", agreement=0.995).choice == of(0.8)
    with pytest.raises(CalibrationError, match=r"closest is transform/4@0\.4\+0\.6:0\.2: 99\.3%"):
        choose(FIDELITY, "6", agreement=0.999, bytes=305)


# The guard's ladder


def test_the_ladder_goes_from_closer_looks_to_the_last_quality_for_every_answer() -> None:
    rest = (Choice("int8/1"), Choice("half/1"), RAW)
    higher = tuple(map(of, (0.6, 0.8, 1.0)))
    assert fallback_chain(ONE, "6", None) == (ONE, *higher, *rest)
    assert fallback_chain(TWO, "6", None) == (TWO, *higher, *rest)
    to_the_end = replace(ONE, looks=(Look(0.6, 0.2), Look(1.0, 0.2)))
    assert fallback_chain(to_the_end, "6", None) == (to_the_end, of(1.0), *rest)
    measured = replace(FIDELITY, entries=(LOOKED, replace(entry(1.0, 250, 0.98), codec="int8/1")))
    assert fallback_chain(ONE, "6", measured) == (ONE, *higher, Choice("half/1"), RAW)


@given(choices())
def test_every_ladder_starts_with_what_is_sent_and_its_last_quality_and_ends_raw(choice: Choice) -> None:
    steps = fallback_chain(choice, "6", None)
    assert steps[0] == choice
    assert not choice.looks or steps[1] == choice.last
    assert steps[-1] == RAW
    assert len(set(steps)) == len(steps)
    qualities = [step.quality for step in steps[1:] if step.codec == choice.codec]
    assert qualities == sorted(qualities)
