"""`isthmus train`: from raw data to a version in the registry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus_tools.cli.console import errors, print_json, publication_document, run, say, show_publication, table, warn
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, registry_settings

if TYPE_CHECKING:
    from isthmus_tools.learning.training.evaluation import Estimate, HeldOutScores
    from isthmus_tools.learning.training.samples import PreparedData
    from isthmus_tools.usecases.train import TrainResult


def train(
    config: Annotated[
        Path, typer.Argument(help="The TOML file; see docs/reference/training.md.", metavar="CONFIG.toml")
    ],
    *,
    stage: Annotated[
        str,
        typer.Option(
            help="Run one stage on what those before it left: collect, clean, train, evaluate or publish.",
            metavar="STAGE",
        ),
    ] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run: its data, and its last checkpoint.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier run collected and trained.")] = False,
    promote: Annotated[
        str,
        typer.Option(
            help="When the alias moves: always, better (on the same held-out data) or never; by default the file's.",
            metavar="RULE",
        ),
    ] = "",
    processes: Annotated[
        int, typer.Option(help="Train on so many processes of this machine, data parallel.", min=1, metavar="N")
    ] = 1,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="With --processes 2: the head in one process, the tail in the other.")
    ] = False,
    split_with: Annotated[
        str,
        typer.Option(
            help="Train the head here and the rest where `isthmus train-tail` listens: split learning.", metavar="URL"
        ),
    ] = "",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Train a classifier: collect, clean, train, evaluate and publish, as a TOML file says.

    An interrupted run goes on with --resume, to the weights of an uninterrupted run. The version is promoted if better
    than the version in service on the same held-out data.

    Example: `isthmus train train.toml --resume`
    """
    # Imported late: help loads neither numpy nor a client of a broker.
    from isthmus_tools.learning.training.config import TrainingPlace, read_config
    from isthmus_tools.usecases import train as use_case

    with errors(as_json):
        request = use_case.TrainRequest(
            config=read_config(config, dict(os.environ)),
            registry=registry_settings(registry),
            stage=stage,
            resume=resume,
            fresh=fresh,
            promote=promote,
            place=TrainingPlace(processes, pipeline, split_with),
        )
        result = run(use_case.train, request, quiet=as_json)
        # Only commands draw.
        picture = _draw(result)
        if as_json:
            print_json(_document(result, picture, registry))
            return
        _show(result, picture, registry)
    warn(result.warnings)


def _draw(result: TrainResult) -> str:
    """The path of the confusion matrix's picture; empty without an evaluation."""
    if result.evaluation is None:
        return ""
    from isthmus_tools.figures.confusion import draw

    path = result.folder / "confusion.png"
    draw(result.evaluation, path)
    return str(path)


def _document(result: TrainResult, picture: str, registry: str) -> dict[str, Any]:
    publication, evaluation, comparison = result.publication, result.evaluation, result.comparison
    return {
        "folder": str(result.folder),
        "messages": result.messages,
        "data": None if result.prepared is None else result.prepared.report,
        "training": result.training,
        "evaluation": None if evaluation is None else evaluation.document(),
        "confusion": picture,
        "comparison": None if comparison is None else comparison.document(),
        "version": None if publication is None else publication.version.version,
        "digest": None if publication is None else publication.version.digest,
        "promoted": publication is not None and publication.moved,
        "unpromoted": result.unpromoted,
        "publication": None if publication is None else publication_document(publication, registry),
        "warnings": result.warnings,
    }


def _show(result: TrainResult, picture: str, registry: str) -> None:
    if result.messages:
        say(f"{result.messages} messages came by MQTT")
    if result.prepared is not None:
        _show_data(result.prepared)
    if (training := result.training) is not None:
        ended = "stopped early" if training["stopped_early"] else "to the last epoch"
        resumed = f", resumed at step {at}" if (at := training["resumed_at_step"]) else ""
        say(
            f"trained {training['parameters']:,} parameters for {training['epochs']} epochs in"
            f" {training['seconds']:.1f} s ({ended}{resumed}); the weights are of epoch {training['best_epoch']}"
        )
    if result.evaluation is not None:
        _show_evaluation(result.evaluation, picture)
    if (publication := result.publication) is None:
        return
    version = publication.version
    say(f"{version.name}:{version.version} {version.digest[:19]}… is published")
    if (comparison := result.comparison) is not None and comparison.is_better:
        say(
            f"it is better than version {comparison.served}: {comparison.candidate:.1%} against"
            f" {comparison.in_service:.1%} of {comparison.metric.replace('_', ' ')}"
        )
    if result.unpromoted:
        say(f"it is not promoted: {result.unpromoted}")
    show_publication(publication, registry)


def _show_data(data: PreparedData) -> None:
    parts = ", ".join(f"{len(part)} {name}" for name, part in data.parts.items())
    say(f"{data.report['collected']} samples, of which {parts}; classes {', '.join(data.classes)}")
    for change, entry in data.report["changes"].items():
        # One origin is enough to look for the cause; the JSON document has more.
        say(f"  {change}: {entry['samples']} (as {entry['examples'][0]})")


def _show_evaluation(evaluation: HeldOutScores, picture: str) -> None:
    table(
        f"Held out: {evaluation.samples} samples of {evaluation.groups} groups",
        ["class", "samples", "precision", "recall", "F1"],
        [
            [each.label, each.samples, _text(each.precision), _text(each.recall), _text(each.f1)]
            for each in evaluation.classes
        ],
        numbers=["samples", "precision", "recall", "F1"],
    )
    say(
        f"accuracy {_text(evaluation.accuracy)}, macro F1 {_text(evaluation.macro_f1)}; the most frequent class alone"
        f" would give {evaluation.majority:.1%}"
    )
    say(f"confusion matrix: {picture}")


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({100 * estimate.low:.0f} to {100 * estimate.high:.0f})"
