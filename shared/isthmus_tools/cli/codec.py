"""`isthmus codec`: measured fidelity and cost of each codec at each cut, and the best codec for a target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.artifacts.choice import RAW_ID
from isthmus.artifacts.json_documents import builtins
from isthmus.errors import Missing
from isthmus.units import format_size, parse_size
from isthmus_tools.cli.console import errors, print_json, say, say_command, table
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    PICTURES,
    AsJson,
    ModelArgument,
    RegistryOption,
    check_output,
    cut_option,
    in_registry,
    read_option,
    registry_settings,
)

if TYPE_CHECKING:
    from isthmus.artifacts.bundle import Bundle
    from isthmus.artifacts.fidelity import Entry, Fidelity, Reference


def codec(
    model: ModelArgument,
    *,
    at: Annotated[list[str] | None, cut_option("Cuts, once or more; all that were measured if none.")] = None,
    agreement: Annotated[
        float | None, typer.Option(help="Find the smallest that keeps at least this share of answers.", min=0, max=1)
    ] = None,
    # `bytes` would hide the built-in.
    bytes_: Annotated[str, typer.Option("--bytes", help="Find the best of at most this size, such as 4kB.")] = "",
    pack_ms: Annotated[
        float | None, typer.Option(help="Find the best that packs and unpacks within this many milliseconds.", min=0)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the curves to this .png or .svg file; a panel for each cut.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every row, not only the Pareto front of bytes and agreement.")
    ] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Show the fidelity and cost of every codec, beside JPEG and WebP of the input; or choose one by targets.

    The choice of fewest bytes on offer stands on top, with the command that serves with it.

    Example: `isthmus codec efficientnet-lite0 --agreement 0.99 --picture curves.svg`
    """
    from isthmus.artifacts.fidelity import choose
    from isthmus_tools.usecases.calibrate import published_fidelity
    from isthmus_tools.usecases.codec_choice import apply_command, best_entry

    with errors(as_json):
        if picture is not None:
            # Before the registry is read, which may be far away.
            check_output(picture, "--picture", PICTURES)
        version, fidelity = published_fidelity(model, registry_settings(registry))
        name = f"{version.name}:{version.version}"
        cuts = _cuts(version.bundle, fidelity, at or [])
        max_bytes = read_option(parse_size, "--bytes", bytes_) if bytes_ else None
        choices: dict[str, Entry] = {}
        if (agreement, max_bytes, pack_ms) != (None, None, None):
            choices = {c: choose(fidelity, c, agreement=agreement, bytes=max_bytes, pack_ms=pack_ms) for c in cuts}
        top = {cut: choices.get(cut) or best_entry(fidelity, cut) for cut in cuts}
        if picture is not None:
            # matplotlib is loaded for a picture alone.
            from isthmus_tools.figures.fidelity import draw

            draw(fidelity, top, name, picture)
        commands = {
            cut: in_registry(apply_command(name, version.bundle, entry), registry)
            for cut, entry in top.items()
            if entry is not None
        }
        if as_json:
            rows = document(fidelity, cuts, choices)
            print_json({"name": version.name, "version": version.version, **rows, "apply": commands})
            return
        for cut in cuts:
            show(fidelity, cut, every=every, top=top[cut])
            if (entry := choices.get(cut)) is not None:
                below = "" if entry.offered else f", below the bundle's limit of {fidelity.limit:.1%}"
                say(f"cut {cut}: {entry.choice} keeps {entry.agreement:.1%} in {format_size(entry.bytes)}{below}")
            if cut in commands:
                say_command("to serve with it", commands[cut])
        if picture is not None:
            say(f"drawn: {picture}")


