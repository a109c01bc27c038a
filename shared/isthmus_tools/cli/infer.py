"""`isthmus infer`: ask a router, or run the bundle in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.errors import HopError, IsthmusError, RegistryError, RequestMalformed, SettingsError
from isthmus.units import format_size
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import errors, print_json, run, say, table, warn
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    ApiKey,
    AsJson,
    RegistryOption,
    check_output,
    cut_option,
    read_api_key,
    registry_settings,
)
from isthmus_tools.zoo.photos import photo_files, read_photo

if TYPE_CHECKING:
    from isthmus.client import Client
    from isthmus_tools.usecases.local_model import LocalModel

# Errors that every photo would meet: of the router or the registry.
_COMMON_ERRORS = (HopError, RegistryError, SettingsError)
# The gateway of `isthmus up`.
ROUTER = "http://127.0.0.1:8080/function/router"


def infer(
    photos: Annotated[list[Path] | None, typer.Argument(help="Photos to classify, and folders of photos.")] = None,
    *,
    model: Annotated[
        str,
        typer.Option(
            help="NAME or NAME:VERSION; empty takes the router's own for photos.", autocompletion=complete_models
        ),
    ] = "",
    tensor: Annotated[
        list[str] | None, typer.Option(help="An input tensor, NAME=FILE.npy; once for each input. Needs --model.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Tensors: write the outputs to this .npz file. Photos and folders: append a JSON line for each photo"
            " to this .jsonl file, and skip the photos that it has already."
        ),
    ] = None,
    url: Annotated[str, typer.Option(envvar="ISTHMUS_URL", help="The router.")] = ROUTER,
    local: Annotated[bool, typer.Option("--local", help="Run every segment in this process; no router.")] = False,
    cuts: Annotated[str, cut_option("With --local: a partition of the bundle, or '..' for the uncut model.")] = "",
    top_k: Annotated[int | None, typer.Option(help="Classes to show; by default as the model says.", min=1)] = None,
    timeout: Annotated[
        float, typer.Option(help="Longest wait for one answer, in seconds.", min=0.001, max=86_400)
    ] = 30.0,
    full_model: Annotated[
        bool, typer.Option("--full-model", help="Have the whole model predict: the request ends at no early exit.")
    ] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Classify photos, or run tensors through a model.

    A photo that cannot be classified is an error of its own, with --output in the photo's line; the others have their
    predictions, and the command exits with 1. The last line on standard error counts the failures by type.

    Example: `isthmus infer cat.jpg`, `isthmus infer photos/ --output results.jsonl`, or
    `isthmus infer --model magika --tensor bytes=input.npy --output out.npz`
    """
    with errors(as_json):
        where = ModelPlace(url, local, cuts, timeout, registry, read_api_key(api_key), not full_model)
        # A model without inputs takes neither photos nor tensors.
        if (photos and tensor) or not (photos or tensor or model):
            raise RequestMalformed("name photos to classify, or tensors with --tensor NAME=FILE.npy, not both")
        if output is not None:
            check_output(output, "--output", (".jsonl",) if photos else ())
        if photos and output is not None:
            _batch(photos, model, where, top_k, output, as_json)
        elif photos:
            _photos(photos, model, where, top_k, as_json)
        else:
            _tensors(tensor or [], model, where, output, as_json)


@dataclass(frozen=True)
class ModelPlace:
    """The router to ask, or with `local` this process."""

    url: str
    local: bool
    cuts: str
    timeout_s: float
    registry: str
    api_key: str | None = None
    exits: bool = True

    def model(self, name: str) -> LocalModel:
        from isthmus_tools.usecases.local_model import LocalModel

        settings = registry_settings(self.registry)
        if not name:
            from isthmus.registry import open_registry

            # The registry's only model, else the demo's, as in stack.yml.
            names = open_registry(settings).models()
            name = names[0] if len(names) == 1 else "efficientnet-lite0"
        return LocalModel(name, settings, self.cuts)

    def client(self) -> Client:
        from isthmus.client import Client
        from isthmus.http.tls import open_trust

        trust = open_trust(registry_settings(self.registry))
        return Client(self.url, timeout_s=self.timeout_s, trust=trust, api_key=self.api_key, exits=self.exits)


def _photos(photos: list[Path], model: str, where: ModelPlace, top_k: int | None, as_json: bool) -> None:
    paths = list(photo_files(photos))
    if len(paths) == 1:
        read_photo(paths[0])  # loading a model takes longer than to see that the file is not there
    predict = _predictor(model, where, top_k)
    documents, failures = [], Counter[str]()
    for path in paths:
        try:
            response = predict(read_photo(path))
        except IsthmusError as e:
            # One photo's error is the command's. An error of the router or the model, too: every photo would fail.
            if len(paths) == 1 or isinstance(e, _COMMON_ERRORS):
                raise
            failures[type(e).__name__] += 1
            documents.append({"photo": str(path), "error": e.message, "type": type(e).__name__})
            if not as_json:
                warn([f"{path}: {e.message}"])
            continue
        documents.append({"photo": str(path), **response, **served(response["route"])})
        if not as_json:
            _show(path, response)
    if as_json:
        print_json(documents)
    elif len(paths) > 1:
        say(f"{len(paths) - failures.total()} of {len(paths)} photos classified")
    _check_failures(failures, len(paths))


