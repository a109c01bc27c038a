"""Versions of a model: when each was published, the return of an alias to an earlier one, removal of a version."""

from __future__ import annotations

from datetime import datetime

from isthmus.errors import Missing, Untrusted
from isthmus.registry.aliases import PROD, AliasSigner, Move
from isthmus.registry.registry import Registry


def published_at(registry: Registry, name: str) -> dict[str, datetime]:
    """The time of publication of each version of a model, by number, by the store's clock.

    Raises:
        Missing: no such model.
    """
    numbers = {version.version for version in registry.versions(name)}
    prefix = f"models/{name}/versions/"
    written = {entry.key.removeprefix(prefix): entry.written for entry in registry.store.entries(prefix)}
    return {number: at for number, at in written.items() if number in numbers}


def roll_back(
    registry: Registry, name: str, alias: str = PROD, *, moved_by: str = "", signer: AliasSigner | None = None
) -> Move:
    """Move an alias to the version before its latest move; a second rollback undoes the move before that.

    Versions that were removed are skipped. A canary ends.

    Raises:
        Missing: no such model or alias, or no earlier version is on record.
        AliasMoved: somebody else moved the alias meanwhile.
        Untrusted: with a signer, nobody signed the version; the alias did not move.
    """
    present = registry.alias(name, alias)
    digests = {version.version: version.digest for version in registry.versions(name)}
    numbers = [*digests]
    before = present.origin
    for earlier in registry.alias_history(name, alias):
        # A rollback stands for the move that it went back to: those between were undone.
        if earlier.counter >= before:
            continue
        before = earlier.origin
        if earlier.number in numbers and earlier.version != present.version:
            # Not signed on the way, as a promotion does: whoever can write to the registry can write its history.
            if signer is not None and not registry.signatures.of(digests[earlier.number]):
                raise Untrusted(
                    f"{name}:{earlier.number}, to which {alias} would go back, is not signed: functions that demand"
                    " signatures would refuse it",
                    reason="not_signed",
                    model=f"{name}:{earlier.number}",
                    hint=f"if you trust it: isthmus promote {name}:{earlier.number} --as {alias} --sign-with FILE",
                )
            return registry.move_alias(
                name,
                alias,
                earlier.number,
                restores=before,
                moved_by=moved_by,
                expected=present.counter,
                signer=signer,
            )
    raise Missing(
        f"{alias} has no version of {name} before {name}:{present.version} to go back to",
        kind="version",
        name=f"{name}:{alias}",
        exists=numbers,
        registry=registry.url,
        hint=f"name the version: isthmus promote {name}:NUMBER --as {alias}",
    )


def remove_version(registry: Registry, name: str, number: str, *, removed_by: str = "") -> None:
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
    registry.withdraw(name, number, removed_by=removed_by)


def remove_model(registry: Registry, name: str, *, removed_by: str = "") -> list[str]:
    """Remove a model: its aliases and all versions; returns the versions' numbers. Aliases' counters go on.

    Raises:
        Missing: no such model.
    """
    numbers = [version.version for version in registry.versions(name)]
    # Aliases first: no alias may mean a removed version.
    registry.remove_aliases(name, moved_by=removed_by)
    for number in numbers:
        registry.withdraw(name, number, removed_by=removed_by)
    return numbers
