"""Choices with closer looks, and a fidelity document that offers them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from isthmus.artifacts.choice import GRADED, MAX_LOOKS, Choice, Look
from isthmus.artifacts.fidelity import Entry, Fidelity, Inputs, Measure

ONE = Choice("transform/4", 0.4, (Look(0.6, 0.2),))
TWO = Choice("transform/4", 0.2, (Look(0.4, 1.5), Look(0.6, 0.7)))


def of(quality: float) -> Choice:
    return Choice("transform/4", quality)


def entry(quality: float, size: int, agreement: float, **more: Any) -> Entry:
    good = agreement >= 0.99
    times = (2.0, 1.0, 1.0, 0.0)
    return Entry("6", "transform/4", quality, agreement, 0.9, 1.0, 0.01, size, size, *times, good, agreement, **more)


LOOKED = entry(0.4, 300, 0.993, looks=ONE.looks, shares=(0.25,))
TWICE = entry(0.2, 280, 0.98, looks=TWO.looks, shares=(0.4, 0.1))
FIDELITY = Fidelity(
    "sha256:" + "0" * 64,
    0.99,
    Measure("top1", "logits"),
    Inputs("photos", 16, 100, 200),
    (entry(0.4, 200, 0.95), entry(0.6, 310, 0.994), entry(0.8, 400, 0.996), TWICE, LOOKED),
)

MARGINS = st.builds(lambda digits, exponent: float(f"{digits}e{exponent}"), st.integers(1, 999), st.integers(-9, 0))


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """Of a codec with qualities, which are thousandths, and as many looks as there may be."""
    qualities = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=MAX_LOOKS + 1, unique=True).map(sorted))
    first, *finer = (q / 1000 for q in qualities)
    return Choice(draw(st.sampled_from(sorted(GRADED))), first, tuple(Look(q, draw(MARGINS)) for q in finer))
