"""Post-processing of a classifier: logits to classes, by the manifest's `postprocess`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isthmus.artifacts.bundle import is_digest
from isthmus.errors import ModelError, RequestMalformed, RunFailed

_KEYS = {"kind", "output", "softmax", "top_k", "labels"}


def classify(
    logits: np.ndarray, spec: Mapping[str, Any], labels: Sequence[str] | None, top_k: int | None = None
) -> list[list[dict[str, Any]]]:
    """The `top_k` classes of each row of the batch, as {"label", "index", "probability"}, in falling order.

    A list for each row, also in a batch of 1. Equal probabilities are in the order of their indices. `label` is None
    without labels. `top_k` None means the spec's. Without `softmax`, the model's values are the probabilities.

    Shapes: logits (batch, classes), with any number of dimensions of 1 after it, or (classes,).

    Raises:
        RequestMalformed: `top_k` is not a whole number from 1.
        RunFailed: values are not finite (minus infinity is allowed before a softmax), the output is no table of
            classes, or the numbers of classes and labels differ.
        ModelError: `spec` is not a postprocess specification.
    """
    validate_spec(spec)
    count = spec["top_k"] if top_k is None else top_k
    if type(count) is not int or count < 1:
        raise RequestMalformed(
            "top_k is not a whole number from 1", parameter="top_k", hint="leave it out to get the model's own"
        )
    scores = table_of(logits, spec, labels)
    if spec["softmax"]:
        scores = softmax(scores)
    if not np.isfinite(scores).all():
        raise RunFailed(f"the output {spec['output']} holds values that are not finite", output=spec["output"])
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return [
        [
            {"label": None if labels is None else labels[i], "index": i, "probability": p}
            for i, p in zip(indices.tolist(), row[indices].tolist(), strict=True)
        ]
        for indices, row in zip(best, scores, strict=True)
    ]


def table_of(logits: np.ndarray, spec: Mapping[str, Any], labels: Sequence[str] | None) -> np.ndarray:
    """An output as float64 (batch, classes).

    Raises:
        RunFailed: the output has another shape, or the numbers of classes and labels differ.
    """
    scores = _rows(logits, spec["output"])
    if labels is not None and len(labels) != scores.shape[1]:
        raise RunFailed(
            f"the output {spec['output']} has {scores.shape[1]} classes and there are {len(labels)} labels",
            classes=scores.shape[1],
            labels=len(labels),
            hint="publish the model again with labels of its own",
        )
    return scores


def class_index(name: str, labels: Sequence[str] | None) -> int:
    """The index of a class, given as its index or its label; case does not matter.

    Raises:
        RequestMalformed: no class has this label; the facts have similar labels.
    """
    # Five digits hold any number of classes; int() of a long text takes quadratic time.
    if name.isascii() and name.isdigit() and len(name) <= 5:
        return int(name)
    folded = [label.casefold() for label in labels or ()]
    if name.casefold() in folded:
        return folded.index(name.casefold())
    similar = difflib.get_close_matches(name[:80].casefold(), folded, 5)
    raise RequestMalformed(
        f"class is {name[:80]!r}, no class's label or index",
        parameter="class",
        exists=[label for label in labels or () if label.casefold() in similar],
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64; NaN for a row with NaN, +infinity or only -infinity."""
    with np.errstate(invalid="ignore"):
        x = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        return np.asarray(x / x.sum(axis=-1, keepdims=True))


def parse_labels(data: bytes) -> tuple[str, ...]:
    """The class names in a labels blob: a JSON list of strings.

    Raises:
        ModelError: anything else.
    """
    try:
        names = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ModelError(f"the labels are not JSON: {e}") from e
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ModelError("the labels are not a JSON list of strings")
    try:
        "".join(names).encode()
    except UnicodeEncodeError as e:
        raise ModelError("the labels hold half of a surrogate pair, which no response can carry") from e
    return tuple(names)


def validate_spec(spec: Mapping[str, Any]) -> None:
    """Check a `postprocess`.

    Raises:
        ModelError: an unknown or missing kind, key or value; the message names the fault.
    """
    if not isinstance(spec, Mapping) or set(spec) != _KEYS:
        got = sorted(map(str, spec)) if isinstance(spec, Mapping) else type(spec).__name__
        raise ModelError(f"postprocess has the keys {got}; it has exactly {sorted(_KEYS)}")
    if spec["kind"] != "classify":
        raise ModelError(f"postprocess kind is {spec['kind']!r}; this version knows 'classify'")
    if not isinstance(spec["output"], str):
        raise ModelError("postprocess output is not a tensor's name")
    if not isinstance(spec["softmax"], bool):
        raise ModelError(f"postprocess softmax is {spec['softmax']!r}; it is true or false")
    if type(spec["top_k"]) is not int or spec["top_k"] < 1:
        raise ModelError(f"postprocess top_k is {spec['top_k']!r}; it is a whole number from 1")
    labels = spec["labels"]
    if labels is not None and not _is_blob(labels):
        raise ModelError('postprocess labels is neither null nor {"digest": "sha256:…", "size": BYTES}')


def _is_blob(doc: Any) -> bool:
    if not isinstance(doc, Mapping) or set(doc) != {"digest", "size"}:
        return False
    digest, size = doc["digest"], doc["size"]
    return isinstance(digest, str) and is_digest(digest) and type(size) is int and size > 0


def _rows(logits: np.ndarray, name: str) -> np.ndarray:
    shape = logits.shape if logits.ndim > 1 else (1, *logits.shape)
    if logits.ndim == 0 or any(n != 1 for n in shape[2:]) or shape[1] == 0 or logits.dtype.kind not in "fiuV":
        raise RunFailed(
            f"the output {name} is {logits.dtype} {list(logits.shape)}, no table of logits (batch, classes)",
            output=name,
            got=f"{logits.dtype} {list(logits.shape)}",
        )
    return logits.reshape(shape[:2]).astype(np.float64)
