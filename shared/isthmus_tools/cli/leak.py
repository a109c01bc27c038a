"""`isthmus leak`: reconstruction of inputs from boundary tensors, by attackers trained on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.artifacts.json_documents import builtins
from isthmus_tools.cli.calibrate import PHOTOS
from isthmus_tools.cli.console import errors, print_json, published_document, run, say, show_publication, table
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    PICTURES,
    Alias,
    AsJson,
    DropPlan,
    ModelArgument,
    RegistryOption,
    RunThreads,
    check_output,
    cut_option,
    registry_settings,
)
from isthmus_tools.zoo.photos import varied_photos

if TYPE_CHECKING:
    from isthmus.artifacts.leak import Leak, Likeness


def leak(
    model: ModelArgument,
    *,
    data: Annotated[
        str,
        typer.Option(
            help="A folder of public inputs: photos, or .npy or .npz files named after the model's inputs."
            f" `{PHOTOS}` takes those that come with packages. Half train the attackers, half are held out."
        ),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(help="Classes of the inputs: CSV lines FILE,LABEL, or .npy or .json in the order of files."),
    ] = None,
    at: Annotated[list[str] | None, cut_option("Cuts, once or more; all of the bundle if none.")] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            help="A codec beside raw, such as int8/1 or transform/4@0.6, once or more; if none, what a plan would take"
            " at each calibrated cut."
        ),
    ] = None,
    classifier: Annotated[
        str, typer.Option(help="Classify reconstructions with this bundle of the registry; with the model if none.")
    ] = "",
    inputs: Annotated[int, typer.Option(help="Inputs in all.", min=32, max=20_000)] = 600,
    steps: Annotated[int, typer.Option(help="Steps of each network's training.", min=1, max=10**6)] = 400,
    seconds: Annotated[float, typer.Option(help="End each training after so long; 0 is no limit.", min=0)] = 120.0,
    side: Annotated[
        int, typer.Option(help="Pixels of the longer side at which photos are reconstructed and compared.", min=8)
    ] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the halves and of all training.", min=0, max=2**31)] = 0,
    threads: RunThreads = 0,
    picture: Annotated[
        Path | None, typer.Option(help="Draw some held-out inputs and their reconstructions to this .png or .svg file.")
    ] = None,
    alias: Alias = "prod",
    drop_plan: DropPlan = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Measure how well attackers reconstruct inputs from what crosses each cut, by codec. Publishes the next version.

    A ridge regression and an inverse network train on public inputs and are measured on further inputs; the stronger
    counts. Values are lower bounds of the leak: a better attacker may do better. `isthmus plan --private-ssim` plans by
    these.

    Example: `isthmus leak efficientnet-lite0 --data photos --cut 31 --codec int4/1 --picture leak.png`
    """
    from isthmus.registry.aliases import check_alias
    from isthmus_tools.usecases import leak as use_case

    with errors(as_json):
        if alias:
            check_alias(alias)
        if picture is not None:
            check_output(picture, "--picture", PICTURES)
        request = use_case.LeakRequest(
            model=model,
            registry=registry_settings(registry),
            data=None if data == PHOTOS else Path(data),
            photos=varied_photos() if data == PHOTOS else (),
            labels=labels,
            cuts=at or [],
            codecs=codec or [],
            classifier=classifier,
            inputs=inputs,
            steps=steps,
            seconds=seconds,
            side=side,
            seed=seed,
            threads=threads,
            alias=alias,
            drop_plan=drop_plan,
        )
        result = run(use_case.leak, request, quiet=as_json)
        version = result.publication.version
        if picture is not None:
            from isthmus_tools.figures.leak import draw

            shown = result.reconstructions
            draw(result.leak, shown.originals, shown.baseline[0], shown.by_choice, version.name, picture)
        if as_json:
            print_json(published_document(result.publication, registry, **builtins(result.leak)))
            return
        _show(result.leak)
        say(f"{version.name}:{version.version} {version.digest[:19]}…")
        show_publication(result.publication, registry)


def _show(leak: Leak) -> None:
    rows = [
        [entry.cut, str(entry.choice), entry.attacker, *_cells(entry.likeness), f"{entry.linear.similarity:.3f}"]
        for entry in leak.entries
    ]
    inputs, shape = leak.inputs, " x ".join(map(str, leak.shape))
    name = {"ssim": "SSIM", "correlation": "correlation"}[leak.measure]
    table(
        f"{inputs.held_out} held-out inputs reconstructed by attackers trained on {inputs.trained}, at {shape};"
        " lower bounds: a better attacker may do better",
        ["cut", "codec", "attacker", name, "95th percentile", "PSNR", "same class", "linear attacker"],
        [["none", "", "mean input", *_cells(leak.baseline), ""], *rows],
        numbers=[name, "95th percentile", "PSNR", "same class", "linear attacker"],
        drop=["linear attacker", "PSNR"],
    )
    if leak.original.top1 is not None:
        say(f"the inputs themselves at {shape}: {leak.original.top1:.1%} get the same class")


def _cells(likeness: Likeness) -> list[str]:
    top1 = "" if likeness.top1 is None else f"{likeness.top1:.1%}"
    return [f"{likeness.similarity:.3f}", f"{likeness.p95:.3f}", f"{likeness.psnr:.1f} dB", top1]
