"""Constraints on the fields of JSON documents, as annotations checked by msgspec and exported to JSON Schema."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated

from msgspec import Meta, Struct

# In Python `$` also matches before a final newline; JSON Schema's regular expressions have no `\Z`.
_END = r"$(?!\n)"


def matching(pattern: str) -> Meta:
    """Constrain a string to a full match of `pattern`."""
    return Meta(pattern=f"^{pattern}{_END}")


def one_of(*texts: str) -> Meta:
    """Constrain a string to `texts`."""
    return Meta(pattern=f"^(?:{'|'.join(map(re.escape, texts))}){_END}", extra_json_schema={"enum": list(texts)})


# JSON has no bound on integers; 63 bits fit every counter and file offset.
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Amount = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
# Strings become header values, keys and log lines; frames have tighter bounds of their own.
Text = Annotated[str, Meta(max_length=4096)]
Digest = Annotated[str, matching("sha256:[0-9a-f]{64}")]
# A time without a zone could not be compared with another.
Moment = Annotated[datetime, Meta(tz=True)]


class Blob(Struct, frozen=True, forbid_unknown_fields=True):
    """Content in the registry: `sha256:<hex>` and the length in bytes."""

    digest: Digest
    size: Count
