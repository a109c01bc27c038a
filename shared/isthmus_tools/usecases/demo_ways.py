"""The ways of the demo: the planner's candidates, and what they predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing

from msgspec.structs import replace

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import PHOTO_ID, RAW, Choice
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.fidelity import Entry, Fidelity, offered
from isthmus.artifacts.plan import Candidate, Coding, Error, Terms
from isthmus.context import Context
from isthmus.pipeline import HttpHop, Result, execute, photo_input, planned_route
from isthmus.processing.image_decoding import MAX_PIXELS
from isthmus.registry import Registry, Resolved
from isthmus.runtime.tables import Tables
from isthmus_tools.planner.inputs import TrialInput
from isthmus_tools.planner.offered import short_name
from isthmus_tools.progress import Progress
from isthmus_tools.usecases.function_urls import FunctionUrls

_LONGEST_S = 120.0
_ATTEMPTS, _CONNECT_S, _MAX_REPLY_BYTES = 3, 5.0, 2**26
# As cameras and browsers save photos.
JPEG_QUALITY = 85


def demo_candidates(
    bundle: Bundle, cut: str, fidelity: Fidelity, link: Conditions, edge_slowdown: float
) -> list[tuple[str, Candidate]]:
    """The ways in words, and as the planner's candidates; a JPEG with too little agreement is refused.

    The calibrated split takes the offered codec of least seconds here: encoding at the edge, bytes on the link.
    """
    held_out = fidelity.inputs.held_out
    tensors = [t.name for t in bundle.cuts[cut].tensors]

    def seconds(entry: Entry) -> float:
        codec_ms = entry.pack_ms * edge_slowdown + entry.unpack_ms
        return codec_ms / 1000 + entry.bytes * link.up_byte_s

    plain = [e for e in offered(fidelity, cut) if not e.looks and e.choice != RAW]
    best = min(plain, key=seconds, default=None)
    choice = best.choice if best is not None else RAW
    error = Error(0.0, 0) if best is None else Error(best.error, held_out, 1 - best.agreement, calibrated=True)
    jpeg = next((r for r in fidelity.references if (r.codec, r.quality) == ("jpeg", JPEG_QUALITY)), None)
    photo_error = Error(0.0, 0) if jpeg is None else Error(jpeg.error, held_out, 1 - jpeg.agreement, calibrated=True)
    refused = ""
    if jpeg is not None and jpeg.agreement < fidelity.limit:
        refused = f"{jpeg.agreement:.1%} of {held_out} held-out inputs agree, of {fidelity.limit:.1%}"
    photo = bundle.inputs[0].name
    ways = [
        ("the whole model at the edge", Candidate("edge-float", "edge", Terms())),
        (
            "the photo to the cloud",
            Candidate("cloud-photo", "cloud", Terms(), codecs={photo: Coding(PHOTO_ID)}, input="photo"),
        ),
        (
            "a small JPEG to the cloud",
            Candidate(
                f"cloud-jpeg-{JPEG_QUALITY}",
                "cloud",
                Terms(),
                codecs={photo: Coding(PHOTO_ID, JPEG_QUALITY / 100)},
                input="photo",
                error=photo_error,
                refused=refused,
            ),
        ),
        ("a split, raw", Candidate(f"split-{cut}-{short_name(RAW)}", "split", Terms(), cuts=(cut,))),
        ("a split, calibrated", _encoded(cut, tensors, choice, error)),
    ]
    # A candidate that is expected to take some time: limits of requests follow from that.
    return [(what, replace(way, predicted=Terms(rtt=max(link.rtt_s, 1.0)))) for what, way in ways]


def _encoded(cut: str, tensors: Sequence[str], choice: Choice, error: Error) -> Candidate:
    codecs = {} if choice == RAW else dict.fromkeys(tensors, Coding(choice.codec, choice.quality))
    name = f"split-{cut}-{short_name(choice)}"
    return Candidate(name, "split", Terms(), cuts=(cut,), codecs=codecs, error=error)


def predictions(
    registry: Registry,
    model: Resolved,
    candidates: Mapping[str, Candidate],
    inputs: Sequence[TrialInput],
    functions: FunctionUrls,
    progress: Progress,
) -> dict[str, list[Result]]:
    """The results of each way for each photo, from the functions without the link."""
    tables = Tables(registry.bundle, registry.blob, MAX_PIXELS)
    predicted: dict[str, list[Result]] = {}
    with ExitStack() as resources:
        hops = [
            HttpHop(
                url,
                attempts=_ATTEMPTS,
                connect_timeout_s=_CONNECT_S,
                max_reply_bytes=_MAX_REPLY_BYTES,
                protection=functions.protection,
            )
            for url in (functions.head, functions.tail)
        ]
        for hop in hops:
            resources.enter_context(closing(hop))
        for what, candidate in candidates.items():
            progress(f"loading what serves {what}")
            route = planned_route(candidate, model.digest, model.bundle, hops, tables, registry.bundle)
            encoded = photo_input(candidate, model.bundle, hops)
            predicted[what] = [
                execute(
                    route,
                    {} if encoded else each.arrays,
                    Context.from_headers({}, longest_s=_LONGEST_S),
                    encoded.encode(each.photo) if encoded and each.photo else None,
                )
                for each in inputs
            ]
    return predicted