def show(fidelity: Fidelity, cut: str, *, every: bool = False, top: Entry | None = None) -> None:
    """Print the codecs at one cut: `top` first, then the Pareto front, or `every` entry, most bytes first.

    Pictures of the input are printed for comparison. Units: bits for one value, milliseconds of encoding and of
    decoding.
    """
    from isthmus_tools.usecases.codec_choice import pareto_front

    entries, pictures = [e for e in fidelity.entries if e.cut == cut], list(fidelity.references)
    count = len(entries) + len(pictures)
    if not every:
        entries, pictures = pareto_front(entries), pareto_front(pictures)
    rows = [*([top] if top is not None else []), *sorted((e for e in entries if e != top), key=lambda e: -e.bytes)]
    same = "same, %"
    # Of a language model, whose inputs are tokens: sizes and times are of one.
    raw = next((e.perplexity for e in fidelity.entries if e.cut == cut and e.codec == RAW_ID), 0.0)
    inputs = f"{fidelity.inputs.held_out:,} {'tokens of a text' if raw else 'inputs held out'}"
    extra = ["perplexity"] if raw else []
    table(
        f"cut {cut}: {inputs}; the same prediction: {_rule(fidelity)}; "
        f"limit {fidelity.limit:.1%}; bounds: Wilson, {fidelity.confidence:.0%}; ms to encode and to decode",
        ["codec", same, *extra, "bytes", "bits", "ms", "offered"],
        [
            *(
                (
                    f"→ {e.choice}" if e == top else str(e.choice),
                    _bounded(e),
                    *([f"{e.perplexity:.2f} ({e.perplexity / raw - 1:+.2%})"] if raw else []),
                    format_size(e.bytes),
                    f"{e.bits:.2f}",
                    f"{e.pack_ms:.2f}+{e.unpack_ms:.2f}",
                    _offered(e),
                )
                for e in rows
            ),
            *(
                (f"{r.codec} {r.quality}", _bounded(r), format_size(r.bytes), "", "", "input")
                for r in sorted(pictures, key=lambda r: -r.bytes)
            ),
        ],
        numbers=[same, *extra, "bytes", "bits", "ms"],
        drop=["ms", "bits"],
    )
    if (hidden := count - len(rows) - len(pictures)) > 0:
        say(f"{hidden} more take more bytes for no more agreement; isthmus codec --all has them")


def _offered(entry: Entry) -> str:
    raw = f", {entry.fell_back:.0%} raw" if entry.fell_back else ""
    closer = f", looks {' '.join(f'{share:.0%}' for share in entry.shares)}" if entry.looks else ""
    return ("yes" if entry.offered else "no") + raw + closer


def _bounded(measured: Entry | Reference) -> str:
    return f"{measured.agreement * 100:.1f} ({measured.low * 100:.0f}–{measured.high * 100:.0f})"


def document(
    fidelity: Fidelity, cuts: list[str] | None = None, choices: Mapping[str, Entry] | None = None
) -> dict[str, Any]:
    """The fidelity at some cuts or all, JSON-ready."""
    cuts = fidelity.cuts() if cuts is None else cuts
    return {
        "limit": fidelity.limit,
        "confidence": fidelity.confidence,
        "measure": builtins(fidelity.measure),
        "inputs": builtins(fidelity.inputs),
        "entries": [builtins(e) for e in fidelity.entries if e.cut in cuts],
        "references": [builtins(r) for r in fidelity.references],
        "chosen": {cut: builtins(entry) for cut, entry in (choices or {}).items()},
    }


def _rule(fidelity: Fidelity) -> str:
    measure = fidelity.measure
    return f"top-1 of {measure.output}" if measure.output else f"errors of at most {measure.tolerance:g}"


def _cuts(bundle: Bundle, fidelity: Fidelity, at: list[str]) -> list[str]:
    calibrated = fidelity.cuts()
    cuts = [name for text in at for name in bundle.cut_names(text)]
    for cut in cuts:
        if cut not in calibrated:
            raise Missing(
                f"no codec was measured at cut {cut!r}",
                kind="cut",
                name=cut,
                exists=calibrated,
                hint=f"calibrate it: isthmus calibrate {bundle.name} --data FOLDER --cut {cut}",
            )
    return cuts or calibrated
