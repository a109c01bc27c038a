"""The setting `codec`: a codec for every cut of the router's model, in place of the plan's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import TOKEN_CODECS, Choice
from isthmus.artifacts.fidelity import TOP1, Measure
from isthmus.codecs import Encoding, Tables, encodings, find_codec
from isthmus.errors import Missing, SettingsError
from isthmus.pipeline import LookPolicy, Route
from isthmus.pipeline.agreement import margin
from isthmus.runtime.tables import tables_of
from isthmus.settings import RouterSettings


def parse_override(settings: RouterSettings) -> Choice | None:
    """The setting's choice of a codec; None where the setting is empty.

    Raises:
        SettingsError: unknown codec or quality, or a share beyond 1 for the guard.
    """
    if settings.guard_share > 1:
        raise SettingsError(
            f"the setting guard_share is {settings.guard_share}; it is a share, from 0 to 1",
            variable="guard_share",
            value=settings.guard_share,
        )
    if not settings.codec:
        return None
    try:
        return Choice.parse(settings.codec)
    except ValueError as e:
        raise SettingsError(f"the setting codec: {e}", variable="codec", value=settings.codec) from e


def override_codec(route: Route, choice: Choice, tables: Tables, measure: Callable[[Bundle], Measure]) -> Route:
    """The route with the boundary tensors of its cuts encoded by `choice`; the model's own inputs stay raw.

    `measure` gives a bundle's rule of agreement, for closer looks.

    Raises:
        Missing: the codec needs calibration, and the bundle has none for the boundary tensors.
        SettingsError: closer looks for predictions that are no classes; for a language model, a codec under which
            tokens depend on the steps that they are sent in.
    """
    if route.bundle.state is not None and (choice.codec not in TOKEN_CODECS or choice.looks):
        why = "has closer looks" if choice.looks else "gives a token other values beside other tokens"
        raise SettingsError(
            f"the setting codec is {choice}, which {why}; {route.bundle.name} is a language model, whose steps hold any"
            f" number of tokens: set codec to one of {', '.join(TOKEN_CODECS)}",
            variable="codec",
            value=str(choice),
        )
    calibrated = choice.codec != "raw" and find_codec(choice.codec).calibrated
    table = tables_of(route.bundle, route.digest, choice.codec, tables)
    encoded: list[Mapping[str, Encoding]] = [{}]
    for segment in route.segments[1:]:
        if calibrated and not any(s.name in route.bundle.tables for s in segment.inputs):
            raise Missing(
                f"bundle {route.bundle.name} has no calibration of what {segment.id} takes, which {choice} needs",
                kind="table",
                name=segment.id,
                exists=sorted(route.bundle.tables),
                hint=f"calibrate it: isthmus calibrate {route.bundle.name}"
                + ("" if route.bundle.state is not None else " --data FOLDER"),
            )
        encoded.append(encodings(route.bundle.carried(segment.inputs), choice, table))
    return replace(route, encodings=tuple(encoded), looks=_look_policy(route.bundle, choice, measure))


def _look_policy(bundle: Bundle, choice: Choice, measure: Callable[[Bundle], Measure]) -> LookPolicy | None:
    if not choice.looks:
        return None
    rule = measure(bundle)
    if rule.kind != TOP1 or rule.output not in {s.name for s in bundle.outputs}:
        raise SettingsError(
            f"the setting codec is {choice}, and closer looks are for classes, which {bundle.name} does not answer: set"
            f" codec to {choice.once}, or calibrate the bundle with --classes OUTPUT",
            variable="codec",
            value=str(choice),
        )
    return LookPolicy(choice.looks, partial(margin, rule))
