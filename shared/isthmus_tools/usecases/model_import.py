"""Import: an ONNX file, a model of another framework or a ready model becomes a bundle in the registry."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from isthmus.artifacts.bundle import Bundle, is_model_name
from isthmus.errors import Missing, ModelError
from isthmus.registry import Version, open_registry
from isthmus.registry.aliases import check_alias
from isthmus.settings import RegistrySettings
from isthmus_tools.graph import build
from isthmus_tools.graph.decoder.bundler import build_decoder
from isthmus_tools.graph.encoder.bundler import build_encoder
from isthmus_tools.graph.exporting import ModelInputs
from isthmus_tools.printable import printable
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.language_sources import language_model, sentence_encoder
from isthmus_tools.usecases.publication import Publication, publish_version, with_next_command
from isthmus_tools.usecases.sources import onnx_file
from isthmus_tools.zoo import models as zoo


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """A model to import.

    `model` is an ONNX file, a model of another framework (docs/how-to/import.md) or a ready model's name; `name`
    defaults to a name made of it. The first of `cuts` (partitions as texts) is the default; without any, the narrowest
    cut is taken. `freeze`, `free_batch`: see `open_model`. `preprocess`, `postprocess` and `labels` are the bundle's; a
    ready model brings its own. A language model or a sentence encoder (docs/how-to/language-models.md) is cut between
    layers, `cuts` are numbers of layers, and the fields about shapes, batches, photos and classes are not for it.
    `alias` moves to the new version, as in `publish_version`. With `if_absent` a model of that name stays unchanged.
    `source` says more of where the model comes from, and becomes a part of the bundle's.
    """

    model: str
    registry: RegistrySettings
    name: str = ""
    cuts: Sequence[str] = ()
    inputs: ModelInputs = field(default_factory=ModelInputs)
    freeze: bool = False
    free_batch: bool = False
    weights: str = ""
    preprocess: Mapping[str, Any] | None = None
    postprocess: Mapping[str, Any] | None = None
    labels: Sequence[str] | None = None
    alias: str = "prod"
    drop_plan: bool = False
    if_absent: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)


def import_model(request: ImportRequest, progress: Progress = silent) -> Publication:
    """Import a model and publish it as the next version of its name.

    Raises:
        ModelError: the model cannot be read or exported, or has no usable name.
        CutError: a cut is not in the graph, or does not separate inputs from outputs.
        RegistryError: the registry cannot be read or written.
    """
    name = request.name or _name_of(request.model)
    store = open_registry(request.registry)
    if request.if_absent:
        with contextlib.suppress(Missing):
            model = store.resolve(name)
            version = Version(model.name, model.version, model.digest)
            return with_next_command(store, Publication(version, alias="", was="", moved=False))
    if not is_model_name(name):
        raise ModelError(f"{name!r} cannot name a model", hint="use 1 to 63 of a-z, 0-9, '.', '_' and '-'")
    if request.freeze and request.free_batch:
        raise ModelError("a batch dimension is either frozen or free: give --freeze or --free-batch, not both")
    # An export may take minutes: requests that the registry would refuse fail before.
    if request.alias:
        check_alias(request.alias)
    with contextlib.suppress(Missing):
        store.resolve(name)
    if (decoder := language_model(request.model)) is not None:
        build_bundle = partial(build_decoder, decoder, weights=request.weights or "float32")
        return _import_text_model(request, "language model", build_bundle, name, progress)
    if request.weights:
        raise ModelError(
            f"{request.model} is no decoder, and --weights is for layers of decoders alone", hint="leave --weights out"
        )
    if (encoder := sentence_encoder(request.model)) is not None:
        return _import_text_model(request, "sentence encoder", partial(build_encoder, encoder), name, progress)
    with (
        tempfile.TemporaryDirectory(prefix="isthmus-") as folder,
        onnx_file(request.model, request.inputs, progress) as path,
    ):
        progress(f"cutting {name}")
        bundle, files = build(
            path,
            name,
            folder,
            partitions=request.cuts,
            bind=request.inputs.shapes,
            examples=request.inputs.examples,
            freeze=request.freeze,
            free_batch=request.free_batch,
            **_declared(request),
        )
        request.inputs.check_free({spec.name: spec for spec in bundle.inputs})
        progress(f"publishing {name} to {request.registry.registry}")
        return publish_version(
            store, bundle, files, request.alias, settings=request.registry, drop_plan=request.drop_plan, dry_run=True
        )


def _import_text_model(
    request: ImportRequest,
    kind: str,
    build_bundle: Callable[..., tuple[Bundle, dict[str, Path]]],
    name: str,
    progress: Progress,
) -> Publication:
    options = {
        "--shape or --example": request.inputs != ModelInputs(),
        "--freeze": request.freeze,
        "--free-batch": request.free_batch,
        "--preprocess": request.preprocess is not None,
        "--postprocess": request.postprocess is not None,
        "--labels": request.labels is not None,
    }
    if senseless := [option for option, is_set in options.items() if is_set]:
        raise ModelError(
            f"{request.model} is a {kind}, which takes no {', '.join(senseless)}",
            options=senseless,
            hint="its inputs are tokens, its batch and length are free, and its tokenizer makes them of text",
        )
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        bundle, files = build_bundle(name, Path(folder), cuts=request.cuts, progress=progress)
        progress(f"publishing {name} to {request.registry.registry}")
        return publish_version(
            open_registry(request.registry),
            bundle,
            files,
            request.alias,
            settings=request.registry,
            drop_plan=request.drop_plan,
        )


def _declared(request: ImportRequest) -> dict[str, Any]:
    """Processing and source: a ready model's own, overridden by the request's."""
    if request.model in zoo.MODELS:
        own = zoo.zoo_model(request.model).arguments()
    else:
        own = {"source": {"file": printable(Path(request.model).name)}}
    overrides = {"preprocess": request.preprocess, "postprocess": request.postprocess, "labels": request.labels}
    own = {**own, "source": {**own["source"], **request.source}}
    return {**own, **{key: value for key, value in overrides.items() if value is not None}}


def _name_of(model: str) -> str:
    path = Path(model)
    # A folder's name has no suffix: Qwen2.5-0.5B is whole.
    stem = model.rpartition(":")[2] if ":" in model else path.name if path.is_dir() else path.stem
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in stem.lower()).strip("-")[:63]
    if not is_model_name(name):
        raise ModelError(f"{model!r} makes no model name", hint="give one with --name")
    return name
