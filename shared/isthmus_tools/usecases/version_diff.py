"""Differences of two versions of a model: segments, cuts, exits, fusion, sizes, fidelity, plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.fidelity import Fidelity, read_fidelity
from isthmus.artifacts.plan import Plan, read_plan
from isthmus.errors import CalibrationError, PlanMalformed, PlanMismatch
from isthmus.registry import Registry, Resolved

NAMED = ("tensors", "segments", "cuts", "exits", "fusions")
"""The fields of `VersionDiff` with changes by name."""


@dataclass(frozen=True)
class NameChanges:
    """Names that the second version has more, less, or with other content."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


@dataclass(frozen=True)
class AgreementChange:
    """The agreement of a cut's codec in the two versions; None where one has not measured it. Shares of 1."""

    cut: str
    codec: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class VersionDiff:
    """How a version differs from another one.

    `weights_bytes` and `graph_bytes` are of the first and the second. `new_bytes` is what a registry with the first
    lacks of the second: whole blobs. `exits` and `fusions` are named by their cuts; an exit with another threshold has
    changed. `plans` names the choices, empty for none.
    """

    first: Resolved
    second: Resolved
    segments: NameChanges
    cuts: NameChanges
    exits: NameChanges
    fusions: NameChanges
    default_cuts: tuple[tuple[str, ...], tuple[str, ...]]
    tensors: NameChanges
    weights_bytes: tuple[int, int]
    graph_bytes: tuple[int, int]
    new_bytes: int
    agreements: tuple[AgreementChange, ...]
    plans: tuple[str, str]

    def document(self) -> dict[str, Any]:
        """The differences, JSON-ready."""
        return {
            "first": f"{self.first.name}:{self.first.version}",
            "second": f"{self.second.name}:{self.second.version}",
            "same": self.first.digest == self.second.digest,
            **{name: vars(getattr(self, name)) for name in NAMED},
            "default_cuts": [list(each) for each in self.default_cuts],
            "weights_bytes": list(self.weights_bytes),
            "graph_bytes": list(self.graph_bytes),
            "new_bytes": self.new_bytes,
            "agreements": [vars(each) for each in self.agreements],
            "plans": list(self.plans),
        }


def diff_versions(store: Registry, first: str, second: str) -> VersionDiff:
    """Compare two versions, each NAME, NAME:VERSION or NAME:ALIAS; of different models, too.

    Raises:
        Missing: unknown model or version.
        RegistryError: the registry cannot be read.
    """
    # Aliases are resolved once, so that a move meanwhile mixes no versions.
    one, two = store.resolve(first), store.resolve(second)
    a, b = one.bundle, two.bundle
    return VersionDiff(
        one,
        two,
        segments=_changes(a.runnable, b.runnable),
        cuts=_changes(a.cuts, b.cuts),
        exits=_changes(_exits(a), _exits(b)),
        fusions=_changes(_fusions(a), _fusions(b)),
        default_cuts=(a.default_cuts, b.default_cuts),
        tensors=_changes(_tensors(a), _tensors(b)),
        weights_bytes=(a.weights.blob.size, b.weights.blob.size),
        graph_bytes=(_graph_bytes(a), _graph_bytes(b)),
        # Whole blobs: a registry keeps no parts of a weights file. A cache fetches ranges, and so less.
        new_bytes=sum(size for digest, size in b.content.items() if digest not in a.content),
        agreements=tuple(_agreements(_fidelity(store, a), _fidelity(store, b))),
        plans=(_plan(store, a), _plan(store, b)),
    )


def _changes(before: Mapping[str, object], after: Mapping[str, object]) -> NameChanges:
    return NameChanges(
        tuple(sorted(after.keys() - before.keys())),
        tuple(sorted(before.keys() - after.keys())),
        tuple(sorted(name for name in before.keys() & after.keys() if before[name] != after[name])),
    )


def _tensors(bundle: Bundle) -> dict[str, object]:
    """The model's own inputs and outputs."""
    return {spec.name: (spec.dtype, spec.shape) for spec in (*bundle.inputs, *bundle.outputs)}


def _exits(bundle: Bundle) -> dict[str, object]:
    return {each.cut: each for each in bundle.exits}


def _fusions(bundle: Bundle) -> dict[str, object]:
    return {} if bundle.fusion is None else {bundle.fusion.cut: bundle.fusion}


def _graph_bytes(bundle: Bundle) -> int:
    return sum(segment.graph.size for segment in bundle.runnable.values())


def _fidelity(store: Registry, bundle: Bundle) -> Fidelity | None:
    try:
        return read_fidelity(bundle, store.blob)
    except CalibrationError:
        return None  # of another version of Isthmus: no router uses it


def _agreements(before: Fidelity | None, after: Fidelity | None) -> list[AgreementChange]:
    first, second = _shares(before), _shares(after)
    return [
        AgreementChange(cut, codec, first.get((cut, codec)), second.get((cut, codec)))
        for cut, codec in sorted(first.keys() | second.keys())
        if first.get((cut, codec)) != second.get((cut, codec))
    ]


def _shares(fidelity: Fidelity | None) -> dict[tuple[str, str], float]:
    if fidelity is None:
        return {}
    # One codec has an entry for each quality.
    return {(each.cut, f"{each.codec} {each.quality:g}"): each.agreement for each in fidelity.entries}


def _plan(store: Registry, bundle: Bundle) -> str:
    try:
        plan = read_plan(bundle, store.blob)
    except (PlanMalformed, PlanMismatch):
        return ""
    return plan.chosen if isinstance(plan, Plan) else ""
