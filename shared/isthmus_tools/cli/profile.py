"""`isthmus profile`: measure a model on its future functions."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.artifacts.segment_id import WHOLE, partition_ids
from isthmus.errors import RequestMalformed, SettingsError
from isthmus.settings import is_secret
from isthmus.units import format_size
from isthmus_tools.cli.console import errors, print_json, progress_bars, say, table
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    AsJson,
    ModelArgument,
    RegistryOption,
    Tensors,
    TimeLimit,
    budget_of,
    cut_option,
    registry_settings,
    stack_variables,
)

if TYPE_CHECKING:  # its module loads onnx and onnxruntime
    from isthmus_tools.usecases.profile import ProfileResult

EDGE, CLOUD = "edge", "cloud"
# The local engine's secret; read when no other file is named.
TOKEN_FILE = Path(".isthmus/secrets/profile-token")


def profile(
    model: ModelArgument,
    *,
    head: Annotated[str, typer.Option(help="URL of the function at the edge, which is to run heads.")] = "",
    tail: Annotated[str, typer.Option(help="URL of the function in the cloud, which is to run tails.")] = "",
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with the functions' secret profile-token. [default: {TOKEN_FILE}]")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Start edge-head and cloud-tail of stack.yml here, and measure those.")
    ] = False,
    stack: Annotated[Path, typer.Option(help="With --local: the stack file.")] = Path("stack.yml"),
    runs: Annotated[int, typer.Option(help="Runs of each segment, after two to warm up.", min=1, max=500)] = 15,
    at: Annotated[list[str] | None, cut_option("Cuts to measure, once or more; some of every part if none.")] = None,
    photo: Annotated[Path | None, typer.Option("--input", help="A photo to run the model on.")] = None,
    tensor: Tensors = None,
    time_limit: TimeLimit = "0s",
    again: Annotated[bool, typer.Option("--again", help="Measure even where a profile is up to date.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Measure a model, its segments and its nodes on deployed functions, and keep the profiles in the registry.

    Cuts that the bundle lacks are published as its next version, without moving an alias. Without --input or --tensor
    the model runs on random numbers of its inputs' shapes.

    Example: `isthmus profile efficientnet-lite0 --local`, or `isthmus profile efficientnet-lite0 --head
    http://edge:8080/function/edge-head --tail http://cloud:8080/function/cloud-tail --token-file token.txt`
    """
    from isthmus_tools.cli.inputs import read_tensors
    from isthmus_tools.usecases import profile as use_case
    from isthmus_tools.usecases.function_urls import FunctionUrls, functions_at
    from isthmus_tools.usecases.local_functions import local_functions

    with errors(as_json):
        if not (local or head or tail):
            raise RequestMalformed("name the functions with --head URL and --tail URL, or start some with --local")
        if local and (head or tail):
            raise RequestMalformed("--local starts its own functions: leave --head and --tail out")
        budget_of(time_limit)  # refuses a malformed limit before functions start
        settings = registry_settings(registry)
        request = use_case.ProfileRequest(
            model=model,
            registry=settings,
            functions=FunctionUrls() if local else functions_at(head, tail, settings, _token(token_file)),
            cuts=at or [],
            runs=runs,
            photos=[photo] if photo else [],
            tensors=read_tensors(tensor),
            again=again,
        )
        with ExitStack() as resources:
            progress = resources.enter_context(progress_bars(as_json))
            if local:
                # The start of functions takes seconds: unusable inputs fail before.
                use_case.check_inputs(request)
                functions = resources.enter_context(local_functions(stack, stack_variables(registry), progress))
                request = replace(request, functions=functions)
            # The time limit starts once the functions run.
            result = use_case.profile(replace(request, budget=budget_of(time_limit)), progress)
        if as_json:
            print_json(result.document())
        else:
            _show(result)


def _token(file: Path | None) -> str:
    path = file or TOKEN_FILE
    try:
        # The token is sent as a header, and headers are ASCII.
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError(
            f"the token cannot be read from {path}: {getattr(e, 'strerror', None) or e}",
            variable="token_file",
            hint="give the file with the functions' secret profile-token: --token-file FILE; docs/reference/profile.md",
        ) from e
    if not is_secret(text):
        raise SettingsError(
            f"{path} holds no token: it must be one word of printable characters", variable="token_file"
        )
    return text


def _show(result: ProfileResult) -> None:
    for tier, profile in result.profiles.items():
        whole, device = profile.whole, profile.device
        state = "up to date" if tier in result.up_to_date else "measured"
        say(
            f"{tier} {state}: {device.cpu}, {device.threads} of {device.cpus} CPUs, {device.runtime},"
            f" device {device.id}"
        )
        hop = "" if profile.hop is None else f"; a call costs {profile.hop.fixed_s * 1000:.2f} ms beside it"
        say(
            f"  the whole model: {_ms(whole.run.median)} ms ({_ms(whole.run.low)} to {_ms(whole.run.high)}),"
            f" {format_size(whole.memory_bytes)} of memory, on {profile.inputs} inputs{hop}"
        )
        for step in (s for s in profile.steps if s.segment == WHOLE):
            each = step.run.median / step.tokens
            say(f"  a step of {step.tokens} tokens behind {step.past}: {_ms(step.run.median)} ms, {_ms(each)} a token")
        for warning in profile.warnings:
            say(f"  unsteady or incomplete: {warning}", "yellow")
    rows = []
    for name, weight in result.cuts.items():
        cells = [name, format_size(weight)]
        for tier, segment in zip((EDGE, CLOUD), partition_ids([name]), strict=True):
            measured = result.profiles.get(tier)
            cost = measured.segments.get(segment) if measured else None
            cells += ["", ""] if cost is None else [_ms(cost.run.median), format_size(cost.memory_bytes)]
        rows.append(cells)
    columns = ["cut", "crosses", "head at the edge, ms", "memory", "tail in the cloud, ms", "memory "]
    table(result.model, columns, rows, numbers=columns[1:], drop=[columns[3], columns[5]])


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f}"
