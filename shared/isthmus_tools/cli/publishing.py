"""How commands publish: an alias never moves away from a plan unless that was asked for, and every move is reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.artifacts.bundle import Blob, Bundle
from isthmus.errors import CalibrationError, Missing, PlanMalformed, PlanMismatch
from isthmus.units import format_duration, format_rate
from isthmus_tools.cli.console import err, out

if TYPE_CHECKING:
    from isthmus.artifacts.fidelity import Fidelity
    from isthmus.artifacts.plan import Plan
    from isthmus.registry import Registry, Resolved, Version

DropPlan = Annotated[
    bool,
    typer.Option(
        "--drop-plan",
        help="Move the alias even where the version that it means has a plan and the new one would have none.",
    ),
]


@dataclass(frozen=True)
class Publication:
    """A published version, and what that did to the alias that was to mean it.

    `was` is the version that the alias meant before, empty if there was none. `plan` names the choice of the plan that
    the version has; `lost` is a plan that the version could not keep.
    """

    version: Version
    alias: str
    was: str
    moved: bool
    plan: str = ""
    lost: Plan | None = None

    def document(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "alias": self.alias,
            "alias_was": self.was,
            "alias_moved": self.moved,
            "plan": self.plan,
            "plan_dropped": self.lost is not None,
        }

    def show(self) -> None:
        """What the alias means now, and where the plan went."""
        name, lost = self.version.name, self.lost
        for line in (
            self._alias_line(),
            f"the plan stays in force: {self.plan}; to choose anew: isthmus plan {name}:{self.version.version} …"
            if self.plan
            else "",
            f"{name}:{self.version.version} has no plan: the plan before it ({lost.chosen}) is for another bundle; plan"
            f" again: {_again(lost, self.version)}"
            if lost is not None
            else "",
        ):
            if line:
                out.print(line, highlight=False, markup=False, soft_wrap=True)

    def _alias_line(self) -> str:
        name, number = self.version.name, self.version.version
        if not self.alias:
            return ""
        if not self.moved:
            return (
                f"{self.alias} stays at {name}:{self.was}, which serves by a plan; --drop-plan moves it to"
                f" {name}:{number} without one"
            )
        if self.was == number:
            return f"{self.alias} means {name}:{number}, as before"
        return f"{self.alias} means {name}:{number} now" + (f"; it meant {name}:{self.was}" if self.was else "")


def findings(bundle: Bundle, before: Bundle | None = None) -> list[str]:
    """Sentences on what the dry run of a bundle's segments found, without those that `before` has already."""
    found, known = (b.source.get("dry_run", {}) if b is not None else {} for b in (bundle, before))
    old = known.get("differences", {})
    differ = [
        f"at the cut {cut} predictions differ from the whole model's by up to {share:.1g} of an output's largest value"
        for cut, share in found.get("differences", {}).items()
        if old.get(cut) != share
    ]
    return [*differ, *(note for note in found.get("notes", []) if note not in known.get("notes", []))]


def warn(sentences: Sequence[str]) -> None:
    """Print warnings on standard error."""
    for sentence in sentences:
        err.print(f"warning: {sentence}", highlight=False, markup=False, soft_wrap=True)


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

    The plan of `before`, else that of the version which `alias` means, is kept where it still holds. Where it does not,
    the alias stays, unless `drop_plan`: the new version is published all the same.

    Raises:
        RegistryError: as `Registry.publish`.
    """
    from isthmus_tools.planner.published import carried, publish_plan

    serving = _serving(registry, bundle.name, alias)
    was = serving.version if serving is not None else ""
    plans = [(found, plan) for found in (before, serving) if found is not None and (plan := _plan(registry, found))]
    if bundle.plan is None and not drop_plan:
        fidelity = _fidelity(registry, bundle, files)
        for found, plan in plans:
            if (kept := carried(plan, found.bundle, bundle, fidelity)) is not None:
                version = publish_plan(registry, bundle, files, kept, alias=alias or None)
                return Publication(version, alias, was, moved=bool(alias), plan=kept.chosen)
    keeps = bundle.plan is not None
    stays = not keeps and not drop_plan and any(found.version == was for found, _ in plans)
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
    """The number of the version that `alias` means; empty if there is none."""
    serving = _serving(registry, name, alias)
    return serving.version if serving is not None else ""


def _serving(registry: Registry, name: str, alias: str) -> Resolved | None:
    if not alias:
        return None
    try:
        return registry.resolve(f"{name}:{alias}")
    except Missing:
        return None


def _plan(registry: Registry, found: Resolved) -> Plan | None:
    from isthmus.artifacts.plan_document import read_plan

    try:
        return read_plan(found.bundle, registry.blob)
    except (PlanMalformed, PlanMismatch):
        return None  # no router serves by it


def _fidelity(registry: Registry, bundle: Bundle, files: Mapping[str, Path]) -> Fidelity | None:
    """What was measured of the codecs of a bundle whose content may still be in `files` alone."""
    from isthmus.artifacts.fidelity_document import read

    def blob(wanted: Blob) -> bytes:
        return files[wanted.digest].read_bytes() if wanted.digest in files else registry.blob(wanted)

    try:
        return read(bundle, blob)
    except CalibrationError:
        return None  # of another model or another version of Isthmus: it says nothing of this bundle


def _again(plan: Plan, version: Version) -> str:
    """The command that plans `version` for the link that `plan` was made for."""
    c = plan.conditions
    options = [
        f" --uplink {_word(format_rate(c.uplink_bps))}" if math.isfinite(c.uplink_bps) else "",
        f" --downlink {_word(format_rate(c.downlink_bps))}" if c.downlink_bps != c.uplink_bps else "",
        f" --rtt {_word(format_duration(c.rtt_s))}" if c.rtt_s else "",
    ]
    return f"isthmus plan {version.name}:{version.version}{''.join(options)} …"


def _word(text: str) -> str:
    return text.replace(" ", "")
