"""`isthmus exits`: fit early exits to a classifier's cuts, bound their risk on held-out data, and publish the best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from isthmus.artifacts.json_documents import builtins
from isthmus.units import format_size, parse_share
from isthmus_tools.cli.console import errors, print_json, published_document, run, say, show_publication, table
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    Alias,
    AsJson,
    ModelArgument,
    RegistryOption,
    RunThreads,
    cut_option,
    read_option,
    registry_settings,
)

if TYPE_CHECKING:
    from isthmus_tools.learning.exits.fit import ExitCandidate, FittedExits
    from isthmus_tools.learning.exits.measurement import MeasuredShare
    from isthmus_tools.usecases.exits import ExitsResult

_NO_FIGURE = "-"


def exits(
    model: ModelArgument,
    *,
    data: Annotated[
        Path,
        typer.Option(
            help="A folder of photos, or of .npz or .npy files named after the model's inputs, with a row for each"
            " input. Half fits the exits, half bounds their risk: inputs as requests will be, not those that trained"
            " the model.",
            exists=True,
        ),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="The class of each input: CSV with lines FILE,LABEL, or .npy or .json in the order of files. Without,"
            " a folder for each class, or an array `labels` in .npz files.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    training: Annotated[
        Path | None,
        typer.Option(
            help="A folder of other inputs to fit on, such as the model's training data; then all of --data bounds.",
            exists=True,
        ),
    ] = None,
    at: Annotated[
        list[str] | None,
        cut_option("Candidates, once each: every one that keeps the bound gets an exit. Cuts over the model if none."),
    ] = None,
    limit: Annotated[str, typer.Option(help="The share of all requests that may exit and fail.")] = "1%",
    confidence: Annotated[
        str, typer.Option(help="How surely the limit holds, over the choice of held-out inputs.")
    ] = "95%",
    risk: Annotated[
        Literal["disagreement", "accuracy"],
        typer.Option(
            help="What fails: an exit with another class than the model's; or, with labels, a wrong exit where the"
            " model is right."
        ),
    ] = "disagreement",
    classes: Annotated[
        str, typer.Option(help="The output whose last axis holds classes, where the bundle does not say.")
    ] = "",
    inputs: Annotated[int, typer.Option(help="Inputs of a folder at most, drawn at random.", min=16)] = 20_000,
    threads: RunThreads = 0,
    alias: Alias = "prod",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Fit early exits to a classifier's cuts: clear inputs are answered at the edge, with a bound on the risk.

    At each candidate cut a linear head predicts the model's scores from pooled activations, by ridge regression in
    closed form. Its threshold is the lowest at which at most --limit of all requests exit and fail, with --confidence,
    by held-out inputs that took no part in the fit. Publishes the next version with the exits that spare the most.

    Example: `isthmus exits digits --data digits --limit 2%`, `isthmus exits mnist --data held-out --cut 2 --cut 6`
    """
    from isthmus_tools.learning.exits.head import ExitRisk
    from isthmus_tools.usecases import exits as use_case

    with errors(as_json):
        request = use_case.ExitsRequest(
            model=model,
            data=data,
            registry=registry_settings(registry),
            labels=labels,
            training=training,
            cuts=at or [],
            risk=ExitRisk(
                risk, read_option(parse_share, "--limit", limit), read_option(parse_share, "--confidence", confidence)
            ),
            classes=classes,
            inputs=inputs,
            threads=threads,
            alias=alias,
        )
        result = run(use_case.exits, request, quiet=as_json)
        version = result.publication.version
        if as_json:
            print_json(
                published_document(
                    result.publication,
                    registry,
                    fitted=result.fitted.fitted,
                    held_out=result.fitted.held_out,
                    labelled=result.labelled,
                    candidates=[_document(each) for each in result.fitted.candidates],
                )
            )
            return
        _show(result.fitted, request.risk)
        for each in result.fitted.candidates:
            if each.reason:
                say(f"  {each.cut.name}: no exit, {each.reason}")
            for tensor, reason in each.left_out.items():
                say(f"  {each.cut.name}: without {tensor}, which {reason}")
        count = len(result.fitted.published)
        size = sum(branch.segment.graph.size for branch, _ in result.fitted.published)
        say(
            f"{version.name}:{version.version} {version.digest[:19]}… with {count} exit{'s'[: count != 1]}"
            f" ({format_size(size)})"
        )
        say(_taken_text(result))
        show_publication(result.publication, registry)


