"""Closer looks in calibration: the cost of each transmission, margins, and the chains on offer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from isthmus.arrays import Array
from isthmus.artifacts.choice import MAX_LOOKS, RAW, Choice
from isthmus.artifacts.fidelity import Entry, from_json, measure_for, to_json
from isthmus.artifacts.tensors import TensorSpec
from isthmus.codecs import EncodedTensor, encode_tensor
from isthmus.codecs.transform.levels import STEPS_PER_FACTOR, step_of_quality
from isthmus.codecs.transform.planes import Layout
from isthmus.pipeline.agreement import margin, margin_of
from isthmus.wire.frame import Frame, encode
from isthmus_tools.calibration.boundary import CutBoundary
from isthmus_tools.calibration.calibrate import QUALITIES
from isthmus_tools.calibration.closer_looks import QUALITY_STEP, QUANTILE, finer_than, look_entries, with_looks
from isthmus_tools.calibration.inputs import CalibrationInput
from isthmus_tools.calibration.rows import RowModel, Rows, learn_rows
from isthmus_tools.calibration.scoring import CodecSender, Scorer, Tally, codec_senders, judge_by
from isthmus_tools.calibration.transforms import STEPS, learn_planes
from support.bundles import Published, photo, photo_array
from support.bundles import photos as photos
from support.closer_looks import FIDELITY, of
from support.executors import executor_of

# Transmissions

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
        "maps": learn_planes([maps(n) for n in range(20)], layout=Layout(4, 1)),
        "tokens": learn_rows(rows, RowModel(1, rotated=True), None, STEPS),
    }


SPECS = (
    TensorSpec("maps", "float32", (1, 6, 12, 12)),
    TensorSpec("tokens", "float32", (1, 9, 6)),
    TensorSpec("mask", "float32", (1, 9)),
    TensorSpec("ids", "int64", (1, 40)),
)
AT = CutBoundary("6", (), (), SPECS)


def crossed(seed: int = 99) -> dict[str, Array]:
    ids = np.arange(40, dtype=np.int64)[None] * 7
    return {"maps": maps(seed), "tokens": tokens(seed), "mask": np.ones((1, 9), np.float32), "ids": ids}


def tried_at(qualities: list[float], tables: Mapping[str, object]) -> list[CodecSender]:
    return codec_senders(AT, [*(Choice("transform/4", q) for q in qualities), Choice("int8/1")], tables)


def frame_of(trial: CodecSender, arrays: Mapping[str, Array]) -> int:
    """Bytes of the frame of a closer look."""
    encoded = {n: p for n, a in arrays.items() if isinstance(p := encode_tensor(a, trial.encodings[n]), EncodedTensor)}
    rest = {name: array for name, array in arrays.items() if name not in encoded}
    return len(encode(Frame(rest, "sha256:" + "0" * 64, trial.segment, "0" * 36, encoded)))


def test_a_closer_look_costs_the_whole_frame_and_the_first_transmission_its_payloads(
    tables: Mapping[str, object],
) -> None:
    arrays = crossed()
    for trial in tried_at([0.3, 0.5], tables):
        sent = trial.send(arrays)
        whole = {name: encode_tensor(array, trial.encodings[name]).nbytes for name, array in arrays.items()}
        assert sent.payload_bytes == sum(whole.values())
        assert sent.frame_bytes == frame_of(trial, arrays) > sent.payload_bytes
        assert sent.tensors["ids"].tolist() == arrays["ids"].tolist()


@pytest.mark.parametrize("value", [np.nan, 3e38, 1e6])
def test_a_tensor_that_falls_back_to_raw_counts_raw_in_the_frame(value: float, tables: Mapping[str, object]) -> None:
    (trial, *_) = tried_at([0.5], tables)
    arrays = crossed()
    arrays["maps"] = arrays["maps"] + np.float32(value)
    sent = trial.send(arrays)
    assert sent.fell_back
    assert sent.frame_bytes == frame_of(trial, arrays) > sent.payload_bytes > arrays["maps"].nbytes
    assert np.array_equal(sent.tensors["maps"], arrays["maps"], equal_nan=True)


def test_only_a_fixed_factor_finer_is_a_closer_look() -> None:
    others = [Choice("sparse/2", 0.5), Choice("transform/4", 0.4), Choice("transform/4", 0.5), RAW]
    assert finer_than(Choice("transform/4", 0.3), others) == Choice("transform/4", 0.5)
    assert finer_than(Choice("transform/4", 0.35), others) is None
    assert finer_than(Choice("transform/4", 1.0), others) is None


def test_what_calibration_tries_is_followed_by_exactly_a_third_of_the_step() -> None:
    every = [Choice("transform/4", q) for q in QUALITIES]
    followed = 0
    for by in range(-40, 41):
        steps = (STEPS[0] + by, STEPS[1] + by)
        for choice in every:
            if (finer := finer_than(choice, every)) is not None:
                assert (
                    step_of_quality(choice.quality, steps) - step_of_quality(finer.quality, steps) == STEPS_PER_FACTOR
                )
                followed += 1
    assert followed == 81 * sum(q <= 1 - QUALITY_STEP + 1e-6 for q in QUALITIES)


def test_a_chains_tally_is_that_of_sending_look_by_look_by_hand(photos: Published, tmp_path: Path) -> None:
    at = CutBoundary.at(photos.bundle, "6")
    executor = executor_of(photos, tmp_path)

    def head(x: Array) -> Mapping[str, Array]:
        return executor.execute(at.head, {"x": x}).tensors

    def tail(tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        return executor.execute(at.tail, tensors).outputs

    examples = [CalibrationInput(f"{n // 2}", {"x": photo_array(photo(seed=n))}) for n in range(40)]
    table = learn_planes([head(photo_array(photo(seed=n)))["p6"] for n in range(40, 80)])
    measure = measure_for(photos.bundle)
    by_quality = {t.choice.quality: t for t in codec_senders(at, [*map(of, (0.1, 0.3, 0.5, 0.7))], {"p6": table})}
    judge = judge_by(measure)
    scorer = Scorer(executor, judge, partial(margin, measure))
    tallies = scorer.score(examples, 40, [(at, [*by_quality.values()])])
    alone = {q: tallies["6", t.name] for q, t in by_quality.items()}
    made = with_looks([(of(q), tally) for q, tally in alone.items()])
    assert {tuple(look.quality for look in choice.looks) for choice, _, _ in made} >= {(0.3,), (0.5,)}
    for choice, tally, shares in made:
        at_each = [choice.quality, *(look.quality for look in choice.looks)]
        for quality, look in zip(at_each, choice.looks, strict=False):
            exact = float(np.quantile(alone[quality].shifts, QUANTILE))
            assert exact <= look.margin <= exact * 1.01
        took = [0] * len(choice.looks)
        for n, example in enumerate(examples):
            tensors = head(example.arrays["x"])
            crossed, expected = at.select(tensors), tail(tensors)
            arrived = by_quality[choice.quality].send(crossed)
            first = alone[choice.quality]
            size, encode_s, decode_s = arrived.payload_bytes, first.encode_s[n], first.decode_s[n]
            answer = tail({**tensors, **arrived.tensors})
            clear = margin_of(answer["logits"])
            changed = int(answer["logits"].argmax()) != int(expected["logits"].argmax())
            moved = abs(margin_of(expected["logits"]) - (-clear if changed else clear))
            assert (clear, moved) == pytest.approx((first.margins[n], first.shifts[n]))
            for i, look in enumerate(choice.looks):
                if margin_of(answer["logits"]) >= look.margin:
                    break
                took[i] += 1
                size += frame_of(by_quality[look.quality], crossed)
                answer = tail({**tensors, **by_quality[look.quality].send(crossed).tensors})
                encode_s += alone[look.quality].encode_s[n]
                decode_s += alone[look.quality].decode_s[n]
            assert (tally.same[n], tally.errors[n]) == judge(example, expected, answer)
            assert (tally.encode_s[n], tally.decode_s[n]) == (encode_s, decode_s)
            assert tally.bytes[n] == size
        assert shares == tuple(count / 40 for count in took)
        assert tally.groups == first.groups
        entry = tally.entry("6", choice, 0.9)
        assert (entry.bytes, entry.measured) == (round(statistics.fmean(tally.bytes)), round(tally.agreement, 6))
        assert entry.pack_ms == pytest.approx(1000 * statistics.fmean(tally.encode_s), abs=1e-4)
        assert entry.choice == choice


# Tallies


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
