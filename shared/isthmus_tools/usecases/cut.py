"""Cuts: the list of a model's cuts, and new cuts of a bundle under the same weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.segment_id import WHOLE
from isthmus.registry import open_cache
from isthmus.settings import RegistrySettings
from isthmus_tools.graph import CutInfo, Model, add_cuts, cuts, open_model
from isthmus_tools.graph.cuts import default_cuts, within_quantised_operators
from isthmus_tools.graph.decoder.bundler import add_layer_cuts
from isthmus_tools.graph.encoder.bundler import add_encoder_cuts
from isthmus_tools.graph.exporting import ModelInputs
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.publication import Publication, findings, open_predecessor, publish_version
from isthmus_tools.usecases.sources import onnx_file


@dataclass(frozen=True, kw_only=True)
class CutRequest:
    """Cuts to add to a bundle in the registry.

    `model` is NAME or NAME:VERSION. `cuts` are partitions as texts (docs/explanation/cuts.md); with `default` the first
    becomes the bundle's default. `alias` moves to the new version, as in `publish_version`.
    """

    model: str
    cuts: Sequence[str]
    registry: RegistrySettings
    default: bool = False
    alias: str = "prod"
    drop_plan: bool = False


@dataclass(frozen=True)
class CutResult:
    """The published bundle with its new segments, and the new findings of their dry run."""

    publication: Publication
    bundle: Bundle
    new_segments: Sequence[str]
    warnings: Sequence[str]

    @property
    def new_bytes(self) -> int:
        """Size of the new segments' graphs."""
        return sum(self.bundle.segments[segment].graph.size for segment in self.new_segments)


def cut(request: CutRequest, progress: Progress = silent) -> CutResult:
    """Cut a bundle again and publish the result as its next version; no weights are copied.

    Raises:
        CutError: a cut is not in the graph, or does not separate inputs from outputs.
        RegistryError: unknown model, or the registry cannot be read or written.
    """
    store, model = open_predecessor(request.registry, request.model, request.alias)
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        progress(f"fetching {model.name}:{model.version}")
        with open_cache(request.registry, store).locate(model.digest, WHOLE) as whole:
            progress(f"cutting at {', '.join(request.cuts)}")
            extend = _extension(model.bundle)
            bundle, files = extend(model.bundle, whole.path, request.cuts, Path(folder), default=request.default)
        progress("publishing")
        publication = publish_version(
            store,
            bundle,
            files,
            request.alias,
            settings=request.registry,
            before=model,
            drop_plan=request.drop_plan,
            # Cuts between layers have no dry run.
            dry_run=model.bundle.text is None and model.bundle.embedding is None,
        )
    new = sorted(bundle.segments.keys() - model.bundle.segments.keys())
    return CutResult(publication, bundle, new, findings(bundle, model.bundle))


def _extension(bundle: Bundle) -> Callable[..., tuple[Bundle, dict[str, Path]]]:
    """What adds cuts to a bundle: models of text are cut between layers."""
    if bundle.text is not None:
        return add_layer_cuts
    return add_cuts if bundle.embedding is None else add_encoder_cuts


@dataclass(frozen=True)
class CutList:
    """A model's cuts along its graph.

    `fused` names the cuts inside a quantised operator, which runtimes execute whole. `best` names the cuts that suit as
    a default, fewest bytes first: the first is what an import without cuts takes.
    """

    model: Model
    cuts: Sequence[CutInfo]
    fused: frozenset[str]
    best: tuple[str, ...] = ()


def list_cuts(model: str, inputs: ModelInputs, *, single: bool = False, progress: Progress = silent) -> CutList:
    """The cuts of an ONNX file, a torch model or a ready model along its graph; `single` keeps cuts of a single tensor.

    Raises:
        ModelError: the model cannot be read or exported.
    """
    with onnx_file(model, inputs, progress) as path:
        progress(f"reading {model}")
        opened = open_model(path, bind=inputs.shapes, examples=inputs.examples)
        inputs.check_free(opened.specs)
        # Every cut, not the narrow ones alone: the reader weighs bytes against the work before the cut.
        listed = [c for c in cuts(opened) if not single or len(c.tensors) == 1]
        within = {str(value.name) for value in within_quantised_operators(opened)}
        names = {c.name for c in listed}
        best = tuple(c.name for c in default_cuts(opened) if c.name in names)
    return CutList(opened, listed, frozenset(c.name for c in listed if within & {t.name for t in c.tensors}), best)
