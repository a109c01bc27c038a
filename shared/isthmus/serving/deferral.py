"""Requests whose tail gives no response: finished later, or answered by the unsure prediction of the route's exit.

A caller that can keep bytes and come again says so by `Accept: application/vnd.isthmus.continuation`, and by
`Prefer: wait=SECONDS` how long the router may wait for the tail (RFC 7240). Source: docs/reference/continuation.md.
With the setting `exit_when_cut_off` other callers get the exit's prediction instead of an error.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flask import Response
from werkzeug.http import parse_dict_header

from isthmus.context import Context
from isthmus.errors import HopError, RequestMalformed
from isthmus.pipeline import Interruption, Result
from isthmus.pipeline.continuation import CONTENT_TYPE, encode_continuation
from isthmus.routing import Attempt, RouteCandidate
from isthmus.serving.inference import InferenceRequest
from isthmus.serving.request import FunctionRequest

# A link that was cut is rarely back sooner.
RETRY_AFTER_S = 5
# Of `wait=0`: once over a link that is up, and no second try.
_MIN_WAIT_S = 0.1


class Deferred(Exception):
    """The route was interrupted, and the caller takes its continuation."""

    def __init__(self, interruption: Interruption, sizes: dict[str, int]) -> None:
        super().__init__(str(interruption.error))
        self.error = interruption.error
        self._interruption, self._sizes = interruption, sizes

    def response(self, request: FunctionRequest, inference: InferenceRequest) -> Response:
        """503 with the continuation as its body."""
        model, tensors = inference.model, inference.tensors
        notes: dict[str, Any] = dict(self._sizes)
        if tensors is not None:
            notes |= {"id": tensors.id, "outputs": [[output.name, output.binary] for output in tensors.outputs]}
        elif inference.top_k is not None:
            notes["top_k"] = inference.top_k
        body = encode_continuation(self._interruption, model.name, model.version, request.context.call_id, notes)
        return Response(body, 503, {"Content-Type": CONTENT_TYPE, "Retry-After": str(RETRY_AFTER_S)})


class CutOff(Exception):
    """The route was interrupted behind its exit, whose unsure prediction is better than none: `result`, degraded."""

    def __init__(self, interruption: Interruption, unsure: Result, route: str) -> None:
        super().__init__(str(interruption.error))
        self.error = interruption.error
        met, reason = unsure.exit, type(interruption.error).__name__
        confidence = (
            "" if met is None else f" at {met.cut}, {met.facts()['exit_confidence']:.3g} of {met.threshold:.3g}"
        )
        degraded = f"an exit that is not sure{confidence}; {reason} behind it"
        self.result = replace(unsure, route=route, degraded=degraded)


class Resumable:
    """An attempt whose deferral counts as the hop's failure, so that other routes are tried first.

    `deferred` is the first deferral, `cut_off` the first prediction of an exit that was not sure.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self.deferred: Deferred | None = None
        self.cut_off: CutOff | None = None

    def __call__(self, candidate: RouteCandidate, context: Context) -> Result:
        """See `Attempt`."""
        try:
            return self._attempt(candidate, context)
        except Deferred as e:
            self.deferred = self.deferred or e
            raise e.error from e
        except CutOff as e:
            self.cut_off = self.cut_off or e
            raise e.error from e

    def instead(self, error: HopError) -> Result:
        """The degraded result in place of the error of the last route.

        Raises:
            Deferred: the caller takes a continuation, with which it can have the model's own prediction later.
            HopError: there is nothing else.
        """
        if self.deferred is not None or self.cut_off is None:
            raise (self.deferred or error) from error
        return self.cut_off.result


def takes_continuation(request: FunctionRequest) -> bool:
    """Whether the caller takes a continuation in place of an error."""
    types = request.headers.get("Accept", "").split(",")
    return any(text.partition(";")[0].strip().lower() == CONTENT_TYPE for text in types)


def tail_wait(request: FunctionRequest) -> float | None:
    """Seconds that each hop after the first has by the caller's `Prefer: wait=…`; None where it prefers nothing.

    Raises:
        RequestMalformed: the preference is no number of seconds.
    """
    wait = parse_dict_header(request.headers.get("Prefer", "")).get("wait")
    if wait is None or not takes_continuation(request):
        return None
    if not (wait.isascii() and wait.isdigit() and 1 <= len(wait) <= 6):
        raise RequestMalformed("the preference wait is no whole number of seconds", header="Prefer")
    return max(float(wait), _MIN_WAIT_S)
