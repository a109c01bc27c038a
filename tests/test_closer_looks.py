"""Closer looks: how choices write them, and which of them targets choose."""

from __future__ import annotations

import pytest
from hypothesis import given

from isthmus.artifacts.choice import MAX_LOOKS, MAX_MARGIN, Choice, Look
from isthmus.artifacts.fidelity import choose, offered
from isthmus.errors import CalibrationError
from support.closer_looks import FIDELITY, LOOKED, ONE, TWICE, TWO, choices, of

# What they are called


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


# Which of them targets choose


def test_targets_and_plans_find_closer_looks_where_they_are_the_smallest() -> None:
    assert next(e.choice for e in offered(FIDELITY, "6")) == LOOKED.choice == ONE
    assert choose(FIDELITY, "6", agreement=0.99) == LOOKED
    assert choose(FIDELITY, "6", agreement=0.98) == TWICE
    assert TWICE.choice == TWO
    assert choose(FIDELITY, "6", agreement=0.995).choice == of(0.8)
    with pytest.raises(CalibrationError, match=r"closest is transform/4@0\.4\+0\.6:0\.2: 99\.3%"):
        choose(FIDELITY, "6", agreement=0.999, bytes=305)
