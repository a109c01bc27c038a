"""The schema of a manifest's `postprocess` and of its labels, without numpy. Source: docs/reference/bundle.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from isthmus.artifacts.bundle import is_digest
from isthmus.errors import ModelError

_KEYS = {"kind", "output", "softmax", "top_k", "labels"}


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
