"""`isthmus infer`: ask a router, or run the bundle in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.errors import RequestMalformed
from isthmus.units import format_size
from isthmus_tools.cli.console import DEFAULT_REGISTRY, AsJson, RegistryOption, errors, out, print_json, table
from isthmus_tools.cli.cut_options import SYNTAX, OldCuts
from isthmus_tools.cli.files import check_output, write_npz
from isthmus_tools.zoo.photos import read_photo

ROUTER = "http://127.0.0.1:8080/function/router"


def infer(
    photos: Annotated[list[Path] | None, typer.Argument(help="Photos to classify.")] = None,
    *,
    model: Annotated[str, typer.Option(help="NAME or NAME:VERSION; empty takes the router's own for photos.")] = "",
    tensor: Annotated[
        list[str] | None, typer.Option(help="An input tensor, NAME=FILE.npy; once for each input. Needs --model.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the output tensors to this .npz file.")] = None,
    url: Annotated[str, typer.Option(envvar="ISTHMUS_URL", help="The router.")] = ROUTER,
    local: Annotated[bool, typer.Option("--local", help="Run every segment in this process; no router.")] = False,
    cuts: Annotated[
        str, typer.Option("--cut", help=f"With --local: the partition of the bundle, or '..' for none. {SYNTAX}")
    ] = "",
    old_cuts: OldCuts = "",
    top_k: Annotated[int, typer.Option(help="Classes to show.", min=1)] = 5,
    timeout: Annotated[
        float, typer.Option(help="Longest wait for one answer, in seconds.", min=0.001, max=86_400)
    ] = 30.0,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Classify photos, or run tensors through a model.

    Example: `isthmus infer cat.jpg`, or `isthmus infer --model magika --tensor bytes=input.npy --output out.npz`
    """
    cuts = cuts or old_cuts
    with errors(as_json):
        # A model without inputs takes neither.
        if (photos and tensor) or not (photos or tensor or model):
            raise RequestMalformed("name photos to classify, or tensors with --tensor NAME=FILE.npy, not both")
        if output is not None:
            if photos:
                raise RequestMalformed("--output is for tensors; a photo's answer is printed", option="--output")
            check_output(output, "--output")
        if photos:
            _photos(photos, model, url, local, cuts, top_k, timeout, registry, as_json)
        else:
            _tensors(tensor or [], model, output, url, local, cuts, timeout, registry, as_json)


def _photos(
    photos: list[Path],
    model: str,
    url: str,
    local: bool,
    cuts: str,
    top_k: int,
    timeout: float,
    registry: str,
    as_json: bool,
) -> None:
    documents = []
    for path in photos:
        data = read_photo(path)
        if local:
            from isthmus_tools.cli.here import Here

            answer = Here(registry, model, cuts).photo(data, top_k, timeout)
        else:
            from isthmus.client import Client

            answer = Client(url, timeout_s=timeout).photo(data, model=model, top_k=top_k)
        documents.append({"photo": str(path), **answer})
        if not as_json:
            _show(path, answer)
    if as_json:
        print_json(documents)


def _show(path: Path, answer: dict[str, Any]) -> None:
    table(
        f"{path.name} by {answer['model_name']}:{answer['model_version']}",
        ["class", "probability"],
        [(c["label"] or c["index"], f"{c['probability']:.4f}") for c in answer["classes"]],
        numbers=["probability"],
    )
    route = answer["route"]
    stages = ", ".join(f"{s['segment']} on {s['hop']} {s['ms']:.1f} ms" for s in route["segments"])
    out.print(f"{stages}; {_sent(route)}\n", highlight=False, soft_wrap=True)


def _sent(facts: Mapping[str, Any]) -> str:
    """Bytes over the link, and what they stand for, as one phrase."""
    if not facts.get("link_bytes"):
        return "nothing sent over the link"
    raw = facts.get("link_raw_bytes", 0)
    return f"{format_size(facts['link_bytes'])} sent over the link for {format_size(raw)} of tensors"


def _tensors(
    tensors: list[str],
    model: str,
    output: Path | None,
    url: str,
    local: bool,
    cuts: str,
    timeout: float,
    registry: str,
    as_json: bool,
) -> None:
    if not model:
        raise RequestMalformed("tensors need --model NAME or NAME:VERSION")
    from isthmus_tools.cli.tensors import read_tensors

    arrays = read_tensors(tensors)
    if local:
        from isthmus_tools.cli.here import Here

        outputs, facts = Here(registry, model, cuts).infer(arrays, timeout)
    else:
        from isthmus.client import Client

        name, _, version = model.partition(":")
        answer = Client(url, timeout_s=timeout).infer(arrays, model=name, version=version)
        outputs, facts = answer.outputs, dict(answer.parameters)
    if output is not None:
        write_npz(output, outputs)
    shown = [
        {
            "name": name,
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "min": float(array.min()) if array.size else None,
            "max": float(array.max()) if array.size else None,
        }
        for name, array in outputs.items()
    ]
    if as_json:
        print_json({"outputs": shown, "route": facts, "file": str(output) if output else None})
        return
    table(
        f"{model} in {facts.get('segments')}; {_sent(facts)}",
        ["output", "dtype", "shape", "min", "max"],
        [list(o.values()) for o in shown],
        numbers=["min", "max"],
    )
