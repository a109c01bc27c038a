"""What a published version of a model is: the manifest, as frozen dataclasses and as canonical JSON.

A bundle's digest is the SHA-256 of its canonical JSON, so one digest pins the graph, the weights, every segment and the
pre- and post-processing. Source: docs/bundle.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from isthmus.artifacts.cuts import CutText, is_cut_name, parse_partition
from isthmus.artifacts.segment_id import SegmentId, partition_ids
from isthmus.artifacts.tensors import Dim, TensorSpec
from isthmus.errors import Missing, RegistryError

FORMAT = "isthmus.bundle/1"
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_TEXT = 4096
"""Characters of a name, a dtype or a free dimension; a frame carries fewer."""
MAX_RANK = 64
"""Axes of a tensor; numpy has no more, and a frame carries fewer."""

T = TypeVar("T")

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """Content in the registry: `sha256:<hex>` and its length in bytes."""

    digest: str
    size: int


@dataclass(frozen=True)
class WeightTensor:
    """One initialiser's place in the weights file, and the digest of exactly those bytes."""

    name: str
    offset: int
    length: int
    digest: str


@dataclass(frozen=True)
class Weights:
    """The one weights file, tensors sorted by offset: the order in which the graph first uses them."""

    blob: Blob
    tensors: tuple[WeightTensor, ...]


@dataclass(frozen=True)
class Segment:
    """The part of the model between two cuts, runnable alone.

    `weights` are half-open ranges of indices into `Weights.tensors`. `inputs` and `outputs` are what its graph takes
    and gives; a value that only passes by it is not among them: the router holds it.
    """

    id: SegmentId
    graph: Blob
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[tuple[int, int], ...]
    macs: int = 0


@dataclass(frozen=True)
class Cut:
    """A named cut: the tensors that cross it, what they weigh as they are, and the share of MACs upstream of it."""

    name: str
    tensors: tuple[TensorSpec, ...]
    bytes: int
    macs_before: float
    position: int | None = None


@dataclass(frozen=True)
class Bundle:
    """One published version of a model.

    `default_cuts` name the partition that a request takes when nothing chooses another: n names make n + 1 segments.
    `preprocess`, `postprocess` are data for isthmus.processing; None where the model takes and gives bare tensors.
    `tables` are what calibrated codecs know of a tensor, by its name, each a frame of named arrays. `fidelity` is what
    was measured of each codec's answers (docs/codecs.md), and `plan` the plan made for this bundle (docs/plan.md).
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: Weights
    segments: Mapping[str, Segment]
    cuts: Mapping[str, Cut]
    default_cuts: tuple[str, ...] = ()
    preprocess: Mapping[str, Any] | None = None
    postprocess: Mapping[str, Any] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Blob] = field(default_factory=dict)
    fidelity: Blob | None = None
    plan: Blob | None = None

    def segment(self, segment_id: str) -> Segment:
        """The segment of that id.

        Raises:
            Missing: this bundle has no such segment; names those it has.
        """
        if (found := self.segments.get(segment_id)) is not None:
            return found
        raise Missing(
            f"bundle {self.name} has no segment {segment_id!r}",
            kind="segment",
            name=segment_id,
            exists=sorted(self.segments),
            hint=f"publish it with: isthmus cut {self.name} --cut …",
        )

    def cut_names(self, text: str) -> tuple[str, ...]:
        """The names of this bundle's cuts that `text` says, in order: by name, position or tensors (docs/cuts.md).

        Names separated by commas are cuts in order, too, unless the bundle has a cut of these tensors.

        Raises:
            Missing: the bundle has no such cut.
        """
        known = {*self.cuts, *(t.name for c in self.cuts.values() for t in c.tensors)}
        return tuple(name for cut in parse_partition(text, known) for name in self._names_of(cut))

    def _names_of(self, text: CutText) -> tuple[str, ...]:
        if len(text.parts) == 1 and text.parts[0] in self.cuts:
            return text.parts
        for cut in sorted(self.cuts.values(), key=lambda c: c.name != text.name):
            at_position = text.position is not None and cut.position == text.position
            if at_position or {t.name for t in cut.tensors} == set(text.parts):
                return (cut.name,)
        for part in text.parts:
            if part not in self.cuts:
                name = part if len(text.parts) == 1 else ",".join(text.parts)
                raise Missing(
                    f"bundle {self.name} has no cut {name!r}", kind="cut", name=name, exists=sorted(self.cuts)
                )
        return text.parts

    def partition(self, cuts: Iterable[str] | None = None) -> tuple[Segment, ...]:
        """The segments, in order, that `cuts` (default: `default_cuts`) part the model into.

        `cuts` are names, or one text that says them (see `cut_names`).

        Raises:
            Missing: a cut, or the segment between two of them, is not in this bundle.
        """
        if isinstance(cuts, str):
            cuts = self.cut_names(cuts)
        names = self.default_cuts if cuts is None else tuple(cuts)
        for name in names:
            if name not in self.cuts:
                raise Missing(
                    f"bundle {self.name} has no cut {name!r}", kind="cut", name=name, exists=sorted(self.cuts)
                )
        return tuple(map(self.segment, partition_ids(names)))

    def has_segments(self, cuts: Iterable[str]) -> bool:
        """Whether every segment of the partition at `cuts` is in this bundle."""
        return self.segments.keys() >= set(partition_ids(cuts))

    def weight_ranges(self, segment: Segment) -> tuple[WeightTensor, ...]:
        """The weights file's tensors that `segment` reads, by offset."""
        return tuple(t for start, stop in segment.weights for t in self.weights.tensors[start:stop])

    def blobs(self) -> set[str]:
        """The digests of all content that this bundle refers to."""
        found = {self.weights.blob.digest, *(s.graph.digest for s in self.segments.values())}
        found.update(blob.digest for blob in (self.labels, self.fidelity, self.plan, *self.tables.values()) if blob)
        return found

    @property
    def labels(self) -> Blob | None:
        """The blob of class names (a JSON list of strings) that `postprocess` refers to, if it does."""
        doc = (self.postprocess or {}).get("labels")
        return None if doc is None else _blob_from(doc)


