"""Exit branches for speculation: fitted on text that the model itself writes, and published in the bundle."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.artifacts.bundle import Exit
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import LocalError, ModelError
from isthmus.generation import TextCodec
from isthmus.registry import open_cache
from isthmus.runtime.session_store import open_store
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.calibration.exit_training import ExitAgreement, fit_branch, observe, passage_prompts, write_on
from isthmus_tools.graph.decoder.exits import exit_segment, matrix_of
from isthmus_tools.graph.weights import LOCATION
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.publication import Publication, open_predecessor, publish_exits


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
    """The published version, what its new branches predict, and how many tokens were written for the fit."""

    publication: Publication
    exits: Sequence[ExitAgreement]
    tokens: int


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
    settings = SegmentSettings(**vars(request.registry), threads=request.threads)
    registry, model = open_predecessor(settings, request.model, request.alias)
    bundle, text = model.bundle, model.bundle.text
    if bundle.state is None or text is None:
        raise ModelError(f"{bundle.name} is no language model: it declares no state")
    cuts = list(dict.fromkeys(name for each in request.cuts for name in bundle.cut_names(each)))
    cuts = cuts or list(bundle.default_cuts[:1])
    cache = open_cache(settings, registry)
    store = open_store(cache, settings)
    # Sessions end before the graph is loaded once more: two copies of a large model may not fit.
    try:
        codec = TextCodec(registry.blob(text.tokenizer), text)
        written = write_on(
            model,
            store,
            passage_prompts(codec, bundle, bundle.state.context, request.text, request.tokens),
            request.tokens,
            progress,
        )
    finally:
        store.store.close()
    with cache.locate(model.digest, WHOLE) as whole, tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        progress("running the model on what it wrote")
        observed = observe(whole.path, bundle, cuts, written, request.threads)
        matrix = matrix_of(whole.path.with_name(LOCATION), bundle)
        exits, files, agreements = list[Exit](), dict[str, Path](), list[ExitAgreement]()
        for cut in cuts:
            progress(f"fitting the branch at {cut}")
            fitted, agreement = fit_branch(observed, cut, matrix)
            graph, segment = exit_segment(bundle, cut, fitted)
            path = Path(folder) / f"{segment.graph.digest[7:]}.onnx"
            path.write_bytes(graph)
            files[segment.graph.digest] = path
            exits.append(Exit(segment, agreement.agreement))
            agreements.append(agreement)
        publication = publish_exits(
            registry, bundle, exits, files, request.alias, settings=request.registry, before=model
        )
    return DraftResult(publication, agreements, sum(len(each.tokens) - each.start for each in written))
