"""The manifest of a published model version.

The digest of a bundle is the SHA-256 of its canonical JSON, and so pins the graph, the weights, every segment and the
processing. Source: docs/reference/bundle.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field
from msgspec.structs import force_setattr, replace

from isthmus.artifacts.bundle_rules import check_bundle
from isthmus.artifacts.constraints import Amount, Count, Share, Text, matching
from isthmus.artifacts.constraints import Blob as Blob
from isthmus.artifacts.cuts import SYNTAX, CutName, CutText, layer_cut, parse_partition
from isthmus.artifacts.fusion import Fusion
from isthmus.artifacts.gate import Gate
from isthmus.artifacts.json_documents import DocumentKind, builtins, canonical
from isthmus.artifacts.redaction import Redaction
from isthmus.artifacts.segment_id import SegmentId, partition_ids
from isthmus.artifacts.state import State
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import Missing, RegistryError

# Parsed in memory as a whole; at some 150 bytes per tensor, 100,000 tensors fit.
MAX_MANIFEST_BYTES = 16 * 2**20

# Published templates have up to some 20,000 characters.
MAX_TEMPLATE_LENGTH = 2**17

_NAME = r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?"
_MODEL = re.compile(_NAME)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
ModelName = Annotated[str, matching(_NAME)]


class WeightTensor(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The range of an initialiser in the weights file, and the digest of that range."""

    name: Text
    offset: Count
    length: Count
    digest: Text


class Weights(Struct, frozen=True, forbid_unknown_fields=True):
    """The weights file, with tensors sorted by offset: the order of first use in the graph."""

    blob: Blob
    tensors: tuple[WeightTensor, ...]


class Segment(Struct, frozen=True, forbid_unknown_fields=True):
    """The part of the model between two cuts, runnable alone.

    `weights` are half-open ranges of indices into `Weights.tensors`. `inputs` and `outputs` are the graph's own;
    boundary tensors that bypass a segment stay in the router.
    """

    id: SegmentId
    graph: Blob
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[tuple[Count, Count], ...]
    macs: Count = 0


class TextModel(Struct, frozen=True, forbid_unknown_fields=True):
    """How a language model's text becomes token ids and back.

    `tokenizer` is the blob of a tokenizer.json (package `tokenizers`); `chat_template` a Jinja template of messages,
    empty for a model of plain text. `logits` is the output with a row of scores for each token; `bos` begins every
    sequence, any of `eos` ends one.
    """

    tokenizer: Blob
    logits: Text
    chat_template: Annotated[str, Meta(max_length=MAX_TEMPLATE_LENGTH)] = ""
    bos: Count | None = None
    eos: Annotated[tuple[Count, ...], Meta(max_length=64)] = ()


class TextEmbedding(Struct, frozen=True, forbid_unknown_fields=True):
    """How a sentence encoder takes texts, each of which becomes one vector.

    `tokenizer` is the blob of a tokenizer.json. `ids` and `mask` are the inputs of token ids and of ones where a token
    is; rows shorter than the longest end in `pad`. `vector` is the output (texts, width). `max_tokens` bounds a text,
    the tokenizer's special tokens included. `pooling` and `normalized` say what the graph computes of the tokens.
    """

    tokenizer: Blob
    ids: Text
    mask: Text
    vector: Text
    max_tokens: Annotated[int, Meta(ge=1, le=2**20)]
    pooling: Literal["cls", "max", "mean"]
    normalized: bool = False
    pad: Count = 0


# What a language model's branch predicts: a token for each position, and its probability by the branch.
EXIT_TOKENS, EXIT_PROBABILITIES = "exit_tokens", "exit_probabilities"


