"""A bundle with what codecs learned of its activations, and with what was measured of each on inputs held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.agreement import CLOSE, TOP1, Measure
from isthmus.artifacts.bundle import Blob, Bundle, digest_of
from isthmus.artifacts.choice import GRADED, KNOWN, NEVER_CHOSEN, SPARSE_ID, TRANSFORM_ID, Choice
from isthmus.artifacts.fidelity import Entry, Fidelity, Inputs
from isthmus.artifacts.fidelity_document import model_digest, to_json
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import CalibrationError
from isthmus.pipeline.agreement import margin
from isthmus.wire import frame as frames
from isthmus_tools.calibration.crossing import Run, crossing
from isthmus_tools.calibration.inputs import LEAST, Source, split
from isthmus_tools.calibration.looks import entries_of
from isthmus_tools.calibration.scoring import Tally, judge_by, risen, score
from isthmus_tools.calibration.sending import trials
from isthmus_tools.calibration.spool import MAX_FRAME, Spool
from isthmus_tools.calibration.tables import learn_tables
from isthmus_tools.progress import Progress, silent

QUALITIES = tuple(round(i / 15, 4) for i in range(16))
"""Three of which are a closer look's factor of three."""
CHOICES: tuple[Choice, ...] = (
    *(Choice(codec) for codec in KNOWN if codec not in NEVER_CHOSEN | GRADED),
    *(Choice(SPARSE_ID, quality) for quality in (0.25, 0.5, 0.75, 1.0)),
    *(Choice(TRANSFORM_ID, quality) for quality in QUALITIES),
)
"""What is measured at every cut."""


@dataclass(frozen=True)
class Calibrated:
    """The bundle to publish, its new content by digest, and why a tensor got no table."""

    bundle: Bundle
    files: dict[str, Path]
    fidelity: Fidelity
    skipped: dict[str, str]


def calibrate(
    bundle: Bundle,
    source: Source,
    run: Run,
    folder: Path,
    *,
    cuts: Sequence[str],
    count: int,
    limit: float,
    measure: Measure,
    choices: Sequence[Choice] = CHOICES,
    progress: Progress = silent,
) -> Calibrated:
    """Learn tables from half of the inputs and measure every codec at every cut on the other half.

    `folder` takes what crosses for the calibrating inputs, one file each, and the new content. The bundle's plan is
    left out: who publishes the bundle decides whether it still holds (`planning.published.carried`).

    Raises:
        CalibrationError: the data do not fit the model, or are too few.
        Missing: no such cut.
    """
    crossings = sorted(
        (crossing(bundle, cut) for cut in dict.fromkeys(cuts)), key=lambda c: bundle.cuts[c.cut].macs_before
    )
    learning, held_out = split(source, count)
    spool = Spool(crossings, run, folder)
    for done, example in enumerate(source.examples(learning, count // 2)):
        progress("running the model", done, count // 2)
        spool.add(example.arrays)
    if spool.count < LEAST // 2:
        raise CalibrationError(
            f"{source.name} gives {spool.count} inputs to calibrate with; {LEAST // 2} are the least",
            source=source.name,
            inputs=spool.count,
            least=LEAST,
            hint="a hundred or more say something about 99%; raise --inputs or add files",
        )
    if measure.kind == CLOSE:
        measure = replace(measure, scales=spool.scales())
    _check_answers(bundle, measure, spool.answer)
    calibrated = any(choice.codec == TRANSFORM_ID for choice in choices)
    learned, skipped = learn_tables(crossings, spool, run, measure, progress) if calibrated else ({}, {})
    if learned:
        from isthmus.codecs.rows import read_table
    tables: dict[str, object] = {}
    blobs: dict[str, Blob] = {}
    files: dict[str, Path] = {}
    for tensor, table in learned.items():
        data = frames.encode(frames.Frame(table.to_arrays()))
        blobs[tensor] = _keep(data, folder, files)
        # As everyone else will read it.
        tables[tensor] = read_table(frames.decode(data, max_bytes=MAX_FRAME).tensors)
    planned = {c.cut: trials(c, choices, tables) for c in crossings}
    whole = bundle.segment(WHOLE)
    beside = None
    if bundle.preprocess is not None:
        from isthmus_tools.calibration.reference import References  # Pillow, for models of photos

        beside = References(bundle, lambda arrays: run(whole, arrays), measure)
    tallies = score(
        source.examples(held_out, count - count // 2),
        count - count // 2,
        crossings,
        planned,
        run,
        judge_by(measure),
        beside=beside,
        margin=partial(margin, measure) if measure.kind == TOP1 else None,
        progress=progress,
    )
    scored = max((len(t.bytes) for t in tallies.values()), default=0)
    if scored < LEAST // 2:
        raise CalibrationError(
            f"{source.name} leaves {scored} inputs to measure with; {LEAST // 2} are the least",
            source=source.name,
            inputs=scored,
            least=LEAST,
        )
    entries = [
        e
        for c in crossings
        for e in _entries(c.cut, [(t.choice, tallies[c.cut, t.name]) for t in planned[c.cut]], limit)
    ]
    found = Fidelity(
        subject=model_digest(bundle),
        limit=limit,
        measure=measure,
        inputs=Inputs(source.name, len(learning) + len(held_out), spool.count, scored, source.made),
        entries=tuple(entries),
        references=beside.entries() if beside is not None else (),
    )
    blob = _keep(to_json(found), folder, files)
    # A tensor that was not calibrated now may have been before; its table still fits the same model.
    made = replace(bundle, tables={**bundle.tables, **blobs}, fidelity=blob, plan=None)
    return Calibrated(made, files, found, skipped)


def _entries(cut: str, tried: Sequence[tuple[Choice, Tally]], limit: float) -> list[Entry]:
    """A cut's entries: each choice's own, and closer looks where answers are classes."""
    found = risen([tally.entry(cut, choice, limit) for choice, tally in tried], limit)
    return [*found, *entries_of(cut, tried, found, limit)]


def _check_answers(bundle: Bundle, measure: Measure, answer: Mapping[str, Array]) -> None:
    if measure.kind == TOP1 and measure.output not in answer:
        raise CalibrationError(
            f"{bundle.name} has no output {measure.output!r}", output=measure.output, exists=sorted(answer)
        )
    for name, array in answer.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CalibrationError(
                f"the model's output {name} is not finite for these inputs", output=name, hint="are they what it takes?"
            )


def _keep(data: bytes, folder: Path, files: dict[str, Path]) -> Blob:
    digest = digest_of(data)
    files[digest] = folder / digest.partition(":")[2]
    files[digest].write_bytes(data)
    return Blob(digest, len(data))
