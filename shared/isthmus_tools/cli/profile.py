"""`isthmus profile`: measure a model on the functions that are to run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.artifacts.segment_id import partition_ids
from isthmus.errors import RequestMalformed, SettingsError
from isthmus.settings import is_secret
from isthmus.units import format_size
from isthmus_tools.cli.console import (
    CACHE_DIR,
    DEFAULT_REGISTRY,
    AsJson,
    RegistryOption,
    errors,
    out,
    print_json,
    progress_bars,
    table,
)
from isthmus_tools.cli.cut_options import SYNTAX, OldAt
from isthmus_tools.cli.functions import TimeLimit, budget_of, places

if TYPE_CHECKING:  # it loads onnx and onnxruntime
    from isthmus_tools.cli.profiling import Outcome

EDGE, CLOUD = "edge", "cloud"
TOKEN_FILE = Path(".isthmus/secrets/profile-token")
"""Where the local engine keeps the secret; read when no other file is named."""


def profile(
    model: Annotated[str, typer.Argument(help="NAME or NAME:VERSION of a bundle in the registry.")],
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
    at: Annotated[
        list[str] | None,
        typer.Option("--cut", help=f"Cuts to measure, once or more; else some of every part. {SYNTAX}"),
    ] = None,
    old_at: OldAt = None,
    photo: Annotated[Path | None, typer.Option("--input", help="A photo to run the model on.")] = None,
    tensor: Annotated[
        list[str] | None, typer.Option(help="An input tensor, NAME=FILE.npy; once for each input.")
    ] = None,
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
    from isthmus_tools.cli.profiling import check_request, profile_tiers

    with errors(as_json):
        if not (local or head or tail):
            raise RequestMalformed("name the functions with --head URL and --tail URL, or start some with --local")
        budget_of(time_limit)
        if local:
            check_request(registry, model, photo, tensor or [])
        with progress_bars(as_json) as step, places(local, stack, registry, head, tail, step) as found:
            urls = {tier: url for tier, url in ((EDGE, found.head), (CLOUD, found.tail)) if url}
            token = found.token or _token(token_file)
            outcome = profile_tiers(
                registry,
                CACHE_DIR,
                model,
                urls,
                token,
                runs=runs,
                at=[*(at or []), *(old_at or [])],
                photo=photo,
                tensors=tensor or [],
                again=again,
                step=step,
                budget=budget_of(time_limit),
            )
        if as_json:
            print_json(outcome.document())
        else:
            _show(outcome)


def _token(file: Path | None) -> str:
    path = file or TOKEN_FILE
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise SettingsError(
            f"the token cannot be read from {path}: {getattr(e, 'strerror', None) or e}",
            variable="token_file",
            hint="give the file with the functions' secret profile-token: --token-file FILE; docs/profile.md",
        ) from e
    if not is_secret(text):
        raise SettingsError(
            f"{path} holds no token: it must be one word of printable characters", variable="token_file"
        )
    return text


def _show(outcome: Outcome) -> None:
    for tier, found in outcome.profiles.items():
        whole = found.whole
        state = "up to date" if tier in outcome.kept else "measured"
        out.print(
            f"{tier} {state}: {found.device.cpu}, {found.device.threads} of {found.device.cpus} CPUs,"
            f" {found.device.runtime}, device {found.device.id}",
            highlight=False,
            soft_wrap=True,
        )
        hop = "" if found.hop is None else f"; a call costs {found.hop.fixed_s * 1000:.2f} ms beside it"
        out.print(
            f"  the whole model: {_ms(whole.run.median)} ms ({_ms(whole.run.low)} to {_ms(whole.run.high)}),"
            f" {format_size(whole.memory_bytes)} of memory, on {found.inputs} inputs{hop}",
            highlight=False,
            soft_wrap=True,
        )
        for warning in found.warnings:
            out.print(f"  unsteady or incomplete: {warning}", style="yellow", highlight=False, soft_wrap=True)
    rows = []
    for name, weight in outcome.cuts.items():
        cells = [name, format_size(weight)]
        for tier, segment in zip((EDGE, CLOUD), partition_ids([name]), strict=True):
            measured = outcome.profiles.get(tier)
            cost = measured.segments.get(segment) if measured else None
            cells += ["", ""] if cost is None else [_ms(cost.run.median), format_size(cost.memory_bytes)]
        rows.append(cells)
    columns = ["cut", "crosses", "head at the edge, ms", "memory", "tail in the cloud, ms", "memory "]
    table(outcome.model, columns, rows, numbers=columns[1:])


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f}"