class Exit(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A branch of a cut that predicts the model's output early, from the boundary tensors.

    `segment` runs where the segment before the cut does; its id names the cut twice, `CUT..CUT`. `agreement` is the
    share of held-out predictions that are the model's. `gate` says when a classifier's early answer stands; None for a
    branch that only drafts, as a language model's.
    """

    segment: Segment
    agreement: Share
    gate: Gate | None = None

    @property
    def cut(self) -> str:
        """The name of its cut."""
        return self.segment.id.start


class SegmentVariant(Struct, frozen=True, forbid_unknown_fields=True):
    """Another graph of one of the bundle's segments, compressed: `FROM..TO~NAME`, its weights inside the graph.

    It takes and gives the tensors of the segment that it stands for. `method` says how it was made. `agreement` is the
    share of `inputs` held-out inputs with the whole model's prediction, `low` and `high` its Wilson interval at 95%,
    `error` the RMS of its outputs' difference from the segment's over the RMS of the segment's, of the worst tensor.
    Units: `seconds` is the median run on the machine that measured, on one thread, and `seconds_ratio` that over the
    segment's own; `memory_bytes` is the graph and the runtime's arena.
    """

    segment: Segment
    method: Text
    agreement: Share
    inputs: Count
    seconds_ratio: Amount = 0.0
    memory_bytes: Count = 0
    low: Share = 0.0
    high: Share = 1.0
    error: Amount = 0.0
    seconds: Amount = 0.0

    @property
    def name(self) -> str:
        """The name behind the segment's id."""
        return self.segment.id.variant


class Cut(Struct, frozen=True, forbid_unknown_fields=True):
    """A named cut: its boundary tensors, their raw bytes, and the share of MACs upstream of the cut."""

    name: CutName
    tensors: tuple[TensorSpec, ...]
    bytes: Count
    macs_before: Share
    position: Count | None = None


# dict=True gives cached_property a place for its values; the struct itself stays frozen.
class Bundle(Struct, frozen=True, forbid_unknown_fields=True, dict=True, tag_field="format", tag="isthmus.bundle/1"):
    """A published model version.

    `default_cuts` name the partition of requests without a plan: n names make n + 1 segments. `preprocess` and
    `postprocess` are specs for isthmus.processing, None for a model of plain tensors. `tables` hold the parameters of
    calibrated codecs by tensor name, each a frame of named arrays. `fidelity` is the blob of the fidelity document
    (docs/explanation/calibration.md), `plan` the blob of the plan (docs/reference/plan.md). `state` declares what a
    session's segments keep, `text` how a language model reads and writes, `embedding` how a sentence encoder takes
    texts; each is absent for other models. `redaction` is what the router blurs or masks in an input before it leaves.
    `variants` are compressed segments, `fusion` the weights of an exit's scores beside the model's.
    `leak` is the blob of the leak document (docs/how-to/leak.md).
    """

    name: ModelName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: Weights
    segment_list: tuple[Segment, ...] = field(name="segments")
    cut_list: tuple[Cut, ...] = field(name="cuts")
    default_cuts: tuple[Text, ...] = ()
    preprocess: Mapping[str, Any] | None = None
    postprocess: Mapping[str, Any] | None = None
    source: Mapping[str, Any] = {}
    tables: Mapping[Text, Blob] = {}
    fidelity: Blob | None = None
    plan: Blob | None = None
    state: State | None = None
    text: TextModel | None = None
    embedding: TextEmbedding | None = None
    exits: tuple[Exit, ...] = ()
    redaction: Redaction | None = None
    variants: tuple[SegmentVariant, ...] = ()
    fusion: Fusion | None = None
    leak: Blob | None = None

    def __post_init__(self) -> None:
        # In manifest order, so that equality does not depend on construction order.
        force_setattr(self, "segment_list", tuple(sorted(self.segment_list, key=lambda segment: segment.id)))
        force_setattr(self, "cut_list", tuple(sorted(self.cut_list, key=lambda cut: cut.name)))

    @cached_property
    def kept(self) -> frozenset[str]:
        """Names of inputs and outputs that stay with the segments: no frame carries these."""
        return frozenset() if self.state is None else frozenset((*self.state.inputs, *self.state.outputs))

    def carried(self, specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
        """Those of `specs` that frames carry."""
        return tuple(spec for spec in specs if spec.name not in self.kept)

    @cached_property
    def segments(self) -> Mapping[str, Segment]:
        """The segments by id."""
        return {segment.id: segment for segment in self.segment_list}

    @cached_property
    def cuts(self) -> Mapping[str, Cut]:
        """The cuts by name."""
        return {cut.name: cut for cut in self.cut_list}

    @cached_property
    def runnable(self) -> Mapping[str, Segment]:
        """All graphs that a function can run, by id: the segments, the exits' branches, the variants."""
        further = (*(each.segment for each in self.exits), *(each.segment for each in self.variants))
        return {**self.segments, **{segment.id: segment for segment in further}}

    def segment(self, segment_id: str) -> Segment:
        """The segment, branch or variant with the id `segment_id`.

        Raises:
            Missing: no such segment in this bundle; facts list the existing ids.
        """
        if (segment := self.runnable.get(segment_id)) is not None:
            return segment
        raise Missing(
            f"bundle {self.name} has no segment {segment_id!r}",
            kind="segment",
            name=segment_id,
            exists=sorted(self.runnable),
            hint=f"publish it with: isthmus cut {self.name} --cut …",
        )

    def exit_at(self, cut: str) -> Exit | None:
        """The exit of a cut, if it has one."""
        return next((each for each in self.exits if each.cut == cut), None)

    def variants_of(self, segment_id: SegmentId) -> tuple[SegmentVariant, ...]:
        """The variants of a segment."""
        return tuple(each for each in self.variants if each.segment.id.plain == segment_id)

    def cut_names(self, text: str) -> tuple[str, ...]:
        """The names of the cuts in `text`, in order: each by name, position or tensors (docs/explanation/cuts.md).

        Raises:
            Missing: no such cut in this bundle.
        """
        names = {*self.cuts, *(t.name for c in self.cuts.values() for t in c.tensors)}
        return tuple(name for cut in parse_partition(text, names) for name in self._names_of(cut))

    def _names_of(self, text: CutText) -> tuple[str, ...]:
        if len(text.parts) == 1 and text.parts[0] in self.cuts:
            return text.parts
        # A language model's cuts have no positions in the graph: a number is that of the layers before the cut.
        if self.text is not None and text.position is not None and layer_cut(text.position) in self.cuts:
            return (layer_cut(text.position),)
        # Two cuts may share their tensors: a cut of the name in `text` comes first.
        for cut in sorted(self.cuts.values(), key=lambda c: c.name != text.name):
            at_position = text.position is not None and cut.position == text.position
            if at_position or {t.name for t in cut.tensors} == set(text.parts):
                return (cut.name,)
        raise self._no_cut(",".join(text.parts))

    def _no_cut(self, name: str) -> Missing:
        hint = f"isthmus cut {self.name} --cut CUT adds another; {SYNTAX}"
        return Missing(
            f"bundle {self.name} has no cut {name!r}", kind="cut", name=name, exists=sorted(self.cuts), hint=hint
        )

    def partition(self, cuts: Iterable[str] | None = None) -> tuple[Segment, ...]:
        """The segments of the partition at `cuts` (default: `default_cuts`), in order.

        `cuts` are names, or a text for `cut_names`.

        Raises:
            Missing: no such cut in this bundle, or no segment between two of the cuts.
        """
        if isinstance(cuts, str):
            cuts = self.cut_names(cuts)
        names = self.default_cuts if cuts is None else tuple(cuts)
        for name in names:
            if name not in self.cuts:
                raise self._no_cut(name)
        return tuple(map(self.segment, partition_ids(names)))

    def has_segments(self, cuts: Iterable[str]) -> bool:
        """Whether every segment of the partition at `cuts` is in this bundle."""
        return self.segments.keys() >= set(partition_ids(cuts))

    def weight_ranges(self, segment: Segment) -> tuple[WeightTensor, ...]:
        """The tensors of the weights file that `segment` reads, by offset."""
        return tuple(t for start, stop in segment.weights for t in self.weights.tensors[start:stop])

    @cached_property
    def content(self) -> Mapping[str, int]:
        """The lengths of all blobs referenced by this bundle, by digest."""
        tokenizers = [model.tokenizer for model in (self.text, self.embedding) if model is not None]
        faces = self.redaction.faces if self.redaction is not None else None
        detector = faces.detector if faces is not None else None
        documents = (self.labels, self.fidelity, self.leak, self.plan, detector, *tokenizers, *self.tables.values())
        blobs = (self.weights.blob, *(s.graph for s in self.runnable.values()), *documents)
        return {blob.digest: blob.size for blob in blobs if blob is not None}

    def blobs(self) -> set[str]:
        """The digests of all blobs referenced by this bundle."""
        return set(self.content)

    @property
    def labels(self) -> Blob | None:
        """The blob of class names (a JSON list of strings) in `postprocess`; None without labels."""
        doc = (self.postprocess or {}).get("labels")
        return None if doc is None else msgspec.convert(doc, Blob)


def digest_of(data: bytes | memoryview) -> str:
    """`sha256:<hex>` of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def subject_digest(bundle: Bundle) -> str:
    """The digest of a bundle without its plan: the subject of a plan, and the only bundle served by that plan."""
    return digest_of(to_json(replace(bundle, plan=None)))


def is_digest(text: str) -> bool:
    """Whether `text` is `sha256:` and 64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def is_model_name(text: str) -> bool:
    """Whether `text` is a valid model name: 1 to 63 of a-z, 0-9, '.', '_' and '-', with alphanumeric ends."""
    return _MODEL.fullmatch(text) is not None


# Absent if empty, so that bundles without these fields keep the digests of earlier versions.
_OPTIONAL = (
    *("tables", "fidelity", "plan", "state", "text", "embedding", "exits", "redaction"),
    *("variants", "fusion", "leak"),
)


def to_json(bundle: Bundle) -> bytes:
    """Canonical JSON of a bundle: sorted keys, no spaces, UTF-8; equal bundles give equal bytes."""
    doc = builtins(bundle)
    for name in _OPTIONAL:
        if not doc[name]:
            del doc[name]
    return canonical(doc)


def from_json(data: bytes | memoryview) -> Bundle:
    """Parse a manifest.

    Raises:
        RegistryError: not a manifest of this format; the message names the field and the rule.
    """
    return BUNDLE.decode(data)


BUNDLE = DocumentKind(Bundle, "bundle", MAX_MANIFEST_BYTES, RegistryError, check_bundle)
