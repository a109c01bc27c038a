"""The demo: one model served several ways over one emulated link with a slow edge, and the planner's verdict."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from msgspec.structs import replace

from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Candidate
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import CalibrationError
from isthmus.pipeline import Result
from isthmus.registry import Resolved, open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.planner.inputs import from_photos
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.demo_model import CUT, MODEL, fidelity_at
from isthmus_tools.usecases.demo_verdict import Verdict, Way, judge
from isthmus_tools.usecases.demo_ways import demo_candidates, predictions
from isthmus_tools.usecases.function_urls import FunctionUrls
from isthmus_tools.usecases.functions import measure_over_link
from isthmus_tools.usecases.local_model import LocalModel

LINK = Conditions(10e6, 10e6, 0.02)
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
    """The ways in order, the uncut model's likeliest class of each photo, and two verdicts.

    `private` is the verdict where photos must not leave the edge.
    """

    model: str
    digest: str
    cut: str
    conditions: Conditions
    edge_slowdown: float
    slowed_by: str
    expected: Mapping[str, str]
    ways: tuple[Way, ...]
    verdict: Verdict
    private: Verdict

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
            "verdict_private": asdict(self.private),
        }


def compare(request: DemoRequest, model: Resolved, functions: FunctionUrls, progress: Progress = silent) -> DemoResult:
    """Send each photo each way over the link, measured and judged as the planner does.

    Raises:
        CalibrationError: the model has no calibration at the cut.
        HopError, RegistryError: a function or the registry cannot be reached.
    """
    store = open_registry(request.registry)
    fidelity = fidelity_at(store, model.bundle, request.cut)
    if fidelity is None:
        raise CalibrationError(f"{model.name} is not calibrated at the cut {request.cut}", cut=request.cut)
    whole = LocalModel(f"{model.name}:{model.version}", request.registry, WHOLE, threads=1)
    inputs = from_photos(model.bundle, request.photos.values())
    uncut = [whole.run(photo.arrays) for photo in inputs]
    link, slowdown = request.conditions, request.edge_slowdown
    candidates = dict(demo_candidates(model.bundle, request.cut, fidelity, link, slowdown))
    predicted = predictions(store, model, candidates, inputs, functions, progress)
    measured = measure_over_link(
        functions,
        list(candidates.values()),
        model.digest,
        model.bundle,
        inputs,
        store,
        link,
        rounds=request.repeat * len(inputs),
        eliminate=False,
        progress=progress,
    )
    ways = [
        _way(what, candidate, whole, list(request.photos), uncut, predicted[what])
        for what, candidate in zip(candidates, measured, strict=True)
    ]
    return DemoResult(
        model=f"{model.name}:{model.version}",
        digest=model.digest,
        cut=request.cut,
        conditions=link,
        edge_slowdown=slowdown,
        slowed_by=functions.edge.method,
        expected=dict(zip(request.photos, (_likeliest(whole, result) for result in uncut), strict=True)),
        ways=tuple(ways),
        verdict=judge(ways, link, slowdown),
        private=judge(ways, link, slowdown, private=True),
    )


def _way(
    what: str,
    candidate: Candidate,
    whole: LocalModel,
    names: Sequence[str],
    uncut: Sequence[Result],
    predicted: Sequence[Result],
) -> Way:
    bundle = whole.model.bundle
    output = bundle.outputs[0].name
    classes = [_likeliest(whole, result) for result in predicted]
    pairs = [(a.outputs[output], b.outputs[output]) for a, b in zip(uncut, predicted, strict=True)]
    last = [result.runs[-1] for result in predicted] if candidate.kind != "edge" else []
    near = {"edge": (WHOLE,), "cloud": ()}.get(candidate.kind, (predicted[0].runs[0].segment,))
    return Way(
        what=what,
        candidate=replace(
            candidate,
            up_bytes=statistics.median_low([run.sent_bytes for run in last]) if last else 0,
            down_bytes=statistics.median_low([run.received_bytes for run in last]) if last else 0,
        ),
        classes=dict(zip(names, classes, strict=True)),
        photos_agree=sum(a == _likeliest(whole, b) for a, b in zip(classes, uncut, strict=True)),
        # Relative to the largest output: near zero a relative difference of one output says nothing.
        difference=max(float(abs(a - b).max()) / float(abs(a).max()) for a, b in pairs),
        edge_weight_bytes=sum(t.length for s in near for t in bundle.weight_ranges(bundle.segment(s))),
    )


def _likeliest(whole: LocalModel, result: Result) -> str:
    # With its index: two classes of ImageNet are called crane.
    likeliest = whole.classes(result.outputs)[0]
    return f"{likeliest['label']} ({likeliest['index']})"
