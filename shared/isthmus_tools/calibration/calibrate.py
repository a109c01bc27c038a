"""Calibration of a bundle: learn codec tables from inputs, and measure every codec on inputs held out.

Source: docs/explanation/calibration.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Blob, Bundle, digest_of
from isthmus.artifacts.choice import CODEC_IDS, GRADED, INPUT_CODECS, SPARSE_ID, TRANSFORM_ID, Choice
from isthmus.artifacts.fidelity import CLOSE, TOP1, Entry, Fidelity, Inputs, Measure, model_digest, to_json
from isthmus.errors import CalibrationError
from isthmus.pipeline.agreement import margin
from isthmus_tools.calibration.boundary import CutBoundary, SegmentExecutor, Spool
from isthmus_tools.calibration.closer_looks import look_entries
from isthmus_tools.calibration.inputs import MIN_INPUTS, InputSource, split
from isthmus_tools.calibration.scoring import Scorer, Tally, codec_senders, judge_by, monotone
from isthmus_tools.calibration.tables import learn_tables, stored_table
from isthmus_tools.progress import Progress, silent

# Fifteenths, so that three steps are a closer look's factor of three.
QUALITIES = tuple(round(i / 15, 4) for i in range(16))
CHOICES: tuple[Choice, ...] = (
    *(Choice(codec) for codec in CODEC_IDS if codec not in INPUT_CODECS | GRADED),
    *(Choice(SPARSE_ID, quality) for quality in (0.25, 0.5, 0.75, 1.0)),
    *(Choice(TRANSFORM_ID, quality) for quality in QUALITIES),
)
"""The codecs and qualities that are measured at every cut."""


@dataclass(frozen=True)
class CalibrationSpec:
    """Parameters of a calibration: `count` inputs in all, and the least agreement, `limit`, of codecs on offer."""

    cuts: Sequence[str]
    count: int
    limit: float
    measure: Measure
    choices: Sequence[Choice] = CHOICES


@dataclass(frozen=True)
class Calibrated:
    """The bundle to publish, its new content by digest, and the reason for each tensor without a table."""

    bundle: Bundle
    files: dict[str, Path]
    fidelity: Fidelity
    skipped: dict[str, str]


def calibrate(
    executor: SegmentExecutor, source: InputSource, spec: CalibrationSpec, folder: Path, progress: Progress = silent
) -> Calibrated:
    """Learn tables from half of the inputs and score every codec at every cut on the other half.

    `folder` receives the boundary tensors of the calibrating inputs, a file each, and the new content. The result has
    no plan: its publisher decides whether the former plan still holds.

    Raises:
        CalibrationError: the data do not fit the model, or are too few.
        Missing: the bundle has no cut of that name.
    """
    bundle, measure = executor.bundle, spec.measure
    # By depth: a tensor that crosses several cuts gets its table at the first.
    boundaries = sorted(
        (CutBoundary.at(bundle, cut) for cut in dict.fromkeys(spec.cuts)), key=lambda b: bundle.cuts[b.cut].macs_before
    )
    training, held_out = split(source, spec.count)
    spool = Spool(boundaries, executor, folder)
    for index, example in enumerate(source.examples(training, spec.count // 2)):
        progress("running the model", index, spec.count // 2)
        spool.add(example.arrays)
    _check_count(source, spool.count, "calibrate")
    if measure.kind == CLOSE:
        measure = replace(measure, scales=spool.scales())
    _check_outputs(bundle, measure, spool.prediction)
    files: dict[str, Path] = {}
    tables: dict[str, object] = {}
    blobs: dict[str, Blob] = {}
    skipped: dict[str, str] = {}
    if any(choice.codec == TRANSFORM_ID for choice in spec.choices):
        learned, skipped = learn_tables(boundaries, spool, executor, measure, progress)
        for tensor, table in learned.items():
            data, tables[tensor] = stored_table(table)
            blobs[tensor] = write_blob(data, folder, files)
    references = None
    if bundle.preprocess is not None:
        from isthmus_tools.calibration.references import References  # Pillow, for models of photos

        references = References(executor, measure)
    senders = [(boundary, codec_senders(boundary, spec.choices, tables)) for boundary in boundaries]
    scorer = Scorer(executor, judge_by(measure), partial(margin, measure) if measure.kind == TOP1 else None, references)
    count = spec.count - spec.count // 2
    tallies = scorer.score(source.examples(held_out, count), count, senders, progress)
    scored = max((len(t.bytes) for t in tallies.values()), default=0)
    _check_count(source, scored, "measure")
    entries: list[Entry] = []
    for boundary, tried in senders:
        by_choice = [(sender.choice, tallies[boundary.cut, sender.name]) for sender in tried]
        entries += _entries(boundary.cut, by_choice, spec.limit)
    fidelity = Fidelity(
        subject=model_digest(bundle),
        limit=spec.limit,
        measure=measure,
        inputs=Inputs(source.name, len(training) + len(held_out), spool.count, scored, source.method),
        entries=tuple(entries),
        references=references.entries() if references is not None else (),
    )
    blob = write_blob(to_json(fidelity), folder, files)
    # Tables of an earlier calibration stay: they still fit, as the model is the same.
    calibrated = replace(bundle, tables={**bundle.tables, **blobs}, fidelity=blob, plan=None)
    return Calibrated(calibrated, files, fidelity, skipped)


def _check_count(source: InputSource, count: int, purpose: str) -> None:
    if count < MIN_INPUTS // 2:
        raise CalibrationError(
            f"{source.name} has {count} inputs to {purpose} with; {MIN_INPUTS // 2} are the least",
            source=source.name,
            inputs=count,
            least=MIN_INPUTS,
            hint="a hundred or more say something about 99%; raise --inputs or add files",
        )


def _entries(cut: str, tried: Sequence[tuple[Choice, Tally]], limit: float) -> list[Entry]:
    plain = monotone([tally.entry(cut, choice, limit) for choice, tally in tried], limit)
    return [*plain, *look_entries(cut, tried, plain, limit)]


def _check_outputs(bundle: Bundle, measure: Measure, outputs: Mapping[str, Array]) -> None:
    if measure.kind == TOP1 and measure.output not in outputs:
        raise CalibrationError(
            f"{bundle.name} has no output {measure.output!r}", output=measure.output, exists=sorted(outputs)
        )
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CalibrationError(
                f"the model's output {name} is not finite for these inputs", output=name, hint="are they what it takes?"
            )


def write_blob(data: bytes, folder: Path, files: dict[str, Path]) -> Blob:
    """Write content of a bundle to `folder`, and note its file in `files` by digest."""
    digest = digest_of(data)
    files[digest] = folder / digest.partition(":")[2]
    files[digest].write_bytes(data)
    return Blob(digest, len(data))
