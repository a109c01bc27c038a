"""A second look: what it is called, which answers are clear, and which pairs of qualities calibration keeps."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles import Published, cache_of, photo, photo_array, publish_photos, segment_settings
from isthmus.calibration.agreement import Measure, margin_of, measure_for
from isthmus.calibration.choice import GRADED, RAW, Again, Choice
from isthmus.calibration.crossing import crossing
from isthmus.calibration.fidelity import Entry, Fidelity, Inputs, choose, offered
from isthmus.calibration.fidelity_document import from_json, to_json
from isthmus.calibration.inputs import Example
from isthmus.calibration.ladder import ladder
from isthmus.calibration.running import runs_here
from isthmus.calibration.scoring import Tally, judge_by, score, trials
from isthmus.calibration.second_look import QUANTILE, asked_again, entries_of, second_looks
from isthmus.errors import CalibrationError
from isthmus.planner.planning.usable import short_name, usable_codecs

TWICE = Choice("transform/1", 0.4, Again(0.8, 0.2))


# What it is called


@given(
    st.sampled_from(sorted(GRADED)),
    st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True).map(sorted),
    st.integers(1, 999),
    st.integers(-9, 0),
)
def test_a_choice_with_a_second_look_reads_as_it_is_written(
    codec: str, qualities: list[int], digits: int, exponent: int
) -> None:
    first, second = (q / 1000 for q in qualities)
    made = Choice(codec, first, Again(second, float(f"{digits}e{exponent}")))
    assert Choice.parse(str(made)) == made
    assert str(made.once) == str(made).partition("+")[0]
    assert made.once.once == made.once == Choice(codec, first)


def test_it_is_written_as_the_documents_say() -> None:
    assert str(TWICE) == "transform/1@0.4+0.8:0.2"
    assert Choice.parse(" transform/1@0.4+0.8:0.2\n") == TWICE


@pytest.mark.parametrize(
    "text",
    [
        *(f"transform/1@0.4{rest}" for rest in ("+", "+:", "+0.8", "+0.8:", "+:0.2", "+0.8:0.2:0.3", "+0.8:0.2+0.9:1")),
        *(f"transform/1@0.4+{q}:0.2" for q in ("0.4", "0.3", "-1", "1.01", "nan", "inf", "", "fine")),
        *(f"transform/1@0.4+0.8:{m}" for m in ("0", "-0.2", "nan", "inf", "-inf", "1001", "wide", "0.2 nats", "0.2;")),
        *(f"{first}+0.8:0.2" for first in ("int8/1", "raw", "lossless/1", "transform/1", "transform/1@", "sparse/1@2")),
        "transform/1+0.8@0.4:0.2",
        "+0.8:0.2",
    ],
)
def test_what_is_no_second_look_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"second look is a higher quality|has a quality|is no codec") as e:
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
    assert Measure("top1", "y").margin(answer) == 2
    assert Measure("close").margin(answer) == math.inf


# Tallies


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("photos"))


def test_a_pairs_tally_is_that_of_sending_twice_by_hand(photos: Published, tmp_path: Path) -> None:
    at = crossing(photos.bundle, "6")
    run = runs_here(photos.digest, cache_of(photos, tmp_path), segment_settings(photos, tmp_path))
    examples = [Example(f"{n // 2}", {"x": photo_array(photo(seed=n))}) for n in range(40)]
    measure = measure_for(photos.bundle)
    coarse, fine = trials(at, [Choice("sparse/1", 0.1), Choice("sparse/1", 0.45)], {})
    judge = judge_by(measure)
    tallies = score(examples, 40, [at], {"6": [coarse, fine]}, run, judge, margin=measure.margin)
    one, other = tallies["6", coarse.name], tallies["6", fine.name]
    ((choice, both),) = second_looks([(coarse.choice, one), (fine.choice, other)])
    assert choice.once == coarse.choice
    assert choice.again is not None
    assert choice.again.quality == 0.45
    exact = float(np.quantile(one.moved, QUANTILE))
    assert exact <= choice.again.margin <= exact * 1.01
    asked = 0
    for n, example in enumerate(examples):
        crossed, early = at.before(run, example.arrays)
        expected = at.after(run, crossed, early)
        sent = coarse.send(crossed)
        answer = at.after(run, sent.tensors, early)
        size, pack_s, unpack_s = sent.bytes, one.pack_s[n], one.unpack_s[n]
        clear = margin_of(answer["logits"])
        changed = int(answer["logits"].argmax()) != int(expected["logits"].argmax())
        moved = abs(margin_of(expected["logits"]) - (-clear if changed else clear))
        assert (clear, moved) == pytest.approx((one.margins[n], one.moved[n]))
        if clear < choice.again.margin:
            asked += 1
            again = fine.send(crossed)
            answer = at.after(run, again.tensors, early)
            size, pack_s, unpack_s = size + again.bytes, pack_s + other.pack_s[n], unpack_s + other.unpack_s[n]
        assert (both.same[n], both.errors[n]) == judge(example, expected, answer)
        assert (both.bytes[n], both.pack_s[n], both.unpack_s[n]) == (size, pack_s, unpack_s)
    assert both.sources == one.sources
    assert asked == sum(asked_again(one, choice.again.margin))
    assert 0 < asked < 40
    entry = both.entry("6", choice, 0.9)
    assert (entry.bytes, entry.measured) == (round(statistics.fmean(both.bytes)), round(both.agreement, 6))
    assert entry.pack_ms == pytest.approx(1000 * statistics.fmean(both.pack_s), abs=1e-4)


def tally(rows: list[tuple[bool, int, float, float]]) -> Tally:
    """Of (same, bytes, margin, moved) for each input."""
    made = Tally()
    for n, (same, size, clear, moved) in enumerate(rows):
        made.add(str(n), same, size, 100, 0.0 if same else math.inf)
        made.pack_s.append(0.001)
        made.unpack_s.append(0.001)
        made.margins.append(clear)
        made.moved.append(moved)
    return made


def tried(*of: tuple[float, Tally]) -> tuple[list[tuple[Choice, Tally]], list[Entry]]:
    """Qualities of transform/1 with their tallies, and their entries, with int8 beside them."""
    made = [(Choice("transform/1", quality), t) for quality, t in of]
    made.append((Choice("int8/1"), tally([(True, 1000, 1.0, 0.0)] * len(of[0][1].bytes))))
    return made, [t.entry("6", c, 0.9) for c, t in made]


ROWS = st.tuples(
    st.booleans(), st.integers(1, 3000), st.floats(0, 3) | st.just(math.inf), st.floats(0, 3) | st.just(math.nan)
)


@settings(max_examples=50)
@given(st.lists(st.lists(ROWS, min_size=6, max_size=6), min_size=5, max_size=5))
def test_no_second_look_is_kept_that_something_beats(rows: list[Any]) -> None:
    made, plain = tried(*zip((0.1, 0.3, 0.45, 0.65, 1.0), map(tally, rows), strict=True))
    found = entries_of("6", made, plain, 0.9)
    means = [(statistics.fmean(t.bytes), e.agreement) for (_, t), e in zip(made, plain, strict=True)]
    pairs = dict(second_looks(made[:-1]))
    means += [(statistics.fmean(pairs[e.choice].bytes), e.agreement) for e in found]
    of_quality = {e.choice: e.agreement for e in plain}
    tallies = dict(made)
    for entry in found:
        choice = entry.choice
        assert choice.again is not None
        assert choice.again.quality > choice.quality
        assert Choice.parse(str(choice)) == choice
        assert entry.agreement <= of_quality[Choice(choice.codec, choice.again.quality)]
        assert entry.offered == (entry.agreement >= 0.9)
        share = statistics.fmean(asked_again(tallies[choice.once], choice.again.margin))
        assert 0 < entry.asked_again == pytest.approx(share, abs=1e-6)
        size = statistics.fmean(pairs[choice].bytes)
        assert not any(n < size and a >= entry.agreement for n, a in means)


def test_one_that_no_input_took_is_none_however_sizes_are_spread() -> None:
    """Means lie far below the median here, so that the first quality looks smaller with its pair than without."""
    sure = tally([(True, 10, 9.0, 0.1)] * 4 + [(True, 1000, 9.0, 0.1)] * 6)
    finer = tally([(True, 2000, 9.0, 0.1)] * 10)
    made, plain = tried((0.3, sure), (0.65, finer))
    assert len(second_looks(made[:-1])) == 1
    assert entries_of("6", made, plain, 0.9) == []
    fallen = replace(plain[0], agreement=0.9)  # as its neighbours' bad luck may have it
    assert entries_of("6", made, [fallen, *plain[1:]], 0.9) == []


def test_means_say_which_takes_fewer_bytes() -> None:
    """Half of the finer tensors are far smaller than the others, so that the median of all is, too."""
    coarse = tally([(False, 10, 0.05, 0.1)] * 6 + [(True, 10, 1.0, 0.1)] * 4)
    finer = tally([(True, 1, 1.0, 0.1)] * 6 + [(True, 900, 1.0, 0.1)] * 4)
    made, plain = tried((0.3, coarse), (0.65, finer))
    (found,) = entries_of("6", made, plain, 0.9)
    assert (found.bytes, found.agreement, found.asked_again) == (11, 1.0, 0.6)
    assert found.bytes > next(e.bytes for e in plain if e.quality == 0.65)


@pytest.mark.parametrize("moved", [0.0, 5e-324, 1e-7, math.nan, math.inf, 5000.0, 1e308])
def test_moves_that_give_no_margin_that_a_setting_could_say_give_no_second_look(moved: float) -> None:
    made, plain = tried((0.3, tally([(False, 10, 0.0, moved)] * 4)), (0.65, tally([(True, 20, 1.0, 0.1)] * 4)))
    assert entries_of("6", made, plain, 0.9) == []


def test_qualities_too_near_or_too_far_are_no_pair() -> None:
    unclear, clear = tally([(False, 10, 0.05, 0.1)] * 4), tally([(True, 20, 1.0, 0.1)] * 4)
    for second, pairs in ((0.35, 0), (0.5, 0), (0.6, 1), (0.7, 1), (0.8, 0)):
        assert (
            len(second_looks([(Choice("transform/1", 0.3), unclear), (Choice("transform/1", second), clear)])) == pairs
        )
    assert second_looks([]) == []


def test_a_margin_has_three_digits_and_is_never_below_what_it_stands_for() -> None:
    for exact in (0.123456, 1.0, 9.996, 0.000999912, 999.2, 2.5e-6):
        ((choice, _), *_) = second_looks(
            [
                (Choice("transform/1", 0.3), tally([(True, 10, 0.05, exact)] * 4)),
                (Choice("transform/1", 0.65), tally([(True, 20, 1.0, 0.1)] * 4)),
            ]
        )
        assert choice.again is not None
        assert exact <= choice.again.margin <= 1.01 * exact
        assert Choice.parse(str(choice)) == choice


# The fidelity document


def entry(quality: float, size: int, agreement: float, **more: Any) -> Entry:
    good = agreement >= 0.99
    return Entry("6", "transform/1", quality, agreement, 0.9, 1, 0.01, size, size, 2, 1, 1, 0, good, agreement, **more)


PAIR = entry(0.4, 300, 0.993, again_quality=0.8, again_margin=0.2, asked_again=0.25)
FIDELITY = Fidelity(
    "sha256:" + "0" * 64,
    0.99,
    Measure("top1", "logits"),
    Inputs("photos", 16, 100, 200),
    (entry(0.4, 200, 0.95), entry(0.6, 310, 0.991), entry(0.8, 400, 0.996), PAIR),
)


def test_targets_and_plans_find_a_second_look_where_it_is_the_smallest() -> None:
    assert next(e.choice for e in offered(FIDELITY, "6")) == PAIR.choice == TWICE
    assert choose(FIDELITY, "6", agreement=0.99) == PAIR
    assert choose(FIDELITY, "6", agreement=0.995).choice == Choice("transform/1", 0.8)
    with pytest.raises(CalibrationError, match=r"closest is transform/1@0\.4\+0\.8:0\.2: 99\.3%"):
        choose(FIDELITY, "6", agreement=0.999, bytes=305)


def changed(**changes: Any) -> bytes:
    doc = json.loads(to_json(FIDELITY))
    doc["entries"][-1] |= changes
    return json.dumps(doc).encode()


def test_a_document_from_before_second_looks_still_reads() -> None:
    doc = json.loads(to_json(FIDELITY))
    doc["entries"] = [{k: v for k, v in e.items() if "again" not in k} for e in doc["entries"][:-1]]
    assert from_json(json.dumps(doc).encode()) == replace(FIDELITY, entries=FIDELITY.entries[:-1])
    assert from_json(to_json(FIDELITY)) == FIDELITY


@pytest.mark.parametrize(
    "changes",
    [
        {"again_quality": 1.1},
        {"again_quality": 0.4},
        {"again_quality": "0.8"},
        {"again_quality": 0.0},
        {"again_margin": -0.1},
        {"again_margin": 0},
        {"again_margin": 1e9},
        {"again_margin": math.inf},
        {"again_margin": math.nan},
        {"again_margin": True},
        {"asked_again": 1.5},
        {"asked_again": None},
        {"asked_twice": 0.1},
        {"codec": "int8/1"},
        {"quality": 0.9},
    ],
)
def test_an_entry_that_is_no_second_look_is_refused(changes: dict[str, Any]) -> None:
    assert from_json(changed(asked_again=0.5)) != FIDELITY
    with pytest.raises(CalibrationError):
        from_json(changed(**changes))


# The guard's ladder


def test_the_ladder_goes_from_a_second_look_to_its_finer_quality_for_every_answer() -> None:
    rest = (Choice("int8/1"), Choice("half/1"), RAW)
    higher = [Choice("transform/1", q) for q in (0.8, 0.9, 1.0)]
    assert ladder(TWICE, "6", None) == (TWICE, *higher, *rest)
    assert ladder(replace(TWICE, again=Again(1.0, 0.2)), "6", None)[1:] == (Choice("transform/1", 1.0), *rest)
    measured = replace(FIDELITY, entries=(PAIR, replace(entry(1.0, 250, 0.98), codec="int8/1")))
    assert ladder(TWICE, "6", measured) == (TWICE, *higher, Choice("half/1"), RAW)


# What plans may use


def test_a_cut_offers_the_smallest_plain_quality_and_the_smallest_second_look() -> None:
    other = replace(PAIR, quality=0.5, bytes=305)
    found = usable_codecs(replace(FIDELITY, entries=(*FIDELITY.entries, other)), "6")
    assert found == (RAW, TWICE, Choice("transform/1", 0.6))
    assert [short_name(c) for c in found] == ["raw", "transform-40-80", "transform-60"]
