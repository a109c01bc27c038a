"""Post-processing of a classifier: logits to classes, by the manifest's `postprocess`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isthmus.errors import RequestMalformed, RunFailed
from isthmus.processing.classify_spec import validate_spec


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


def _rows(logits: np.ndarray, name: str) -> np.ndarray:
    shape = logits.shape if logits.ndim > 1 else (1, *logits.shape)
    if logits.ndim == 0 or any(n != 1 for n in shape[2:]) or shape[1] == 0 or logits.dtype.kind not in "fiuV":
        raise RunFailed(
            f"the output {name} is {logits.dtype} {list(logits.shape)}, no table of logits (batch, classes)",
            output=name,
            got=f"{logits.dtype} {list(logits.shape)}",
        )
    return logits.reshape(shape[:2]).astype(np.float64)
