"""`isthmus cut`: publish more cuts of a bundle; its weights stay as they are."""

from __future__ import annotations

import tempfile
from typing import Annotated

import typer

from isthmus.artifacts.segment_id import WHOLE
from isthmus.units import format_size
from isthmus_tools.cli.console import (
    DEFAULT_REGISTRY,
    AsJson,
    RegistryOption,
    errors,
    out,
    print_json,
    progress_bars,
    registry_settings,
)
from isthmus_tools.cli.cut_options import SYNTAX, OldAt
from isthmus_tools.cli.publishing import DropPlan, findings, publish_version, warn


def cut(
    model: Annotated[str, typer.Argument(help="NAME or NAME:VERSION of a bundle in the registry.")],
    *,
    at: Annotated[
        list[str] | None,
        typer.Option("--cut", help=f"A partition, once each. {SYNTAX} They make as many segments and one more."),
    ] = None,
    old_at: OldAt = None,
    default: Annotated[bool, typer.Option("--default", help="Make the first --cut what requests take.")] = False,
    alias: Annotated[str, typer.Option(help="Let this alias mean the new version.")] = "prod",
    drop_plan: DropPlan = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Cut a bundle again and publish the result as its next version; no weights are copied. A plan stays in force.

    Example: `isthmus cut efficientnet-lite0 --cut 20/65 --default`
    """
    from isthmus.registry import open_cache, open_registry
    from isthmus.registry.registry import check_alias
    from isthmus_tools.graph import add_cuts

    partitions = [*(at or []), *(old_at or [])]
    if not partitions:
        raise typer.BadParameter("say where to cut, e.g. --cut 20", param_hint="--cut")
    with errors(as_json):
        settings = registry_settings(registry)
        if alias:
            check_alias(alias)
        store = open_registry(settings)
        found = store.resolve(model)
        with tempfile.TemporaryDirectory(prefix="isthmus-") as folder, progress_bars(as_json) as step:
            step(f"fetching {found.name}:{found.version}")
            cache = open_cache(settings, store)
            with cache.locate(found.digest, WHOLE) as whole:
                step(f"cutting at {', '.join(partitions)}")
                bundle, files = add_cuts(found.bundle, whole.path, partitions, folder, default=default)
            step("publishing")
            published = publish_version(store, bundle, files, alias, before=found, drop_plan=drop_plan)
            version = published.version
        fresh = sorted(bundle.segments.keys() - found.bundle.segments.keys())
        if as_json:
            print_json(
                {
                    "name": version.name,
                    "version": version.version,
                    "digest": version.digest,
                    "new_segments": fresh,
                    "new_bytes": sum(bundle.segments[s].graph.size for s in fresh),
                    "default_cuts": list(bundle.default_cuts),
                    "warnings": findings(bundle, found.bundle),
                    **published.document(),
                }
            )
            return
        weight = format_size(sum(bundle.segments[s].graph.size for s in fresh))
        out.print(
            f"{version.name}:{version.version} {version.digest[:19]}…, new segments "
            f"{', '.join(fresh) or 'none'} ({weight})",
            highlight=False,
            soft_wrap=True,
        )
        published.show()
        warn(findings(bundle, found.bundle))
        if default and published.plan:
            out.print(
                "requests take the way of the plan, not the default cuts: --drop-plan lets the default cuts decide",
                highlight=False,
                soft_wrap=True,
            )
