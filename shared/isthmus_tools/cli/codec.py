"""`isthmus codec`: what each codec keeps and costs at each cut, as it was measured, and which one meets a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.artifacts.bundle import Bundle
from isthmus.errors import CalibrationError, Missing
from isthmus.units import format_size, parse_size
from isthmus_tools.cli.console import (
    DEFAULT_REGISTRY,
    AsJson,
    RegistryOption,
    errors,
    out,
    print_json,
    read_option,
    registry_settings,
    table,
)
from isthmus_tools.cli.cut_options import SYNTAX, OldAt
from isthmus_tools.cli.files import PICTURES, check_output

if TYPE_CHECKING:
    from isthmus.artifacts.fidelity import Entry, Fidelity, Reference


def codec(
    model: Annotated[str, typer.Argument(help="NAME or NAME:VERSION of a calibrated bundle in the registry.")],
    *,
    at: Annotated[
        list[str] | None, typer.Option("--cut", help=f"Cuts, once or more; all that were measured if none. {SYNTAX}")
    ] = None,
    old_at: OldAt = None,
    agreement: Annotated[
        float | None, typer.Option(help="Find the smallest that keeps at least this share of answers.", min=0, max=1)
    ] = None,
    bytes_: Annotated[str, typer.Option("--bytes", help="Find the best of at most this size, such as 4kB.")] = "",
    pack_ms: Annotated[
        float | None, typer.Option(help="Find the best that packs and unpacks within this many milliseconds.", min=0)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the curves to this .png or .svg file; a panel for each cut.")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Show what every codec keeps and costs, beside JPEG and WebP of the input; or choose one by targets.

    Example: `isthmus codec efficientnet-lite0 --agreement 0.99 --picture curves.svg`
    """
    from isthmus.artifacts.fidelity import choose
    from isthmus.artifacts.fidelity_document import read
    from isthmus.registry import open_registry

    with errors(as_json):
        if picture is not None:
            check_output(picture, "--picture", PICTURES)
        store = open_registry(registry_settings(registry))
        found = store.resolve(model)
        fidelity = read(found.bundle, store.blob)
        if fidelity is None:
            raise CalibrationError(
                f"{found.name}:{found.version} was not calibrated",
                model=found.name,
                version=found.version,
                hint=f"isthmus calibrate {found.name} --data FOLDER",
            )
        cuts = _cuts(found.bundle, fidelity, [*(at or []), *(old_at or [])])
        most = read_option(parse_size, "--bytes", bytes_) if bytes_ else None
        chosen: dict[str, Entry] = {}
        if (agreement, most, pack_ms) != (None, None, None):
            chosen = {c: choose(fidelity, c, agreement=agreement, bytes=most, pack_ms=pack_ms) for c in cuts}
        if picture is not None:
            from isthmus_tools.figures.fidelity import draw

            draw(fidelity, cuts, f"{found.name}:{found.version}", picture)
        if as_json:
            print_json({"name": found.name, "version": found.version, **document(fidelity, cuts, chosen)})
            return
        for cut in cuts:
            show(fidelity, cut)
        for cut, entry in chosen.items():
            below = "" if entry.offered else f", below the bundle's limit of {fidelity.limit:.1%}"
            out.print(
                f"cut {cut}: {_name(entry)} keeps {entry.agreement:.1%} in {format_size(entry.bytes)}{below}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        if picture is not None:
            out.print(f"drawn: {picture}", highlight=False)


def show(fidelity: Fidelity, cut: str) -> None:
    """Print what was measured at one cut, most bytes first, and what the input itself costs as a picture.

    Units: bits for one value, milliseconds of packing and of unpacking.
    """
    entries = sorted((e for e in fidelity.entries if e.cut == cut), key=lambda e: -e.bytes)
    pictures = sorted(fidelity.references, key=lambda r: -r.bytes)
    same = "same, %"
    table(
        f"cut {cut}: {fidelity.inputs.held_out} inputs held out; the same answer: {_rule(fidelity)}; "
        f"limit {fidelity.limit:.1%}; bounds: Wilson, {fidelity.confidence:.0%}; ms to pack and to unpack",
        ["codec", same, "bytes", "bits", "ms", "offered"],
        [
            *(
                (
                    _name(e),
                    _bounded(e),
                    format_size(e.bytes),
                    f"{e.bits:.2f}",
                    f"{e.pack_ms:.2f}+{e.unpack_ms:.2f}",
                    _offered(e),
                )
                for e in entries
            ),
            *((f"{r.codec} {r.quality}", _bounded(r), format_size(r.bytes), "", "", "input") for r in pictures),
        ],
        numbers=[same, "bytes", "bits", "ms"],
    )


def _offered(entry: Entry) -> str:
    raw = f", {entry.fell_back:.0%} raw" if entry.fell_back else ""
    closer = f", looks {' '.join(f'{share:.0%}' for share in entry.shares)}" if entry.looks else ""
    return ("yes" if entry.offered else "no") + raw + closer


def _bounded(measured: Entry | Reference) -> str:
    return f"{measured.agreement * 100:.1f} ({measured.low * 100:.0f}–{measured.high * 100:.0f})"


def document(
    fidelity: Fidelity, cuts: list[str] | None = None, chosen: Mapping[str, Entry] | None = None
) -> dict[str, Any]:
    """What was measured, as `--json` prints it."""
    wanted = fidelity.cuts() if cuts is None else cuts
    return {
        "limit": fidelity.limit,
        "confidence": fidelity.confidence,
        "measure": asdict(fidelity.measure),
        "inputs": asdict(fidelity.inputs),
        "entries": [asdict(e) for e in fidelity.entries if e.cut in wanted],
        "references": [asdict(r) for r in fidelity.references],
        "chosen": {cut: asdict(entry) for cut, entry in (chosen or {}).items()},
    }


def _rule(fidelity: Fidelity) -> str:
    measure = fidelity.measure
    return f"top-1 of {measure.output}" if measure.output else f"errors of at most {measure.tolerance:g}"


def _name(entry: Entry) -> str:
    return str(entry.choice)


def _cuts(bundle: Bundle, fidelity: Fidelity, at: list[str]) -> list[str]:
    known = fidelity.cuts()
    cuts = [name for text in at for name in bundle.cut_names(text)]
    for cut in cuts:
        if cut not in known:
            raise Missing(f"no codec was measured at cut {cut!r}", kind="cut", name=cut, exists=known)
    return cuts or known