def _taken_text(result: ExitsResult) -> str:
    """Who takes the exits: a route needs one at its first cut."""
    name = result.publication.version.name
    cuts = [branch.segment.id.start for branch, _ in result.fitted.published]
    if result.publication.plan:
        return f"requests take the way of the plan; isthmus plan {name} … weighs the exits"
    if result.default_cut in cuts:
        return f"clear requests end at the default cut {result.default_cut}; isthmus plan {name} … weighs the exits"
    return (
        f"no request takes an exit yet: isthmus plan {name} … weighs them, and isthmus cut {name} --cut {cuts[0]}"
        " --default makes the first what requests take"
    )


def _show(fitted: FittedExits, risk: Any) -> None:
    """Print the candidates in the order of work."""
    labelled = any(each.measured is not None and each.measured.accuracies is not None for each in fitted.candidates)
    accuracy = ["right alone, %", "model, %", "gated, %"] if labelled else []
    numbers = ["work before, %", "exits, %", "fail", "bound, %", "agrees, %", *accuracy]
    table(
        f"{fitted.fitted:,} inputs fitted, {fitted.held_out:,} held out; risk: {risk.kind}, at most {risk.limit:.2%} of"
        f" requests; each bound by Clopper and Pearson at {fitted.confidence:.4g}; intervals: Wilson, 95%",
        ["cut", *numbers, "exit"],
        [_row(each, labelled) for each in fitted.candidates],
        numbers=numbers,
        drop=["agrees, %", "right alone, %"],
    )


def _row(each: ExitCandidate, labelled: bool) -> list[str]:
    measured, gate = each.measured, each.measured.gate if each.measured is not None else None
    accuracies = measured.accuracies if measured is not None else None
    shares = (accuracies.alone, accuracies.model, accuracies.gated) if accuracies is not None else (None,) * 3
    return [
        each.cut.name,
        f"{each.cut.macs_before:.0%}".removesuffix("%"),
        _bounded(measured.exits if measured is not None else None),
        _NO_FIGURE if gate is None else str(gate.failing),
        _NO_FIGURE if gate is None else f"{gate.bound:.2%}".removesuffix("%"),
        _bounded(measured.agreement if measured is not None else None),
        *([_bounded(share) for share in shares] if labelled else []),
        "no" if each.reason else "yes",
    ]


def _bounded(share: MeasuredShare | None) -> str:
    if share is None:
        return _NO_FIGURE
    return f"{100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _document(each: ExitCandidate) -> dict[str, Any]:
    """A candidate as JSON; null where nothing could be fitted or bounded."""
    head, measured = each.head, each.measured
    return {
        "cut": each.cut.name,
        "macs_before": each.cut.macs_before,
        "bytes": each.cut.bytes,
        "published": not each.reason,
        "reason": each.reason,
        "left_out": dict(each.left_out),
        "head": None
        if head is None or each.branch is None
        else {
            "target": head.target,
            "features": len(head.branch.mean),
            "penalty": head.penalty,
            "confidence": "learned" if head.is_learned else "margin",
            "bytes": each.branch.segment.graph.size,
            "macs": each.branch.segment.macs,
        },
        "gate": None if measured is None or measured.gate is None else builtins(measured.gate),
        **_shares(measured),
    }


def _shares(measured: Any) -> dict[str, Any]:
    shares: dict[str, MeasuredShare | None] = dict.fromkeys(("exits", "agreement", "alone", "model", "gated"))
    if measured is not None:
        shares |= {"exits": measured.exits, "agreement": measured.agreement}
        if (accuracies := measured.accuracies) is not None:
            shares |= {name: getattr(accuracies, name) for name in ("alone", "model", "gated")}
    return {name: None if share is None else vars(share) for name, share in shares.items()}
