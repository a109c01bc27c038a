"""`isthmus plan`: find the best way to serve a model over a link, by measurement, and publish it in the bundle."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.errors import RequestMalformed
from isthmus.units import parse_duration, parse_rate, parse_size
from isthmus_tools.cli.console import errors, print_json, progress_bars, publication_document, say, show_publication
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    PICTURES,
    Alias,
    AsJson,
    CheckedCells,
    EdgeCpus,
    EdgeSlowdown,
    ModelArgument,
    PlanPicture,
    RegistryOption,
    Sweep,
    Tensors,
    TimeLimit,
    budget_of,
    check_output,
    edge_slowdown_of,
    read_option,
    registry_settings,
    stack_variables,
)

_RATE = "such as 10mbit, 1.5Mbit/s or unlimited"


def plan(
    model: ModelArgument,
    *,
    uplink: Annotated[str, typer.Option(help=f"Rate of the link to the cloud, {_RATE}.")] = "unlimited",
    downlink: Annotated[str, typer.Option(help="Rate back; as --uplink if not given.")] = "",
    rtt: Annotated[str, typer.Option(help="Round-trip time that the link adds.")] = "0ms",
    # Empty, since its default depends on --latency.
    objective: Annotated[
        str,
        typer.Option(
            help="latency, throughput, cost or energy; of a language model also first-token and per-token. [default:"
            " latency; with --latency, cost]"
        ),
    ] = "",
    latency: Annotated[str, typer.Option(help="Longest time of a request, such as 50ms.")] = "",
    first_token: Annotated[str, typer.Option(help="Longest time to a language model's first token.")] = "",
    per_token: Annotated[str, typer.Option(help="Longest time of a further token.")] = "",
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of the prompt that a language model is planned for. [default: 512]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of its answer. [default: 128]")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of the longest session, for its memory. [default: prompt and answer]")
    ] = None,
    sessions: Annotated[int | None, typer.Option(help="Sessions with their state kept at once. [default: 1]")] = None,
    edge_memory: Annotated[str, typer.Option(help="Most memory of the model at the edge, such as 200MB.")] = "",
    private_depth: Annotated[
        int,
        typer.Option(
            help="So many first nodes, of a language model layers, run at the edge; no cut before them, no cloud-only."
        ),
    ] = 0,
    private_ssim: Annotated[
        float | None,
        typer.Option(
            help="Only cuts whose tensors give reconstructions at most this similar to the input, as isthmus leak"
            " measured; no cloud-only."
        ),
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Largest relative error of the outputs. [default: 0.05, or calibrated]")
    ] = None,
    max_disagreement: Annotated[
        float | None, typer.Option(help="Largest share of inputs that may get another answer.")
    ] = None,
    prices: Annotated[Path | None, typer.Option(help="A TOML file with prices, for cost and energy.")] = None,
    head: Annotated[str, typer.Option(help="URL of the function at the edge, to measure on.")] = "",
    tail: Annotated[str, typer.Option(help="URL of the function in the cloud, to measure on.")] = "",
    local: Annotated[
        bool, typer.Option("--local", help="Start edge-head and cloud-tail of stack.yml here, profile and measure.")
    ] = False,
    stack: Annotated[Path, typer.Option(help="With --local: the stack file.")] = Path("stack.yml"),
    edge_slowdown: EdgeSlowdown = None,
    edge_cpus: EdgeCpus = None,
    predict_only: Annotated[bool, typer.Option("--predict-only", help="Measure nothing over the link.")] = False,
    photos: Annotated[
        list[Path] | None,
        typer.Option(
            "--input", help="A photo, a folder of photos, or a language model's text, to try candidates with."
        ),
    ] = None,
    tensor: Tensors = None,
    time_limit: TimeLimit = "5m",
    sweep: Sweep = False,
    check: CheckedCells = 0,
    picture: PlanPicture = None,
    int8: Annotated[bool, typer.Option(help="Try the model quantised to int8 at the edge.")] = True,
    publish: Annotated[
        bool | None,
        typer.Option(
            "--publish/--no-publish",
            help="Publish the plan as the model's next version. [default: if its choice was measured]",
            show_default=False,
        ),
    ] = None,
    alias: Alias = "prod",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Find the best way to serve a model over a link: the cut and its codec, or no split at all.

    Predictions prune, measurements decide: candidates run on the functions of --head and --tail, or of --local, over an
    emulated link. Without functions the plan is predicted only, says so, and is published with --publish alone. Before
    its publication nothing in service changes. A language model is planned for the time to its first token, the time of
    a token, or that of a whole answer.

    Example: `isthmus plan efficientnet-lite0 --uplink 10mbit --rtt 20ms --local`, or `isthmus plan smollm2
    --objective per-token --prompt 512 --tokens 128 --sessions 8 --uplink 4mbit --rtt 20ms --local`
    """
    from isthmus.artifacts.conditions import Conditions, Constraints, check_objective
    from isthmus.registry.aliases import check_alias
    from isthmus_tools.cli import plan_text
    from isthmus_tools.cli.inputs import read_tensors
    from isthmus_tools.planner.costs import read_prices
    from isthmus_tools.usecases import plan as use_case
    from isthmus_tools.usecases.function_urls import functions_at
    from isthmus_tools.usecases.local_functions import local_functions
    from isthmus_tools.usecases.map_check import check_map

    with errors(as_json):
        if predict_only and head:
            raise RequestMalformed("--predict-only measures nothing: leave --head and --tail out")
        if local and (head or tail):
            raise RequestMalformed("--local starts its own functions: leave --head and --tail out")
        if bool(head) != bool(tail):
            raise RequestMalformed("measuring takes both functions: --head URL and --tail URL")
        slowdown = edge_slowdown_of(edge_slowdown, edge_cpus)
        if slowdown is not None and not local:
            raise RequestMalformed("--edge-slowdown and --edge-cpus slow the edge that --local starts")
        if check and not (sweep and slowdown):
            raise RequestMalformed("--check measures cells of a slow edge's map: --sweep --local --edge-slowdown N")
        # Before minutes of measurements.
        if picture is not None:
            check_output(picture, "--picture", PICTURES)
        if alias:
            check_alias(alias)
        up = read_option(parse_rate, "--uplink", uplink)
        request = use_case.PlanRequest(
            model=model,
            registry=registry_settings(registry),
            conditions=Conditions(
                up,
                read_option(parse_rate, "--downlink", downlink) if downlink else up,
                read_option(parse_duration, "--rtt", rtt),
            ),
            constraints=Constraints(
                edge_memory_bytes=int(read_option(parse_size, "--edge-memory", edge_memory)) if edge_memory else None,
                private_depth=private_depth,
                private_ssim=private_ssim,
                latency_s=read_option(parse_duration, "--latency", latency) if latency else None,
                max_error=max_error,
                max_disagreement=max_disagreement,
                first_token_s=read_option(parse_duration, "--first-token", first_token) if first_token else None,
                per_token_s=read_option(parse_duration, "--per-token", per_token) if per_token else None,
            ),
            objective=check_objective(objective or ("cost" if latency else "latency")),
            prices=read_prices(prices) if prices else None,
            functions=functions_at(head, tail, registry_settings(registry)) if head else None,
            predict_only=predict_only,
            photos=photos or [],
            tensors=read_tensors(tensor),
            sweep=sweep,
            int8=int8,
            answer=use_case.AnswerSize(prompt, tokens, context, sessions),
            budget=budget_of(time_limit),
        )
        # Progress ends last, functions outlive the plan's measurements.
        with ExitStack() as resources:
            progress = resources.enter_context(progress_bars(as_json))
            if check or (picture is not None and not sweep):
                use_case.check_graph(request)
            if local:
                # The start of functions takes seconds: unusable inputs fail before.
                use_case.check_inputs(request)
                functions = resources.enter_context(
                    local_functions(stack, stack_variables(registry), progress, slowdown)
                )
                request = replace(request, functions=functions)
            result = resources.enter_context(use_case.plan(request, progress))
            best = result.plan
            sweeps = plan_text.Sweeps.of(best, slowdown)
            if check:
                sweeps = replace(sweeps, checked=check_map(request, result, sweeps.regions, check, progress))
            if picture is not None:
                from isthmus_tools.figures import plan as plan_figure
                from isthmus_tools.figures import regions as map_figure

                progress(f"drawing {picture}")
                if sweep:
                    map_figure.draw(best, sweeps.regions, picture)
                else:
                    plan_figure.draw(best, plan_figure.GraphCurves.of(result.graph_candidates), picture)
            publication = None
            # Last of all: a failure or an interrupt before has published nothing.
            # A prediction may be wrong, so it is published on demand alone.
            if best.measured if publish is None else publish:
                progress("publishing the plan")
                publication = result.publish(alias)
        version = f"{publication.version.name}:{publication.version.version}" if publication else ""
        if as_json:
            about: dict[str, Any] = {}
            if publication is not None:
                published = publication_document(publication, registry)
                about = {k: v for k, v in published.items() if not k.startswith("plan")}
            print_json({**plan_text.document(best, version, sweeps if sweep else None), **about})
            return
        plan_text.show(best)
        if sweep:
            plan_text.show_sweeps(sweeps)
        if picture is not None:
            say(f"drawn: {picture}")
        if publication is not None:
            say(f"published: {version}", "bold")
            show_publication(publication, registry)
        elif publish is None:
            say("not published, since nothing was measured: --publish publishes it")
        else:
            say("not published")
