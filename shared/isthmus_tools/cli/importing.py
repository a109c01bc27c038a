"""`isthmus import`: a model becomes a bundle in the registry."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.errors import ModelError
from isthmus.units import format_size
from isthmus_tools.cli.console import errors, print_json, publication_document, run, say, show_publication, warn
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    Alias,
    AsJson,
    DropPlan,
    Examples,
    RegistryOption,
    Shapes,
    cut_option,
    registry_settings,
)

if TYPE_CHECKING:
    from isthmus.artifacts.bundle import Bundle, TextEmbedding
    from isthmus.artifacts.tensors import TensorSpec


def import_model(
    model: Annotated[
        str,
        typer.Argument(
            help="An ONNX file; a factory package.module:factory of a torch or scikit-learn model; a .pt2, TorchScript"
            " .pt, .keras or .skops file; a SavedModel or Hugging Face folder; a .gguf file; or a ready model:"
            " efficientnet-lite0, all-minilm-l6-v2, llm:smollm2."
        ),
    ],
    *,
    name: Annotated[str, typer.Option(help="The model's name; by default made from the file's.")] = "",
    cut: Annotated[
        list[str] | None,
        cut_option(
            "A partition to publish, once each, the first as the default; the narrowest cut if none. Of a language"
            " model or a sentence encoder, numbers of layers."
        ),
    ] = None,
    shape: Shapes = None,
    example: Examples = None,
    freeze: Annotated[bool, typer.Option("--freeze", help="Fix the free dimensions to --shape for good.")] = False,
    free_batch: Annotated[
        bool,
        typer.Option(
            "--free-batch",
            help="Make a first dimension of 1 free, so that functions can batch requests; refused unless each row of a"
            " batch gives what it gives alone.",
        ),
    ] = False,
    preprocess: Annotated[Path | None, typer.Option(help="JSON file: how a photo becomes the input.")] = None,
    postprocess: Annotated[Path | None, typer.Option(help="JSON file: how the output becomes classes.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Class names: a JSON list, or one name a line.")] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="Of a language model: float32, float16, int8 or int4, or one for each segment of the first --cut,"
            " as in int4/float16; float32 if none."
        ),
    ] = "",
    alias: Alias = "prod",
    drop_plan: DropPlan = False,
    if_absent: Annotated[
        bool, typer.Option("--if-absent", help="Do nothing if the registry has a model of that name.")
    ] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Import a model: its weights in one file, its segments as small graphs, all under one digest.

    Example: `isthmus import detector.onnx --shape x=1x3x320x640 --cut 40`
    """
    from isthmus.artifacts.tensors import describe
    from isthmus.registry import open_registry
    from isthmus_tools.cli.inputs import read_model_inputs
    from isthmus_tools.usecases import model_import
    from isthmus_tools.usecases.language import language_facts
    from isthmus_tools.usecases.publication import findings

    with errors(as_json):
        settings = registry_settings(registry)
        request = model_import.ImportRequest(
            model=model,
            registry=settings,
            name=name,
            cuts=cut or [],
            preprocess=_document(preprocess),
            postprocess=_document(postprocess),
            labels=read_labels(labels),
            inputs=read_model_inputs(shape, example),
            freeze=freeze,
            free_batch=free_batch,
            weights=weights,
            alias=alias,
            drop_plan=drop_plan,
            if_absent=if_absent,
        )
        publication = run(model_import.import_model, request, quiet=as_json)
        version = publication.version
        # Read back: with --if-absent the version is one of an earlier import.
        bundle = open_registry(settings).bundle(version.digest)
        language = language_facts(bundle)
        if as_json:
            print_json(
                {
                    "name": bundle.name,
                    "version": version.version,
                    "digest": version.digest,
                    "weights_bytes": bundle.weights.blob.size,
                    "inputs": tensor_documents(bundle.carried(bundle.inputs)),
                    "segments": sorted(bundle.segments),
                    "default_cuts": list(bundle.default_cuts),
                    "language": language.document() if language is not None else None,
                    "registry": registry,
                    "warnings": findings(bundle),
                    **publication_document(publication, registry),
                }
            )
            return
        say(
            f"{bundle.name}:{version.version} {version.digest[:19]}…,"
            f" weights {format_size(bundle.weights.blob.size)}, segments {', '.join(sorted(bundle.segments))}"
        )
        # With --if-absent an earlier import may have chosen the cut.
        if language is not None:
            for line in language.sentences():
                say(line)
        else:
            inputs = ", ".join(describe(s.dtype, s.shape, s.name) for s in bundle.inputs)
            say(f"takes {inputs}{_fixed(model, bundle)}")
        if (embedding := bundle.embedding) is not None:
            say(embedding_text(embedding))
        elif bundle.default_cuts and language is None and not (cut or if_absent):
            default = "/".join(bundle.default_cuts)
            say(f"cut at {default}, the narrowest; isthmus cuts lists others, isthmus cut takes one")
        show_publication(publication, registry)
        warn(findings(bundle))


def tensor_documents(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    """Tensors as JSON."""
    return [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in specs]


def embedding_text(embedding: TextEmbedding) -> str:
    """How a sentence encoder takes texts, in a sentence."""
    length = ", of length 1" if embedding.normalized else ""
    return f"gives a vector for each text of at most {embedding.max_tokens} tokens ({embedding.pooling}{length})"


def _fixed(model: str, bundle: Bundle) -> str:
    """Advice where the export of a torch model fixed every dimension."""
    if ":" not in model or any(isinstance(d, str) for s in bundle.inputs for d in s.shape):
        return ""
    first = bundle.inputs[0]
    free = ",".join(["batch", *map(str, first.shape[1:])]) if first.shape else ""
    return f"; all sizes are fixed, a free one is named at the export: --shape {first.name}={free}" if free else ""


def _document(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    doc = _parsed(path, _text(path))
    if not isinstance(doc, dict):
        raise ModelError(f"{path} is not a JSON object")
    return doc


def read_labels(path: Path | None) -> list[str] | None:
    """Class names from a file: a JSON list, or a name a line.

    Raises:
        ModelError: the file is neither.
    """
    if path is None:
        return None
    text = _text(path)
    # Names may hold commas and quotes, so only a bracket means JSON; an object is parsed to be refused, not read as
    # names.
    if not text.lstrip().startswith(("[", "{")):
        # An empty line is a class too; splitlines would also split at form feeds and Unicode separators.
        return text.removesuffix("\n").split("\n") if text else []
    doc = _parsed(path, text)
    if not isinstance(doc, list) or not all(isinstance(label, str | int) for label in doc):
        raise ModelError(
            f"{path} is not a JSON list of class names", hint='["cat", "dog"], in the order of the model\'s classes'
        )
    return [str(label) for label in doc]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors mark UTF-8 with a character in front
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise ModelError(f"{path} cannot be read: {e}") from e


def _parsed(path: Path, text: str) -> Any:
    try:
        doc = json.loads(text)
        json.dumps(doc, ensure_ascii=False).encode()  # half of a surrogate pair is in no manifest
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path} cannot be read as JSON: {e}") from e
    return doc
