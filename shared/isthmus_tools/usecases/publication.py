"""Publication of versions: an alias never moves away from a plan unless asked to, and every move is reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msgspec import structs

from isthmus.artifacts.bundle import Blob, Bundle, Exit
from isthmus.artifacts.fidelity import Fidelity, read_fidelity
from isthmus.artifacts.plan import Plan, read_plan
from isthmus.artifacts.redaction import Redaction
from isthmus.errors import CalibrationError, Missing, PlanMalformed, PlanMismatch
from isthmus.registry import Registry, Resolved, Version, open_registry
from isthmus.registry.aliases import check_alias
from isthmus.registry.sealed_content import refuse_sealed
from isthmus.settings import RegistrySettings
from isthmus.units import format_duration, format_rate
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.language_candidates import LanguageCandidates
from isthmus_tools.planner.publishing import carry_over, publish_plan, renew, renew_exit
from isthmus_tools.usecases.segment_runs import run_new_segments
from isthmus_tools.usecases.versions import next_command, serving_version


@dataclass(frozen=True)
class Publication:
    """A published version, and its effect on the alias.

    `was` is the alias's earlier version, empty if there was none. `plan` names the choice of the version's plan;
    `renewed` says that the plan was adapted to new tables; `lost` is a plan that the version could not keep. `serving`
    is the version that requests without a version reach now, and `following` the command that usually follows.
    `redacts` says what was carried over from the alias's version, which a new model's file knows nothing of.
    """

    version: Version
    alias: str
    was: str
    moved: bool
    plan: str = ""
    lost: Plan | None = None
    renewed: bool = False
    serving: str = ""
    following: str = ""
    redacts: str = ""

    def document(self) -> dict[str, Any]:
        """The alias and the plan, JSON-ready."""
        return {
            "alias": self.alias,
            "alias_was": self.was,
            "alias_moved": self.moved,
            "plan": self.plan,
            "plan_dropped": self.lost is not None,
            "plan_renewed": self.renewed,
            "serving": self.serving,
            "next": self.following,
            "redaction_kept": self.redacts,
        }


def findings(bundle: Bundle, before: Bundle | None = None) -> list[str]:
    """Sentences about the dry run of a bundle's segments, except sentences about `before`."""
    now, earlier = (b.source.get("dry_run", {}) if b is not None else {} for b in (bundle, before))
    old = earlier.get("differences", {})
    differ = [
        f"at the cut {cut} predictions differ from the whole model's by up to {share:.1g} of an output's largest value"
        for cut, share in now.get("differences", {}).items()
        if old.get(cut) != share
    ]
    return [*differ, *(note for note in now.get("notes", []) if note not in earlier.get("notes", []))]


def refuse_encrypted(registry: Registry, model: Resolved) -> None:
    """Refuse to make a version of an encrypted one, before minutes of work: its new content would be plain.

    Raises:
        RegistryError: the version is encrypted.
    """
    refuse_sealed(registry.store, model.bundle)


def open_predecessor(settings: RegistrySettings, reference: str, alias: str) -> tuple[Registry, Resolved]:
    """The registry, and the version that a next one is made of.

    Raises:
        RegistryError: no such version, an encrypted one, or an alias that cannot be one.
    """
    # What publishing would refuse fails here, before minutes of cutting or calibrating.
    if alias:
        check_alias(alias)
    registry = open_registry(settings)
    model = registry.resolve(reference)
    # The new content would be plain, beside the sealed one.
    refuse_encrypted(registry, model)
    return registry, model


def publish_version(
    registry: Registry,
    bundle: Bundle,
    files: Mapping[str, Path],
    alias: str,
    *,
    settings: RegistrySettings,
    before: Resolved | None = None,
    drop_plan: bool = False,
    keeps_redaction: bool = True,
    dry_run: bool = False,
) -> Publication:
    """Publish a bundle without a plan of its own, made from the version `before` or from a model's file.

    The plan of `before`, else of the alias's version, is kept where still valid. Otherwise the version is
    published and the alias stays, unless `drop_plan`.

    A plan with changed codec tables, or with an exit fitted anew, is renewed. A bundle that redacts nothing gets the
    redaction of the alias's version, if `keeps_redaction`: requests must not lose that by a publication for another
    purpose. Segments that have never run are run first, by `settings` of the registry; with `dry_run` those of `files`
    ran when the bundle was built.

    Raises:
        ModelError: a segment does not run; nothing was published.
        RegistryError: as `Registry.publish`.
    """
    redacts = ""
    serving = _serving(registry, bundle.name, alias) if keeps_redaction and bundle.redaction is None else None
    if serving is not None and bundle.plan is None and (redaction := _suitable(bundle, serving.bundle.redaction)):
        bundle, redacts = structs.replace(bundle, redaction=redaction), redaction.sentence()
    run_new_segments(registry, settings, bundle, files, dry_run=dry_run)
    publication = _publish_version(registry, bundle, files, alias, before, drop_plan)
    return replace(with_next_command(registry, publication), redacts=redacts)


def publish_exits(
    registry: Registry,
    bundle: Bundle,
    exits: Sequence[Exit],
    files: Mapping[str, Path],
    alias: str,
    *,
    settings: RegistrySettings,
    before: Resolved,
) -> Publication:
    """Publish a bundle with new exits beside those of other cuts; `files` has the branches' graphs.

    Raises:
        ModelError, RegistryError: as `publish_version`.
    """
    merged = {each.cut: each for each in (*bundle.exits, *exits)}
    # A plan is for a version without these exits, and fusion weights for the scores of one exit.
    fusion = bundle.fusion if bundle.fusion is not None and merged.get(bundle.fusion.cut) in bundle.exits else None
    extended = structs.replace(bundle, exits=tuple(merged.values()), fusion=fusion, plan=None)
    return publish_version(registry, extended, files, alias, settings=settings, before=before)


