"""The constraints of fields in JSON documents, as annotations that msgspec checks and writes into JSON Schemas."""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta

# `$` alone would let a line end pass; `\Z` is no part of JSON Schema's dialect.
_END = r"$(?!\n)"


def matching(pattern: str) -> Meta:
    """The constraint of a text that `pattern` matches in full."""
    return Meta(pattern=f"^{pattern}{_END}")


def one_of(*texts: str) -> Meta:
    """The constraint of a text that is one of `texts`."""
    return Meta(pattern=f"^(?:{'|'.join(map(re.escape, texts))}){_END}", extra_json_schema={"enum": list(texts)})


# JSON bounds no integer; 63 bits fit every counter and file offset that the values become.
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Amount = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
# Texts become header values, keys and log lines; a frame carries shorter ones still.
Text = Annotated[str, Meta(max_length=4096)]
Digest = Annotated[str, matching("sha256:[0-9a-f]{64}")]
