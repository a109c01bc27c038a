"""`isthmus cuts`: where a model can be cut."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.artifacts.tensors import TensorSpec
from isthmus.units import format_size
from isthmus_tools.cli.console import errors, print_json, progress_bars, say, table
from isthmus_tools.cli.options import PICTURES, AsJson, Examples, Shapes, check_output, refuse_senseless

if TYPE_CHECKING:
    from isthmus_tools.usecases.language_sources import DecoderCutList

# The rows of a table without --all.
_SHOWN = 10


def cuts(
    model: Annotated[
        str,
        typer.Argument(
            help="An ONNX file, a torch model as package.module:factory or .pt2, or a language model: a .gguf file, a"
            " folder, or llm:smollm2."
        ),
    ],
    *,
    shape: Shapes = None,
    example: Examples = None,
    single: Annotated[bool, typer.Option("--single", help="Only cuts that one tensor crosses.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw bytes and work along the graph to this .png or .svg file.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every cut, not only the ten best and the default.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the cuts of a model along its graph: the boundary tensors, their bytes, and the work before them.

    Prints the ten that suit best as a default, by their bytes; → marks the cut that an import without --cut takes. A
    language model is cut between layers: for each cut the work before it, and the weights and the keys and values of
    both sides.

    Example: `isthmus cuts detector.onnx --shape x=1x3x320x640 --picture cuts.png`
    """
    # In the function, as in every command: help and usage errors appear without loading onnx.
    from isthmus_tools.cli.inputs import read_model_inputs
    from isthmus_tools.usecases.cut import list_cuts
    from isthmus_tools.usecases.language_sources import list_layer_cuts

    with errors(as_json):
        if (layers := list_layer_cuts(model)) is not None:
            refuse_senseless(model, {"--shape": shape, "--example": example, "--picture": picture, "--single": single})
            _show_layers(model, layers, every, as_json)
            return
        if picture is not None:
            check_output(picture, "--picture", PICTURES)
        inputs = read_model_inputs(shape, example)
        with progress_bars(as_json) as progress:
            result = list_cuts(model, inputs, single=single, progress=progress)
            if picture is not None:
                from isthmus_tools.figures.cuts import draw

                progress(f"drawing {picture}")
                draw(result.model, Path(model).name, picture, result.best[0] if result.best else "")
        graph = result.model
        if as_json:
            print_json(
                {
                    "model": model,
                    "nodes": len(graph.nodes),
                    "macs": graph.total_macs,
                    "cuts": [
                        {
                            "name": c.name,
                            "node": c.node,
                            "op": c.op,
                            "tensors": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in c.tensors],
                            "passing": list(c.passing),
                            "bytes": c.bytes,
                            "macs_before": c.macs_before,
                            "fused": c.name in result.fused,
                        }
                        for c in result.cuts
                    ],
                    "best": list(result.best[:_SHOWN]),
                    "default": result.best[0] if result.best else None,
                    "picture": str(picture) if picture else None,
                }
            )
            return
        best = result.best[:_SHOWN]
        shown = [c for c in result.cuts if every or not best or c.name in best]
        table(
            f"{len(result.cuts)} cuts of {Path(model).name}: {len(graph.nodes)} nodes,"
            f" {graph.total_macs / 1e6:.1f} M MACs",
            ["cut", "after", "MACs before", "bytes", "tensors"],
            [
                (
                    f"→ {c.name}" if c.name in best[:1] else c.name,
                    f"{c.op} (fused)" if c.name in result.fused else c.op,
                    f"{c.macs_before:.1%}",
                    format_size(c.bytes),
                    _tensors(c.tensors, c.passing),
                )
                for c in shown
            ],
            numbers=["cut", "MACs before", "bytes"],
            drop=["after", "MACs before"],
        )
        if best:
            more = f"; {len(result.cuts) - len(shown)} more: --all" if len(shown) < len(result.cuts) else ""
            say(f"→ is the cut that isthmus import takes without --cut{more}")
        if picture is not None:
            say(f"drawn: {picture}")


def _show_layers(model: str, listed: DecoderCutList, every: bool, as_json: bool) -> None:
    c = listed.config
    if as_json:
        print_json(
            {
                "model": model,
                "layers": c.layers,
                "context": c.context,
                "token_bytes": listed.token_bytes,
                "cuts": [asdict(cut) for cut in listed.cuts],
                "default": str(listed.default),
            }
        )
        return
    columns = ["layers before", "work before", "weights before", "after", "KV a token before", "after it"]
    # Neighbours differ by one layer: some, evenly spaced, show the trade.
    step = 1 if every else -(-len(listed.cuts) // _SHOWN)
    shown = [cut for cut in listed.cuts if cut.layers % step == 0 or cut.layers == listed.default]
    table(
        f"{len(listed.cuts)} cuts of {Path(model).name}: {c.layers} layers, {c.context:,} tokens of context,"
        f" {listed.token_bytes:,} bytes over any cut per token",
        columns,
        [
            (
                f"→ {cut.layers}" if cut.layers == listed.default else cut.layers,
                f"{cut.work_before:.1%}",
                format_size(cut.head_weights),
                format_size(cut.tail_weights),
                format_size(cut.head_kv_bytes),
                format_size(cut.tail_kv_bytes),
            )
            for cut in shown
        ],
        numbers=columns,
        drop=["work before", "after it"],
    )
    more = f"; {len(listed.cuts) - len(shown)} more: --all" if len(shown) < len(listed.cuts) else ""
    say(f"→ is the cut that isthmus import takes without --cut{more}; weights are counted in float32")


def _tensors(tensors: tuple[TensorSpec, ...], passing: tuple[str, ...]) -> str:
    from isthmus.artifacts.tensors import describe

    # A cut through parallel branches may hold too many tensors for a table; --json has all.
    shown = [describe(t.dtype, t.shape, t.name) + (" (an input)" if t.name in passing else "") for t in tensors[:4]]
    return "\n".join([*shown, f"and {len(tensors) - 4} more"] if len(tensors) > 4 else shown)
