"""Publication of versions: an alias never moves away from a plan unless asked to, and every move is reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.artifacts.bundle import Blob, Bundle
from isthmus.artifacts.fidelity import Fidelity
from isthmus.artifacts.fidelity_document import read
from isthmus.artifacts.plan import Plan
from isthmus.artifacts.plan_document import read_plan
from isthmus.errors import CalibrationError, Missing, PlanMalformed, PlanMismatch
from isthmus.registry import Registry, Resolved, Version
from isthmus_tools.planner.publishing import carry_over, publish_plan


@dataclass(frozen=True)
class Publication:
    """A published version, and its effect on the alias.

    `was` is the alias's earlier version, empty if there was none. `plan` names the choice of the version's plan;
    `lost` is a plan that the version could not keep.
    """

    version: Version
    alias: str
    was: str
    moved: bool
    plan: str = ""
    lost: Plan | None = None

    def document(self) -> dict[str, Any]:
        """The alias and the plan, JSON-ready."""
        return {
            "alias": self.alias,
            "alias_was": self.was,
            "alias_moved": self.moved,
            "plan": self.plan,
            "plan_dropped": self.lost is not None,
        }


def findings(bundle: Bundle, before: Bundle | None = None) -> list[str]:
    """Sentences about the dry run of a bundle's segments, except those of `before`."""
    now, earlier = (b.source.get("dry_run", {}) if b is not None else {} for b in (bundle, before))
    old = earlier.get("differences", {})
    differ = [
        f"at the cut {cut} predictions differ from the whole model's by up to {share:.1g} of an output's largest value"
        for cut, share in now.get("differences", {}).items()
        if old.get(cut) != share
    ]
    return [*differ, *(note for note in now.get("notes", []) if note not in earlier.get("notes", []))]


def publish_version(
    registry: Registry,
    bundle: Bundle,
    files: Mapping[str, Path],
    alias: str,
    *,
    before: Resolved | None = None,
    drop_plan: bool = False,
) -> Publication:
    """Publish a bundle without a plan of its own, made from the version `before` or from a model's file.

    The plan of `before`, else of the alias's version, is kept where it still holds. Otherwise the version is
    published and the alias stays, unless `drop_plan`.

    Raises:
        RegistryError: as `Registry.publish`.
    """
    serving = _serving(registry, bundle.name, alias)
    was = serving.version if serving is not None else ""
    plans = [(model, plan) for model in (before, serving) if model is not None and (plan := _plan(registry, model))]
    if bundle.plan is None and not drop_plan:
        fidelity = _fidelity(registry, bundle, files)
        for model, plan in plans:
            if (valid := carry_over(plan, model.bundle, bundle, fidelity)) is not None:
                version = publish_plan(registry, bundle, files, valid, alias=alias or None)
                return Publication(version, alias, was, moved=bool(alias), plan=valid.chosen)
    keeps = bundle.plan is not None
    stays = not keeps and not drop_plan and any(model.version == was for model, _ in plans)
    version = registry.publish(bundle, files, alias=None if stays else alias or None)
    return Publication(
        version,
        alias,
        was,
        moved=bool(alias) and not stays,
        plan=plans[0][1].chosen if keeps and plans else "",
        lost=plans[0][1] if plans and not keeps else None,
    )


def version_of(registry: Registry, name: str, alias: str) -> str:
    """The number of the alias's version; empty if there is none."""
    serving = _serving(registry, name, alias)
    return serving.version if serving is not None else ""


def _serving(registry: Registry, name: str, alias: str) -> Resolved | None:
    if not alias:
        return None
    try:
        return registry.resolve(f"{name}:{alias}")
    except Missing:
        return None


def _plan(registry: Registry, model: Resolved) -> Plan | None:
    try:
        return read_plan(model.bundle, registry.blob)
    except (PlanMalformed, PlanMismatch):
        return None  # no router serves by it


def _fidelity(registry: Registry, bundle: Bundle, files: Mapping[str, Path]) -> Fidelity | None:
    """The fidelity of a bundle, its content partly in `files` still."""

    def content(blob: Blob) -> bytes:
        return files[blob.digest].read_bytes() if blob.digest in files else registry.blob(blob)

    try:
        return read(bundle, content)
    except CalibrationError:
        return None  # measured of another model or by another version of Isthmus
