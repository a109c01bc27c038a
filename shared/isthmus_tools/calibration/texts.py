"""Fidelity of codecs on the hidden states of a language model: perplexity of a text, agreement of its next tokens.

Each token is predicted from the text's own tokens before (teacher forcing), by steps of sessions along the route that
serves: the head, frames, the tail. Nothing is learned. Source: docs/explanation/calibration.md, "Language models".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import RAW, TOKEN_CODECS, Choice
from isthmus.artifacts.fidelity import Entry, Fidelity, Inputs, measure_for, model_digest
from isthmus.artifacts.state import State
from isthmus.codecs import is_exact
from isthmus.context import Context
from isthmus.errors import CalibrationError
from isthmus.pipeline import LocalHop, LoopbackHop, Result, Route, execute, local_route
from isthmus.runtime.session_store import SessionStore
from isthmus.wire.frame import Step
from isthmus_tools.calibration.boundary import CutBoundary
from isthmus_tools.calibration.scoring import CodecSender, Tally, codec_senders
from isthmus_tools.progress import Progress, silent

# Raw first: the others are compared with it.
CHOICES = (RAW, *(Choice(codec) for codec in TOKEN_CODECS if codec != RAW.codec))
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


def score_text(
    digest: str, bundle: Bundle, store: SessionStore, spec: TextSpec, progress: Progress = silent
) -> Fidelity:
    """Measure every codec of `spec` at every cut on the text; a codec of a tensor's whole is no choice of steps.

    Raises:
        CalibrationError: no language model, or fewer tokens than MIN_TOKENS.
        Missing: the bundle has no cut of that name.
    """
    if bundle.state is None or bundle.text is None:
        raise CalibrationError(f"{bundle.name} is no language model", model=bundle.name, hint="give --data FOLDER")
    if len(spec.tokens) < MIN_TOKENS:
        raise CalibrationError(
            f"{spec.source} has {len(spec.tokens)} tokens; {MIN_TOKENS} are the least",
            source=spec.source,
            tokens=len(spec.tokens),
            least=MIN_TOKENS,
        )
    windows = _windows(spec.tokens, min(WINDOW, bundle.state.context))
    boundaries = sorted(
        (CutBoundary.at(bundle, cut) for cut in dict.fromkeys(spec.cuts)), key=lambda b: bundle.cuts[b.cut].macs_before
    )
    entries: list[Entry] = []
    for number, boundary in enumerate(boundaries):
        scorer = _CutScorer(digest, bundle, bundle.state, bundle.text.logits, boundary, store, spec.choices)
        for index, window in enumerate(windows):
            progress("measuring", number * len(windows) + index, len(boundaries) * len(windows))
            scorer.add(window, str(index))
        entries += scorer.entries(spec.limit)
    progress("measuring", 1, 1)
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


def _windows(tokens: Sequence[int], size: int) -> list[Array]:
    """The text in parts of `size` tokens, int64 (1, tokens); a part of one token predicts nothing."""
    ids = np.asarray(tokens, np.int64)[None]
    parts = (ids[:, start : start + size] for start in range(0, ids.shape[1], size))
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
        state: State,
        logits: str,
        boundary: CutBoundary,
        store: SessionStore,
        choices: Sequence[Choice],
    ) -> None:
        local = LocalHop(store)
        self._state, self._logits, self._boundary, self._store = state, logits, boundary, store
        self._head = local_route(digest, bundle, boundary.head, local)
        self._senders = codec_senders(boundary, choices, {})
        loopback = LoopbackHop(local)
        self._tails = {
            sender.name: local_route(digest, bundle, boundary.tail, loopback, sender.encodings)
            for sender in self._senders
        }
        self._outcomes = {sender.name: _TextOutcome() for sender in self._senders}

    def add(self, window: Array, name: str) -> None:
        """Predict each token of a window but the first."""
        ids, targets = window[:, :-1], window[0, 1:]
        for start in range(0, ids.shape[1], CHUNK):
            chunk = ids[:, start : start + CHUNK]
            step = Step(name, start, reserve=ids.shape[1])
            tensors = _run(self._head, {self._state.tokens: chunk}, step).tensors
            expected: Array | None = None
            for sender in self._senders:
                # A session of its own: its keys and values are of the decoded states.
                own = Step(f"{name}-{sender.name}", start, reserve=step.reserve)
                if expected is not None and is_exact(sender.choice):
                    scores = expected
                else:
                    scores = _run(self._tails[sender.name], tensors, own).outputs[self._logits][0]
                expected = scores if expected is None else expected
                self._note(sender, tensors, scores, expected, targets[start : start + CHUNK], name)
        for session in (name, *(f"{name}-{sender.name}" for sender in self._senders)):
            self._store.end_session(session)

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
        tally, boundary = outcome.tally, self._boundary.select(tensors)
        outcome.loss += float(losses(scores, targets).sum())
        tally.same += (scores.argmax(axis=-1) == expected.argmax(axis=-1)).tolist()
        tally.groups += [group] * len(targets)
        difference, size = np.linalg.norm(scores - expected), np.linalg.norm(expected)
        tally.errors.append(float(difference / size) if size else 0.0)
        for at in range(0, len(targets), -(-len(targets) // _TIMED)):
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
            entry = outcome.tally.entry(self._boundary.cut, sender.choice, limit)
            entries.append(replace(entry, perplexity=float(f"{perplexity:.6g}")))
        return entries


def _run(route: Route, tensors: Mapping[str, Array], step: Step) -> Result:
    return execute(route, tensors, Context.from_headers({}, longest_s=_MAX_STEP_S), step=step)
