"""`isthmus fuse`: the weights of a model's exit and tail, or one model of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import structs

from isthmus.artifacts.choice import Choice
from isthmus.artifacts.fusion import FusionGain
from isthmus.errors import RequestMalformed
from isthmus_tools.cli.console import errors, print_json, published_document, run, say, show_publication
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    Alias,
    AsJson,
    ModelArgument,
    RegistryOption,
    RunThreads,
    cut_option,
    registry_settings,
)

if TYPE_CHECKING:
    from isthmus_tools.usecases.publication import Publication


def fuse(
    model: ModelArgument,
    *,
    data: Annotated[
        Path,
        typer.Option(
            help="Held-out inputs that neither the members nor an exit were trained on: a folder of photos, or of .npy"
            " or .npz files named after the model's inputs (with --members MEMBER.INPUT, as in camera.x)."
        ),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV with lines FILE,LABEL; or .npy or .json with a label for each input. Also read from folders by"
            " class and from an array `labels`. Without any, agreement with the model's own predictions counts."
        ),
    ] = None,
    members: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Make one model of these, in order; MODEL is its name.")
    ] = "",
    shared: Annotated[
        bool, typer.Option("--shared", help="With --members: all take the same inputs, such as one photo.")
    ] = False,
    at: Annotated[str, cut_option("The cut of the exit, where the model has several exits.")] = "",
    codec: Annotated[
        str, typer.Option(help="The codec behind the exit, such as int8/1; the plan's, or raw, if none.")
    ] = "",
    inputs: Annotated[int, typer.Option(help="Inputs at most, drawn at random.", min=1)] = 20_000,
    threads: RunThreads = 0,
    alias: Alias = "prod",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Learn a weighted sum of edge and cloud: a model's exit and tail, or several models. Publishes a version.

    Ridge regression weighs the members' scores. The kind of scores, the form of the weights and the penalty are chosen
    by cross-validation, the gain is measured on folds that had no part in the choice. Where it is not beyond chance,
    nothing is published.

    Example: `isthmus fuse efficientnet-lite0 --data held-out/ --labels labels.csv`
    """
    # Commas, as in lists of cuts: the order of members is that of the weights.
    names = [name.strip() for name in members.split(",") if name.strip()]
    with errors(as_json):
        common: dict[str, Any] = {
            "data": data,
            "labels": labels,
            "inputs": inputs,
            "threads": threads,
            "alias": alias,
            "registry": registry_settings(registry),
        }
        if names:
            _refuse({"--cut": at, "--codec": codec}, "--members makes a model without an exit")
            _fuse_members(model, names, shared, common, registry, as_json=as_json)
        else:
            _refuse({"--shared": shared}, "--shared is of --members")
            _fuse_exit(model, at, codec, common, registry, as_json=as_json)


def _refuse(options: Mapping[str, object], reason: str) -> None:
    # An option that would be ignored is a misunderstanding.
    if senseless := [name for name, value in options.items() if value]:
        raise RequestMalformed(f"{reason}; leave out {', '.join(senseless)}", options=senseless)


def _fuse_exit(model: str, cut: str, codec: str, common: dict[str, Any], registry: str, *, as_json: bool) -> None:
    # Imported on use, as in every command: scipy takes a third of a second.
    from isthmus_tools.usecases import fuse as use_case

    request = use_case.FuseRequest(model=model, cut=cut, codec=_choice(codec), **common)
    result = run(use_case.fuse, request, quiet=as_json)
    fusion = result.fusion
    if as_json:
        facts = {"fusion": structs.asdict(fusion), "inputs": result.inputs, "exited": result.exited}
        _print(result.publication, fusion.gain, facts, registry)
        return
    _say_version(result.publication, f"fuses the exit at {fusion.cut} with the model")
    _say_gain(fusion.gain, "the model", "agree" if fusion.target == "agreement" else "are right")
    say(f"  of {result.inputs:,} inputs {result.exited:,} exited, which the fusion leaves as they are")
    _say_weights(fusion.kind, fusion.scale, {"exit": fusion.exit_weights, "model": fusion.model_weights})
    show_publication(result.publication, registry)


def _fuse_members(
    name: str, members: Sequence[str], shared: bool, common: dict[str, Any], registry: str, *, as_json: bool
) -> None:
    from isthmus_tools.usecases import fuse_members as use_case

    request = use_case.FuseMembersRequest(name=name, members=members, shared=shared, **common)
    result = run(use_case.fuse_members, request, quiet=as_json)
    gain = result.fitted.gain
    if as_json:
        facts = {"fusion": result.bundle.source["fusion"], "cuts": sorted(result.bundle.cuts), "inputs": gain.inputs}
        _print(result.publication, gain, facts, registry)
        return
    _say_version(result.publication, f"is the sum of {', '.join(result.members)}")
    _say_gain(gain, result.members[result.fitted.alone], "are right")
    weights = dict(zip(result.members, result.fitted.weights.tolist(), strict=True))
    _say_weights(result.fitted.recipe.kind, result.fitted.scale, weights)
    say(f"  cuts: {', '.join(sorted(result.bundle.cuts))}; served with {'/'.join(result.bundle.default_cuts)}")
    show_publication(result.publication, registry)


def _choice(text: str) -> Choice | None:
    try:
        return Choice.parse(text) if text else None
    except ValueError as e:
        raise RequestMalformed(f"--codec: {e}", option="--codec") from e


def _print(publication: Publication, gain: FusionGain, facts: dict[str, Any], registry: str) -> None:
    # The gain once, beside the facts of either kind.
    document = {**structs.asdict(gain), "gain": gain.gain}
    print_json(published_document(publication, registry, gain=document, **facts))


def _say_version(publication: Publication, text: str) -> None:
    version = publication.version
    say(f"{version.name}:{version.version} {version.digest[:19]}… {text}")


def _say_gain(gain: FusionGain, alone: str, verb: str) -> None:
    say(
        f"  of {gain.inputs:,} held-out inputs {gain.alone:.2%} {verb} by {alone} alone and {gain.fused:.2%} fused:"
        f" {100 * gain.gain:+.2f} points ({100 * gain.low:+.2f} to {100 * gain.high:+.2f} at 95%)"
    )


def _say_weights(kind: str, scale: float, weights: Mapping[str, Sequence[float]]) -> None:
    listed = [
        # Times the scale: what a unit of log-odds of the member adds to the sum's.
        f"{name} {scale * each[0]:.3g}" if len(each) == 1 else f"{name} {len(each)}, one for each class"
        for name, each in weights.items()
    ]
    say(f"  weights of {kind.replace('_', '-')}: {'; '.join(listed)}")
