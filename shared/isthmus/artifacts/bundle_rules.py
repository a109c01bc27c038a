"""Rules between a bundle's fields, beyond the types of single fields; checked in every manifest that is read.

Source: docs/reference/bundle.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from isthmus.artifacts.fusion import Fusion
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES
from isthmus.artifacts.redaction import Redaction
from isthmus.artifacts.state import State
from isthmus.artifacts.tensors import TensorSpec

if TYPE_CHECKING:  # bundle.py calls this module
    from isthmus.artifacts.bundle import Bundle, Exit, Segment, TextEmbedding


def check_bundle(bundle: Bundle) -> None:
    """Check the rules between fields: names become parts of keys, file names and headers.

    Raises:
        ValueError: names the broken rule.
    """
    for kind, names in (("segment", [s.id for s in bundle.segment_list]), ("cut", [c.name for c in bundle.cut_list])):
        # The cached properties would silently drop a duplicate.
        if len(set(names)) != len(names):
            raise ValueError(f"has two {kind}s of one name")
    for segment in bundle.segment_list:
        # The end of a segment without a cut could never be reached by a partition.
        if segment.id.variant or not {segment.id.start, segment.id.stop} <= {"", *bundle.cuts}:
            raise ValueError(f"has the segment {segment.id!r}, which does not lie between two of the bundle's cuts")
    if unknown := [name for name in bundle.default_cuts if name not in bundle.cuts]:
        raise ValueError(f"has the default cut {unknown[0][:80]!r}, which is none of the bundle's cuts")
    _check_exits(bundle)
    _check_variants(bundle)
    if bundle.fusion is not None:
        _check_fusion(bundle, bundle.fusion)
    if bundle.state is not None:
        _check_state(bundle, bundle.state)
    if bundle.text is not None and bundle.text.logits not in [spec.name for spec in bundle.outputs]:
        raise ValueError(f"has text by the output {bundle.text.logits[:80]!r}, which the model does not have")
    if bundle.embedding is not None:
        _check_embedding(bundle, bundle.embedding)
    if bundle.redaction is not None:
        _check_redaction(bundle, bundle.redaction)
    for specs in _tensor_lists(bundle):
        if len({spec.name for spec in specs}) != len(specs):
            raise ValueError("has two tensors of one name in one list")
    for processing, doc, key, specs in (
        ("preprocess", bundle.preprocess, "input", bundle.inputs),
        ("postprocess", bundle.postprocess, "output", bundle.outputs),
    ):
        if doc is not None and doc.get(key) not in [spec.name for spec in specs]:
            raise ValueError(
                f"has a {processing} of the {key} {str(doc.get(key))[:80]!r}, which the model does not have"
            )
    try:
        _ = bundle.labels
    except msgspec.ValidationError as e:
        raise ValueError(f"has labels that are no blob: {e}") from e


def _check_exits(bundle: Bundle) -> None:
    for each in bundle.exits:
        if each.segment.id.stop != each.cut or each.segment.id.variant or each.cut not in bundle.cuts:
            raise ValueError(f"has the exit {each.segment.id!r}, which is no branch of one of the bundle's cuts")
    if len({each.cut for each in bundle.exits}) != len(bundle.exits):
        raise ValueError("has two exits of one cut")
    for each in bundle.exits:
        _check_gate(bundle, each)


def _check_gate(bundle: Bundle, each: Exit) -> None:
    if (gate := each.gate) is None:
        return
    output = next((spec for spec in bundle.outputs if spec.name == gate.output), None)
    if output is None:
        raise ValueError(f"has an exit of the output {gate.output[:80]!r}, which the model does not have")
    if {spec.name for spec in each.segment.outputs} != {EXIT_SCORES, EXIT_CONFIDENCE}:
        raise ValueError(f"has an exit at {each.cut} with other outputs than {EXIT_SCORES} and {EXIT_CONFIDENCE}")
    expected = (
        TensorSpec(EXIT_SCORES, output.dtype, output.shape),
        TensorSpec(EXIT_CONFIDENCE, "float32", output.shape[:1]),
    )
    if not output.shape or _types(each.segment.outputs) != _types(expected):
        raise ValueError(f"has an exit at {each.cut} whose outputs do not fit {output.name[:80]!r}")
    crossing = _types(bundle.cuts[each.cut].tensors)
    if not _types(each.segment.inputs) <= crossing:
        raise ValueError(f"has an exit at {each.cut} that takes other tensors than those of the cut")
    # Both would travel in one frame.
    if {name for name, *_ in crossing} & {EXIT_SCORES, EXIT_CONFIDENCE}:
        raise ValueError(f"has an exit at {each.cut}, where a tensor has a name of the exit's")
    if not max(gate.failing, gate.differing or 0) <= gate.exiting <= gate.inputs:
        raise ValueError(f"has an exit at {each.cut} with larger counts than it was measured on")


def _check_variants(bundle: Bundle) -> None:
    for variant in bundle.variants:
        if not variant.segment.id.variant or variant.segment.id.plain not in bundle.segments:
            raise ValueError(f"has {variant.segment.id!r}, which is no variant of one of the bundle's segments")
        own, plain = variant.segment, bundle.segments[variant.segment.id.plain]
        if not _types(own.inputs) <= _types(plain.inputs) or _types(own.outputs) != _types(plain.outputs):
            raise ValueError(f"has {own.id!r}, whose tensors are not those of {plain.id!r}")
    if len({variant.segment.id for variant in bundle.variants}) != len(bundle.variants):
        raise ValueError("has two variants of one name")


def _check_fusion(bundle: Bundle, fusion: Fusion) -> None:
    found = bundle.exit_at(fusion.cut)
    if found is None or (gate := found.gate) is None:
        raise ValueError(f"has a fusion with the exit at {fusion.cut!r}, which is no classifier's")
    if gate.output != fusion.output:
        raise ValueError(f"has a fusion of the output {fusion.output[:80]!r}, and its exit is of {gate.output[:80]!r}")
    spec = next(spec for spec in bundle.outputs if spec.name == fusion.output)
    fusion.check(spec.shape)


def _check_state(bundle: Bundle, state: State) -> None:
    for kind, names, specs in (
        ("input", (state.tokens, *state.inputs), bundle.inputs),
        ("output", state.outputs, bundle.outputs),
    ):
        if len(set(names)) != len(names):
            raise ValueError(f"has two {kind}s of one name in its state")
        if unknown := set(names) - {spec.name for spec in specs}:
            raise ValueError(f"has a state of the {kind} {min(unknown)[:80]!r}, which the model does not have")


def _check_embedding(bundle: Bundle, embedding: TextEmbedding) -> None:
    inputs = {spec.name: spec for spec in bundle.inputs}
    if inputs.keys() != {embedding.ids, embedding.mask} or any(spec.dtype != "int64" for spec in inputs.values()):
        raise ValueError("has an embedding of texts, and other inputs than its ids and its mask as int64")
    vector = next((spec for spec in bundle.outputs if spec.name == embedding.vector), None)
    if vector is None or vector.dtype != "float32" or len(vector.shape) != 2 or not isinstance(vector.shape[1], int):
        raise ValueError(f"has an embedding by {embedding.vector[:80]!r}, no output of float32[texts, width]")


def _check_redaction(bundle: Bundle, redaction: Redaction) -> None:
    redaction.check()
    if redaction.of_photos and bundle.preprocess is None:
        raise ValueError("redacts photos, and declares no pre-processing of photos")
    if redaction.patterns and bundle.text is None and bundle.embedding is None:
        raise ValueError("masks patterns of texts, and takes no texts")


def _types(specs: Iterable[TensorSpec]) -> set[tuple[str, str, tuple[int | None, ...]]]:
    """Names, dtypes and shapes; free dimensions may have other names in another graph."""
    return {
        (each.name, each.dtype, tuple(size if isinstance(size, int) else None for size in each.shape)) for each in specs
    }


def _tensor_lists(bundle: Bundle) -> Iterable[tuple[TensorSpec, ...]]:
    # Not `runnable`, which would drop one of two segments of one id.
    branches = (*(each.segment for each in bundle.exits), *(each.segment for each in bundle.variants))
    parts: tuple[Bundle | Segment, ...] = (bundle, *bundle.segment_list, *branches)
    return [
        *(part.inputs for part in parts),
        *(part.outputs for part in parts),
        *(cut.tensors for cut in bundle.cut_list),
    ]
