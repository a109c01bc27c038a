"""What closer looks cost in calibration: the whole frame of each transmission, look by look."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from isthmus.arrays import Array
from isthmus.artifacts.agreement import measure_for
from isthmus.artifacts.choice import RAW, Choice
from isthmus.artifacts.tensors import TensorSpec
from isthmus.codecs import EncodedTensor, encode_tensor
from isthmus.codecs.transform.levels import STEPS_PER_FACTOR, step_of_quality
from isthmus.codecs.transform.planes import Layout
from isthmus.pipeline.agreement import margin, margin_of
from isthmus.wire.frame import Frame, encode
from isthmus_tools.calibration.boundary import Boundary
from isthmus_tools.calibration.calibrate import QUALITIES
from isthmus_tools.calibration.closer_looks import QUALITY_STEP, QUANTILE, finer_than, with_looks
from isthmus_tools.calibration.inputs import CalibrationInput
from isthmus_tools.calibration.rows import RowModel, Rows, learn_rows
from isthmus_tools.calibration.scoring import CodecSender, Scorer, codec_senders, judge_by
from isthmus_tools.calibration.transforms import STEPS, learn_planes
from support.bundles import Published, photo, photo_array
from support.bundles import photos as photos
from support.executors import executor_of
from support.fidelities import of

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
AT = Boundary("6", (), (), SPECS)


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
    at = Boundary.at(photos.bundle, "6")
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
