"""Enumeration of a language model's candidates: each cut between two layers under each codec, and no cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from isthmus.artifacts.bundle import Blob
from isthmus.artifacts.choice import RAW_ID, TOKEN_CODECS, Choice
from isthmus.artifacts.fidelity import Fidelity, read_fidelity
from isthmus.artifacts.plan import MAX_CANDIDATES, Error, GenerationLoad
from isthmus.artifacts.profile import Profile
from isthmus.artifacts.segment_id import WHOLE, partition_ids
from isthmus.registry import Resolved
from isthmus.runtime.codec_speed import compared, speeds
from isthmus_tools.planner.candidates import CLOUD, EDGE, check_profile
from isthmus_tools.planner.decoder_layers import DecoderLayers, layers_before
from isthmus_tools.planner.language_candidates import LanguageCandidates
from isthmus_tools.planner.offered import offered_codecs, short_name
from isthmus_tools.planner.step_frames import Placement, StepFrames

EDGE_WHOLE, CLOUD_WHOLE = "edge-whole", "cloud-whole"
"""The candidates without a cut: always present, but for the cloud's where token ids stay at the edge."""


def language_candidates(
    model: Resolved,
    profiles: Mapping[str, Profile],
    load: GenerationLoad,
    blob: Callable[[Blob], bytes],
    private_layers: int = 0,
) -> LanguageCandidates:
    """The candidates of a published language model; errors are calibration's where there is one.

    Raises:
        ModelError: the bundle is no language model, or has no cut between layers.
        PlanMismatch: a profile is of another model.
        CalibrationError: the bundle's fidelity cannot be read.
    """
    for profile in profiles.values():
        check_profile(profile, model.bundle)
    fidelity, codecs = read_fidelity(model.bundle, blob), speeds()
    inputs = 0 if fidelity is None else fidelity.inputs.held_out
    layers = DecoderLayers.of(model.bundle)
    frames = StepFrames(model.digest, layers)
    chunk = min(load.chunk, load.prompt)
    placements = enumerate_placements(layers, frames, partial(_token_codecs, fidelity), chunk, private_layers)
    return LanguageCandidates(
        model.bundle,
        layers,
        profiles,
        load,
        frames,
        # A document of more is refused; the first ones have every codec of the first cuts.
        list(placements)[:MAX_CANDIDATES],
        {
            (entry.cut, entry.choice): Error(entry.error, inputs, 1 - entry.agreement, calibrated=True)
            for entry in (() if fidelity is None else fidelity.entries)
        },
        private_layers,
        {tier: compared(profile.codecs, codecs) for tier, profile in profiles.items()},
    )


def _token_codecs(fidelity: Fidelity | None, cut: str) -> list[Choice]:
    """The codecs on offer at a cut under which a token's values do not depend on the tokens of its step."""
    return [choice for choice in offered_codecs(fidelity, cut) if choice.codec in TOKEN_CODECS]


def enumerate_placements(
    layers: DecoderLayers,
    frames: StepFrames,
    choices: Callable[[str], Sequence[Choice]],
    chunk: int,
    private_layers: int = 0,
) -> Iterator[Placement]:
    """No cut, then every cut behind the private layers; codecs that gain nothing on a chunk are left out."""
    yield Placement(EDGE_WHOLE, EDGE, WHOLE, None)
    # Token ids are the input: sent to the cloud, they tell the whole text.
    if not private_layers:
        yield Placement(CLOUD_WHOLE, CLOUD, None, WHOLE)
    for cut in layers.cuts:
        if layers_before(cut) < private_layers:
            continue
        head, tail = partition_ids([cut])
        for choice in choices(cut):
            # Otherwise the raw candidate under another name.
            if choice.codec == RAW_ID or frames.coded(cut, choice, chunk).is_encoded:
                yield Placement(f"split-{cut}-{short_name(choice)}", "split", head, tail, cut, choice)
