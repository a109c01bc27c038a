"""Enumeration of candidates: cuts searched and extracted from the model, then every option evaluated."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from msgspec.structs import replace

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.conditions import Conditions, Objective
from isthmus.artifacts.profile import Profile
from isthmus.artifacts.segment_id import WHOLE
from isthmus.registry import Registry, SegmentCache
from isthmus_tools.budget import UNLIMITED, Budget
from isthmus_tools.graph import add_cuts, open_model
from isthmus_tools.planner.candidates import CLOUD, EDGE, CandidateSet, check_profile, same_graph
from isthmus_tools.planner.cut_search import CutSearch, edge_fits, measure_encoded_sizes, min_boundary_bytes, named_cuts
from isthmus_tools.planner.evaluation import Evaluator
from isthmus_tools.planner.inputs import TrialInput
from isthmus_tools.planner.offered import Offer, offered_codecs
from isthmus_tools.planner.segment_pool import SegmentPool, codec_tables, weights_beside_graphs
from isthmus_tools.planner.trials import Trials, prepared_cuts
from isthmus_tools.progress import Progress, silent

# A cut takes two more sessions, and a run of the tail for each codec and input.
MAX_CUTS = 12
# Evaluations compare options in one process; results are scaled to the tiers, so more threads only crowd the machine.
_MAX_THREADS = 2


@contextmanager
def enumerate_candidates(
    registry: Registry,
    cache: SegmentCache,
    reference: str,
    profiles: Mapping[str, Profile],
    inputs: Sequence[TrialInput],
    input_kind: str,
    *,
    links: Sequence[Conditions],
    objective: Objective = "latency",
    private_depth: int = 0,
    private_ssim: float | None = None,
    edge_memory_bytes: int | None = None,
    int8: bool = True,
    max_cuts: int = MAX_CUTS,
    all_prefixes: bool = False,
    jpeg_photos: Sequence[bytes] = (),
    own_photos: bool = False,
    progress: Progress = silent,
    budget: Budget = UNLIMITED,
) -> Iterator[CandidateSet]:
    """The candidates of the model `reference`; new files exist as long as the block lasts.

    `profiles` are by tier, edge and cloud; `input_kind` is photo, tensors or random. The search optimises cuts for
    `links` and the objective, or takes all prefix cuts with `all_prefixes`; predictions for other links use the same
    candidates. Heads beyond `edge_memory_bytes` are left out, and so are cuts and codecs whose tensors reveal more than
    `private_ssim`. Photos compressed at the edge are judged by `jpeg_photos`, else by `inputs`: a share of disagreement
    takes more photos than bytes and seconds do. With `own_photos` they tell the share of an exit too: photos of
    packages are not what requests will be. After the budget no further cut is evaluated, nor the int8 variant; the
    set's notes name the omissions.

    Raises:
        RegistryError: no such model.
        Missing, CalibrationError: as `Offer.read`.
        PlanMismatch: a profile of another model.
        ConstraintMalformed: a private depth beyond the model.
        ModelError, RunFailed: the model cannot be read, or does not run with the inputs.
    """
    resolved = registry.resolve(reference)
    for profile in profiles.values():
        check_profile(profile, resolved.bundle)
    # A plan belongs to one bundle, and these candidates are for the next.
    base = replace(resolved.bundle, plan=None)
    offer = Offer.read(base, registry.blob, private_ssim)
    progress(f"fetching {resolved.name}:{resolved.version}")
    with cache.locate(resolved.digest, WHOLE) as whole, tempfile.TemporaryDirectory(prefix="isthmus-") as temporary:
        folder = Path(temporary)
        # A published graph was normalised at import.
        model = open_model(whole.path, examples=dict(inputs[0].arrays), normalise=False)
        choices = offered_codecs(offer.fidelity, "")
        progress("encoding every tensor under every codec")
        encoded = measure_encoded_sizes(model, inputs[0].arrays, choices)
        search = CutSearch(
            model,
            profiles[EDGE],
            profiles[CLOUD],
            encoded,
            private_depth,
            fits=edge_fits(model, base, profiles[EDGE], edge_memory_bytes),
        )
        progress("searching cuts")
        cuts = search.prefixes() if all_prefixes else search.cuts(links, choices, max_cuts, objective)
        names, missing = named_cuts(model, base, cuts, prepared_cuts(base, offer), private_depth)
        notes = offer.notes(names)
        # Before files are made for cuts of the search, which no leak document has.
        names = [name for name in names if offer.allows(name)]
        missing = [cut for cut in missing if offer.allows(cut if isinstance(cut, str) else cut.name)]
        threads = min(profiles[EDGE].device.threads, _MAX_THREADS)
        with weights_beside_graphs(folder, whole.path):
            bundle, files = base, dict[str, Path]()
            if missing:
                partitions = [[cut] for cut in missing]
                bundle, files = add_cuts(
                    base, whole.path, partitions, folder, on_refusal=lambda e: notes.append(e.message)
                )
            # Without the cuts that the extraction refused.
            names = [name for name in names if bundle.has_segments([name])]
            candidates = CandidateSet(
                resolved,
                bundle,
                files,
                model,
                profiles,
                inputs,
                input_kind,
                same_graph={tier: same_graph(registry, profile, bundle) for tier, profile in profiles.items()},
                min_boundary_bytes=min_boundary_bytes(model, encoded),
                private_depth=private_depth,
                notes=notes,
            )
            progress("running the uncut model")
            with closing(SegmentPool(bundle, resolved.digest, files, cache, threads=threads)) as pool:
                evaluator = Evaluator(bundle, resolved.digest, pool, inputs, codec_tables(registry))
                trials = Trials(candidates, evaluator, offer, progress, budget, jpeg_photos, own_photos)
                trials.whole_model()
                trials.variants.whole()
                trials.splits(names)
        if int8:
            trials.variants.int8(registry, cache, whole.path, folder, threads)
        yield candidates


def check_private(registry: Registry, bundle: Bundle, private_ssim: float | None) -> None:
    """Check that the documents for the bound on reconstructions are there, before minutes of profiling.

    Raises:
        Missing, CalibrationError: as `Offer.read`.
    """
    Offer.read(bundle, registry.blob, private_ssim)
