"""The leak document: how well inputs are reconstructed from what crosses each cut under each codec.

Read by plans that bound what a crossing may reveal. Values are of the strongest attacker that was tried, and so lower
bounds of what leaks. Format: docs/how-to/leak.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from isthmus.artifacts.bundle import Blob, Bundle
from isthmus.artifacts.choice import RAW_ID, TRANSFORM_ID, BoundaryCodecId, Choice
from isthmus.artifacts.constraints import Amount, Count, Digest, Share, Text, one_of
from isthmus.artifacts.fidelity import model_digest
from isthmus.artifacts.json_documents import DocumentKind, builtins, canonical
from isthmus.errors import LearningError

MAX_BYTES = 4 * 2**20
# Cuts times codecs: dozens in practice, since each takes a training run.
MAX_ENTRIES = 10_000
SSIM, CORRELATION = "ssim", "correlation"
MEAN, LINEAR, NETWORK = "mean", "linear", "network"
# Both measures are 1 for the input itself.
Similarity = Annotated[float, Meta(ge=-1, le=1)]


class Likeness(Struct, frozen=True, forbid_unknown_fields=True):
    """How close reconstructions are to the inputs, over the held-out inputs.

    `similarity` is the mean of the document's measure, `p95` its 95th percentile: one input in twenty is reconstructed
    better. `psnr` is the mean in decibels, at most 100. `top1` is the share of reconstructions that get the class of
    their input; None without classes.
    """

    similarity: Similarity
    p95: Similarity
    psnr: Amount
    top1: Share | None = None


class LeakInputs(Struct, frozen=True, forbid_unknown_fields=True):
    """The inputs: the files of `source`, and the numbers of inputs that trained attackers and that measured them."""

    source: Text
    files: Count
    trained: Count
    held_out: Count


class LeakEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """What the strongest `attacker` reconstructs at `cut` from the boundary tensors under a codec.

    The attacker `mean` guesses the mean input: nothing tried did better. `linear` is the likeness of the linear
    attacker in any case. `steps` of the network's training were taken, fewer than demanded where its time was over.
    """

    cut: Text
    codec: BoundaryCodecId
    quality: Share
    attacker: Annotated[str, one_of(MEAN, LINEAR, NETWORK)]
    likeness: Likeness
    linear: Likeness
    steps: Count

    @property
    def choice(self) -> Choice:
        """The measured codec, in the form of settings."""
        return Choice(self.codec, self.quality)


class Leak(Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="isthmus.leak/1"):
    """The measurements of a model; `subject` is its `model_digest`.

    `tensor` is the input that attackers reconstruct, and `shape` the shape at which reconstructions are compared,
    smaller than the tensor's for large photos. `baseline` is the mean of the training inputs, the best constant guess
    of an attacker without activations; `original` the inputs themselves at that shape: a `top1` below 1 is the loss of
    the shape alone. `tables` are the codec tables in force, by tensor.
    """

    subject: Text
    measure: Annotated[str, one_of(SSIM, CORRELATION)]
    tensor: Text
    shape: Annotated[tuple[Count, ...], Meta(max_length=8)]
    inputs: LeakInputs
    baseline: Likeness
    original: Likeness
    entries: Annotated[tuple[LeakEntry, ...], Meta(max_length=MAX_ENTRIES)]
    tables: Mapping[Text, Digest] = {}

    def cuts(self) -> list[str]:
        """The measured cuts, in document order."""
        return list(dict.fromkeys(entry.cut for entry in self.entries))


def revealed(leak: Leak, cut: str, choice: Choice) -> float | None:
    """The mean similarity of reconstructions at `cut` under a codec; None where the cut was not measured.

    Of a codec that was not measured itself: the largest similarity at the cut. A codec's output is computed from the
    raw tensors, so it reveals no more than they do (data processing inequality). With closer looks the finest
    transmission counts.
    """
    at_cut = [entry for entry in leak.entries if entry.cut == cut]
    measured = [e.likeness.similarity for e in at_cut if e.choice in (choice.once, choice.last)]
    if len(measured) == len({choice.once, choice.last}):
        return max(measured)
    return max((entry.likeness.similarity for entry in at_cut), default=None)


def private_cuts(leak: Leak, limit: float) -> list[str]:
    """The measured cuts at which no codec, raw included, lets an input be reconstructed with more than `limit`."""
    return [cut for cut in leak.cuts() if (revealed(leak, cut, Choice(RAW_ID)) or 0.0) <= limit]


def read_leak(bundle: Bundle, blob: Callable[[Blob], bytes]) -> Leak | None:
    """The leak document of a bundle; None where nothing was measured.

    Entries of a codec whose tables were learned again since are left out.

    Raises:
        LearningError: unreadable, measured on another model, or written by another version.
    """
    if bundle.leak is None:
        return None
    LEAK.check_size(bundle.leak.size)
    leak = from_json(blob(bundle.leak))
    if leak.subject != (subject := model_digest(bundle)):
        raise LearningError(
            f"the leak document in {bundle.name} was measured of another model",
            subject=leak.subject,
            expected=subject,
            hint=f"measure it: isthmus leak {bundle.name} --data FOLDER",
        )
    if leak.tables == table_digests(bundle):
        return leak
    return replace(leak, entries=tuple(entry for entry in leak.entries if entry.codec != TRANSFORM_ID))


def table_digests(bundle: Bundle) -> dict[str, str]:
    """The codec tables of a bundle: digests by tensor."""
    return {tensor: blob.digest for tensor, blob in bundle.tables.items()}


def to_json(leak: Leak) -> bytes:
    """Canonical JSON of a leak document."""
    return canonical(builtins(leak))


def from_json(data: bytes | memoryview) -> Leak:
    """Parse a leak document.

    Raises:
        LearningError: not of this format or version; the message names the field and the rule.
    """
    return LEAK.decode(data)


LEAK = DocumentKind(Leak, "leak", MAX_BYTES, LearningError, hint="measure again: isthmus leak NAME --data FOLDER")
