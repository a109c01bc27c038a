"""Redaction in requests and responses: inputs that cannot be redacted, and counts, never the redacted texts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from isthmus.artifacts.bundle import Bundle
from isthmus.errors import MediaUnsupported
from isthmus.serving.request import FunctionRequest

REDACTED_HEADER = "Isthmus-Redacted"
# Counts of a photo's redaction are among its sizes, and so in continuations and in the document's `route`.
REDACTED = "redacted_"
# Those that a photo's redaction makes. Callers write continuations, and a name goes into a header.
PHOTO_COUNTS = (f"{REDACTED}faces", f"{REDACTED}regions")
_COUNT = re.compile(r"([a-z0-9_]+)=([0-9]+)")


def state_redaction(request: FunctionRequest, sizes: Mapping[str, int]) -> None:
    """Add the counts among a photo's sizes to the response's header: `faces=2, regions=1`."""
    counts = {name.removeprefix(REDACTED): count for name, count in sizes.items() if name.startswith(REDACTED)}
    state_masking(request, counts)


def state_masking(request: FunctionRequest, counts: Mapping[str, int]) -> None:
    """Add numbers of masked patterns by their names to the response's header: `email=1, ticket=3`."""
    total = {name: int(count) for name, count in _COUNT.findall(request.reply_headers.get(REDACTED_HEADER, ""))}
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count
    if total:
        request.reply_headers[REDACTED_HEADER] = ", ".join(f"{name}={count}" for name, count in total.items())


def refuse_tensors(bundle: Bundle) -> None:
    """Refuse tensors for a bundle that redacts inputs: nothing can be redacted in them.

    Raises:
        MediaUnsupported: the bundle redacts inputs.
    """
    if bundle.redaction is None:
        return
    of_photos = bundle.redaction.of_photos
    raise MediaUnsupported(
        f"{bundle.name} redacts {'photos' if of_photos else 'texts'}, and tensors cannot be redacted",
        accepted=["photos" if of_photos else "OpenAI API"],
        hint="send the photo itself" if of_photos else "send texts to /v1/embeddings or /v1/chat/completions",
    )
