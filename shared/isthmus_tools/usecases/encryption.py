"""Encryption at rest: versions sealed for recipients, further grants, and their removal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.grant import Grant
from isthmus.errors import Missing, NotGranted, RequestMalformed
from isthmus.registry import FolderStore, Registry, Resolved, open_registry
from isthmus.registry.collection import DAY_S, reachable
from isthmus.registry.content import blob_key, read_manifest
from isthmus.registry.leases import collect_lease, publish_lease
from isthmus.registry.retry_policy import in_parallel
from isthmus.registry.sealed_content import grant_key, grants_in, grants_of
from isthmus.security.audit import AuditLog, local_user
from isthmus.security.grants import SealedKeys
from isthmus.settings import RegistrySettings
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.sealed_versions import (
    Addressee,
    give,
    parse_addressee,
    parse_addressees,
    plan_of,
    readable_bytes,
    refuse_twice,
    seal_content,
)

# Recipients in an entry of the audit log.
_MAX_LOGGED = 32


@dataclass(frozen=True, kw_only=True)
class EncryptRequest:
    """A version to encrypt, NAME or NAME:VERSION, and its recipients as texts: FILE.pub.pem or FILE.pub.pem@SEGMENT,….

    `shared` encrypts the versions too that share content with it, for the same recipients. `new_keys` encrypts again
    where the recipients have their grants already.
    """

    model: str
    recipients: Sequence[str]
    registry: RegistrySettings
    shared: bool = False
    new_keys: bool = False


@dataclass(frozen=True)
class GrantSummary:
    """What a recipient may read: segments, and bytes of the weights of all. `whole` is everything."""

    label: str
    recipient: str
    segments: Sequence[str]
    whole: bool
    weights_bytes: int
    of_bytes: int


@dataclass(frozen=True)
class EncryptResult:
    """The encrypted versions, the grants of the version asked for, and the plain blobs that were removed.

    `variant` is the digest of another model that the version's plan serves, whose content this leaves as it is.
    """

    name: str
    versions: Sequence[str]
    grants: Sequence[GrantSummary]
    removed: int
    variant: str = ""


def encrypt(request: EncryptRequest, progress: Progress = silent) -> EncryptResult:
    """Seal a version's content under new keys, give grants to exactly these recipients, remove the plain content.

    Of an encrypted version this makes new keys, for which its reader's own recipient key is needed. An interrupted run
    is finished by the same command.

    Raises:
        RequestMalformed: no recipient of everything, one named twice, or other versions share content with this one.
        NotGranted: the version is encrypted, and this process may not read it.
        RegistryUnavailable: a publish is under way, so that nothing may be removed.
        RegistryError: unknown model, or the registry cannot be read or written.
    """
    addressees = parse_addressees(request.recipients)
    registry = open_registry(request.registry)
    model = registry.resolve(request.model)
    versions = [(model.digest, model.bundle), *_sharing(registry, model, request)]
    store, retry_policy = registry.store, registry.retry_policy
    with publish_lease(store, retry_policy):
        if request.new_keys or not _is_done(registry, versions, addressees):
            plans = [plan_of(registry, bundle) for _, bundle in versions]
            # Before the first blob is sealed: a wrong name of a segment costs no time.
            for (_, bundle), (choice, _) in zip(versions, plans, strict=True):
                for addressee in addressees:
                    addressee.segments(bundle, choice)
            sealed = seal_content(registry, store, retry_policy, [bundle for _, bundle in versions], progress)
            for version, plan in zip(versions, plans, strict=True):
                # Everything first: from then on the version counts as encrypted.
                for addressee in sorted(addressees, key=lambda each: bool(each.selection)):
                    give(store, retry_policy, version, plan, sealed, addressee)
                earlier = set(grants_of(store, version[0])) - {each.recipient.id for each in addressees}
                _remove_grants(registry, version[0], earlier)
    progress("removing plain content")
    removed = _remove_plain(registry, [bundle for _, bundle in versions])
    numbers = _numbers(registry, model.name, versions)
    grants = list_grants(registry, model.digest, model.bundle)
    _log(registry, "encrypt", versions=numbers, grants=_for_the_log(grants))
    return EncryptResult(model.name, numbers, grants, removed, _variant(registry, model.digest))


@dataclass(frozen=True, kw_only=True)
class GrantRequest:
    """An encrypted version, and further recipients as of EncryptRequest."""

    model: str
    recipients: Sequence[str]
    registry: RegistrySettings


@dataclass(frozen=True)
class GrantResult:
    """The version and all of its grants."""

    name: str
    version: str
    grants: Sequence[GrantSummary]


def grant(request: GrantRequest) -> GrantResult:
    """Give further recipients grants of an encrypted version; one who has a grant gets another instead.

    Raises:
        NotGranted: this process may not read everything of the version.
        RequestMalformed: a recipient is named twice, or the version is not encrypted.
    """
    addressees = [parse_addressee(text) for text in request.recipients]
    refuse_twice(addressees)
    registry = open_registry(request.registry)
    model = registry.resolve(request.model)
    _refuse_plain(registry, model)
    plan = plan_of(registry, model.bundle)
    sealed = {digest: _all_keys(registry, model, digest) for digest in model.bundle.content}
    with publish_lease(registry.store, registry.retry_policy):
        for addressee in addressees:
            _refuse_last(registry, model, addressee.recipient.id, unless=not addressee.selection)
            give(registry.store, registry.retry_policy, (model.digest, model.bundle), plan, sealed, addressee)
    return _result(registry, model, "grant", [each.recipient.id for each in addressees])


@dataclass(frozen=True, kw_only=True)
class RevokeRequest:
    """An encrypted version, and the recipients to take grants from: an id, a label, or a file of a public key."""

    model: str
    recipients: Sequence[str]
    registry: RegistrySettings


def revoke(request: RevokeRequest) -> GrantResult:
    """Remove grants of an encrypted version. What a recipient read before, content and keys, it may have kept.

    Raises:
        Missing: a recipient has no grant.
        RequestMalformed: nobody else could read everything of the version.
    """
    registry = open_registry(request.registry)
    model = registry.resolve(request.model)
    _refuse_plain(registry, model)
    revoked = []
    for text in request.recipients:
        # Looked at again for each: two together may be the last two of everything.
        recipient = _recipient_id(registry, model, text)
        _refuse_last(registry, model, recipient)
        _remove_grants(registry, model.digest, [recipient])
        revoked.append(recipient)
    return _result(registry, model, "revoke", revoked)


def list_grants(registry: Registry, manifest: str, bundle: Bundle) -> list[GrantSummary]:
    """The grants of a bundle, those of everything first; none of one that is not encrypted.

    Raises:
        RegistryError: a grant cannot be read.
    """
    grants = _grants(registry, manifest)
    every = tuple(bundle.runnable.values())
    total = readable_bytes(bundle, every)
    summaries = [
        GrantSummary(
            each.label,
            each.recipient,
            [str(segment) for segment in each.segments],
            each.whole,
            readable_bytes(bundle, [segment for segment in every if segment.id in each.segments]),
            total,
        )
        for each in grants
    ]
    return sorted(summaries, key=lambda each: (not each.whole, each.label))


def _result(registry: Registry, model: Resolved, what: str, recipients: Sequence[str]) -> GrantResult:
    grants = list_grants(registry, model.digest, model.bundle)
    # All grants that are left, so that the log alone says who could read what at any time.
    version = f"{model.name}:{model.version}"
    _log(registry, what, version=version, recipients=list(recipients)[:_MAX_LOGGED], grants=_for_the_log(grants))
    return GrantResult(model.name, model.version, grants)


def _log(registry: Registry, what: str, **facts: object) -> None:
    AuditLog(registry.store, registry.retry_policy).append(local_user(), what, facts)


def _for_the_log(grants: Sequence[GrantSummary]) -> dict[str, str]:
    # An entry has a bound in bytes, which thousands of segments would exceed.
    return {
        each.recipient: "everything" if each.whole else ",".join(each.segments)[:256] for each in grants[:_MAX_LOGGED]
    }


def _sharing(registry: Registry, model: Resolved, request: EncryptRequest) -> list[tuple[str, Bundle]]:
    """The other versions, of any model, that are not encrypted and share content with this one."""
    others = [
        version
        for version in registry.all_versions()
        if version.digest != model.digest and not _whole_grants(registry, version.digest)
    ]
    # Not by the cache of bundles, which holds some: keys of sealed content are found by the bundles in it.
    digests = {version.digest: read_manifest(registry.manifest(version.digest)) for version in others}
    sharing = {d: bundle for d, bundle in digests.items() if bundle.content.keys() & model.bundle.content.keys()}
    if sharing and not request.shared:
        names = [f"{version.name}:{version.version}" for version in others if version.digest in sharing]
        raise RequestMalformed(
            f"{', '.join(names[:8])} share{'s' * (len(names) == 1)} content with {model.name}:{model.version}, which"
            " would stay readable",
            option="--shared",
            hint=f"encrypt these too, with --shared; or remove them: isthmus rm {names[0]}",
        )
    return list(sharing.items())


def _is_done(registry: Registry, versions: Sequence[tuple[str, Bundle]], addressees: Sequence[Addressee]) -> bool:
    """Whether the grants are these already: an interrupted run has plain content left to remove."""
    for manifest, bundle in versions:
        grants = _grants(registry, manifest)
        if {each.recipient for each in grants} != {each.recipient.id for each in addressees}:
            return False
        # An earlier run may have been killed between two grants; the one of everything is stored first.
        whole = next((each for each in grants if each.whole), None)
        if whole is None or whole.sealed.keys() != bundle.content.keys():
            return False
        try:
            plan = plan_of(registry, bundle)[0]
        except NotGranted:
            # Only recipients can tell which segments head and tail are.
            plan = None
        wanted = {each.recipient.id: {s.id for s in each.segments(bundle, plan)} for each in addressees}
        if any({*each.segments} != wanted[each.recipient] for each in grants):
            return False
    return True


def _remove_grants(registry: Registry, manifest: str, recipients: Iterable[str]) -> None:
    for recipient in recipients:
        registry.retry_policy(
            lambda recipient=recipient: registry.store.delete(grant_key(manifest, recipient))  # type: ignore[misc]
        )


def _remove_plain(registry: Registry, bundles: Sequence[Bundle]) -> int:
    """Remove the plain content of encrypted versions that no other version needs."""
    store, retry_policy = registry.store, registry.retry_policy
    keys = {blob_key(digest) for bundle in bundles for digest in bundle.content}
    # Exclusive: a publish under way may rely on a plain blob that is there.
    with collect_lease(store, retry_policy, DAY_S):
        keys -= reachable(registry)

        def remove(key: str) -> bool:
            if isinstance(store, FolderStore):
                store.forget_pull(key)
            present = retry_policy(lambda: store.exists(key))
            if present:
                retry_policy(lambda: store.delete(key))
            return present

        return sum(in_parallel(remove, sorted(keys)))


def _refuse_plain(registry: Registry, model: Resolved) -> None:
    if not grants_of(registry.store, model.digest):
        raise RequestMalformed(
            f"{model.name}:{model.version} is not encrypted",
            hint=f"isthmus encrypt {model.name}:{model.version} --for FILE.pub.pem",
        )


def _refuse_last(registry: Registry, model: Resolved, recipient: str, unless: bool = False) -> None:
    if not unless and _whole_grants(registry, model.digest) == [recipient]:
        raise RequestMalformed(
            f"{recipient} is the only recipient that may read everything of {model.name}:{model.version}; without it"
            " nobody could",
            hint=f"give another one everything first: isthmus grant {model.name}:{model.version} --for FILE.pub.pem",
        )


def _whole_grants(registry: Registry, manifest: str) -> list[str]:
    return [each.recipient for each in _grants(registry, manifest) if each.whole]


def _all_keys(registry: Registry, model: Resolved, digest: str) -> SealedKeys:
    keys = registry.retry_policy(lambda: registry.content.keys(digest))
    if keys is None:
        recipient = registry.content.recipient
        raise NotGranted(
            f"{model.name}:{model.version} is encrypted, and "
            + (f"recipient {recipient} has no grant of everything" if recipient else "there is no recipient-key here"),
            segment="..",
            recipient=recipient,
            blob=digest,
            hint="run this with the private key of a recipient of everything, as the secret recipient-key",
        )
    return keys


def _recipient_id(registry: Registry, model: Resolved, text: str) -> str:
    labels = [(each.label, each.recipient) for each in _grants(registry, model.digest)]
    named = [recipient for label, recipient in labels if text in (label, recipient)]
    # A label is what people see in lists; the file is at hand where the grant was given.
    with suppress(RequestMalformed):
        named = named or [each for _, each in labels if each == parse_addressee(text).recipient.id]
    if len(named) != 1:
        raise Missing(
            f"{model.name}:{model.version} has {'several grants' if named else 'no grant'} for {text[:80]!r}",
            kind="grant",
            name=text[:80],
            exists=[f"{label} ({recipient})" for label, recipient in labels],
        )
    return named[0]


def _grants(registry: Registry, manifest: str) -> list[Grant]:
    return grants_in(registry.store, registry.retry_policy, manifest)


# A plan's variant is a bundle of its own: its segments are others, and `head` of it may be the whole model.
def _variant(registry: Registry, manifest: str) -> str:
    """A manifest that the plan names and that is not encrypted, if there is one."""
    named = {digest for each in _grants(registry, manifest) if each.whole for digest in each.reaches}
    names = [version for version in registry.all_versions() if version.digest in named]
    plain = [f"{v.name}:{v.version}" for v in names if v.digest != manifest and not _whole_grants(registry, v.digest)]
    return plain[0] if plain else ""


def _numbers(registry: Registry, name: str, versions: Sequence[tuple[str, Bundle]]) -> list[str]:
    digests = {digest for digest, _ in versions}
    numbered = [version for version in registry.all_versions() if version.digest in digests]
    return [f"{version.name}:{version.version}" for version in sorted(numbered, key=lambda v: v.name != name)]
