"""Versions of models for people: the serving version, calibration, plan, and the command that usually follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from isthmus.artifacts.alias import Alias
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.fidelity import read_fidelity
from isthmus.artifacts.leak import read_leak
from isthmus.artifacts.plan import Plan, read_plan
from isthmus.errors import CalibrationError, LearningError, Missing, NotGranted, PlanMalformed, PlanMismatch
from isthmus.registry import Registry
from isthmus.registry.aliases import PROD
from isthmus.registry.run_records import never_run
from isthmus.registry.versions import published_at
from isthmus_tools.usecases.language import LanguageFacts, language_facts

UNREADABLE = "unreadable"
"""Stands for a plan or for calibrated cuts that this version of Isthmus cannot read; routers ignore both."""
ENCRYPTED = "encrypted"
"""Stands for either where this process has no grant for them; functions that have one use both."""


@dataclass(frozen=True)
class VersionSummary:
    """A version of a model.

    `calibrated` are the cuts with measured codecs, `leak` those at which reconstructions of inputs were measured;
    `plan` is the choice of its plan, empty for none. Each is UNREADABLE where so. `serves` says whether requests
    without a version reach it, `ran` whether each of its segments was loaded and run.
    """

    name: str
    version: str
    digest: str
    published: datetime
    aliases: tuple[str, ...]
    serves: bool
    calibrated: tuple[str, ...]
    leak: tuple[str, ...]
    plan: str
    bundle: Bundle
    ran: bool

    @property
    def language(self) -> LanguageFacts | None:
        """What matters of a language model; None for another model."""
        return language_facts(self.bundle)


@dataclass(frozen=True)
class ModelSummary:
    """A model: the version that serves, the newest version, all aliases and the count of versions."""

    serving: VersionSummary
    newest: str
    aliases: Mapping[str, str]
    versions: int

    @property
    def name(self) -> str:
        """The model's name."""
        return self.serving.name


def list_models(registry: Registry) -> list[ModelSummary]:
    """Every model of a registry, by name.

    Raises:
        RegistryError: the registry cannot be read.
    """
    return [summarise_model(registry, name) for name in registry.models()]


def summarise_model(registry: Registry, name: str) -> ModelSummary:
    """One model.

    Raises:
        Missing: unknown model.
    """
    versions = registry.versions(name)
    return ModelSummary(summarise(registry, name), versions[-1].version, registry.aliases(name), len(versions))


def summarise(registry: Registry, reference: str) -> VersionSummary:
    """The version that `reference` (NAME, NAME:VERSION or NAME:ALIAS) stands for.

    Raises:
        Missing: unknown model, version or alias.
    """
    found = registry.resolve(reference)
    aliases = registry.aliases(found.name)
    return VersionSummary(
        found.name,
        found.version,
        found.digest,
        published_at(registry, found.name)[found.version],
        tuple(sorted(alias for alias, version in aliases.items() if version == found.version)),
        serving_version(registry, found.name) == found.version,
        _calibrated(registry, found.bundle),
        _leak(registry, found.bundle),
        _plan_name(registry, found.bundle),
        found.bundle,
        not never_run(registry, found.bundle),
    )


def list_versions(registry: Registry, name: str) -> list[VersionSummary]:
    """Every version of a model, oldest first.

    Raises:
        Missing: unknown model.
    """
    return [summarise(registry, f"{name}:{version.version}") for version in registry.versions(name)]


def list_aliases(registry: Registry, name: str) -> dict[str, list[Alias]]:
    """The documents of each alias of a model, newest first.

    Raises:
        Missing: unknown model.
    """
    return {
        alias: [registry.alias(name, alias), *registry.alias_history(name, alias)]
        for alias in sorted(registry.aliases(name))
    }


def serving_version(registry: Registry, name: str) -> str:
    """The version that requests without a version reach: prod's, else the newest; empty without a model of that name.

    Raises:
        RegistryError: the registry cannot be read.
    """
    try:
        versions = [version.version for version in registry.versions(name)]
    except Missing:
        return ""
    return registry.aliases(name).get(PROD, versions[-1])


def next_command(registry: Registry, reference: str) -> str:
    """The usual next command of a version: calibrate, plan, alias, or up.

    Raises:
        Missing: unknown model, version or alias.
    """
    version = summarise(registry, reference)
    name = version.name if version.serves else f"{version.name}:{version.version}"
    if (version.bundle.text or version.bundle.embedding) is not None and not version.plan:
        return f"isthmus up --model {name}" if version.serves else f"isthmus promote {name} --as {PROD}"
    if not version.calibrated and not version.plan:
        # The photos of installed packages suit a model from a package; another model needs inputs of its own kind.
        ready = "packages" in version.bundle.source
        return f"isthmus calibrate {name} --data {'photos' if ready else 'FOLDER'}"
    if not version.plan or version.plan == UNREADABLE:
        return f"isthmus plan {name} --uplink 10mbit --rtt 20ms --local"
    if not version.serves:
        return f"isthmus promote {name} --as {PROD}"
    # Functions follow the alias; `isthmus package` is for functions without a registry.
    return f"isthmus up --model {name}"


def _calibrated(registry: Registry, bundle: Bundle) -> tuple[str, ...]:
    try:
        fidelity = read_fidelity(bundle, registry.blob)
    except CalibrationError:
        return (UNREADABLE,)
    except NotGranted:
        return (ENCRYPTED,)
    return tuple(fidelity.cuts()) if fidelity is not None else ()


def _leak(registry: Registry, bundle: Bundle) -> tuple[str, ...]:
    try:
        leak = read_leak(bundle, registry.blob)
    except LearningError:
        return (UNREADABLE,)
    except NotGranted:
        return (ENCRYPTED,)
    return tuple(leak.cuts()) if leak is not None else ()


def _plan_name(registry: Registry, bundle: Bundle) -> str:
    try:
        plan = read_plan(bundle, registry.blob)
    except (PlanMalformed, PlanMismatch):
        return UNREADABLE
    except NotGranted:
        return ENCRYPTED
    return plan.chosen if isinstance(plan, Plan) else ""
