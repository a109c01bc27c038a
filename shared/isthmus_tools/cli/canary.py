"""`isthmus canary`: the canaries of a model's aliases, and how their trials go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import typer

from isthmus.artifacts.canary import parse_rule, parse_share
from isthmus.errors import RequestMalformed
from isthmus.units import format_duration
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import FOLLOWING, errors, print_json, run, say, say_command, table
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    ApiKey,
    AsJson,
    RegistryOption,
    in_registry,
    read_api_key,
    registry_settings,
)

if TYPE_CHECKING:
    from isthmus.arrays import Array
    from isthmus.registry.aliases import AliasSigner, Move
    from isthmus.routing.state import TrialState

_COLUMNS = ["alias", "release", "version", "requests", "errors", "median", "differ", "state"]


def canary(
    model: Annotated[str, typer.Argument(help="NAME of a model in the registry.", autocompletion=complete_models)],
    *,
    url: Annotated[str, typer.Option(envvar="ISTHMUS_URL", help="A router, whose trials are shown too.")] = "",
    api_key: ApiKey = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Show the canaries of a model: their share and rule, and in a router the requests of both versions.

    Example: `isthmus canary efficientnet-lite0 --url http://127.0.0.1:8080/function/router`
    """
    from isthmus.http.tls import open_trust
    from isthmus_tools.usecases.canary import CanaryQuestion, report_canaries

    with errors(as_json):
        settings = registry_settings(registry)
        report = report_canaries(
            CanaryQuestion(
                name=model,
                registry=settings,
                router=url,
                trust=open_trust(settings) if url else None,
                api_key=read_api_key(api_key),
            )
        )
        if as_json:
            documents = [msgspec.to_builtins(document) for document in report.aliases]
            print_json({"aliases": documents, "trials": [msgspec.to_builtins(trial) for trial in report.trials]})
            return
        for document in report.aliases:
            tried = document.canary
            if tried is not None:
                say(
                    f"{document.alias} means {model}:{document.version}; {share_text(tried.share)} of its callers get"
                    f" {model}:{tried.version}"
                )
                say(f"rolled back by the rule {tried.rule.option()}")
        # No error: the end of a trial is a state like another.
        if not report.aliases:
            say(f"no alias of {model} has a canary")
        if report.trials:
            table(f"requests at {url}", _COLUMNS, _rows(report.trials), numbers=("requests", "errors"))
        for alias in (document.alias for document in report.aliases):
            finish = f"isthmus promote {model} --as {alias} --finish"
            say_command("for all callers", in_registry(finish, registry))


def share_text(share: float) -> str:
    """A share of callers in percent; shares below one percent are usual in large deployments."""
    return f"{100 * share:.4g}%"


class CanaryChoice(NamedTuple):
    """What the options of `isthmus promote` say of an alias's canary."""

    model: str
    alias: str
    expected: int | None
    share: str
    rule: str
    is_finished: bool
    is_aborted: bool
    signer: AliasSigner | None = None


def change_canary(choice: CanaryChoice, arrays: Mapping[str, Array], registry: str, as_json: bool) -> None:
    """Begin, grow, finish or abort a canary, and print the alias's move.

    Raises:
        RequestMalformed: the options contradict each other.
        As the use cases.
    """
    from isthmus_tools.usecases.canary import CanaryEnd, CanaryRequest, begin_canary, end_canary

    if bool(choice.share) + choice.is_finished + choice.is_aborted != 1:
        raise RequestMalformed(
            "a canary is changed by one of --canary SHARE, --finish and --abort; --rule needs --canary"
        )
    if choice.rule and not choice.share:
        raise RequestMalformed("--rule is the rule of a canary: give --canary SHARE too")
    settings = registry_settings(registry)
    if choice.share:
        request = CanaryRequest(
            model=choice.model,
            registry=settings,
            share=parse_share(choice.share),
            rule=parse_rule(choice.rule),
            alias=choice.alias,
            expected=choice.expected,
            signer=choice.signer,
            arrays=arrays,
        )
        move = run(begin_canary, request, quiet=as_json).move
    else:
        move = end_canary(
            CanaryEnd(
                model=choice.model,
                registry=settings,
                is_finished=choice.is_finished,
                alias=choice.alias,
                expected=choice.expected,
                signer=choice.signer,
            )
        )
    _show(move, registry, as_json)


def _show(move: Move, registry: str, as_json: bool) -> None:
    after, name = move.after, move.after.name
    following = f"isthmus promote {name} --as {after.alias} --abort" if after.canary else f"isthmus canary {name}"
    following = in_registry(following, registry)
    if as_json:
        print_json({**msgspec.to_builtins(after), "alias_was": move.before.number, "next": following})
        return
    say(
        f"{after.alias} means {name}:{after.number} for "
        + (share_text(1 - after.canary.share) if after.canary else "all")
        + " of its callers"
        + (f", and {name}:{after.canary.version} for the others" if after.canary else "")
    )
    say(FOLLOWING)
    say_command("to end it" if after.canary else "next", following)


def _rows(trials: Sequence[TrialState]) -> list[list[str]]:
    # Two rows a trial, so that the figures of the releases stand below each other.
    rows = []
    for trial in trials:
        compared = trial.agreed + trial.differed
        state = f"rolled back: {trial.reason}" if trial.reason else f"{share_text(trial.share)} of the callers"
        for release, counts in (("stable", trial.stable), ("canary", trial.canary)):
            median = "" if counts.median_s is None else format_duration(counts.median_s)
            own = [trial.alias, release, counts.version, str(counts.requests), str(counts.errors), median]
            rows.append([*own, *([f"{trial.differed} of {compared}", state] if release == "canary" else ["", ""])])
    return rows
