"""Encrypted versions brought to another registry: sealed on the way, or as they are, without any key."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from isthmus.artifacts.bundle import Bundle
from isthmus.errors import RegistryError, RequestMalformed
from isthmus.registry import Registry
from isthmus.registry.collection import reached_by
from isthmus.registry.content import blob_key, corrupt, file_digest, send_until_right
from isthmus.registry.leases import publish_lease
from isthmus.registry.sealed_content import grants_in, put_grant, sealed_key
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.sealed_versions import Addressee, give, parse_addressees, plan_of, seal_content

_READ_BYTES = 8 * 2**20


def copy_encrypted(
    source: Registry, target: Registry, digest: str, recipients: Sequence[str], progress: Progress = silent
) -> int:
    """Bring a version's content to another registry, sealed for `recipients`, or as it is without any; its bytes.

    Raises:
        RequestMalformed: as `seal_into`; or the plan serves another model that the target lacks.
        RegistryError: a registry cannot be read or written.
    """
    _refuse_missing_variants(source, target, digest)
    if recipients:
        seal_into(source, target, digest, parse_addressees(recipients), progress)
        return sum(source.bundle(digest).content.values())
    return copy_sealed(source, target, digest, progress)


def _refuse_missing_variants(source: Registry, target: Registry, digest: str) -> None:
    # Whether a variant is encrypted, and for whom, is its own publisher's choice.
    reached = reached_by(source, [digest]) - {digest}
    for version in source.all_versions():
        if version.digest in reached and not target.store.exists(blob_key(version.digest)):
            raise RequestMalformed(
                f"the plan serves {version.name}:{version.version}, which {target.url} does not have",
                hint=f"publish that first: isthmus publish {version.name}:{version.version} --to {target.url} …",
            )


def seal_into(
    source: Registry, target: Registry, digest: str, addressees: Sequence[Addressee], progress: Progress = silent
) -> None:
    """Seal a version's content into another registry, with its grants; nothing plain gets there.

    `Registry.publish` then numbers the version without files.

    Raises:
        RequestMalformed: the version is there in plain, or other versions hold some of its content in plain.
        NotGranted: the source is encrypted, and this process may not read it.
        RegistryError: a registry cannot be read or written.
    """
    bundle, store, retry_policy = source.bundle(digest), target.store, target.retry_policy
    plan = plan_of(source, bundle)
    for addressee in addressees:
        addressee.segments(bundle, plan[0])
    with publish_lease(store, retry_policy):
        # Within the lease, whose write makes the folder of a new registry.
        _refuse_plain(target, bundle)
        sealed = seal_content(source, store, retry_policy, [bundle], progress)
        for addressee in sorted(addressees, key=lambda each: bool(each.selection)):
            give(store, retry_policy, (digest, bundle), plan, sealed, addressee)


def copy_sealed(source: Registry, target: Registry, digest: str, progress: Progress = silent) -> int:
    """Copy the grants of an encrypted version and what they name to another registry; the bytes that were copied.

    No key is needed, and content that arrived before is not copied again. A version without grants takes nothing.

    Raises:
        RequestMalformed: the target holds some of the content in plain.
        Corrupt: the target gives other bytes than the source.
        RegistryError: a registry cannot be read or written.
    """
    if not (grants := grants_in(source.store, source.retry_policy, digest)):
        return 0
    keys = sorted({sealed_key(blob, identity) for grant in grants for blob, identity in grant.sealed.items()})
    copied = 0
    with publish_lease(target.store, target.retry_policy):
        _refuse_plain(target, source.bundle(digest))
        for number, key in enumerate(keys, start=1):
            progress(f"copying sealed blob {number} of {len(keys)}")
            copied += _copy(source, target, key)
        # A grant of everything says that the version is encrypted: all of its content is there by now.
        for grant in grants:
            target.retry_policy(lambda grant=grant: put_grant(target.store, grant))  # type: ignore[misc]
    return copied


def _copy(source: Registry, target: Registry, key: str) -> int:
    size = source.retry_policy(lambda: source.store.size(key))
    if size is None:
        raise RegistryError(f"{source.url} has no {key}, which a grant names", registry=source.url, blob=key)
    if target.retry_policy(lambda: target.store.size(key)) == size:
        return 0
    with tempfile.TemporaryDirectory(prefix="isthmus-copy-") as folder:
        path = Path(folder) / "sealed"
        with path.open("wb") as f:
            f.writelines(_ranges(source, key, size))
        # Without a key the tags cannot be checked here: both stores must give the same bytes.
        digest = file_digest(path)

        def compare() -> None:
            arrived = hashlib.sha256()
            for part in _ranges(target, key, size):
                arrived.update(part)
            if f"sha256:{arrived.hexdigest()}" != digest:
                raise corrupt(target.url, key)

        budget = target.retry_policy.budget()
        send_until_right(
            target.store,
            target.retry_policy,
            budget,
            key,
            lambda: target.store.put_file(key, path, budget),
            compare,
        )
    return size


def _ranges(registry: Registry, key: str, size: int) -> Iterator[bytes]:
    for start in range(0, size, _READ_BYTES):
        stop = min(start + _READ_BYTES, size)
        yield registry.retry_policy(lambda start=start, stop=stop: registry.store.read(key, start, stop))  # type: ignore[misc]


def _refuse_plain(target: Registry, bundle: Bundle) -> None:
    plain = {key.rpartition("/")[2] for key in target.store.list("blobs/sha256/")}
    if shared := sorted({digest.removeprefix("sha256:") for digest in bundle.content} & plain):
        raise RequestMalformed(
            f"{len(shared)} of {len(bundle.content)} blobs of {bundle.name} are in {target.url} in plain already",
            blob=f"sha256:{shared[0]}",
            hint="encrypt the versions there that hold them: isthmus encrypt NAME:VERSION --shared --for …; content of"
            " removed versions goes with isthmus gc --delete",
        )
