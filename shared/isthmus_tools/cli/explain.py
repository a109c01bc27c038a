"""`isthmus explain`: why a model is served as its plan says."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import errors, print_json, progress_bars, say
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    PICTURES,
    AsJson,
    PlanPicture,
    RegistryOption,
    Sweep,
    check_output,
    registry_settings,
)


def explain(
    model: Annotated[
        str, typer.Argument(help="NAME or NAME:VERSION of a bundle with a plan.", autocompletion=complete_models)
    ],
    *,
    sweep: Sweep = False,
    picture: PlanPicture = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Explain a plan's choice: the terms of its cost, the runners-up, and why candidates were refused.

    Example: `isthmus explain efficientnet-lite0 --picture plan.svg`
    """
    from isthmus_tools.cli import plan_text
    from isthmus_tools.usecases import explain as use_case

    with errors(as_json):
        if picture is not None:
            check_output(picture, "--picture", PICTURES)
        settings = registry_settings(registry)
        explanation = use_case.explain(model, settings)
        bundle, plan = explanation.version, explanation.plan
        sweeps = plan_text.Sweeps.of(plan)
        if picture is not None:
            from isthmus.registry import open_cache, open_registry
            from isthmus_tools.figures import plan as plan_figure
            from isthmus_tools.figures import regions as map_figure

            with progress_bars(as_json) as progress:
                progress(f"drawing {picture}")
                if sweep:
                    map_figure.draw(plan, sweeps.regions, picture)
                else:
                    store = open_registry(settings)
                    cache = open_cache(settings, store)
                    plan_figure.draw(plan, plan_figure.GraphCurves.published(plan, bundle, store, cache), picture)
        if as_json:
            document = plan_text.document(plan, f"{bundle.name}:{bundle.version}", sweeps if sweep else None)
            print_json({**document, "explanation": explanation.document()})
            return
        plan_text.explain(explanation)
        if sweep:
            plan_text.show_sweeps(sweeps)
        if picture is not None:
            say(f"drawn: {picture}")
