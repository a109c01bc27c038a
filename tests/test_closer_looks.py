"""Closer looks: what they are called, which answers are clear, what they cost, and which of them calibration keeps."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles import Published, cache_of, photo, photo_array, publish_photos, segment_settings
from isthmus.bundle import TensorSpec
from isthmus.calibration.agreement import Measure, margin_of, measure_for
from isthmus.calibration.calibrate import QUALITIES
from isthmus.calibration.choice import GRADED, MAX_LOOKS, RAW, WIDEST_MARGIN, Choice, Look
from isthmus.calibration.crossing import Crossing, crossing
from isthmus.calibration.fidelity import Entry, Fidelity, Inputs, choose, offered
from isthmus.calibration.fidelity_document import from_json, to_json
from isthmus.calibration.inputs import Example
from isthmus.calibration.ladder import ladder
from isthmus.calibration.learn import STEPS, learn
from isthmus.calibration.looks import MOST, QUANTILE, entries_of, with_looks
from isthmus.calibration.rows import Form, Rows, learn_rows
from isthmus.calibration.running import runs_here
from isthmus.calibration.scoring import Tally, judge_by, score
from isthmus.calibration.sending import FINER_BY, Trial, finer_than, trials
from isthmus.codecs import Packed, find, pack
from isthmus.codecs.layers import Basis, Held, follow, layered, trail_of
from isthmus.codecs.planes import Layout
from isthmus.codecs.steps import THIRD, step_of
from isthmus.errors import CalibrationError
from isthmus.frame import Frame, encode
from isthmus.runners import Array

ONE = Choice("transform/3", 0.4, (Look(0.6, 0.2),))
TWO = Choice("transform/3", 0.2, (Look(0.4, 1.5), Look(0.6, 0.7)))


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
    assert str(ONE) == "transform/3@0.4+0.6:0.2"
    assert str(TWO) == "transform/3@0.2+0.4:1.5+0.6:0.7"
    assert Choice.parse(" transform/3@0.2+0.4:1.5+0.6:0.7\n") == TWO
    longer = Choice.parse("transform/3@0.12345678+0.4444444444:1.23456789")
    assert longer == Choice("transform/3", 0.123457, (Look(0.444444, 1.23457),)) == Choice.parse(str(longer))
    assert (Choice("int8/1").once, Choice("int8/1").last) == (Choice("int8/1"), Choice("int8/1"))
    assert Choice.parse(f"sparse/1@0+1:{WIDEST_MARGIN:g}").looks == (Look(1.0, WIDEST_MARGIN),)


@pytest.mark.parametrize(
    "text",
    [
        *(f"transform/3@0.4{rest}" for rest in ("+", "+:", "+0.8", "+0.8:", "+:0.2", "+0.8:0.2:0.3", "++0.8:0.2")),
        *(f"transform/3@0.4+0.8:0.2{rest}" for rest in ("+", "+0.9", "+0.8:0.1", "+0.6:0.1", "+1.1:1", "+0.9:0")),
        *(f"transform/3@0.4+{q}:0.2" for q in ("0.4", "0.3", "-1", "1.01", "nan", "inf", "", "fine")),
        *(f"transform/3@0.4+0.8:{m}" for m in ("0", "-0.2", "nan", "inf", "-inf", "1001", "wide", "0.2 nats", "0.2;")),
        *(f"{first}+0.8:0.2" for first in ("int8/1", "raw", "lossless/2", "transform/3", "transform/3@", "sparse/1@2")),
        *(f"{codec}@0.4+0.8:0.2" for codec in ("int8/1", "layers/1", "photo/1", "transform/1", "transform")),
        "transform/3@0" + "".join(f"+{(n + 1) / 10}:1" for n in range(MAX_LOOKS + 1)),
        "transform/3+0.8@0.4:0.2",
        "+0.8:0.2",
        "layers/1",
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
    assert Measure("top1", "y").margin(answer) == 2
    assert Measure("close").margin(answer) == math.inf


# Ways to send

GENERATOR = np.random.default_rng(0)
MIXED = GENERATOR.normal(size=(6, 6))


def maps(seed: int, size: int = 12) -> Array:
    rng = np.random.default_rng([7, seed])
    smooth = np.cumsum(np.cumsum(rng.normal(size=(1, size, size, 6)), axis=1), axis=2) @ MIXED
    return np.ascontiguousarray(smooth.transpose(0, 3, 1, 2), np.float32)


def tokens(seed: int) -> Array:
    return np.random.default_rng([8, seed]).normal(size=(1, 9, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def tables() -> Mapping[str, object]:
    rows = Rows.of([tokens(n) for n in range(40)])
    return {
        "maps": learn([maps(n) for n in range(20)], layout=Layout(4, 1)),
        "tokens": learn_rows(rows, Form(1, rotated=True), None, STEPS),
    }


SPECS = (
    TensorSpec("maps", "float32", (1, 6, 12, 12)),
    TensorSpec("tokens", "float32", (1, 9, 6)),
    TensorSpec("mask", "float32", (1, 9)),
    TensorSpec("ids", "int64", (1, 40)),
)
AT = Crossing("6", (), (), SPECS, ("y",))


def crossed(seed: int = 99) -> dict[str, Array]:
    ids = np.arange(40, dtype=np.int64)[None] * 7
    return {"maps": maps(seed), "tokens": tokens(seed), "mask": np.ones((1, 9), np.float32), "ids": ids}


class Shelf(dict[bytes, Held]):
    """Where a hop keeps what may be refined."""

    def keep(self, held: Held) -> None:
        self[held.key] = held

    def find(self, key: bytes) -> Held | None:
        return self.get(key)


def unpacked(packed: Packed, basis: Basis) -> Array:
    """As the hop does it that keeps what it was sent."""
    dtype = np.dtype(packed.dtype)
    return find(packed.codec).decode(memoryview(packed.payload), dtype, packed.shape, basis)


def tried_at(qualities: list[float], tables: Mapping[str, object]) -> list[Trial]:
    return trials(AT, [*(Choice("transform/3", q) for q in qualities), Choice("int8/1")], tables)


def frame_of(trial: Trial, arrays: Mapping[str, Array], **refined: Packed) -> int:
    """Bytes of the frame of a closer look, these tensors in it refined."""
    packed = {n: p for n, a in arrays.items() if isinstance(p := pack(a, trial.packings[n]), Packed)} | refined
    rest = {name: array for name, array in arrays.items() if name not in packed}
    return len(encode(Frame(rest, "sha256:" + "0" * 64, trial.segment, "0" * 36, packed)))


def test_a_closer_look_costs_the_refinement_of_what_can_be_refined_and_the_rest_whole(
    tables: Mapping[str, object],
) -> None:
    first, second, other = tried_at([0.3, 0.5], tables)
    assert (set(first.coarser), set(second.coarser), set(other.coarser)) == (set(), {"maps", "tokens"}, set())
    arrays = crossed()
    sent = second.send(arrays)
    coarse = pack(arrays["maps"], layered(first.packings["maps"]))
    assert isinstance(coarse, Packed)
    made, _ = follow(trail_of(coarse, "", "maps"), second.packings["maps"])
    whole = {name: pack(array, second.packings[name]).nbytes for name, array in arrays.items()}
    assert sent.cost.bytes == sum(whole.values())
    assert sent.closer.bytes == frame_of(second, arrays, maps=made)
    assert made.nbytes < whole["maps"]
    basis = Basis(tables["maps"], Shelf(), "", "maps")
    assert np.array_equal(unpacked(coarse, basis), first.send(arrays).tensors["maps"])
    assert np.array_equal(unpacked(made, basis), sent.tensors["maps"])
    assert sent.tensors["ids"].tolist() == arrays["ids"].tolist()
    for trial in (first, other):
        assert trial.send(arrays).closer.bytes == frame_of(trial, arrays)


@pytest.mark.parametrize("value", [np.nan, 3e38, 1e6])
def test_what_was_not_packed_coarsely_takes_a_closer_look_whole(value: float, tables: Mapping[str, object]) -> None:
    *_, second = tried_at([0.3, 0.5], tables)[:2]
    arrays = crossed()
    arrays["maps"] = arrays["maps"] + np.float32(value)
    sent = second.send(arrays)
    assert sent.fell_back
    assert sent.closer.bytes == frame_of(second, arrays) > sent.cost.bytes > arrays["maps"].nbytes
    assert np.array_equal(sent.tensors["maps"], arrays["maps"], equal_nan=True)


def test_only_a_fixed_factor_finer_is_a_closer_look(tables: Mapping[str, object]) -> None:
    made = tried_at([0.3, 0.45, 0.6], tables)
    assert not any(trial.coarser for trial in made)
    others = [Choice("sparse/1", 0.5), Choice("transform/3", 0.4), Choice("transform/3", 0.5), RAW]
    assert finer_than(Choice("transform/3", 0.3), others) == Choice("transform/3", 0.5)
    assert finer_than(Choice("transform/3", 0.35), others) is None
    assert finer_than(Choice("transform/3", 1.0), others) is None


def test_what_calibration_tries_is_followed_by_exactly_a_third_of_the_step() -> None:
    every = [Choice("transform/3", q) for q in QUALITIES]
    followed = 0
    for by in range(-40, 41):
        steps = (STEPS[0] + by, STEPS[1] + by)
        for choice in every:
            if (finer := finer_than(choice, every)) is not None:
                assert step_of(choice.quality, steps) - step_of(finer.quality, steps) == THIRD
                followed += 1
    assert followed == 81 * sum(q <= 1 - FINER_BY + 1e-6 for q in QUALITIES)
    assert 0 < MOST <= MAX_LOOKS


# Tallies


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("photos"))


def test_a_chains_tally_is_that_of_sending_look_by_look_by_hand(photos: Published, tmp_path: Path) -> None:
    at = crossing(photos.bundle, "6")
    run = runs_here(photos.digest, cache_of(photos, tmp_path), segment_settings(photos, tmp_path))
    examples = [Example(f"{n // 2}", {"x": photo_array(photo(seed=n))}) for n in range(40)]
    table = learn([at.before(run, {"x": photo_array(photo(seed=n))})[0]["p6"] for n in range(40, 80)])
    measure = measure_for(photos.bundle)
    by_quality = {t.choice.quality: t for t in trials(at, [*map(of, (0.1, 0.3, 0.5, 0.7))], {"p6": table})}
    judge = judge_by(measure)
    tallies = score(examples, 40, [at], {"6": [*by_quality.values()]}, run, judge, margin=measure.margin)
    alone = {q: tallies["6", t.name] for q, t in by_quality.items()}
    made = with_looks([(of(q), tally) for q, tally in alone.items()])
    assert {tuple(look.quality for look in choice.looks) for choice, _, _ in made} >= {(0.3,), (0.5,)}
    for choice, tally, shares in made:
        at_each = [choice.quality, *(look.quality for look in choice.looks)]
        for quality, look in zip(at_each, choice.looks, strict=False):
            exact = float(np.quantile(alone[quality].moved, QUANTILE))
            assert exact <= look.margin <= exact * 1.01
        took = [0] * len(choice.looks)
        for n, example in enumerate(examples):
            crossed, early = at.before(run, example.arrays)
            expected = at.after(run, crossed, early)
            array = crossed["p6"]
            packed = pack(array, layered(by_quality[choice.quality].packings["p6"]))
            assert isinstance(packed, Packed)
            trail = trail_of(packed, photos.digest, "p6")
            basis = Basis(table, Shelf(), photos.digest, "p6")
            arrived = unpacked(packed, basis)
            assert np.array_equal(arrived, by_quality[choice.quality].send(crossed).tensors["p6"])
            first = alone[choice.quality]
            size, pack_s, unpack_s = packed.nbytes, first.pack_s[n], first.unpack_s[n]
            answer = at.after(run, {"p6": arrived}, early)
            clear = margin_of(answer["logits"])
            changed = int(answer["logits"].argmax()) != int(expected["logits"].argmax())
            moved = abs(margin_of(expected["logits"]) - (-clear if changed else clear))
            assert (clear, moved) == pytest.approx((first.margins[n], first.moved[n]))
            for i, look in enumerate(choice.looks):
                if margin_of(answer["logits"]) >= look.margin:
                    break
                took[i] += 1
                packed, trail = follow(trail, by_quality[look.quality].packings["p6"])
                size += len(encode(Frame({}, photos.digest, "6..", "0" * 36, {"p6": packed})))
                answer = at.after(run, {"p6": unpacked(packed, basis)}, early)
                pack_s += alone[look.quality].closer_pack_s[n]
                unpack_s += alone[look.quality].closer_unpack_s[n]
            assert (tally.same[n], tally.errors[n]) == judge(example, expected, answer)
            assert (tally.pack_s[n], tally.unpack_s[n]) == (pack_s, unpack_s)
            assert tally.bytes[n] == size
        assert shares == tuple(count / 40 for count in took)
        assert tally.sources == first.sources
        entry = tally.entry("6", choice, 0.9)
        assert (entry.bytes, entry.measured) == (round(statistics.fmean(tally.bytes)), round(tally.agreement, 6))
        assert entry.pack_ms == pytest.approx(1000 * statistics.fmean(tally.pack_s), abs=1e-4)
        assert entry.choice == choice


def of(quality: float) -> Choice:
    return Choice("transform/3", quality)


def tally(rows: list[tuple[bool, int, int, float, float]]) -> Tally:
    """Of (same, bytes, bytes as a closer look, margin, moved) for each input."""
    made = Tally()
    for n, (same, size, closer, clear, moved) in enumerate(rows):
        made.add(str(n), same, size, 100, 0.0 if same else math.inf)
        made.pack_s.append(size / 2**10)
        made.unpack_s.append(size / 2**11)
        made.closer.append(closer)
        made.closer_pack_s.append(closer / 2**12)
        made.closer_unpack_s.append(closer / 2**13)
        made.margins.append(clear)
        made.moved.append(moved)
    return made


def tried(*each: tuple[float, Tally]) -> tuple[list[tuple[Choice, Tally]], list[Entry]]:
    """Qualities of transform/3 with their tallies, and their entries, with int8 beside them."""
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
        assert 0 < len(choice.looks) == len(shares) <= MOST
        assert [look.quality for look in choice.looks] == [
            pytest.approx(choice.quality + FINER_BY * (n + 1)) for n in range(len(choice.looks))
        ]
        took = [0] * len(shares)
        for n in range(6):
            at, first = choice.quality, alone[choice.quality]
            size, pack_s, unpack_s = first.bytes[n], first.pack_s[n], first.unpack_s[n]
            for i, look in enumerate(choice.looks):
                if alone[at].margins[n] >= look.margin:
                    break
                took[i] += 1
                at, finer = look.quality, alone[look.quality]
                size += finer.closer[n]
                pack_s += finer.closer_pack_s[n]
                unpack_s += finer.closer_unpack_s[n]
            assert (both.bytes[n], both.pack_s[n], both.unpack_s[n]) == (size, pack_s, unpack_s)
            assert (both.same[n], both.errors[n]) == (alone[at].same[n], alone[at].errors[n])
        assert shares == tuple(count / 6 for count in took)


@settings(max_examples=50)
@given(TRIED)
def test_no_closer_looks_are_kept_that_something_beats_and_none_is_dropped_that_nothing_does(rows: list[Any]) -> None:
    made, plain = tried(*zip(SPREAD, map(tally, rows), strict=True))
    found = {e.choice: e for e in entries_of("6", made, plain, 0.9)}
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
    assert entries_of("6", made, plain, 0.9) == []
    fallen = replace(plain[0], agreement=0.9)  # as its neighbours' bad luck may have it
    assert entries_of("6", made, [fallen, *plain[1:]], 0.9) == []


def test_a_last_look_that_no_input_took_is_left_out() -> None:
    at_the_margin = [(True, 10, 10, 0.1, 0.1)]  # which is not below it
    coarse = tally([(False, 10, 10, 0.05, 0.1)] * 2 + at_the_margin + [(True, 10, 10, 9.0, 0.1)] * 7)
    finer = tally([(True, 100, 90, 9.0, 0.1)] * 10)
    finest = tally([(True, 1000, 900, 9.0, 0.1)] * 10)
    made, plain = tried((0.3, coarse), (0.5, finer), (0.7, finest))
    (found,) = entries_of("6", made, plain, 0.9)
    assert (str(found.choice), found.shares, found.bytes) == ("transform/3@0.3+0.5:0.1", (0.2,), 28)
    # Nor does the finest quality vouch for answers that were never sent at it.
    fallen = [replace(e, agreement=0.9) if e.quality == 0.5 else e for e in plain]
    assert [(e.choice, e.agreement) for e in entries_of("6", made, fallen, 0.9)] == [(found.choice, 0.9)]


def test_means_say_which_takes_fewer_bytes() -> None:
    """Half of the finer tensors are far smaller than the others, so that the median of all is, too."""
    coarse = tally([(False, 10, 10, 0.05, 0.1)] * 6 + [(True, 10, 10, 1.0, 0.1)] * 4)
    finer = tally([(True, 1, 1, 1.0, 0.1)] * 6 + [(True, 900, 900, 1.0, 0.1)] * 4)
    made, plain = tried((0.3, coarse), (0.5, finer))
    (found,) = entries_of("6", made, plain, 0.9)
    assert (found.bytes, found.agreement, found.shares) == (11, 1.0, (0.6,))
    assert found.bytes > next(e.bytes for e in plain if e.quality == 0.5)


def test_no_looks_keep_more_than_their_last_quality_does() -> None:
    """Here the answers that changed at the finer quality are among those that count as sure."""
    coarse = tally([(False, 10, 10, 0.05, 0.1)] * 2 + [(True, 10, 10, 9.0, 0.1)] * 8)
    finer = tally([(True, 100, 90, 9.0, 0.1)] * 9 + [(False, 100, 90, 9.0, 0.1)])
    made, plain = tried((0.3, coarse), (0.5, finer))
    (found,) = entries_of("6", made, plain, 0.95)
    assert (found.measured, found.agreement, found.offered) == (1.0, 0.9, False)
    raised = [replace(e, agreement=0.97) if e.quality == 0.5 else e for e in plain]
    assert [e.agreement for e in entries_of("6", made, raised, 0.95)] == [0.97]


@pytest.mark.parametrize("moved", [0.0, 5e-324, 1e-7, math.nan, math.inf, 5000.0, 1e308])
def test_moves_that_give_no_margin_that_a_setting_could_say_give_no_closer_look(moved: float) -> None:
    coarse, finer = tally([(False, 10, 10, 0.0, moved)] * 4), tally([(True, 20, 15, 1.0, 0.1)] * 4)
    made, plain = tried((0.3, coarse), (0.5, finer))
    assert entries_of("6", made, plain, 0.9) == []


def test_where_nobody_asked_for_margins_there_are_no_closer_looks() -> None:
    made, plain = tried(*((q, tally([(True, 10, 5, 0.0, 1.0)] * 4)) for q in (0.3, 0.5)))
    for _, each in made:
        each.margins.clear()
        each.moved.clear()
    assert entries_of("6", made, plain, 0.9) == []
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


# The fidelity document


def entry(quality: float, size: int, agreement: float, **more: Any) -> Entry:
    good = agreement >= 0.99
    times = (2.0, 1.0, 1.0, 0.0)
    return Entry("6", "transform/3", quality, agreement, 0.9, 1.0, 0.01, size, size, *times, good, agreement, **more)


LOOKED = entry(0.4, 300, 0.993, looks=ONE.looks, shares=(0.25,))
TWICE = entry(0.2, 280, 0.98, looks=TWO.looks, shares=(0.4, 0.1))
FIDELITY = Fidelity(
    "sha256:" + "0" * 64,
    0.99,
    Measure("top1", "logits"),
    Inputs("photos", 16, 100, 200),
    (entry(0.4, 200, 0.95), entry(0.6, 310, 0.994), entry(0.8, 400, 0.996), TWICE, LOOKED),
)


def test_targets_and_plans_find_closer_looks_where_they_are_the_smallest() -> None:
    assert next(e.choice for e in offered(FIDELITY, "6")) == LOOKED.choice == ONE
    assert choose(FIDELITY, "6", agreement=0.99) == LOOKED
    assert choose(FIDELITY, "6", agreement=0.98) == TWICE
    assert TWICE.choice == TWO
    assert choose(FIDELITY, "6", agreement=0.995).choice == of(0.8)
    with pytest.raises(CalibrationError, match=r"closest is transform/3@0\.4\+0\.6:0\.2: 99\.3%"):
        choose(FIDELITY, "6", agreement=0.999, bytes=305)


def changed(**changes: Any) -> bytes:
    doc = json.loads(to_json(FIDELITY))
    doc["entries"][-1] |= changes
    return json.dumps(doc).encode()


def test_a_document_gives_back_the_looks_that_it_was_made_of() -> None:
    data = to_json(FIDELITY)
    assert from_json(data) == FIDELITY
    assert to_json(from_json(data)) == data
    assert b'"looks":[{"margin":1.5,"quality":0.4},{"margin":0.7,"quality":0.6}]' in data
    assert from_json(changed(shares=[0.5])) != FIDELITY
    most = [{"quality": 0.5 + n / 10, "margin": 1.0} for n in range(MAX_LOOKS)]
    found = from_json(changed(looks=most, shares=[0.5] * MAX_LOOKS)).entries[-1]
    assert len(found.looks) == len(found.shares) == MAX_LOOKS


def test_entries_that_say_nothing_of_looks_have_none() -> None:
    doc = json.loads(to_json(FIDELITY))
    doc["entries"] = [{k: v for k, v in e.items() if k not in ("looks", "shares")} for e in doc["entries"][:3]]
    assert from_json(json.dumps(doc).encode()) == replace(FIDELITY, entries=FIDELITY.entries[:3])


def look(**changes: Any) -> dict[str, Any]:
    return {"looks": [{"quality": 0.6, "margin": 0.2} | changes]}


QUALITIES_OF_NONE: list[Any] = [1.1, 0.4, 0.3, "0.6", -0.6, None, True, math.nan, [0.6], {}, 10**400]
MARGINS_OF_NONE: list[Any] = [-0.1, 0, 1e9, math.inf, math.nan, True, "0.2", None, [0.2], 10**400]
NO_LISTS: list[Any] = ["", {}, None, 0, 1.5, True, "looks", {"quality": 0.6, "margin": 0.2}, []]
NOTHING: list[Any] = ["", {}, None]
NO_LOOKS: list[Any] = [0.6, None, [], {}, "0.6", [0.6, 0.2], {"quality": 0.6}, {"margin": 0.2}]
NO_SHARES: list[Any] = [1.5, -0.1, None, True, "0.25", [0.25], {}, math.nan, 10**400]
BROKEN: list[dict[str, Any]] = [
    *(look(quality=quality) for quality in QUALITIES_OF_NONE),
    *(look(margin=margin) for margin in MARGINS_OF_NONE),
    look(more=1),
    *({"looks": looks} for looks in NO_LISTS),
    *({"looks": [each]} for each in NO_LOOKS),
    *({"shares": shares} for shares in [*NO_LISTS, [0.25, 0.1]]),
    *({"shares": [each]} for each in NO_SHARES),
    {"looks": [], "shares": [0.25]},
    *({"looks": nothing, "shares": []} for nothing in NOTHING),
    *({"looks": [], "shares": nothing} for nothing in NOTHING),
    {"looks": [{"quality": 0.6, "margin": 0.2}] * 2, "shares": [0.2, 0.1]},
    {"looks": [{"quality": 0.5 + n / 20, "margin": 1} for n in range(MAX_LOOKS + 1)], "shares": [0.1] * 5},
    {"looks": [{"quality": 0.6, "margin": 0.2}] * 10_000},
    {"shares": [0.1] * 100_000},
    {"looks": [[[[[[]]]]]] * 1000},
    {"again_quality": 0.8, "again_margin": 0.2, "asked_again": 0.1},
    {"codec": "int8/1"},
    {"quality": 0.9},
    {"quality": 0.6},
]


@pytest.mark.parametrize("changes", BROKEN, ids=lambda changes: str(changes)[:60])
def test_an_entry_whose_looks_are_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="not a fidelity document"):
        from_json(changed(**changes))


# The guard's ladder


def test_the_ladder_goes_from_closer_looks_to_the_last_quality_for_every_answer() -> None:
    rest = (Choice("int8/1"), Choice("half/1"), RAW)
    higher = tuple(map(of, (0.6, 0.8, 1.0)))
    assert ladder(ONE, "6", None) == (ONE, *higher, *rest)
    assert ladder(TWO, "6", None) == (TWO, *higher, *rest)
    to_the_end = replace(ONE, looks=(Look(0.6, 0.2), Look(1.0, 0.2)))
    assert ladder(to_the_end, "6", None) == (to_the_end, of(1.0), *rest)
    measured = replace(FIDELITY, entries=(LOOKED, replace(entry(1.0, 250, 0.98), codec="int8/1")))
    assert ladder(ONE, "6", measured) == (ONE, *higher, Choice("half/1"), RAW)


@given(choices())
def test_every_ladder_starts_with_what_is_sent_and_its_last_quality_and_ends_raw(choice: Choice) -> None:
    steps = ladder(choice, "6", None)
    assert steps[0] == choice
    assert not choice.looks or steps[1] == choice.last
    assert steps[-1] == RAW
    assert len(set(steps)) == len(steps)
    qualities = [step.quality for step in steps[1:] if step.codec == choice.codec]
    assert qualities == sorted(qualities)
