"""`isthmus demo`: real photos and a real model served five ways over an emulated link, and what the planner says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.errors import RequestMalformed
from isthmus.units import format_duration, format_rate, format_size, parse_duration, parse_rate
from isthmus_tools.cli.console import errors, print_json, progress_bars, say
from isthmus_tools.cli.console import table as print_table
from isthmus_tools.cli.options import (
    AsJson,
    EdgeCpus,
    EdgeSlowdown,
    edge_slowdown_of,
    read_option,
    registry_settings,
    stack_variables,
)
from isthmus_tools.zoo.photos import read_photo, sample_photos

# The imports load onnxruntime, numpy and scipy.
if TYPE_CHECKING:
    from isthmus_tools.usecases.demo import DemoResult
    from isthmus_tools.usecases.demo_verdict import Range, Verdict

# Of the demo alone: plans and aliases of other registries stay as they are.
REGISTRY = ".isthmus/demo"


def demo(
    photos: Annotated[list[Path] | None, typer.Argument(help="Photos; five that come with packages if none.")] = None,
    *,
    stack: Annotated[Path, typer.Option(help="The stack file.")] = Path("stack.yml"),
    repeat: Annotated[int, typer.Option(help="Times each photo is sent each way; times are medians.", min=1)] = 3,
    uplink: Annotated[str, typer.Option(help="Rate of the emulated link, each way.")] = "10mbit",
    rtt: Annotated[str, typer.Option(help="Round-trip time that the link adds.")] = "20ms",
    edge_slowdown: EdgeSlowdown = None,
    edge_cpus: EdgeCpus = None,
    list_photos: Annotated[bool, typer.Option("--list", help="Print the photos' paths and leave.")] = False,
    registry: Annotated[
        str, typer.Option(help="The demo's own registry; not the one that ISTHMUS_REGISTRY names.")
    ] = REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Classify real photos with EfficientNet-Lite0 five ways: at the edge, in the cloud, and split in two.

    The same photos go each way over one emulated link, with an edge slowed 32 times unless told otherwise; then the
    planner says which way is best there, why, and where another would be. At first the model is imported.

    Example: `isthmus demo my-cat.jpg --uplink 1mbit`
    """
    with errors(as_json):
        slowdown = edge_slowdown_of(edge_slowdown, edge_cpus)
        paths = photos or sample_photos()
        if list_photos:
            if as_json:
                print_json([str(path) for path in paths])
            else:
                typer.echo("\n".join(map(str, paths)))
            return
        # The import and the start take a minute: unreadable photos are refused before.
        contents = {path.name: read_photo(path) for path in paths}
        if len(contents) < len(paths):
            raise RequestMalformed("two photos have one name: results are by name")
        rate = read_option(parse_rate, "--uplink", uplink)
        rtt_s = read_option(parse_duration, "--rtt", rtt)
        from isthmus.artifacts.conditions import Conditions
        from isthmus_tools.engine.stack import read_stack
        from isthmus_tools.usecases import demo as use_case
        from isthmus_tools.usecases.demo_model import prepare
        from isthmus_tools.usecases.local_functions import local_functions

        variables = stack_variables(registry)
        read_stack(stack, variables)
        request = use_case.DemoRequest(
            registry=registry_settings(registry),
            photos=contents,
            conditions=Conditions(rate, rate, rtt_s),
            edge_slowdown=slowdown or use_case.EDGE_SLOWDOWN,
            repeat=repeat,
        )
        with progress_bars(as_json) as progress, ExitStack() as resources:
            model = prepare(request.registry, request.model, request.cut, progress)
            functions = resources.enter_context(local_functions(stack, variables, progress, request.edge_slowdown))
            result = use_case.compare(request, model, functions, progress)
            progress("stopping the functions")
        if as_json:
            print_json(result.document())
        else:
            _show(result)
        if not result.split_is_exact:
            raise typer.Exit(1)


def _show(result: DemoResult) -> None:
    link = result.conditions
    print_table(
        f"{result.model}, {len(result.expected)} photos, over {format_rate(link.up_bps)} each way and"
        f" {format_duration(link.rtt_s)}; edge times are {result.slowed_by}",
        ["way", "latency, ms", "over the link", "edge, ms", "link, ms", "cloud, ms", "photos agree", "held out agree"],
        [
            (
                way.what,
                f"{way.medians['total_ms']:.0f}",
                format_size(way.candidate.up_bytes),
                *(f"{way.medians[part]:.0f}" for part in ("edge_ms", "link_ms", "cloud_ms")),
                f"{way.photos_agree} of {len(result.expected)}",
                "exact" if way.exact else "" if way.held_out is None else f"{way.held_out:.1%}",
            )
            for way in result.ways
        ],
        numbers=["latency, ms", "over the link", "edge, ms", "link, ms", "cloud, ms", "photos agree", "held out agree"],
    )
    say("times are medians; agreement: the likeliest class is the uncut model's. It says:")
    for photo, label in result.expected.items():
        others = [f"{way.classes[photo]} {way.name}" for way in result.ways if way.classes[photo] != label]
        say(f"  {photo}: {label}" + (f"; {', '.join(others)}" if others else ""))
    _show_verdict("the planner says", result.verdict)
    _show_verdict("where photos may not leave the edge", result.private)
    say("next:")
    say("  isthmus import model.onnx --name NAME     # your own model")
    rate, rtt = (text.replace(" ", "") for text in (format_rate(link.up_bps), format_duration(link.rtt_s)))
    say(f"  isthmus plan NAME --local --edge-slowdown {result.edge_slowdown:g} --uplink {rate} --rtt {rtt}")
    say("  isthmus up --model NAME                   # serve it, with a page at http://127.0.0.1:8080")


def _show_verdict(who: str, verdict: Verdict) -> None:
    say(f"\n{who}: {verdict.best}", "bold")
    for sentence in verdict.reasons:
        say(f"- {sentence}")
    if verdict.by_bandwidth:
        say(f"- by bandwidth, with this edge: {_ranges(verdict.by_bandwidth, _rounded_rate)}")
    say(f"- by edge, over this link: {_ranges(verdict.by_slowdown, lambda n: f'{n:.2g} times slower')}")


def _rounded_rate(bps: float) -> str:
    return format_rate(float(f"{bps:.2g}"))


def _ranges(ranges: tuple[Range, ...], text: Callable[[float], str]) -> str:
    """Each range's best way and where it begins."""
    first, *rest = ranges
    return ", ".join([first.best, *(f"{r.best} from {text(r.start)} on" for r in rest)])
