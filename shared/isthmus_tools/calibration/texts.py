"""Fidelity of codecs on the hidden states of a language model: perplexity of a text, agreement of its next tokens.

Each token is predicted from the text's own tokens before (teacher forcing), by steps of sessions along the route that
serves: the head, frames, the tail. Tables of `transform/4` are learned from the text's first half, and every codec is
measured on the second. Source: docs/explanation/calibration.md, "Language models".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Blob, Bundle
from isthmus.artifacts.choice import RAW, RAW_ID, TOKEN_CODECS, TRANSFORM_ID, Choice
from isthmus.artifacts.fidelity import Entry, Fidelity, Inputs, measure_for, model_digest, to_json
from isthmus.codecs import is_exact
from isthmus.context import Context
from isthmus.errors import CalibrationError
from isthmus.pipeline import LocalHop, LoopbackHop, Route, execute, local_route
from isthmus.runtime.session_store import SessionStore
from isthmus.wire.frame import Step
from isthmus_tools.calibration.boundary import CutBoundary
from isthmus_tools.calibration.calibrate import Calibrated, write_blob
from isthmus_tools.calibration.scoring import CodecSender, Tally, codec_senders
from isthmus_tools.calibration.tables import learn_token_table, stored_table
from isthmus_tools.progress import Progress, silent

# Raw first: the others are compared with it. Below a quality of 0.6 perplexity rises by percents.
CHOICES = (
    RAW,
    *(Choice(codec) for codec in TOKEN_CODECS if codec not in (RAW_ID, TRANSFORM_ID)),
    *(Choice(TRANSFORM_ID, quality) for quality in (0.6, 0.7, 0.8, 0.9, 1.0)),
)
MIN_TOKENS = 64
"""Perplexity of fewer would say next to nothing."""
# Later tokens of a window have the context of a short chat; a whole text at once would take memory for its state.
WINDOW = 512
# As the router prefills. A step's scores take 50 MB for SmolLM2's vocabulary.
CHUNK = 256
# Steps of a single token in a chunk, for the bytes and times of decoding; a median needs no more.
_TIMED = 8
# Long, since the first step loads a segment and fetches its weights.
_MAX_STEP_S = 600.0


@dataclass(frozen=True)
class TextSpec:
    """A text of a calibration: its token ids, its name in documents, and the least agreement, `limit`, on offer."""

    tokens: Sequence[int]
    source: str
    limit: float
    cuts: Sequence[str]
    choices: Sequence[Choice] = CHOICES


def calibrate_text(
    digest: str, bundle: Bundle, store: SessionStore, spec: TextSpec, folder: Path, progress: Progress = silent
) -> Calibrated:
    """Learn tables from the first half of a text, and measure every codec at every cut on the second.

    `folder` receives the new content. The result has no plan.

    Raises:
        As `score_text`.
    """
    windows = _windows_of(bundle, spec, 2)
    training, held_out = windows[: len(windows) // 2], windows[len(windows) // 2 :]
    tables: dict[str, object] = {}
    blobs: dict[str, Blob] = {}
    skipped: dict[str, str] = {}
    files: dict[str, Path] = {}
    for cut in dict.fromkeys(spec.cuts):
        scorer = _CutScorer(digest, bundle, store, cut, (), {})
        for tensor in (t.name for t in scorer.boundary.tensors if t.name not in tables):
            progress(f"learning {tensor}")
            try:
                data, tables[tensor] = stored_table(
                    learn_token_table([scorer.states(window)[tensor] for window in training])
                )
                blobs[tensor] = write_blob(data, folder, files)
            except CalibrationError as e:
                skipped[tensor] = e.message
    fidelity = _score(digest, bundle, store, spec, held_out, tables, progress)
    inputs = structs.replace(fidelity.inputs, calibrated=sum(window.shape[1] for window in training))
    fidelity = structs.replace(fidelity, inputs=inputs)
    blob = write_blob(to_json(fidelity), folder, files)
    calibrated = structs.replace(bundle, tables={**bundle.tables, **blobs}, fidelity=blob, plan=None)
    return Calibrated(calibrated, files, fidelity, skipped)


def score_text(
    digest: str, bundle: Bundle, store: SessionStore, spec: TextSpec, progress: Progress = silent
) -> Fidelity:
    """Measure the codecs of `spec` that need no table at every cut on the whole text.

    Raises:
        CalibrationError: no language model, or fewer tokens than MIN_TOKENS.
        Missing: the bundle has no cut of that name.
    """
    return _score(digest, bundle, store, spec, _windows_of(bundle, spec), {}, progress)


def _score(
    digest: str,
    bundle: Bundle,
    store: SessionStore,
    spec: TextSpec,
    windows: Sequence[Array],
    tables: Mapping[str, object],
    progress: Progress,
) -> Fidelity:
    cuts = sorted(dict.fromkeys(spec.cuts), key=lambda cut: bundle.cuts[cut].macs_before)
    entries: list[Entry] = []
    for number, cut in enumerate(cuts):
        scorer = _CutScorer(digest, bundle, store, cut, spec.choices, tables)
        for index, window in enumerate(windows):
            progress(f"measuring at {cut}", number * len(windows) + index, len(cuts) * len(windows))
            scorer.add(window, str(index))
        entries += scorer.entries(spec.limit)
    return Fidelity(
        subject=model_digest(bundle),
        limit=spec.limit,
        measure=measure_for(bundle),
        inputs=Inputs(
            spec.source,
            1,
            0,
            sum(window.shape[1] - 1 for window in windows),
            f"tokens of a text, each behind the tokens before it in a window of {windows[0].shape[1]}",
        ),
        entries=tuple(entries),
    )


def losses(scores: Array, targets: Array) -> Array:
    """Negative log-likelihood of each target, in nats. Shapes: scores (tokens, vocabulary), targets (tokens,)."""
    top = scores.max(axis=-1)
    total = np.log(np.exp(scores - top[:, None]).sum(axis=-1, dtype=np.float64)) + top
    return np.asarray(total - scores[np.arange(len(targets)), targets])


def _windows_of(bundle: Bundle, spec: TextSpec, least: int = 1) -> list[Array]:
    """The text in `least` parts or more, int64 (1, tokens) each; a part of one token predicts nothing."""
    if bundle.state is None or bundle.text is None:
        raise CalibrationError(f"{bundle.name} is no language model", model=bundle.name, hint="give --data FOLDER")
    count = len(spec.tokens)
    if count < MIN_TOKENS:
        raise CalibrationError(
            f"{spec.source} has {count} tokens; {MIN_TOKENS} are the least",
            source=spec.source,
            tokens=count,
            least=MIN_TOKENS,
        )
    ids, size = np.asarray(spec.tokens, np.int64)[None], min(WINDOW, bundle.state.context, -(-count // least))
    parts = (ids[:, start : start + size] for start in range(0, count, size))
    return [part for part in parts if part.shape[1] > 1]


@dataclass
class _TextOutcome:
    """What a codec did to the text so far. Units: `loss` in nats, summed."""

    tally: Tally = field(default_factory=Tally)
    loss: float = 0.0


class _CutScorer:
    """Sends the hidden states of a cut by every codec, in step with each other, so that scores need not be kept."""

    def __init__(
        self,
        digest: str,
        bundle: Bundle,
        store: SessionStore,
        cut: str,
        choices: Sequence[Choice],
        tables: Mapping[str, object],
    ) -> None:
        self.boundary = boundary = CutBoundary.at(bundle, cut)
        self._bundle, self._store, local = bundle, store, LocalHop(store)
        self._head = local_route(digest, bundle, boundary.head, local)
        self._senders = codec_senders(boundary, choices, tables)
        loopback = LoopbackHop(local, lambda bundle, tensor, codec: tables[tensor])
        self._tails = {
            sender.name: local_route(digest, bundle, boundary.tail, loopback, sender.encodings)
            for sender in self._senders
        }
        self._outcomes = {sender.name: _TextOutcome() for sender in self._senders}

    def states(self, window: Array) -> dict[str, Array]:
        """The boundary tensors of a window, (1, tokens, channels) each."""
        parts = [
            self.boundary.select(self._run(self._head, {self._ids: window[:, start : start + CHUNK]}, "head", start))
            for start in range(0, window.shape[1], CHUNK)
        ]
        self._store.end_session("head")
        return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}

    def add(self, window: Array, name: str) -> None:
        """Predict each token of a window but the first."""
        ids, targets = window[:, :-1], window[0, 1:]
        for start in range(0, ids.shape[1], CHUNK):
            tensors = self._run(self._head, {self._ids: ids[:, start : start + CHUNK]}, name, start)
            expected: Array | None = None
            for sender in self._senders:
                if expected is not None and is_exact(sender.choice):
                    scores = expected
                else:
                    # A session of its own: its keys and values are of the decoded states.
                    outputs = self._run(self._tails[sender.name], tensors, f"{name}-{sender.name}", start)
                    scores = outputs[self._logits][0]
                expected = scores if expected is None else expected
                self._note(sender, tensors, scores, expected, targets[start : start + CHUNK], name)
        for session in (name, *(f"{name}-{sender.name}" for sender in self._senders)):
            self._store.end_session(session)

    @property
    def _ids(self) -> str:
        return self._bundle.state.tokens if self._bundle.state is not None else ""

    @property
    def _logits(self) -> str:
        return self._bundle.text.logits if self._bundle.text is not None else ""

    def _run(self, route: Route, tensors: Mapping[str, Array], session: str, start: int) -> Mapping[str, Array]:
        """All tensors after a step of a window's session."""
        context = Context.from_headers({}, longest_s=_MAX_STEP_S)
        return execute(route, tensors, context, step=Step(session, start, reserve=WINDOW)).tensors

    def _note(
        self,
        sender: CodecSender,
        tensors: Mapping[str, Array],
        scores: Array,
        expected: Array,
        targets: Array,
        group: str,
    ) -> None:
        outcome = self._outcomes[sender.name]
        tally, boundary = outcome.tally, self.boundary.select(tensors)
        outcome.loss += float(losses(scores, targets).sum())
        tally.same += (scores.argmax(axis=-1) == expected.argmax(axis=-1)).tolist()
        tally.groups += [group] * len(targets)
        difference, size = np.linalg.norm(scores - expected), np.linalg.norm(expected)
        tally.errors.append(float(difference / size) if size else 0.0)
        stride = -(-len(targets) // _TIMED)
        # From the middle of a part: a window's first token is unlike all others.
        for at in range(stride // 2, len(targets), stride):
            token = {name: np.ascontiguousarray(array[:, at : at + 1]) for name, array in boundary.items()}
            sent = sender.send(token)
            tally.bytes.append(sent.payload_bytes)
            tally.values += sum(array.size for array in token.values())
            tally.add_transmission(sent)

    def entries(self, limit: float) -> list[Entry]:
        """The entries of the fidelity document, in the order of the choices."""
        entries = []
        for sender in self._senders:
            outcome = self._outcomes[sender.name]
            perplexity = math.exp(min(outcome.loss / len(outcome.tally.same), 700.0))  # beyond, a float overflows
            entry = outcome.tally.entry(self.boundary.cut, sender.choice, limit)
            entries.append(structs.replace(entry, perplexity=float(f"{perplexity:.6g}")))
        return entries
