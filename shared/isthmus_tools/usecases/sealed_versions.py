"""Content of versions sealed into a registry under new data keys, and who is given which of these."""

from __future__ import annotations

import errno
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.grant import Grant
from isthmus.artifacts.plan import MAX_PLAN_BYTES, Plan, read_plan
from isthmus.errors import LocalError, Missing, PlanMalformed, PlanMismatch, RequestMalformed
from isthmus.registry import BlobStore, Registry, RetryPolicy
from isthmus.registry.collection import digests_in
from isthmus.registry.content import corrupt, send_until_right
from isthmus.registry.sealed_content import DOCUMENTS, put_grant, sealed_key
from isthmus.security.grants import SealedKeys, make_grant, new_sealing
from isthmus.security.recipients import MAX_PEM_BYTES, Recipient, read_recipient
from isthmus.security.sealed_blob import open_range, seal
from isthmus_tools.progress import Progress

# A ranged read of a blob; memory is a few times as much.
_READ_BYTES = 8 * 2**20
_HEAD, _TAIL = "head", "tail"
FORM = "FILE.pub.pem, or FILE.pub.pem@SEGMENT,… where SEGMENT is head, tail, documents or an id such as ..31"


@dataclass(frozen=True)
class Addressee:
    """A recipient of grants: a name for people, a public key, and the segments as text; none means everything."""

    label: str
    recipient: Recipient
    selection: tuple[str, ...] = ()

    def segments(self, bundle: Bundle, plan: Plan | None) -> tuple[Segment, ...]:
        """The segments of a bundle for this recipient, with the exits and variants that run where these do.

        Raises:
            Missing: the bundle has no such segment.
            RequestMalformed: a head or tail of a bundle that is not cut.
        """
        if not self.selection:
            return tuple(bundle.runnable.values())
        chosen = {bundle.segment(_segment_id(text, bundle, plan)) for text in self.selection if text != DOCUMENTS}
        ids, ends = {s.id for s in chosen}, {s.id.stop for s in chosen}
        exits = {each.segment for each in bundle.exits if each.cut in ends}
        variants = {each.segment for each in bundle.variants if each.segment.id.plain in ids}
        return tuple(sorted(chosen | exits | variants, key=lambda segment: segment.id))


def parse_addressee(text: str) -> Addressee:
    """The recipient of an option --for.

    Raises:
        RequestMalformed: no file of that name.
        SettingsError: the file is no public key.
    """
    # A file's name may hold an @.
    path, selection = Path(text), ""
    if not path.is_file() and "@" in text:
        name, _, selection = text.rpartition("@")
        path = Path(name)
    try:
        with path.open("rb") as f:
            pem = f.read(MAX_PEM_BYTES + 1)
    except OSError as e:
        raise RequestMalformed(f"--for {text!r}: {e.strerror}; it is {FORM}", option="--for") from e
    # Labels are printed and compared; a path tells more than recipients need to know.
    label = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem.removesuffix(".pub"))[:64] or "recipient"
    chosen = tuple(part.strip() for part in selection.split(",") if part.strip())
    return Addressee(label, read_recipient(pem, where=str(path)), chosen)


def parse_addressees(texts: Sequence[str]) -> list[Addressee]:
    """The recipients of an encryption.

    Raises:
        RequestMalformed: none of everything, or a key twice.
        SettingsError: a file is no public key.
    """
    addressees = [parse_addressee(text) for text in texts]
    refuse_twice(addressees)
    if all(each.selection for each in addressees):
        raise RequestMalformed(
            "no recipient may read everything, so nobody could read all of the model or give it to others",
            option="--for",
            hint="name one without @SEGMENT: the cloud's key, or one that you keep: --for own.pub.pem",
        )
    return addressees


# Two grants for one key would be one file: the later would replace the earlier without a word.
def refuse_twice(addressees: Sequence[Addressee]) -> None:
    """Refuse two recipients with one key.

    Raises:
        RequestMalformed: names them.
    """
    ids = [each.recipient.id for each in addressees]
    if twice := [each.label for each in addressees if ids.count(each.recipient.id) > 1]:
        raise RequestMalformed(
            f"{' and '.join(twice)} are one key", option="--for", hint="name it once: FILE.pub.pem@SEGMENT,SEGMENT"
        )


def _segment_id(text: str, bundle: Bundle, plan: Plan | None) -> str:
    """The id that a text stands for; head and tail are those of the plan's cuts, else of the default ones."""
    if text not in (_HEAD, _TAIL):
        return text
    cuts = plan.choice.cuts if plan is not None and plan.choice.cuts else bundle.default_cuts
    if not cuts:
        raise RequestMalformed(
            f"{bundle.name} is not cut by default, so it has no {text}", option="--for", hint=f"name a segment: {FORM}"
        )
    segments = bundle.partition(cuts)
    return segments[0 if text == _HEAD else -1].id


