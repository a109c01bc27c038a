"""Which closer looks calibration keeps, by tallies of what each input took and answered."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.artifacts.choice import MAX_LOOKS, Choice
from isthmus.artifacts.fidelity import Entry
from isthmus.artifacts.fidelity_document import from_json, to_json
from isthmus_tools.calibration.closer_looks import QUALITY_STEP, look_entries, with_looks
from isthmus_tools.calibration.scoring import Tally
from support.fidelities import FIDELITY, of


def tally(rows: list[tuple[bool, int, int, float, float]]) -> Tally:
    """Of (same, bytes, bytes of the frame, margin, moved) for each input."""
    made = Tally()
    for n, (same, size, frame_bytes, clear, moved) in enumerate(rows):
        made.add(str(n), same, size, 100, 0.0 if same else math.inf)
        made.encode_s.append(size / 2**10)
        made.decode_s.append(size / 2**11)
        made.frame_bytes.append(frame_bytes)
        made.margins.append(clear)
        made.shifts.append(moved)
    return made


def tried(*each: tuple[float, Tally]) -> tuple[list[tuple[Choice, Tally]], list[Entry]]:
    """Qualities of transform/4 with their tallies, and their entries, with int8 beside them."""
    made = [(of(quality), t) for quality, t in each]
    made.append((Choice("int8/1"), tally([(True, 1000, 1000, 1.0, 0.0)] * len(each[0][1].bytes))))
    return made, [t.entry("6", c, 0.9) for c, t in made]


ROWS = st.tuples(
    st.booleans(),
    st.integers(1, 3000),
    st.integers(1, 1500),
    st.floats(0, 3) | st.just(math.inf),
    st.floats(0, 3) | st.just(math.nan),
)
TRIED = st.lists(st.lists(ROWS, min_size=6, max_size=6), min_size=5, max_size=5)
SPREAD = (0.1, 0.3, 0.5, 0.7, 0.9)


@settings(max_examples=50)
@given(TRIED)
def test_every_input_takes_the_looks_that_its_answers_ask_for(rows: list[Any]) -> None:
    alone = {q: tally(each) for q, each in zip(SPREAD, rows, strict=True)}
    made = with_looks([(of(q), t) for q, t in alone.items()])
    assert len({choice for choice, _, _ in made}) == len(made)
    for choice, both, shares in made:
        assert choice.is_valid()
        assert 0 < len(choice.looks) == len(shares) <= MAX_LOOKS
        assert [look.quality for look in choice.looks] == [
            pytest.approx(choice.quality + QUALITY_STEP * (n + 1)) for n in range(len(choice.looks))
        ]
        took = [0] * len(shares)
        for n in range(6):
            at, first = choice.quality, alone[choice.quality]
            size, encode_s, decode_s = first.bytes[n], first.encode_s[n], first.decode_s[n]
            for i, look in enumerate(choice.looks):
                if alone[at].margins[n] >= look.margin:
                    break
                took[i] += 1
                at, finer = look.quality, alone[look.quality]
                size += finer.frame_bytes[n]
                encode_s += finer.encode_s[n]
                decode_s += finer.decode_s[n]
            assert (both.bytes[n], both.encode_s[n], both.decode_s[n]) == (size, encode_s, decode_s)
            assert (both.same[n], both.errors[n]) == (alone[at].same[n], alone[at].errors[n])
        assert shares == tuple(count / 6 for count in took)


@settings(max_examples=50)
@given(TRIED)
def test_no_closer_looks_are_kept_that_something_beats_and_none_is_dropped_that_nothing_does(rows: list[Any]) -> None:
    made, plain = tried(*zip(SPREAD, map(tally, rows), strict=True))
    found = {e.choice: e for e in look_entries("6", made, plain, 0.9)}
    of_quality = {e.choice: e.agreement for e in plain}
    known = {c: (statistics.fmean(t.bytes), of_quality[c]) for c, t in made}
    chains = {choice: (t, shares) for choice, t, shares in with_looks(made[:-1]) if all(shares)}
    for choice, (both, _) in chains.items():
        kept = min(round(both.agreement, 6), of_quality[choice.last])
        known[choice] = (statistics.fmean(both.bytes), kept)
    for choice, entry in found.items():
        assert Choice.parse(str(choice)) == choice
        assert (entry.agreement, entry.offered) == (known[choice][1], entry.agreement >= 0.9)
        assert entry.agreement <= of_quality[choice.last]
        assert entry.shares == pytest.approx(chains[choice][1], abs=1e-6)
        assert list(entry.shares) == sorted(entry.shares, reverse=True)
        assert entry.shares[-1] > 0
    for choice in chains:
        size, kept = known[choice]
        others = [known[other] for other in known if other != choice]
        beaten = any((n <= size and a >= kept) and (n, a) != (size, kept) for n, a in others)
        alike = (size, kept) in others
        assert (choice in found) != beaten or alike
        assert not (beaten and choice in found)
    document = replace(FIDELITY, entries=(*plain, *found.values()))
    assert from_json(to_json(document)) == document


def test_those_that_no_input_took_are_none_however_sizes_are_spread() -> None:
    """Means lie far below the median here, so that the first quality looks smaller with a look than without."""
    sure = tally([(True, 10, 10, 9.0, 0.1)] * 4 + [(True, 1000, 1000, 9.0, 0.1)] * 6)
    finer = tally([(True, 2000, 1500, 9.0, 0.1)] * 10)
    made, plain = tried((0.3, sure), (0.5, finer))
    assert len(with_looks(made[:-1])) == 1
    assert look_entries("6", made, plain, 0.9) == []
    fallen = replace(plain[0], agreement=0.9)  # as its neighbours' bad luck may have it
    assert look_entries("6", made, [fallen, *plain[1:]], 0.9) == []


def test_a_last_look_that_no_input_took_is_left_out() -> None:
    at_the_margin = [(True, 10, 10, 0.1, 0.1)]  # which is not below it
    coarse = tally([(False, 10, 10, 0.05, 0.1)] * 2 + at_the_margin + [(True, 10, 10, 9.0, 0.1)] * 7)
    finer = tally([(True, 100, 90, 9.0, 0.1)] * 10)
    finest = tally([(True, 1000, 900, 9.0, 0.1)] * 10)
    made, plain = tried((0.3, coarse), (0.5, finer), (0.7, finest))
    (found,) = look_entries("6", made, plain, 0.9)
    assert (str(found.choice), found.shares, found.bytes) == ("transform/4@0.3+0.5:0.1", (0.2,), 28)
    # Nor does the finest quality vouch for answers that were never sent at it.
    fallen = [replace(e, agreement=0.9) if e.quality == 0.5 else e for e in plain]
    assert [(e.choice, e.agreement) for e in look_entries("6", made, fallen, 0.9)] == [(found.choice, 0.9)]


def test_means_say_which_takes_fewer_bytes() -> None:
    """Half of the finer tensors are far smaller than the others, so that the median of all is, too."""
    coarse = tally([(False, 10, 10, 0.05, 0.1)] * 6 + [(True, 10, 10, 1.0, 0.1)] * 4)
    finer = tally([(True, 1, 1, 1.0, 0.1)] * 6 + [(True, 900, 900, 1.0, 0.1)] * 4)
    made, plain = tried((0.3, coarse), (0.5, finer))
    (found,) = look_entries("6", made, plain, 0.9)
    assert (found.bytes, found.agreement, found.shares) == (11, 1.0, (0.6,))
    assert found.bytes > next(e.bytes for e in plain if e.quality == 0.5)


def test_no_looks_keep_more_than_their_last_quality_does() -> None:
    """Here the answers that changed at the finer quality are among those that count as sure."""
    coarse = tally([(False, 10, 10, 0.05, 0.1)] * 2 + [(True, 10, 10, 9.0, 0.1)] * 8)
    finer = tally([(True, 100, 90, 9.0, 0.1)] * 9 + [(False, 100, 90, 9.0, 0.1)])
    made, plain = tried((0.3, coarse), (0.5, finer))
    (found,) = look_entries("6", made, plain, 0.95)
    assert (found.measured, found.agreement, found.offered) == (1.0, 0.9, False)
    raised = [replace(e, agreement=0.97) if e.quality == 0.5 else e for e in plain]
    assert [e.agreement for e in look_entries("6", made, raised, 0.95)] == [0.97]


@pytest.mark.parametrize("moved", [0.0, 5e-324, 1e-7, math.nan, math.inf, 5000.0, 1e308])
def test_moves_that_give_no_margin_that_a_setting_could_say_give_no_closer_look(moved: float) -> None:
    coarse, finer = tally([(False, 10, 10, 0.0, moved)] * 4), tally([(True, 20, 15, 1.0, 0.1)] * 4)
    made, plain = tried((0.3, coarse), (0.5, finer))
    assert look_entries("6", made, plain, 0.9) == []


def test_where_nobody_asked_for_margins_there_are_no_closer_looks() -> None:
    made, plain = tried(*((q, tally([(True, 10, 5, 0.0, 1.0)] * 4)) for q in (0.3, 0.5)))
    for _, each in made:
        each.margins.clear()
        each.shifts.clear()
    assert look_entries("6", made, plain, 0.9) == []
    assert with_looks([]) == []


def test_qualities_too_near_or_too_far_do_not_follow() -> None:
    unclear, clear = tally([(False, 10, 10, 0.05, 0.1)] * 4), tally([(True, 20, 15, 1.0, 0.1)] * 4)
    for second, looks in ((0.35, 0), (0.49, 0), (0.5, 1), (0.51, 0), (0.7, 0), (0.1, 1)):
        assert len(with_looks([(of(0.3), unclear), (of(second), clear)])) == looks


@pytest.mark.parametrize("around", [0.123456, 1.0, 87.6, 0.141, 9.996, 0.000999912, 999.2, 1000.0, 2.5e-6])
def test_a_margin_has_three_digits_and_is_never_below_what_it_stands_for(around: float) -> None:
    for exact in (math.nextafter(around, 0), around, math.nextafter(around, 1000)):
        each = [(True, 10, 10, 0.05, exact)] * 4
        ((choice, _, _),) = with_looks([(of(0.3), tally(each)), (of(0.5), tally(each))])
        (look,) = choice.looks
        assert exact <= look.margin <= 1.01 * exact
        assert look.margin == float(f"{look.margin:.3g}")
        assert Choice.parse(str(choice)) == choice
        if float(f"{exact:.3g}") == exact:
            assert look.margin == exact
