"""The version that serves a request: drawn where an alias has a canary, and once more where functions hold another.

Responses name it in Isthmus-Version, and with a canary on trial the release in Isthmus-Release: stable or canary.
"""

from __future__ import annotations

from collections.abc import Callable

from flask import Response

from isthmus.errors import HopMismatch
from isthmus.routing import CanaryTrials, ModelCatalog, ServedModel, VersionDraw
from isthmus.serving.app import EndedRequest, FunctionApp
from isthmus.serving.request import FunctionRequest
from isthmus.serving.version_metrics import VersionMetrics
from isthmus.settings import RouterSettings

VERSION_HEADER, RELEASE_HEADER = "Isthmus-Version", "Isthmus-Release"


class VersionChoice:
    """Runs the handlers of requests with the version that each request gets, and counts how they end."""

    def __init__(self, app: FunctionApp, settings: RouterSettings, catalog: ModelCatalog, trials: CanaryTrials) -> None:
        self.catalog, self._trials = catalog, trials
        self._headers = tuple(filter(None, (settings.caller_header, settings.canary_header)))
        self._metrics = VersionMetrics(settings, trials.states)
        app.metrics.add(self._metrics)
        app.observers.append(self._ended)

    def respond(self, request: FunctionRequest, reference: str, respond: Callable[[ServedModel], Response]) -> Response:
        """The response of `respond` with the version that `NAME` or `NAME:VERSION` means for this request.

        Where a function holds another bundle than that version's, the request runs once more, whole, with the version
        that all its functions hold: no response mixes two bundles.

        Raises:
            HopMismatch: the functions hold no common bundle in time, or refused the second run too.
            As `ModelCatalog.draw` and `respond`.
        """
        deadline = request.context.deadline
        drawn = self.catalog.draw(reference, self._caller(request), deadline)
        try:
            return _with(request, drawn, respond)
        except HopMismatch as e:
            # Of the first run: a batch may have noted a route.
            request.reply_headers.clear()
            return _with(request, VersionDraw(self.catalog.renew(reference, e, deadline)), respond)

    def _caller(self, request: FunctionRequest) -> str:
        """A name of the caller that stays from request to request; empty for none."""
        named = (name for header in self._headers if (name := request.headers.get(header, "")))
        return request.caller or next(named, "")

    def _ended(self, ended: EndedRequest, status: int) -> None:
        """Count a request that got a version."""
        facts = ended.facts
        if not (version := facts.get("version", "")):
            return
        # An error within a stream comes after the status; a deadline of the caller's own is no fault of the version.
        is_error = bool(facts.get("error")) or (status >= 500 and not (status == 504 and facts.get("timeout")))
        self._metrics.count(facts["model"], version, is_error=is_error)
        if release := facts.get("release", ""):
            work_s = ended.timings.elapsed() - sum(s for stage, s, _ in ended.timings.stages if stage == "queue")
            # Texts differ in length: of a generation each token's seconds count.
            seconds = work_s / max(1, int(facts.get("tokens", "1")))
            self._trials.answered(facts["model"], facts["alias"], release, seconds, is_error=is_error)


def _with(request: FunctionRequest, drawn: VersionDraw, respond: Callable[[ServedModel], Response]) -> Response:
    model = drawn.model
    request.facts.update(model=model.name, version=model.version, alias=drawn.alias, release=drawn.release)
    if request.headers.get("X-Timeout", ""):
        request.facts["timeout"] = "own"
    request.reply_headers[VERSION_HEADER] = f"{model.name}:{model.version}"
    if drawn.release:
        request.reply_headers[RELEASE_HEADER] = drawn.release
    return respond(model)
