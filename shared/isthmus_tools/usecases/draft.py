"""Exit branches for speculation: fitted on text that the model itself writes, and published in the bundle."""

from __future__ import annotations

import importlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from msgspec import structs

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Exit
from isthmus.artifacts.sampling import Sampling
from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Context
from isthmus.errors import CalibrationError, LocalError, ModelError
from isthmus.generation import Generated, GenerationRequest, Generator, TextCodec
from isthmus.pipeline import LocalHop, local_route
from isthmus.registry import Resolved, open_cache, open_registry
from isthmus.registry.registry import check_alias
from isthmus.runtime.ort_runner import UnpublishedRunner
from isthmus.runtime.session_store import SessionStore, open_store
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.calibration.exit_fit import fit, offered_tokens
from isthmus_tools.graph.decoder.exits import FINAL, FittedExit, exit_segment, matrix_of, observing
from isthmus_tools.graph.weights import LOCATION
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.publication import Publication, publish_version

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


@dataclass(frozen=True, kw_only=True)
class DraftRequest:
    """A language model of the registry, and what its exit branches are fitted on.

    `model` is NAME or NAME:VERSION. `cuts` are cuts of the bundle, the first of the default partition if none.
    `text` is prose or code; passages of it are the prompts of what the model writes, `tokens` in all. `alias` moves to
    the new version, as in `publish_version`. Units: `threads` of one run, 0 for the CPUs available.
    """

    model: str
    text: str
    registry: RegistrySettings
    cuts: Sequence[str] = ()
    tokens: int = 8000
    threads: int = 0
    alias: str = "prod"


@dataclass(frozen=True)
class DraftResult:
    """The published version, and for each cut the share of held-out tokens that its branch predicts as the model does.

    `confident` is that share among the tokens with a probability of at least `CONFIDENT` by the branch, which are the
    share `confident_tokens` of all. `tokens` were written for the fit.
    """

    publication: Publication
    exits: Sequence[ExitAgreement]
    tokens: int


CONFIDENT = 0.7


@dataclass(frozen=True)
class ExitAgreement:
    """See `DraftResult`."""

    cut: str
    agreement: float
    confident: float
    confident_tokens: float


def read_text(path: Path | None) -> str:
    """The text of a file; that of Python's own documentation, which every interpreter has, if none.

    Raises:
        LocalError: the file cannot be read.
    """
    if path is None:
        return "\n\n".join(importlib.import_module("pydoc_data.topics").topics.values())
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise LocalError(f"{path} cannot be read: {e.strerror}", file=str(path)) from e


def draft(request: DraftRequest, progress: Progress = silent) -> DraftResult:
    """Fit the exit branches of a language model's cuts, and publish them in its next version.

    Raises:
        ModelError: no language model of Isthmus's own import.
        CalibrationError: too little text.
        RegistryError: unknown model or cut, or the registry cannot be read or written.
    """
    if request.alias:
        check_alias(request.alias)
    settings = SegmentSettings(**vars(request.registry), threads=request.threads)
    registry = open_registry(settings)
    model = registry.resolve(request.model)
    bundle, text = model.bundle, model.bundle.text
    if bundle.state is None or text is None:
        raise ModelError(f"{bundle.name} is no language model: it declares no state")
    cuts = list(dict.fromkeys(name for each in request.cuts for name in bundle.cut_names(each)))
    cuts = cuts or list(bundle.default_cuts[:1])
    cache = open_cache(settings, registry)
    store = open_store(cache, settings)
    try:
        codec = TextCodec(registry.blob(text.tokenizer), text)
        written = _write(model, store, _prompts(codec, bundle, bundle.state.context, request), request.tokens, progress)
    finally:
        store.store.close()
    with cache.locate(model.digest, WHOLE) as whole, tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        progress("running the model on what it wrote")
        observed = _observe(whole.path, bundle, cuts, written, request.threads)
        matrix = matrix_of(whole.path.with_name(LOCATION), bundle)
        exits, files, agreements = {e.cut: e for e in bundle.exits}, dict[str, Path](), list[ExitAgreement]()
        for cut in cuts:
            progress(f"fitting the branch at {cut}")
            fitted, agreement = _fitted(observed, cut, matrix)
            graph, segment = exit_segment(bundle, cut, fitted)
            path = Path(folder) / f"{segment.graph.digest[7:]}.onnx"
            path.write_bytes(graph)
            files[segment.graph.digest] = path
            exits[cut] = Exit(segment, agreement.agreement)
            agreements.append(agreement)
        extended = structs.replace(bundle, exits=tuple(exits.values()))
        publication = publish_version(registry, extended, files, request.alias, before=model)
    return DraftResult(publication, agreements, sum(len(each.tokens) - each.start for each in written))


