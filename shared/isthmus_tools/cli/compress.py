"""`isthmus compress`: variants of a head for the edge, measured beside the head itself, published in the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.settings import MAX_THREADS
from isthmus.units import format_duration, format_size
from isthmus_tools.cli.calibrate import PHOTOS
from isthmus_tools.cli.console import errors, print_json, publication_document, run, say, show_publication, table
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    Alias,
    AsJson,
    ModelArgument,
    RegistryOption,
    cut_option,
    registry_settings,
)
from isthmus_tools.zoo.photos import varied_photos

if TYPE_CHECKING:
    from isthmus_tools.usecases.compress import CompressResult


def compress(
    model: ModelArgument,
    *,
    data: Annotated[
        str,
        typer.Option(
            help="A folder of photos, for a model that takes them; or of .npy or .npz files named after the model's"
            f" inputs. `{PHOTOS}` takes those that come with packages."
        ),
    ],
    cut: Annotated[str, cut_option("The head's end; the bundle's first default cut if none.")] = "",
    whole: Annotated[
        bool, typer.Option("--whole", help="Compress the whole model, for an edge without a link.")
    ] = False,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="int8, weights-int8 and weights-int4 (of linear layers), prune, prune-int8 or distil; once or more."
            " Those of the first four that apply if none."
        ),
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(help="Share of the head's multiply-accumulates that pruning leaves (0.9 and 0.75); once or more."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Publish the one variant that meets this: 5ms of a run, 2MB of graph and weights, or 99% of"
            " predictions as the model's; once or more."
        ),
    ] = None,
    dominated: Annotated[
        bool, typer.Option("--dominated", help="Publish variants too that another beats in everything.")
    ] = False,
    limit: Annotated[
        float, typer.Option(help="Share of predictions below which int8 leaves layers in float.", min=0, max=1)
    ] = 0.99,
    inputs: Annotated[
        int, typer.Option(help="Inputs in all: half of the files calibrate, half are held out to measure.", min=16)
    ] = 200,
    classes: Annotated[
        str, typer.Option(help="The output whose last axis holds classes, where the bundle does not say.")
    ] = "",
    tolerance: Annotated[
        float, typer.Option(help="Without classes: the error up to which a prediction is the same.", min=0)
    ] = 0.05,
    no_vnni: Annotated[
        bool, typer.Option("--no-vnni", help="The edge's CPU has no VNNI instructions: weights of 7 bits.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads of one run.", min=1, max=MAX_THREADS)] = 1,
    alias: Alias = "prod",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Compress a head for the edge: int8, pruned channels, and more; each measured. Publishes the next version.

    A variant takes and gives the head's own tensors, so that the tail need not change. Its size, its time on this
    machine beside the head's, its memory, and the share of held-out inputs with the model's own prediction are in the
    bundle, and plans offer it. One that another beats in everything, or that keeps less than half of the predictions,
    is shown and not published.

    Example: `isthmus compress efficientnet-lite0 --data photos --cut 65 --method int8 --target 99%`
    """
    from isthmus.registry.aliases import check_alias
    from isthmus_tools.calibration.inputs import list_files
    from isthmus_tools.usecases import compress as use_case

    with errors(as_json):
        if alias:  # before the folder is read, which may take long
            check_alias(alias)
        request = use_case.CompressRequest(
            model=model,
            registry=registry_settings(registry),
            files=varied_photos() if data == PHOTOS else list_files(Path(data)),
            data=data,
            cut=cut,
            whole=whole,
            methods=method or (),
            **({"keep": keep} if keep else {}),
            targets=target or (),
            publish_dominated=dominated,
            limit=limit,
            inputs=inputs,
            classes=classes,
            tolerance=tolerance,
            threads=threads,
            reduce_range=True if no_vnni else None,
            alias=alias,
        )
        # Progress shows on standard error, so that a pipe gets the table alone.
        result = run(use_case.compress, request, quiet=as_json)
        if as_json:
            published = publication_document(result.publication, registry) if result.publication else {}
            version = result.publication.version if result.publication else None
            print_json(
                {
                    "name": version.name if version else model,
                    "version": version.version if version else "",
                    "digest": version.digest if version else "",
                    **result.document(),
                    **published,
                }
            )
            return
        show_variants(result)
        if result.publication is None:
            say("nothing published: no variant gains on the segment, or it keeps too few predictions (--dominated)")
            return
        version = result.publication.version
        say(f"{version.name}:{version.version} {version.digest[:19]}…, with {', '.join(result.published)}")
        show_publication(result.publication, registry)


def show_variants(result: CompressResult) -> None:
    """Print the head and its variants as a table, and why others are missing."""
    plain = result.plain
    # The segment itself first: every other row is read against it.
    rows = [
        [
            "",
            "the segment itself",
            format_size(plain.size),
            format_duration(plain.seconds),
            "1.00",
            format_size(plain.memory_bytes),
            "100%",
            "",
            "0",
            "",
        ]
    ]
    for each in result.variants:
        fate = "published" if each.name in result.published else ""
        if each.name in result.dominated:
            fate = f"{fate} beaten by {result.dominated[each.name]}".strip()
        rows.append(
            [
                each.name,
                each.method,
                format_size(each.segment.graph.size),
                format_duration(each.seconds),
                f"{each.seconds_ratio:.2f}",
                format_size(each.memory_bytes),
                f"{each.agreement:.1%}",
                f"{each.low:.1%} to {each.high:.1%}",
                f"{each.error:.3g}",
                fate,
            ]
        )
    table(
        f"{result.segment.id}",
        ["variant", "method", "size", "time", "ratio", "memory", "agreement", "interval", "error", ""],
        rows,
        numbers=("size", "time", "ratio", "memory", "agreement", "error"),
        drop=("error", "memory", "interval"),
    )
    for name, reason in result.refused.items():
        say(f"{name} does not apply: {reason}")
