"""`isthmus show`: a version of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from isthmus.artifacts.fusion import FusionGain
from isthmus.artifacts.json_documents import builtins
from isthmus.units import format_size
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import errors, print_json, say, say_command
from isthmus_tools.cli.encrypt import grant_document, show_grants
from isthmus_tools.cli.importing import embedding_text, tensor_documents
from isthmus_tools.cli.models import cuts_text
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, in_registry, registry_settings

if TYPE_CHECKING:
    from isthmus.artifacts.bundle import Bundle, Exit
    from isthmus_tools.usecases.versions import VersionSummary


def show(
    model: Annotated[
        str, typer.Argument(help="NAME, NAME:VERSION or NAME:ALIAS of the registry.", autocompletion=complete_models)
    ],
    *,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Show a version of a model: its inputs, cuts, calibration and plan.

    `isthmus versions NAME` lists the others.

    Example: `isthmus show efficientnet-lite0:2`
    """
    from isthmus.registry import open_registry
    from isthmus_tools.usecases.encryption import list_grants
    from isthmus_tools.usecases.versions import next_command, summarise

    with errors(as_json):
        store = open_registry(registry_settings(registry))
        version = summarise(store, model)
        following = in_registry(next_command(store, f"{version.name}:{version.version}"), registry)
        grants = list_grants(store, version.digest, version.bundle)
        if as_json:
            shown = {**_document(version), "grants": [grant_document(grant) for grant in grants]}
            print_json({**shown, "next": following})
            return
        _show(version)
        if grants:
            say("encrypted:")
            show_grants(grants)
        say_command("next", following)


def _document(version: VersionSummary) -> dict[str, Any]:
    bundle = version.bundle
    return {
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "published": version.published.isoformat(),
        "aliases": list(version.aliases),
        "serves": version.serves,
        "weights_bytes": bundle.weights.blob.size,
        "language": version.language.document() if version.language is not None else None,
        "inputs": tensor_documents(bundle.carried(bundle.inputs)),
        "outputs": tensor_documents(bundle.carried(bundle.outputs)),
        "cuts": sorted(bundle.cuts),
        "default_cuts": list(bundle.default_cuts),
        "variants": [builtins(each) for each in bundle.variants],
        "calibrated": list(version.calibrated),
        "leak": list(version.leak),
        "exits": [builtins(each) for each in bundle.exits],
        "plan": version.plan,
        "fusion": _fusion(bundle),
        "redaction": "" if bundle.redaction is None else bundle.redaction.sentence(),
        "ran": version.ran,
    }


def _show(version: VersionSummary) -> None:
    from isthmus.artifacts.tensors import describe

    bundle = version.bundle
    aliases = f", {' and '.join(version.aliases)}" if version.aliases else ""
    say(f"{version.name}:{version.version}{aliases}, {version.digest}", "bold")
    for verb, specs in (("takes", bundle.inputs), ("gives", bundle.outputs)):
        # Keys and values stay with the segments: no request has them.
        say(f"{verb} {', '.join(describe(s.dtype, s.shape, s.name) for s in bundle.carried(specs))}")
    if version.language is not None:
        say("\n".join(version.language.sentences()))
    for text, doc in (
        ("takes photos too", bundle.preprocess),
        ("gives classes", bundle.postprocess),
    ):
        if doc is not None:
            say(text)
    if bundle.embedding is not None:
        say(embedding_text(bundle.embedding))
    if fusion := _fusion(bundle):
        say(fusion)
    if bundle.redaction is not None:
        say(bundle.redaction.sentence())
    # By position or layer: the order of names would put layer_10 before layer_5.
    cuts = sorted(bundle.cuts.values(), key=lambda cut: (cut.macs_before, cut.name))
    say(f"weights {format_size(bundle.weights.blob.size)}; cuts {', '.join(cut.name for cut in cuts) or 'none'}")
    for each in bundle.variants:
        say(
            f"{each.segment.id}: {each.method}; {format_size(each.segment.graph.size)}, {each.seconds_ratio:.2f} of the"
            f" segment's time, {each.agreement:.1%} of {each.inputs} predictions the same"
        )
    if version.leak:
        say(f"what leaks: measured {cuts_text(version.leak)}")
    for branch in bundle.exits:
        say(_exit_text(branch))
    say(f"calibrated: {cuts_text(version.calibrated)}; plan: {version.plan or 'none'}")


def _fusion(bundle: Bundle) -> str:
    """The fusion of an exit and the tail, or the members of a model that `isthmus fuse --members` made; else empty."""
    if bundle.fusion is not None:
        return bundle.fusion.sentence()
    source: Any = bundle.source.get("fusion")
    # A source is free text in a manifest: what is no fusion of this package says nothing.
    try:
        gain = msgspec.convert(source["gain"], FusionGain)
        members = [str(member["name"]) for member in source["members"]]
    except (TypeError, KeyError, msgspec.ValidationError):
        return ""
    return f"the sum of {', '.join(members)}: {gain.sentence()}"


def _exit_text(each: Exit) -> str:
    gate = each.gate
    if gate is None:
        return f"exit at {each.cut}: drafts tokens, {each.agreement:.0%} of held-out ones the model's"
    counted = "other than the model's" if gate.risk == "disagreement" else "wrong where the model is right"
    return (
        f"exit at {each.cut}: {gate.share:.1%} of {gate.inputs:,} held-out inputs; at most {gate.bound:.2%} of requests"
        f" exit with a class {counted}, with {gate.confidence:.4g} confidence"
    )
