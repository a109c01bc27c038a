"""`isthmus why`: which parts of a photo, or which tokens, decided for a class."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from isthmus.errors import RequestMalformed
from isthmus.units import format_size
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import errors, out, print_json, progress_bars, say, table
from isthmus_tools.cli.infer import ROUTER, ModelPlace
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    PICTURES,
    ApiKey,
    AsJson,
    RegistryOption,
    Tensors,
    check_output,
    cut_option,
    read_api_key,
)
from isthmus_tools.zoo.photos import read_photo

# Fifths of the largest drop, two characters a cell: terminals' cells are twice as high as wide.
_SHADES = ("··", "░░", "▒▒", "▓▓", "██")
# Tokens in the table, those with the largest drops.
_MAX_TOKENS = 20


def why(
    photo: Annotated[Path | None, typer.Argument(help="The photo.")] = None,
    *,
    model: Annotated[
        str,
        typer.Option(
            help="NAME or NAME:VERSION; empty takes the router's own for photos.", autocompletion=complete_models
        ),
    ] = "",
    class_name: Annotated[
        str, typer.Option("--class", help="The class, its label or index; by default the likeliest.")
    ] = "",
    grid: Annotated[
        int | None,
        typer.Option(help="Rows and columns of cells, by default 7; of tokens the cells, by default all.", min=1),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Draw the heat map over the photo: a .png or .svg file.")] = None,
    tensor: Tensors = None,
    tokens: Annotated[
        Path | None, typer.Option(help="The tokens' texts: a JSON list, or a line for each token.")
    ] = None,
    classes: Annotated[
        str, typer.Option(metavar="OUTPUT", help="The output with the classes, where the model does not declare it.")
    ] = "",
    hidden_id: Annotated[
        int, typer.Option(help="The id that hides a token of a model without an attention mask.", min=0)
    ] = 0,
    url: Annotated[str, typer.Option(envvar="ISTHMUS_URL", help="The router.")] = ROUTER,
    local: Annotated[bool, typer.Option("--local", help="Run every segment in this process; no router.")] = False,
    cuts: Annotated[str, cut_option("With --local: a partition of the bundle, or '..' for the uncut model.")] = "",
    timeout: Annotated[
        float, typer.Option(help="Longest wait for the answer, in seconds.", min=0.001, max=86_400)
    ] = 60.0,
    registry: RegistryOption = DEFAULT_REGISTRY,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show which parts of a photo, or which tokens, decided for a class.

    Parts of the activations at the cut are hidden, and the class's probability falls where a part counts.

    Example: `isthmus why flower.jpg --local --output heat.png`, or
    `isthmus why --model sentiment --tensor input_ids=ids.npy --tokens tokens.txt`
    """
    with errors(as_json):
        place = ModelPlace(url, local, cuts, timeout, registry, read_api_key(api_key))
        if (photo is None) == (not tensor):
            raise RequestMalformed("name a photo, or tensors with --tensor NAME=FILE.npy")
        if output is not None:
            if photo is None:
                raise RequestMalformed("--output draws over a photo, and there is none", option="--output")
            check_output(output, "--output", PICTURES)
        texts = None if tokens is None else _read_tokens(tokens)
        with progress_bars(as_json) as progress:
            progress("hiding part after part")
            document = _explain(photo, tensor, place, model, class_name, grid or 0, output=classes, hidden_id=hidden_id)
            if photo is not None and output is not None:
                progress(f"drawing {output}")
                _draw(photo, document, output)
        if as_json:
            print_json({**document, "file": str(output) if output else None})
            return
        _show(document, texts)
        if output is not None:
            say(f"drawn: {output}")


def _explain(
    photo: Path | None,
    tensors: list[str] | None,
    place: ModelPlace,
    model: str,
    class_name: str,
    grid: int,
    **parameters: Any,
) -> dict[str, Any]:
    from isthmus_tools.cli.inputs import read_tensors

    inputs = read_photo(photo) if photo is not None else read_tensors(tensors)
    if place.local:
        local = place.model(model)
        return local.explain(inputs, class_name=class_name, grid=grid, timeout_s=place.timeout_s, **parameters)
    return place.client().explain(inputs, model=model, class_name=class_name, grid=grid, **parameters)


def _read_tokens(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.lstrip().startswith("["):
        return text.splitlines()
    try:
        return [str(token) for token in json.loads(text)]
    except (ValueError, RecursionError) as e:
        raise RequestMalformed(f"{path} is no JSON list of tokens: {e}", option="--tokens") from e


def _draw(photo: Path, document: Mapping[str, Any], path: Path) -> None:
    from isthmus.processing.image_decoding import MAX_PIXELS, decode
    from isthmus_tools.figures.heat_map import draw

    picture = decode(read_photo(photo), max_pixels=MAX_PIXELS)
    explanation = document["explanation"]
    draw(picture, explanation["drops"], explanation["part"], _sentence(document), path)


def _sentence(document: Mapping[str, Any]) -> str:
    """`daisy, 31.5%: most by the centre (40% of the drop) and the lower centre (14%)`."""
    chosen = document["class"]
    name = chosen["label"] if chosen["label"] is not None else f"class {chosen['index']}"
    areas = [f"the {area['where']} ({area['share']:.0%})" for area in document["explanation"].get("areas", [])[:2]]
    decided = f": most by {' and '.join(areas)}" if areas else ""
    return f"{name}, {chosen['probability']:.1%}{decided}"


def _show(document: Mapping[str, Any], texts: Sequence[str] | None) -> None:
    explanation, route = document["explanation"], document["route"]
    say(f"{document['model_name']}:{document['model_version']}: {_sentence(document)}")
    if explanation["of"] == "picture":
        _show_map(explanation["drops"])
    else:
        _show_tokens(explanation["drops"][0], texts)
    sent = f", {format_size(route['link_bytes'])} sent over the link" if route["link_bytes"] else ""
    time_ms = document["timings_ms"]["hidden"]
    say(f"{explanation['runs']} parts hidden at the {explanation['at']} in {time_ms:.0f} ms{sent}")


def _show_map(drops: Sequence[Sequence[float]]) -> None:
    """The cells as shades; a cell whose hiding raises the probability is empty."""
    most = max(0.0, *(max(row) for row in drops))
    # A terminal too narrow for square cells gets cells of one character.
    wide = 2 if 2 + 2 * len(drops[0]) <= out.width else 1
    for row in drops:
        out.print(Text("  ") + Text("".join(_shade(drop, most)[:wide] for drop in row), "dark_orange3"))
    say(f"  {_SHADES[-1][:wide]} the probability falls by {100 * most:.1f} points where this is hidden")


def _shade(drop: float, most: float) -> str:
    if drop <= 0 or not most:
        return "  "
    return _SHADES[min(len(_SHADES) - 1, int(len(_SHADES) * drop / most))]


def _show_tokens(drops: Sequence[float], texts: Sequence[str] | None) -> None:
    if texts is not None and len(texts) != len(drops):
        raise RequestMalformed(f"--tokens has {len(texts)} tokens, and {len(drops)} were hidden", option="--tokens")
    order = sorted(range(len(drops)), key=lambda i: -abs(drops[i]))[:_MAX_TOKENS]
    table(
        "the probability, in points, with each token hidden",
        ["place", "token", "points"],
        [(i, texts[i] if texts else "", f"{-100 * drops[i]:+.2f}") for i in order],
        numbers=["place", "points"],
    )
