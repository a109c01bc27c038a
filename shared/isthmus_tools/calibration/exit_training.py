"""Training of exit branches: the model writes, what it computes is observed, and each cut's branch is fitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from isthmus.arrays import Array, empty_state, supplied_inputs
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.sampling import Sampling
from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Context
from isthmus.errors import CalibrationError, ModelError
from isthmus.generation import Generated, GenerationRequest, Generator, TextCodec
from isthmus.pipeline import LocalHop, local_route
from isthmus.registry import Resolved
from isthmus.runtime.ort_runner import UnpublishedRunner
from isthmus.runtime.session_store import SessionStore
from isthmus_tools.calibration.exit_fit import fit, offered_tokens
from isthmus_tools.graph.decoder.exits import FINAL, FittedExit, observed_values
from isthmus_tools.graph.observing import observing
from isthmus_tools.progress import Progress

# Of a passage as a prompt, and of what the model writes on it.
_PASSAGE_CHARACTERS, _WRITTEN_TOKENS = 400, 200
# Sampled, so that a small model does not repeat itself.
_TEMPERATURE = 0.7
# Of the passages, one in so many is held out.
_HELD_OUT = 5
# Tokens that a branch chooses among; SmolLM2 loses none of its acceptance beside all 49,152, and a sixth of the time.
_OFFERED = 8192
_GENERATION_S = 3600.0
_ROWS = 256
CONFIDENT = 0.7


@dataclass(frozen=True)
class ExitAgreement:
    """The share of held-out tokens that the branch of `cut` predicts as the model does.

    `confident` is that share among the tokens with a probability of at least CONFIDENT by the branch, which are the
    share `confident_tokens` of all.
    """

    cut: str
    agreement: float
    confident: float
    confident_tokens: float


def passage_prompts(codec: TextCodec, bundle: Bundle, context: int, text: str, tokens: int) -> list[list[int]]:
    """Passages spread over the text; in a conversation where the model has a chat template."""
    passages = [p.strip() for p in text.split("\n\n") if len(p.strip()) > _PASSAGE_CHARACTERS // 4]
    wanted = max(2 * _HELD_OUT, tokens // _WRITTEN_TOKENS)
    if len(passages) < wanted:
        raise CalibrationError(
            f"the text has {len(passages)} paragraphs of {_PASSAGE_CHARACTERS // 4} characters or more, and"
            f" {wanted} are needed for {tokens} tokens",
            hint="give more text with --data, or fewer --tokens",
        )
    # A token has a character or more, so half of the context is left to write in.
    most = min(_PASSAGE_CHARACTERS, context // 2)
    chosen = [passages[i * len(passages) // wanted][:most] for i in range(wanted)]
    if bundle.text is not None and bundle.text.chat_template:
        return [codec.encode_chat([{"role": "user", "content": passage}]) for passage in chosen]
    return [codec.encode(passage) for passage in chosen]


class WrittenText(NamedTuple):
    """Tokens of a prompt and behind it; those from `start` on are the model's."""

    tokens: list[int]
    start: int


def write_on(
    model: Resolved, store: SessionStore, prompts: Sequence[list[int]], tokens: int, progress: Progress
) -> list[WrittenText]:
    """Prompts, each with what the model writes on it."""
    route = local_route(model.digest, model.bundle, (model.bundle.segment(WHOLE),), LocalHop(store))
    context = model.bundle.state.context if model.bundle.state is not None else 0
    ends = frozenset(model.bundle.text.eos) if model.bundle.text is not None else frozenset[int]()
    written: list[WrittenText] = []
    for seed, prompt in enumerate(prompts):
        progress("letting the model write", seed, len(prompts))
        asked = GenerationRequest(
            prompt=prompt,
            max_tokens=min(-(-tokens // len(prompts)), context - len(prompt)),
            sampling=Sampling(temperature=_TEMPERATURE, seed=seed),
            stop=ends,
        )
        drawn = Generator(route).run(asked, Context.from_headers({}, longest_s=_GENERATION_S), Generated())
        written.append(WrittenText([*prompt, *(each.token for each in drawn)], len(prompt)))
    return written


@dataclass(frozen=True)
class ObservedStates:
    """What the model computed: boundary tensors by cut and final states, and the passage of each row."""

    streams: dict[str, Array]
    final: Array
    passages: Array


def observe(
    whole: Path, bundle: Bundle, cuts: Sequence[str], written: Sequence[WrittenText], threads: int
) -> ObservedStates:
    state = bundle.state
    if state is None:
        raise ModelError(f"{bundle.name} declares no state")
    graph, segment = observing(whole, bundle.segment(WHOLE), observed_values(bundle, cuts))
    runner = UnpublishedRunner(graph, segment, whole.parent, threads=threads, repack=True)
    empty = empty_state(state, segment.inputs)
    found: dict[str, list[Array]] = {name: [] for name in (*cuts, FINAL)}
    for tokens, start in written:
        count = len(tokens)
        outputs = runner.run(
            {
                state.tokens: np.array([tokens], np.int64),
                **supplied_inputs(state, np.array([count - 1], np.int32), count),
                **empty,
            }
        )
        for name, rows in found.items():
            # The position before a token predicts it.
            rows.append(outputs[name][0, start - 1 :])
    arrays = {name: np.concatenate(rows) for name, rows in found.items()}
    final = arrays.pop(FINAL)
    rows_each = [len(each.tokens) - each.start + 1 for each in written]
    return ObservedStates(arrays, final, np.repeat(np.arange(len(written)), rows_each))


def fit_branch(observed: ObservedStates, cut: str, matrix: Array) -> tuple[FittedExit, ExitAgreement]:
    # Whole passages: neighbouring tokens of one passage would be on both sides.
    held_out = observed.passages % _HELD_OUT == 0
    stream, final = observed.streams[cut], observed.final
    # In parts, since a row of scores has the whole vocabulary.
    parts = np.array_split(final, -(-len(final) // _ROWS))
    predicted = np.concatenate([(part @ matrix.T).argmax(axis=1) for part in parts])
    mapped = fit(stream[~held_out], final[~held_out])
    seen = [token for token, _ in Counter(predicted.tolist()).most_common()]
    tokens = offered_tokens(seen, len(matrix), _OFFERED)
    scores = mapped(stream[held_out]) @ matrix[tokens].T
    right = tokens[scores.argmax(axis=1)] == predicted[held_out]
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    # The largest of the softmax, without the division of the others.
    sure = 1 / shifted.sum(axis=1) >= CONFIDENT
    agreement = ExitAgreement(
        cut,
        float(right.mean()),
        float(right[sure].mean()) if sure.any() else 0.0,
        float(sure.mean()),
    )
    return FittedExit(mapped.weights, mapped.bias, tokens), agreement
