"""`isthmus calibrate`: learn what codecs need from inputs, measure every codec, publish both in the bundle."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from isthmus.settings import MAX_THREADS
from isthmus.units import format_size
from isthmus_tools.cli.codec import document, show
from isthmus_tools.cli.console import (
    DEFAULT_REGISTRY,
    AsJson,
    RegistryOption,
    errors,
    out,
    print_json,
    progress_bars,
    segment_settings,
)
from isthmus_tools.cli.cut_options import SYNTAX, OldAt
from isthmus_tools.cli.publishing import DropPlan, publish_version
from isthmus_tools.zoo.photos import varied_photos

PHOTOS = "photos"


def calibrate(
    model: Annotated[str, typer.Argument(help="NAME or NAME:VERSION of a bundle in the registry.")],
    data: Annotated[
        str,
        typer.Option(
            help="A folder of photos, for a model that takes them; or of .npy or .npz files named after the model's"
            f" inputs. `{PHOTOS}` takes those that come with packages."
        ),
    ],
    *,
    at: Annotated[
        list[str] | None, typer.Option("--cut", help=f"Cuts of the bundle, once or more; all if none. {SYNTAX}")
    ] = None,
    old_at: OldAt = None,
    limit: Annotated[
        float, typer.Option(help="Share of answers that must stay the same for a codec to be offered.", min=0, max=1)
    ] = 0.99,
    inputs: Annotated[
        int, typer.Option(help="Inputs in all: half of the files calibrate, half are held out to measure.", min=16)
    ] = 400,
    classes: Annotated[
        str, typer.Option(help="The output whose last axis holds classes, where the bundle does not say.")
    ] = "",
    tolerance: Annotated[
        float, typer.Option(help="Without classes: the error up to which an answer is the same.", min=0)
    ] = 0.05,
    threads: Annotated[
        int, typer.Option(help="Threads of one run; 0 takes the CPUs there are.", min=0, max=MAX_THREADS)
    ] = 0,
    alias: Annotated[str, typer.Option(help="Let this alias mean the new version.")] = "prod",
    drop_plan: DropPlan = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Calibrate a bundle's codecs with inputs and measure how many answers each keeps; publishes the next version.

    A plan that the model serves by stays in force where it still holds. Where it does not, the alias stays with the
    planned version, unless --drop-plan is given.

    Example: `isthmus calibrate efficientnet-lite0 --data photos --cut 65`
    """
    from isthmus.artifacts.agreement import measure_for
    from isthmus.registry import open_cache, open_registry
    from isthmus.registry.registry import check_alias
    from isthmus_tools.calibration.calibrate import calibrate as run_calibration
    from isthmus_tools.calibration.inputs import files_in, open_source
    from isthmus_tools.calibration.running import runs_here

    with errors(as_json):
        settings = segment_settings(registry, threads=threads)
        if alias:
            check_alias(alias)
        store = open_registry(settings)
        found = store.resolve(model)
        texts = [*(at or []), *(old_at or [])]
        cuts = [name for text in texts for name in found.bundle.cut_names(text)] or sorted(found.bundle.cuts)
        files = varied_photos() if data == PHOTOS else files_in(Path(data))
        source = open_source(found.bundle, files, data, inputs)
        with tempfile.TemporaryDirectory(prefix="isthmus-") as folder, progress_bars(as_json) as progress:
            made = run_calibration(
                found.bundle,
                source,
                runs_here(found.digest, open_cache(settings, store), settings),
                Path(folder),
                cuts=cuts,
                count=inputs,
                limit=limit,
                measure=measure_for(found.bundle, classes, tolerance),
                progress=progress,
            )
            published = publish_version(store, made.bundle, made.files, alias, before=found, drop_plan=drop_plan)
            version = published.version
        if as_json:
            print_json(
                {
                    "name": version.name,
                    "version": version.version,
                    "digest": version.digest,
                    "tables": {tensor: blob.size for tensor, blob in made.bundle.tables.items()},
                    "skipped": made.skipped,
                    **published.document(),
                    **document(made.fidelity),
                }
            )
            return
        for cut in made.fidelity.cuts():
            show(made.fidelity, cut)
        for tensor, why in made.skipped.items():
            out.print(f"{tensor} has no table: {why}", highlight=False, markup=False, soft_wrap=True)
        tables = made.bundle.tables.values()
        weight = format_size(sum(blob.size for blob in tables))
        out.print(
            f"{version.name}:{version.version} {version.digest[:19]}…, {len(tables)} tables ({weight})",
            highlight=False,
            soft_wrap=True,
        )
        published.show()
