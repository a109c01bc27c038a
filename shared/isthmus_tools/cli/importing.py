"""`isthmus import`: a model becomes a bundle in the registry."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.artifacts.bundle import Bundle, is_model_name
from isthmus.errors import Missing, ModelError
from isthmus.units import format_size
from isthmus_tools.cli.console import (
    DEFAULT_REGISTRY,
    AsJson,
    RegistryOption,
    errors,
    out,
    print_json,
    progress_bars,
    registry_settings,
    visible,
)
from isthmus_tools.cli.cut_options import SYNTAX
from isthmus_tools.cli.publishing import DropPlan, Publication, findings, publish_version, warn
from isthmus_tools.cli.shapes import BindOption, ExampleOption, read_inputs


def import_model(
    model: Annotated[
        str,
        typer.Argument(
            help="An ONNX file, a torch model (package.module:factory or a .pt2 program), or efficientnet-lite0."
        ),
    ],
    *,
    name: Annotated[str, typer.Option(help="The model's name; by default made from the file's.")] = "",
    cut: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A partition to publish, once each. {SYNTAX} The first is the default; without any, the narrowest cut"
            " is taken."
        ),
    ] = None,
    shape: BindOption = None,
    example: ExampleOption = None,
    freeze: Annotated[bool, typer.Option("--freeze", help="Fix the free dimensions to --shape for good.")] = False,
    preprocess: Annotated[Path | None, typer.Option(help="JSON file: how a photo becomes the input.")] = None,
    postprocess: Annotated[Path | None, typer.Option(help="JSON file: how the output becomes classes.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Class names: a JSON list, or one name a line.")] = None,
    alias: Annotated[str, typer.Option(help="Let this alias mean the new version.")] = "prod",
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

    with errors(as_json):
        processing = {
            "preprocess": _document(preprocess),
            "postprocess": _document(postprocess),
            "labels": read_labels(labels),
        }
        make = publish_if_absent if if_absent else publish
        published = make(
            model,
            registry,
            name=name,
            partitions=cut or [],
            shape=shape,
            example=example,
            freeze=freeze,
            processing={k: v for k, v in processing.items() if v is not None},
            alias=alias,
            drop_plan=drop_plan,
            quiet=as_json,
        )
        version = published.version
        bundle = open_registry(registry_settings(registry)).bundle(version.digest)
        if as_json:
            print_json(
                {
                    "name": bundle.name,
                    "version": version.version,
                    "digest": version.digest,
                    "weights_bytes": bundle.weights.blob.size,
                    "inputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in bundle.inputs],
                    "segments": sorted(bundle.segments),
                    "default_cuts": list(bundle.default_cuts),
                    "registry": registry,
                    "warnings": findings(bundle),
                    **published.document(),
                }
            )
            return
        out.print(
            f"{bundle.name}:{version.version} {version.digest[:19]}…,"
            f" weights {format_size(bundle.weights.blob.size)}, segments {', '.join(sorted(bundle.segments))}",
            highlight=False,
            soft_wrap=True,
        )
        takes = ", ".join(describe(s.dtype, s.shape, s.name) for s in bundle.inputs)
        out.print(f"takes {takes}{_fixed(model, bundle)}", highlight=False, markup=False, soft_wrap=True)
        published.show()
        warn(findings(bundle))


def publish(
    model: str,
    registry: str,
    *,
    name: str = "",
    partitions: Sequence[str] = (),
    shape: Sequence[str] | None = None,
    example: Sequence[Path] | None = None,
    freeze: bool = False,
    processing: dict[str, Any] | None = None,
    alias: str = "prod",
    drop_plan: bool = False,
    quiet: bool = False,
) -> Publication:
    """Import `model` and publish it, saying what is being done.

    Raises:
        ModelError, CutError, RegistryError: it cannot be.
    """
    from isthmus.registry import open_registry
    from isthmus.registry.registry import check_alias
    from isthmus_tools.cli.sources import onnx_file
    from isthmus_tools.graph import build
    from isthmus_tools.zoo import models as zoo

    declared = zoo.entry(model).arguments() if model in zoo.ENTRIES else {"source": {"file": visible(Path(model).name)}}
    called = name or _name_of(model)
    if not is_model_name(called):
        raise ModelError(f"{called!r} cannot name a model", hint="use 1 to 63 of a-z, 0-9, '.', '_' and '-'")
    given = read_inputs(shape, example)
    store = open_registry(registry_settings(registry))
    # An export may take minutes: what the registry would refuse behind it is asked before.
    if alias:
        check_alias(alias)
    with contextlib.suppress(Missing):
        store.resolve(called)
    with (
        tempfile.TemporaryDirectory(prefix="isthmus-") as folder,
        progress_bars(quiet) as step,
        onnx_file(model, given, step) as path,
    ):
        step(f"cutting {called}")
        bundle, files = build(
            path,
            called,
            folder,
            partitions=partitions,
            bind=given.shapes,
            examples=given.examples,
            freeze=freeze,
            **{**declared, **(processing or {})},
        )
        given.check_free({spec.name: spec for spec in bundle.inputs})
        step(f"publishing {called} to {registry}")
        return publish_version(store, bundle, files, alias, drop_plan=drop_plan)


def publish_if_absent(model: str, registry: str, *, name: str = "", **how: Any) -> Publication:
    """The version that the registry has of that name, else what `publish` makes.

    Raises:
        ModelError, CutError, RegistryError: it cannot be made.
    """
    from isthmus.registry import Version, open_registry

    try:
        found = open_registry(registry_settings(registry)).resolve(name or _name_of(model))
        return Publication(Version(found.name, found.version, found.digest), alias="", was="", moved=False)
    except Missing:
        return publish(model, registry, name=name, **how)


def _fixed(model: str, bundle: Bundle) -> str:
    """What to do about a torch model whose export fixed every dimension."""
    if ":" not in model or any(isinstance(d, str) for s in bundle.inputs for d in s.shape):
        return ""
    first = bundle.inputs[0]
    free = ",".join(["batch", *map(str, first.shape[1:])]) if first.shape else ""
    return f"; all sizes are fixed, a free one is named at the export: --shape {first.name}={free}" if free else ""


def _name_of(model: str) -> str:
    stem = model.rpartition(":")[2] if ":" in model else Path(model).stem
    made = "".join(c if c.isalnum() and c.isascii() else "-" for c in stem.lower()).strip("-")[:63]
    if not is_model_name(made):
        raise ModelError(f"{model!r} makes no model name", hint="give one with --name")
    return made


def _document(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    doc = _parsed(path, _text(path))
    if not isinstance(doc, dict):
        raise ModelError(f"{path} is not a JSON object")
    return doc


def read_labels(path: Path | None) -> list[str] | None:
    """The class names in a file: a JSON list, or one name a line.

    Raises:
        ModelError: it cannot be read as either.
    """
    if path is None:
        return None
    text = _text(path)
    if not text.lstrip().startswith(("[", "{")):
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
