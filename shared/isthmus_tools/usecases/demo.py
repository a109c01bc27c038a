"""The demo: one model served four ways over one emulated link with a slowed edge, and the planner's verdict."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Candidate
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import CalibrationError
from isthmus.pipeline import Result
from isthmus.registry import Resolved, open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.demo_model import CUT, MODEL, fidelity_at
from isthmus_tools.usecases.demo_requests import send_photos
from isthmus_tools.usecases.demo_verdict import TimedRequest, Verdict, Way, judge, measured_as
from isthmus_tools.usecases.demo_ways import demo_candidates
from isthmus_tools.usecases.functions import FunctionUrls
from isthmus_tools.usecases.local_model import LocalModel

LINK = Conditions(5e6, 5e6, 0.02)
"""A mobile uplink."""
EDGE_SLOWDOWN = 32.0
"""A small board beside a server."""


@dataclass(frozen=True, kw_only=True)
class DemoRequest:
    """Photos by name, the link, the edge and how often each photo is sent each way.

    `registry` is the demo's own: the model's versions, plans and aliases elsewhere stay as they are.
    """

    registry: RegistrySettings
    photos: Mapping[str, bytes]
    conditions: Conditions = LINK
    edge_slowdown: float = EDGE_SLOWDOWN
    repeat: int = 3
    model: str = MODEL
    cut: str = CUT


@dataclass(frozen=True)
class DemoResult:
    """The ways in order, the uncut model's likeliest class of each photo, and the verdict."""

    model: str
    digest: str
    cut: str
    conditions: Conditions
    edge_slowdown: float
    slowed_by: str
    expected: Mapping[str, str]
    ways: tuple[Way, ...]
    verdict: Verdict

    @property
    def split_is_exact(self) -> bool:
        """Whether the ways that change no number predict what the uncut model does, for every photo."""
        return all(way.classes == self.expected for way in self.ways if way.exact)

    def document(self) -> dict[str, Any]:
        """The result, JSON-ready."""
        return {
            "model": self.model,
            "digest": self.digest,
            "cut": self.cut,
            "link": {
                "uplink_bps": self.conditions.uplink_bps,
                "downlink_bps": self.conditions.downlink_bps,
                "rtt_s": self.conditions.rtt_s,
            },
            "edge_slowdown": self.edge_slowdown,
            "slowed_by": self.slowed_by,
            "uncut": dict(self.expected),
            "split_is_exact": self.split_is_exact,
            "ways": [way.document() for way in self.ways],
            "verdict": asdict(self.verdict),
        }


def compare(request: DemoRequest, model: Resolved, functions: FunctionUrls, progress: Progress = silent) -> DemoResult:
    """Send each photo each way over the link, and judge as the planner does.

    Raises:
        CalibrationError: the model has no calibration at the cut.
        HopError, RegistryError: a function or the registry cannot be reached.
    """
    store = open_registry(request.registry)
    fidelity = fidelity_at(store, model.bundle, request.cut)
    if fidelity is None:
        raise CalibrationError(f"{model.name} is not calibrated at the cut {request.cut}", cut=request.cut)
    whole = LocalModel(f"{model.name}:{model.version}", request.registry, WHOLE, threads=1)
    uncut = {name: whole.run(whole.preprocess(photo)) for name, photo in request.photos.items()}
    link = request.conditions
    candidates = dict(demo_candidates(model.bundle, request.cut, fidelity, link, request.edge_slowdown))
    predicted, timed = send_photos(
        store, model, candidates, request.photos, functions, link, repeat=request.repeat, progress=progress
    )
    ways = [_way(what, candidate, whole, uncut, predicted[what], timed[what]) for what, candidate in candidates.items()]
    measured = [measured_as(c, way) for c, way in zip(candidates.values(), ways, strict=True)]
    return DemoResult(
        model=f"{model.name}:{model.version}",
        digest=model.digest,
        cut=request.cut,
        conditions=link,
        edge_slowdown=request.edge_slowdown,
        slowed_by=functions.edge.method,
        expected={name: _likeliest(whole, result) for name, result in uncut.items()},
        ways=tuple(ways),
        verdict=judge(measured, ways, link, request.edge_slowdown),
    )


def _way(
    what: str,
    candidate: Candidate,
    whole: LocalModel,
    uncut: Mapping[str, Result],
    predicted: Mapping[str, Result],
    requests: Sequence[TimedRequest],
) -> Way:
    output = whole.model.bundle.outputs[0].name
    expected = {name: _likeliest(whole, result) for name, result in uncut.items()}
    classes = {name: _likeliest(whole, result) for name, result in predicted.items()}
    # Relative to the largest output: near zero a relative difference of one output says nothing.
    differences = [
        float(abs(uncut[name].outputs[output] - predicted[name].outputs[output]).max())
        / float(abs(uncut[name].outputs[output]).max())
        for name in predicted
    ]
    last = [result.runs[-1] for result in predicted.values()] if candidate.kind != "edge" else []
    return Way(
        name=candidate.name,
        what=what,
        requests=tuple(requests),
        classes=classes,
        up_bytes=statistics.median_low([run.sent_bytes for run in last]) if last else 0,
        down_bytes=statistics.median_low([run.received_bytes for run in last]) if last else 0,
        photos_agree=sum(classes[name] == expected[name] for name in classes),
        difference=max(differences),
        held_out=1 - candidate.error.disagreement if candidate.error.inputs else None,
        exact=not candidate.codecs,
        refused=candidate.refused,
    )


def _likeliest(whole: LocalModel, result: Result) -> str:
    # With its index: two classes of ImageNet are called crane.
    likeliest = whole.classes(result.outputs)[0]
    return f"{likeliest['label']} ({likeliest['index']})"
