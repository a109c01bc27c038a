"""Versions of a model: when each was published, the alias's earlier versions, removal of a version."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from isthmus.errors import Missing
from isthmus.registry.alias_history import AliasHistory
from isthmus.registry.registry import PROD, Registry, check_alias


@dataclass(frozen=True)
class AliasMove:
    """An alias, the version that it means now, and the version that it meant before; empty for none."""

    name: str
    alias: str
    version: str
    was: str


def published_at(registry: Registry, name: str) -> dict[str, datetime]:
    """The time of publication of each version of a model, by number, by the store's clock.

    Raises:
        Missing: no such model.
    """
    numbers = {version.version for version in registry.versions(name)}
    prefix = f"models/{name}/versions/"
    written = {entry.key.removeprefix(prefix): entry.written for entry in registry.store.entries(prefix)}
    return {number: at for number, at in written.items() if number in numbers}


def move_alias(registry: Registry, reference: str, alias: str) -> AliasMove:
    """Let `alias` mean the version that `reference`, NAME:NUMBER or NAME:ALIAS, stands for.

    Raises:
        Missing: no such model or version.
        RegistryError: `alias` cannot be one.
    """
    check_alias(alias)
    version = registry.resolve(reference)
    was = registry.aliases(version.name).get(alias, "")
    registry.set_alias(version.name, alias, version.version)
    return AliasMove(version.name, alias, version.version, was)


def roll_back(registry: Registry, name: str, alias: str = PROD) -> AliasMove:
    """Move an alias to the version before its latest move; a second rollback undoes the move before that.

    Versions that were removed are skipped.

    Raises:
        Missing: no such model or alias, or no earlier version is on record.
    """
    was = registry.resolve(f"{name}:{alias}").version
    numbers = [version.version for version in registry.versions(name)]
    history = AliasHistory(registry.store, registry.retry_policy)
    earlier = next(
        (e for e in reversed(history.earlier(name, alias)) if e.version in numbers and e.version != was), None
    )
    if earlier is None:
        raise Missing(
            f"{alias} has no version of {name} before {name}:{was} to go back to",
            kind="version",
            name=f"{name}:{alias}",
            exists=numbers,
            registry=registry.url,
            hint=f"name the version: isthmus alias {name}:NUMBER {alias}",
        )
    registry.point_alias(name, alias, earlier.version)
    history.forget_from(name, alias, earlier.place)
    return AliasMove(name, alias, earlier.version, was)


def remove_version(registry: Registry, name: str, number: str) -> None:
    """Remove a version; its number is never given again. Its content stays until a collection.

    Raises:
        Missing: no such model or version.
        RegistryError: an alias means the version.
    """
    numbers = [version.version for version in registry.versions(name)]
    if number not in numbers:
        raise Missing(
            f"model {name} has no version {number[:80]!r}",
            kind="version",
            name=number[:80],
            exists=numbers,
            registry=registry.url,
        )
    registry.withdraw(name, number)


def remove_model(registry: Registry, name: str) -> list[str]:
    """Remove a model: its aliases, their history and all versions; returns the versions' numbers.

    Raises:
        Missing: no such model.
    """
    numbers = [version.version for version in registry.versions(name)]
    store, retry_policy = registry.store, registry.retry_policy
    # Aliases first: no alias may mean a removed version.
    for key in [*store.list(f"models/{name}/aliases/"), *store.list(f"models/{name}/moves/")]:
        retry_policy(lambda key=key: store.delete(key))  # type: ignore[misc]
    for number in numbers:
        registry.withdraw(name, number)
    return numbers