def _prompts(codec: TextCodec, bundle: Bundle, context: int, request: DraftRequest) -> list[list[int]]:
    """Passages spread over the text; in a conversation where the model has a chat template."""
    passages = [p.strip() for p in request.text.split("\n\n") if len(p.strip()) > _PASSAGE_CHARACTERS // 4]
    wanted = max(2 * _HELD_OUT, request.tokens // _WRITTEN_TOKENS)
    if len(passages) < wanted:
        raise CalibrationError(
            f"the text has {len(passages)} paragraphs of {_PASSAGE_CHARACTERS // 4} characters or more, and"
            f" {wanted} are needed for {request.tokens} tokens",
            hint="give more text with --data, or fewer --tokens",
        )
    # A token has a character or more, so half of the context is left to write in.
    most = min(_PASSAGE_CHARACTERS, context // 2)
    chosen = [passages[i * len(passages) // wanted][:most] for i in range(wanted)]
    if bundle.text is not None and bundle.text.chat_template:
        return [codec.encode_chat([{"role": "user", "content": passage}]) for passage in chosen]
    return [codec.encode(passage) for passage in chosen]


class _Written(NamedTuple):
    """Tokens of a prompt and behind it; those from `start` on are the model's."""

    tokens: list[int]
    start: int


def _write(
    model: Resolved, store: SessionStore, prompts: Sequence[list[int]], tokens: int, progress: Progress
) -> list[_Written]:
    """Prompts, each with what the model writes on it."""
    route = local_route(model.digest, model.bundle, (model.bundle.segment(WHOLE),), LocalHop(store))
    context = model.bundle.state.context if model.bundle.state is not None else 0
    ends = frozenset(model.bundle.text.eos) if model.bundle.text is not None else frozenset[int]()
    written: list[_Written] = []
    for seed, prompt in enumerate(prompts):
        progress("letting the model write", seed, len(prompts))
        asked = GenerationRequest(
            prompt=prompt,
            max_tokens=min(-(-tokens // len(prompts)), context - len(prompt)),
            sampling=Sampling(temperature=_TEMPERATURE, seed=seed),
            stop=ends,
        )
        drawn = Generator(route).run(asked, Context.from_headers({}, longest_s=_GENERATION_S), Generated())
        written.append(_Written([*prompt, *(each.token for each in drawn)], len(prompt)))
    return written


@dataclass(frozen=True)
class _Observed:
    """What the model computed: boundary tensors by cut and final states, and the passage of each row."""

    streams: dict[str, Array]
    final: Array
    passages: Array


def _observe(whole: Path, bundle: Bundle, cuts: Sequence[str], written: Sequence[_Written], threads: int) -> _Observed:
    state = bundle.state
    if state is None:
        raise ModelError(f"{bundle.name} declares no state")
    graph, segment = observing(whole, bundle, cuts)
    runner = UnpublishedRunner(graph, segment, whole.parent, threads=threads, repack=True)
    pasts = {pair.past for pair in state.pairs}
    empty = {
        spec.name: np.zeros([d if isinstance(d, int) else int(i == 0) for i, d in enumerate(spec.shape)], np.float32)
        for spec in segment.inputs
        if spec.name in pasts
    }
    found: dict[str, list[Array]] = {name: [] for name in (*cuts, FINAL)}
    for tokens, start in written:
        count = len(tokens)
        outputs = runner.run(
            {
                state.tokens: np.array([tokens], np.int64),
                state.lengths: np.array([count - 1], np.int32),
                state.total: np.array(count, np.int32),
                **empty,
            }
        )
        for name, rows in found.items():
            # The position before a token predicts it.
            rows.append(outputs[name][0, start - 1 :])
    arrays = {name: np.concatenate(rows) for name, rows in found.items()}
    final = arrays.pop(FINAL)
    rows_each = [len(each.tokens) - each.start + 1 for each in written]
    return _Observed(arrays, final, np.repeat(np.arange(len(written)), rows_each))


def _fitted(observed: _Observed, cut: str, matrix: Array) -> tuple[FittedExit, ExitAgreement]:
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
    sure = 1 / shifted.sum(axis=1) >= CONFIDENT
    agreement = ExitAgreement(
        cut,
        float(right.mean()),
        float(right[sure].mean()) if sure.any() else 0.0,
        float(sure.mean()),
    )
    return FittedExit(mapped.weights, mapped.bias, tokens), agreement