def digest_of(data: bytes | memoryview) -> str:
    """`sha256:<hex>` of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def subject_digest(bundle: Bundle) -> str:
    """The digest of a bundle without its plan: what a plan is made for, and the only thing that it may serve."""
    return digest_of(to_json(replace(bundle, plan=None)))


def is_digest(text: str) -> bool:
    """Whether `text` is `sha256:` and 64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def is_model_name(text: str) -> bool:
    """Whether `text` can name a model: 1 to 63 of a-z, 0-9, '.', '_' and '-', starting and ending alphanumeric."""
    return _NAME.fullmatch(text) is not None


def to_json(bundle: Bundle) -> bytes:
    """Canonical JSON of a bundle: sorted keys, no spaces, UTF-8; equal bundles give equal bytes."""
    doc = {
        "format": FORMAT,
        "name": bundle.name,
        "inputs": _specs_to(bundle.inputs),
        "outputs": _specs_to(bundle.outputs),
        "weights": {
            "blob": _blob_to(bundle.weights.blob),
            "tensors": [[t.name, t.offset, t.length, t.digest] for t in bundle.weights.tensors],
        },
        "segments": [
            {
                "id": s.id,
                "graph": _blob_to(s.graph),
                "inputs": _specs_to(s.inputs),
                "outputs": _specs_to(s.outputs),
                "weights": [list(r) for r in s.weights],
                "macs": s.macs,
            }
            for s in sorted(bundle.segments.values(), key=lambda s: s.id)
        ],
        "cuts": [
            {
                "name": c.name,
                "tensors": _specs_to(c.tensors),
                "bytes": c.bytes,
                "macs_before": c.macs_before,
                "position": c.position,
            }
            for c in sorted(bundle.cuts.values(), key=lambda c: c.name)
        ],
        "default_cuts": list(bundle.default_cuts),
        "preprocess": bundle.preprocess,
        "postprocess": bundle.postprocess,
        "source": bundle.source,
    }
    # Written only where there is one, so that a bundle without them keeps its digest.
    if bundle.tables:
        doc["tables"] = {name: _blob_to(blob) for name, blob in bundle.tables.items()}
    if bundle.fidelity is not None:
        doc["fidelity"] = _blob_to(bundle.fidelity)
    if bundle.plan is not None:
        doc["plan"] = _blob_to(bundle.plan)
    return json.dumps(doc, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def from_json(data: bytes) -> Bundle:
    """Read a manifest.

    Raises:
        RegistryError: not a manifest of this format; the sentence says where it departs.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise RegistryError(f"a manifest of {len(data)} bytes exceeds {MAX_MANIFEST_BYTES}", limit=MAX_MANIFEST_BYTES)
    try:
        doc = json.loads(data, parse_constant=_refuse_constant)
        if doc["format"] != FORMAT:
            raise RegistryError(f"manifest format is {str(doc['format'])[:80]!r}; this version reads {FORMAT!r}")
        return _checked(
            Bundle(
                name=_text(doc["name"]),
                inputs=_specs_from(doc["inputs"]),
                outputs=_specs_from(doc["outputs"]),
                weights=Weights(
                    _blob_from(doc["weights"]["blob"]),
                    tuple(
                        WeightTensor(_text(n), _whole(o), _whole(size), _text(d))
                        for n, o, size, d in _list(doc["weights"]["tensors"])
                    ),
                ),
                segments=_by_name("segment", (_segment_from(s) for s in _list(doc["segments"]))),
                cuts=_by_name("cut", (_cut_from(c) for c in _list(doc["cuts"]))),
                default_cuts=tuple(_text(c) for c in _list(doc["default_cuts"])),
                preprocess=_object_or_none(doc["preprocess"]),
                postprocess=_object_or_none(doc["postprocess"]),
                source=_object(doc["source"]),
                tables={_text(name): _blob_from(blob) for name, blob in _object(doc.get("tables", {})).items()},
                fidelity=_blob_from(doc["fidelity"]) if "fidelity" in doc else None,
                plan=_blob_from(doc["plan"]) if "plan" in doc else None,
            )
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        raise RegistryError(f"not a bundle manifest: {type(e).__name__}: {str(e)[:200]}") from e


def _checked(bundle: Bundle) -> Bundle:
    """A bundle whose names can be names: they become parts of keys, files and headers."""
    if not is_model_name(bundle.name):
        raise ValueError(f"{bundle.name[:80]!r} cannot name a model")
    if bad := next((name for name in bundle.cuts if not is_cut_name(name)), None):
        raise ValueError(f"{bad[:80]!r} cannot name a cut")
    for segment in bundle.segments.values():
        if not {segment.id.start, segment.id.stop} <= {"", *bundle.cuts}:
            raise ValueError(f"{segment.id!r} does not lie between two of the bundle's cuts")
    if bad := next((name for name in bundle.default_cuts if name not in bundle.cuts), None):
        raise ValueError(f"the default cut {bad[:80]!r} is none of the bundle's")
    for what, doc, key, specs in (
        ("preprocess", bundle.preprocess, "input", bundle.inputs),
        ("postprocess", bundle.postprocess, "output", bundle.outputs),
    ):
        if doc is not None and doc.get(key) not in [spec.name for spec in specs]:
            raise ValueError(f"{what} names the {key} {str(doc.get(key))[:80]!r}, which the model does not have")
    # Both become JSON again, and the labels' blob is looked up.
    json.dumps([bundle.preprocess, bundle.postprocess, bundle.source], ensure_ascii=False, allow_nan=False).encode()
    _ = bundle.labels
    return bundle


def _specs_to(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    return [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in specs]


def _specs_from(docs: Any) -> tuple[TensorSpec, ...]:
    specs = tuple(
        TensorSpec(_text(d["name"]), _text(d["dtype"]), tuple(_dim(n) for n in _list(d["shape"], MAX_RANK)))
        for d in _list(docs)
    )
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError("two tensors of one list have one name")
    return specs


def _segment_from(doc: Any) -> tuple[str, Segment]:
    name = SegmentId.parse(_text(doc["id"]))
    ranges = tuple((_whole(start), _whole(stop)) for start, stop in _list(doc["weights"]))
    inputs, outputs = _specs_from(doc["inputs"]), _specs_from(doc["outputs"])
    return name, Segment(name, _blob_from(doc["graph"]), inputs, outputs, ranges, _whole(doc["macs"]))


def _cut_from(doc: Any) -> tuple[str, Cut]:
    share, position = doc["macs_before"], doc["position"]
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise ValueError(f"{str(share)[:80]!r} is no share of the MACs")
    name, tensors = _text(doc["name"]), _specs_from(doc["tensors"])
    position = None if position is None else _whole(position)
    return name, Cut(name, tensors, _whole(doc["bytes"]), float(share), position)


def _by_name(what: str, found: Iterable[tuple[str, T]]) -> dict[str, T]:
    made: dict[str, T] = {}
    for name, value in found:
        if name in made:
            raise ValueError(f"two {what}s are named {name[:80]!r}")
        made[name] = value
    return made


def _blob_to(blob: Blob) -> dict[str, Any]:
    return {"digest": blob.digest, "size": blob.size}


def _blob_from(doc: Any) -> Blob:
    if not is_digest(digest := _text(doc["digest"])):
        raise ValueError(f"{digest[:80]!r} is not a sha256 digest")
    return Blob(digest, _whole(doc["size"]))


# Whoever can write to a registry can write any JSON there: each value is what it must be, and bounded.


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > MAX_TEXT:
        raise ValueError(f"{str(value)[:80]!r} is no text of at most {MAX_TEXT} characters")
    value.encode()  # half of a surrogate pair is no text, and neither a name on a wire nor in a file
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{_shown(value)} is no whole number from 0 of at most 63 bits")
    return value


def _dim(value: Any) -> Dim:
    return _text(value) if isinstance(value, str) else _whole(value)


def _list(value: Any, most: int | None = None) -> list[Any]:
    if type(value) is not list or (most is not None and len(value) > most):
        raise ValueError(f"{_shown(value)} is no list" + (f" of at most {most}" if most is not None else ""))
    return value


def _object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{_shown(value)} is no object")
    return value


def _object_or_none(value: Any) -> dict[str, Any] | None:
    return None if value is None else _object(value)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _shown(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, str | int | float | bool | None) else type(value).__name__