def seal_content(
    source: Registry, target: BlobStore, retry_policy: RetryPolicy, bundles: Sequence[Bundle], progress: Progress
) -> dict[str, SealedKeys]:
    """Seal every blob of the bundles into a store, each once, and read each back; the keys by digest.

    A weights file gets a region between every two ends of segments. Memory is bounded; the sealed bytes of a blob pass
    through a temporary file.

    Raises:
        Missing, NotGranted: content that the source does not have, or that this process may not read.
        Corrupt: content does not hash to its digest, or every upload read back differently.
        LocalError: the disk for temporary files is full.
    """
    sizes = {digest: size for bundle in bundles for digest, size in bundle.content.items()}
    boundaries: dict[str, set[int]] = {}
    for bundle in bundles:
        boundaries.setdefault(bundle.weights.blob.digest, set()).update(_boundaries(bundle))
    sealed = {}
    # The weights first: where the disk is too small, that shows at once.
    for number, (digest, size) in enumerate(sorted(sizes.items(), key=lambda item: -item[1]), start=1):
        progress(f"encrypting blob {number} of {len(sizes)}")
        sealed[digest] = new_sealing(digest, size, boundaries.get(digest, ()))
        _seal_blob(source, target, retry_policy, sealed[digest])
    return sealed


def give(
    target: BlobStore,
    retry_policy: RetryPolicy,
    bundle: tuple[str, Bundle],
    plan: tuple[Plan | None, bytes],
    sealed: Mapping[str, SealedKeys],
    addressee: Addressee,
) -> Grant:
    """Store the grant of a bundle's segments for a recipient; `sealed` holds the keys of all content.

    Raises:
        Missing: the bundle has no such segment, or the keys of a blob are not there.
    """
    manifest, content = bundle
    segments = addressee.segments(content, plan[0])
    weights = content.weights.blob.digest
    ranges = [(t.offset, t.offset + t.length) for segment in segments for t in content.weight_ranges(segment)]
    graphs = {segment.graph.digest for segment in content.runnable.values()}
    wanted = {segment.graph.digest for segment in segments} | set(content.content) - graphs - {weights}
    if absent := sorted({weights, *wanted} - sealed.keys()):
        raise Missing(f"{content.name} has no sealed {absent[0]}", kind="blob", name=absent[0], exists=[])
    # Regions of the padding between tensors, and of weights that no segment reads, belong to everything alone.
    whole = not addressee.selection
    blobs = [sealed[digest] for digest in sorted(wanted)]
    if whole or ranges:
        blobs.append(sealed[weights] if whole else sealed[weights].of(ranges))
    facts = Grant(manifest, addressee.label, tuple(s.id for s in segments), whole, tuple(sorted(digests_in(plan[1]))))
    grant = make_grant(facts, addressee.recipient, blobs)
    retry_policy(lambda: put_grant(target, grant))
    return grant


def plan_of(registry: Registry, bundle: Bundle) -> tuple[Plan | None, bytes]:
    """The plan of a bundle and its bytes; none where the plan is another format's, of which the bytes are there."""
    if bundle.plan is None or bundle.plan.size > MAX_PLAN_BYTES:
        return None, b""
    data = registry.blob(bundle.plan)
    try:
        return read_plan(bundle, lambda _: data), data
    except (PlanMalformed, PlanMismatch):
        return None, data


def _boundaries(bundle: Bundle) -> Iterator[int]:
    """The offsets in the weights file where a segment begins or ends to read."""
    tensors = bundle.weights.tensors
    for segment in bundle.runnable.values():
        for index in (end for pair in segment.weights for end in pair):
            if index < len(tensors):
                yield tensors[index].offset


def _seal_blob(source: Registry, target: BlobStore, retry_policy: RetryPolicy, sealed: SealedKeys) -> None:
    key, budget = sealed_key(sealed.digest, sealed.header.identity), retry_policy.budget()
    try:
        # The file holds sealed bytes alone: nothing plain is left where this process is killed.
        with tempfile.TemporaryDirectory(prefix="isthmus-seal-") as folder:
            path = Path(folder) / "sealed"
            with path.open("wb") as f:
                f.writelines(seal(sealed.header, sealed.keys, _plain(source, sealed)))
            send_until_right(
                target,
                retry_policy,
                budget,
                key,
                lambda: target.put_file(key, path, budget),
                lambda: _check_stored(target, retry_policy, sealed),
            )
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LocalError(
                f"the disk of {tempfile.gettempdir()} is full: {sealed.header.sealed_size} bytes are needed",
                hint="set TMPDIR to a folder on a larger disk",
            ) from e
        raise


def _plain(source: Registry, sealed: SealedKeys) -> Iterator[bytes | bytearray]:
    for start in range(0, sealed.header.size, _READ_BYTES):
        yield source.read(sealed.digest, start, min(start + _READ_BYTES, sealed.header.size))


# By the keys of the grants, so that what is checked is what recipients will do.
def _check_stored(target: BlobStore, retry_policy: RetryPolicy, sealed: SealedKeys) -> None:
    """Open all of a stored blob: the plain one may be removed afterwards.

    Raises:
        Corrupt: the store gives other bytes.
    """
    key, digest = sealed_key(sealed.digest, sealed.header.identity), hashlib.sha256()
    for start in range(0, max(1, sealed.header.size), _READ_BYTES):
        stop = min(start + _READ_BYTES, sealed.header.size)
        digest.update(
            retry_policy(
                lambda start=start, stop=stop: open_range(  # type: ignore[misc]
                    sealed.header, sealed.keys, start, stop, lambda a, b: target.read(key, a, b)
                )
            )
        )
    if digest.hexdigest() != sealed.header.digest_hex:
        raise corrupt(target.url, sealed.digest)


def readable_bytes(bundle: Bundle, segments: Iterable[Segment]) -> int:
    """Bytes of the weights that these segments read, each tensor once."""
    return sum(t.length for t in {t for segment in segments for t in bundle.weight_ranges(segment)})