def _suitable(bundle: Bundle, redaction: Redaction | None) -> Redaction | None:
    """The part of a redaction that concerns inputs of this bundle; None where nothing does."""
    if redaction is None:
        return None
    of_photos, of_texts = bundle.preprocess is not None, bundle.text is not None or bundle.embedding is not None
    part = Redaction(
        redaction.faces if of_photos else None,
        redaction.regions if of_photos else (),
        redaction.patterns if of_texts else (),
    )
    return part if part.of_photos or part.patterns else None


def with_next_command(registry: Registry, publication: Publication) -> Publication:
    """The publication with the version that serves now and the command that usually follows.

    Raises:
        RegistryError: the registry cannot be read.
    """
    version, lost = publication.version, publication.lost
    serving = serving_version(registry, version.name)
    if lost is not None:
        following = plan_command(lost, version)
    else:
        following = next_command(registry, f"{version.name}:{version.version}")
    return replace(publication, serving=serving, following=following)


def _publish_version(
    registry: Registry,
    bundle: Bundle,
    files: Mapping[str, Path],
    alias: str,
    before: Resolved | None,
    drop_plan: bool,
) -> Publication:
    serving = _serving(registry, bundle.name, alias)
    was = serving.version if serving is not None else ""
    plans = [(model, plan) for model in (before, serving) if model is not None and (plan := _plan(registry, model))]
    if bundle.plan is None and not drop_plan:
        fidelity = _fidelity(registry, bundle, files)
        for model, plan in plans:
            if (valid := carry_over(plan, model.bundle, bundle, fidelity)) is not None:
                version = publish_plan(registry, bundle, files, valid, alias=alias or None)
                return Publication(version, alias, was, moved=bool(alias), plan=valid.chosen)
        for model, plan in plans:
            renewed = renew_exit(plan, model.bundle, bundle)
            if renewed is None and fidelity is not None:
                renewed = renew(plan, model.bundle, bundle, _fidelity(registry, model.bundle, {}), fidelity)
            if renewed is not None:
                version = publish_plan(registry, bundle, files, renewed, alias=alias or None)
                return Publication(version, alias, was, moved=bool(alias), plan=renewed.chosen, renewed=True)
    keeps = bundle.plan is not None
    # Requests must not lose a plan by a publication for another purpose.
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


def publish_candidate(
    registry: Registry,
    settings: RegistrySettings,
    candidate_set: CandidateSet | LanguageCandidates,
    plan: Plan,
    alias: str,
) -> Publication:
    """Publish a plan as its model's next version, and the int8 variant, if any, as a model of its own.

    Raises:
        RegistryError: the alias is malformed, or the registry cannot be written.
    """
    if alias:
        check_alias(alias)
    bundle, variant = candidate_set.bundle, candidate_set.variant
    serving = _serving(registry, bundle.name, alias)
    # First, since the plan names the variant's digest.
    if variant is not None:
        run_new_segments(registry, settings, variant.bundle, variant.files)
        registry.publish(variant.bundle, variant.files)
    run_new_segments(registry, settings, bundle, candidate_set.files)
    version = publish_plan(registry, bundle, candidate_set.files, plan, alias=alias or None)
    was = serving.version if serving is not None else ""
    return with_next_command(registry, Publication(version, alias, was, moved=bool(alias)))


def planned_cuts(registry: Registry, model: Resolved, alias: str) -> list[str]:
    """The cuts of the plans of a version and of its model's alias, each where there is a plan."""
    versions = [model, _serving(registry, model.name, alias)]
    plans = [plan for version in versions if version is not None and (plan := _plan(registry, version)) is not None]
    return list(dict.fromkeys(cut for plan in plans for cut in plan.choice.cuts))


def plan_command(plan: Plan, version: Version) -> str:
    """The command that plans `version` for the link of `plan`."""
    c = plan.conditions
    options = {
        "--uplink": format_rate(c.up_bps) if math.isfinite(c.up_bps) else "",
        "--downlink": format_rate(c.down_bps) if c.down_bps != c.up_bps else "",
        "--rtt": format_duration(c.rtt_s) if c.rtt_s else "",
    }
    values = [f"{option} {value.replace(' ', '')}" for option, value in options.items() if value]
    return " ".join([f"isthmus plan {version.name}:{version.version}", *values, "…"])


def published_plan(model: str, registry: RegistrySettings) -> tuple[Resolved, Plan]:
    """A bundle of the registry and its plan.

    Raises:
        Missing: unknown model, or the bundle has no plan.
        PlanMalformed, PlanMismatch: the plan cannot be read, or is for another bundle.
    """
    store = open_registry(registry)
    version = store.resolve(model)
    plan = read_plan(version.bundle, store.blob)
    if plan is None:
        raise Missing(
            f"{version.name}:{version.version} has no plan",
            kind="plan",
            name=version.name,
            exists=[],
            hint=f"make one: isthmus plan {version.name} --uplink 10mbit --rtt 20ms --local",
        )
    return version, plan


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
        return read_fidelity(bundle, content)
    except CalibrationError:
        return None  # measured of another model or by another version of Isthmus