def _check_failures(failures: Mapping[str, int], photos: int) -> None:
    """Raise if photos failed, once all other results are written: a script goes by the exit status.

    Raises:
        RequestMalformed: names the failures by their types.
    """
    if count := sum(failures.values()):
        kinds = ", ".join(f"{number} {kind}" for kind, number in failures.items())
        raise RequestMalformed(f"{count} of {photos} photos failed: {kinds}", failed=count, photos=photos)


def _predictor(model: str, where: ModelPlace, top_k: int | None) -> Callable[[bytes], dict[str, Any]]:
    from isthmus_tools.usecases.batch import check_takes_photos

    if where.local:
        local = where.model(model)
        check_takes_photos(local)
        return lambda data: local.photo(data, top_k, where.timeout_s)
    client = where.client()
    return lambda data: client.photo(data, model=model, top_k=top_k)


def served(route: Mapping[str, Any]) -> dict[str, Any]:
    """How a request was served: the plan's candidate, the codec of each tensor sent, and bytes over the link."""
    codecs = {tensor: codec for segment in route["segments"] for tensor, codec in segment.get("codecs", {}).items()}
    # The route of a model without a plan has a name as well.
    plan = "" if route.get("name") == "default" else route.get("name", "")
    return {"plan": plan, "codecs": codecs, "link_bytes": route.get("link_bytes", 0)}


def _batch(photos: list[Path], model: str, where: ModelPlace, top_k: int | None, output: Path, as_json: bool) -> None:
    from isthmus_tools.usecases.batch import BatchRequest, classify_photos, local_predictor, remote_predictor

    if where.local:
        predict = local_predictor(where.model(model), top_k, where.timeout_s)
    else:
        predict = remote_predictor(where.client(), model, top_k)
    result = run(classify_photos, BatchRequest(photos=photos, output=output, predict=predict), quiet=as_json)
    if as_json:
        print_json({**vars(result), "file": str(output)})
    else:
        say(f"{output}: {result.classified} classified, {result.failed} with an error, {result.skipped} there already")
    _check_failures(result.errors, result.classified + result.failed + result.skipped)


def _show(path: Path, response: dict[str, Any]) -> None:
    table(
        f"{path.name} by {response['model_name']}:{response['model_version']}",
        ["class", "probability"],
        [(c["label"] or c["index"], f"{c['probability']:.4f}") for c in response["classes"]],
        numbers=["probability"],
    )
    route = response["route"]
    stages = ", ".join(f"{s['segment']} on {s['hop']} {s['ms']:.1f} ms" for s in route["segments"])
    way = served(route)
    codecs = ", ".join(dict.fromkeys(way["codecs"].values()))
    plan = f"plan {way['plan']}" if way["plan"] else "no plan"
    # Sure of the class, the head's early exit answered, and no segment behind it ran.
    ended = f"exit at {route['exit']}; " if route.get("exit") else ""
    say(f"{plan}; {ended}{f'codec {codecs}; ' if codecs else ''}{_sent(route)}")
    say(f"{stages}\n")


def _sent(facts: Mapping[str, Any]) -> str:
    """Bytes over the link and the tensors' raw size, as a phrase."""
    if not facts.get("link_bytes"):
        return "nothing sent over the link"
    raw = facts.get("link_raw_bytes", 0)
    return f"{format_size(facts['link_bytes'])} sent over the link for {format_size(raw)} of tensors"


def _tensors(tensors: list[str], model: str, where: ModelPlace, output: Path | None, as_json: bool) -> None:
    if not model:
        raise RequestMalformed("tensors need --model NAME or NAME:VERSION")
    from isthmus_tools.array_files import write_npz
    from isthmus_tools.cli.inputs import read_tensors

    arrays = read_tensors(tensors)
    if where.local:
        result = where.model(model).run(arrays, where.timeout_s)
        outputs, facts = result.outputs, result.facts()
    else:
        name, _, version = model.partition(":")
        response = where.client().infer(arrays, model=name, version=version)
        outputs, facts = response.outputs, dict(response.parameters)
    if output is not None:
        write_npz(output, outputs)
    shown = [
        {
            "name": name,
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            # An empty array has no least element.
            "min": float(array.min()) if array.size else None,
            "max": float(array.max()) if array.size else None,
        }
        for name, array in outputs.items()
    ]
    if as_json:
        print_json({"outputs": shown, "route": facts, "file": str(output) if output else None})
        return
    table(
        f"{model} in {facts.get('segments')}; plan {facts.get('plan', 'none')}; {_sent(facts)}",
        ["output", "dtype", "shape", "min", "max"],
        [[o["name"], o["dtype"], o["shape"], _short(o["min"]), _short(o["max"])] for o in shown],
        numbers=["min", "max"],
        drop=["dtype"],
    )


def _short(value: Any) -> str:
    """An output's bound in six digits; --json has all."""
    return "" if value is None else f"{value:.6g}"
