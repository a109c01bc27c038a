"""`isthmus cuts`: where a model can be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.artifacts.tensors import TensorSpec
from isthmus.units import format_size
from isthmus_tools.cli.console import AsJson, errors, out, print_json, progress_bars, table
from isthmus_tools.cli.files import PICTURES, check_output
from isthmus_tools.cli.shapes import BindOption, ExampleOption, read_inputs


def cuts(
    model: Annotated[str, typer.Argument(help="An ONNX file, or a torch model as package.module:factory or .pt2.")],
    *,
    shape: BindOption = None,
    example: ExampleOption = None,
    single: Annotated[bool, typer.Option("--single", help="Only cuts that one tensor crosses.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw bytes and work along the graph to this .png or .svg file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the cuts of a model along its graph: what crosses, how many bytes, and the share of the work before.

    Example: `isthmus cuts detector.onnx --shape x=1x3x320x640 --picture cuts.png`
    """
    from isthmus_tools.cli.sources import onnx_file
    from isthmus_tools.graph import cuts as list_cuts
    from isthmus_tools.graph import open_model
    from isthmus_tools.graph.cuts import within_quantised_operators

    with errors(as_json):
        if picture is not None:
            check_output(picture, "--picture", PICTURES)
        given = read_inputs(shape, example)
        with progress_bars(as_json) as step, onnx_file(model, given, step) as path:
            step(f"reading {model}")
            opened = open_model(path, bind=given.shapes, examples=given.examples)
            given.check_free(opened.specs)
            found = [c for c in list_cuts(opened) if not single or len(c.tensors) == 1]
            within = {str(v.name) for v in within_quantised_operators(opened)}
            fused = {c.name for c in found if within & {t.name for t in c.tensors}}
            if picture is not None:
                from isthmus_tools.figures.cuts import draw

                step(f"drawing {picture}")
                draw(opened, Path(model).name, picture)
        if as_json:
            print_json(
                {
                    "model": model,
                    "nodes": len(opened.nodes),
                    "macs": opened.total_macs,
                    "cuts": [
                        {
                            "name": c.name,
                            "node": c.node,
                            "op": c.op,
                            "tensors": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in c.tensors],
                            "passing": list(c.passing),
                            "bytes": c.bytes,
                            "macs_before": c.macs_before,
                            "fused": c.name in fused,
                        }
                        for c in found
                    ],
                    "picture": str(picture) if picture else None,
                }
            )
            return
        table(
            f"{len(found)} cuts of {Path(model).name}: {len(opened.nodes)} nodes, {opened.total_macs / 1e6:.1f} M MACs",
            ["cut", "after", "MACs before", "bytes", "tensors"],
            [
                (
                    c.name,
                    f"{c.op} (fused)" if c.name in fused else c.op,
                    f"{c.macs_before:.1%}",
                    format_size(c.bytes),
                    _tensors(c.tensors, c.passing),
                )
                for c in found
            ],
            numbers=["cut", "MACs before", "bytes"],
        )
        if picture is not None:
            out.print(f"drawn: {picture}", highlight=False)


def _tensors(tensors: tuple[TensorSpec, ...], passing: tuple[str, ...]) -> str:
    from isthmus.artifacts.tensors import describe

    shown = [describe(t.dtype, t.shape, t.name) + (" (an input)" if t.name in passing else "") for t in tensors[:4]]
    return "\n".join([*shown, f"and {len(tensors) - 4} more"] if len(tensors) > 4 else shown)
