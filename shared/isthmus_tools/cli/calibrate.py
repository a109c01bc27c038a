"""`isthmus calibrate`: learn codec tables from inputs, measure every codec's fidelity, publish both in the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.units import format_size
from isthmus_tools.cli.codec import document, show
from isthmus_tools.cli.console import errors, print_json, publication_document, run, say, show_publication
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    Alias,
    AsJson,
    DropPlan,
    ModelArgument,
    RegistryOption,
    RunThreads,
    cut_option,
    registry_settings,
)
from isthmus_tools.zoo.photos import varied_photos

PHOTOS = "photos"


def calibrate(
    model: ModelArgument,
    *,
    data: Annotated[
        str,
        typer.Option(
            help="A folder of photos, for a model that takes them; or of .npy or .npz files named after the model's"
            f" inputs. `{PHOTOS}` takes those that come with packages."
        ),
    ] = "",
    text: Annotated[
        Path | None, typer.Option(help="A text file in UTF-8, for a language model; a text that comes along if none.")
    ] = None,
    at: Annotated[list[str] | None, cut_option("Cuts, once or more; the bundle's default cuts if none.")] = None,
    all_cuts: Annotated[bool, typer.Option("--all-cuts", help="Calibrate every cut of the bundle.")] = False,
    limit: Annotated[
        float, typer.Option(help="Share of answers that must stay the same for a codec to be offered.", min=0, max=1)
    ] = 0.99,
    inputs: Annotated[
        int | None,
        typer.Option(
            help="Inputs in all (400): half of the files calibrate, half are held out to measure. Of a text, the"
            " tokens that are measured (3,200).",
            min=16,
        ),
    ] = None,
    classes: Annotated[
        str, typer.Option(help="The output whose last axis holds classes, where the bundle does not say.")
    ] = "",
    tolerance: Annotated[
        float, typer.Option(help="Without classes: the error up to which an answer is the same.", min=0)
    ] = 0.05,
    threads: RunThreads = 0,
    alias: Alias = "prod",
    drop_plan: DropPlan = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Calibrate a bundle's codecs with inputs and measure how many predictions each keeps; publishes the next version.

    A language model's codecs are measured on a text, by its perplexity and by the next tokens that stay the same.

    A plan in force stays in force, renewed where its codec has new tables. If it cannot, the alias stays with the
    planned version, unless --drop-plan is given. A cut of the plan is always calibrated.

    Example: `isthmus calibrate efficientnet-lite0 --data photos --cut 65`, `isthmus calibrate smollm2 --text a.txt`
    """
    from isthmus.registry.aliases import check_alias
    from isthmus_tools.calibration.inputs import list_files
    from isthmus_tools.usecases import calibrate as use_case
    from isthmus_tools.usecases.codec_choice import best_entry

    with errors(as_json):
        if alias:  # before the folder is read, which may take long
            check_alias(alias)
        request = use_case.CalibrateRequest(
            model=model,
            files=varied_photos() if data == PHOTOS else list_files(Path(data)) if data else (),
            data=data,
            text=text,
            registry=registry_settings(registry),
            cuts=at or [],
            all_cuts=all_cuts,
            limit=limit,
            inputs=inputs,
            classes=classes,
            tolerance=tolerance,
            threads=threads,
            alias=alias,
            drop_plan=drop_plan,
        )
        result = run(use_case.calibrate, request, quiet=as_json)
        version, calibrated = result.publication.version, result.calibrated
        if as_json:
            print_json(
                {
                    "name": version.name,
                    "version": version.version,
                    "digest": version.digest,
                    "tables": {tensor: blob.size for tensor, blob in calibrated.bundle.tables.items()},
                    "skipped": calibrated.skipped,
                    "cuts": calibrated.fidelity.cuts(),
                    **publication_document(result.publication, registry),
                    **document(calibrated.fidelity),
                }
            )
            return
        for cut in calibrated.fidelity.cuts():
            show(calibrated.fidelity, cut, top=best_entry(calibrated.fidelity, cut))
        for tensor, why in calibrated.skipped.items():
            say(f"{tensor} has no table: {why}")
        tables = calibrated.bundle.tables.values()
        weight = f", with {format_size(sum(blob.size for blob in tables))} of tables" if tables else ""
        say(f"{version.name}:{version.version} {version.digest[:19]}…{weight}")
        show_publication(result.publication, registry)
