"""Making a draft: cuts searched and made, every candidate tried here, the int8 variant among them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from isthmus.artifacts.bundle import Bundle, digest_of, to_json
from isthmus.artifacts.choice import Choice
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.fidelity import Fidelity
from isthmus.artifacts.fidelity_document import read
from isthmus.artifacts.plan import CloserLooks, Error
from isthmus.artifacts.profile import Profile, content_of
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import CutError, PlanMismatch
from isthmus.processing.image import MAX_PIXELS, preprocess
from isthmus.processing.image_spec import made_shape
from isthmus.registry import Registry
from isthmus.registry.cache import SegmentCache
from isthmus.runtime.codec_speed import compared, speeds
from isthmus_tools.budget import UNLIMITED, Budget, Pace
from isthmus_tools.graph import add_cuts, open_model
from isthmus_tools.graph.cuts import CutInfo, upstream_of
from isthmus_tools.graph.model import Model
from isthmus_tools.planner.candidates import Search, smallest_crossing
from isthmus_tools.planner.draft import CLOUD, EDGE, Draft
from isthmus_tools.planner.examples import Example
from isthmus_tools.planner.memory import Memory
from isthmus_tools.planner.survey import survey
from isthmus_tools.planner.trials import Option, Trial, Trials
from isthmus_tools.planner.usable import short_name, usable_codecs
from isthmus_tools.planner.variant import FAILURES, int8_variant, why_not
from isthmus_tools.planner.workbench import Workbench, beside_weights
from isthmus_tools.progress import Progress, silent

MAX_CUTS = 12
_TRIES = 3
Table = Callable[[str], object]
"""A tensor's codec table, by the tensor's name."""


@contextmanager
def drafting(
    registry: Registry,
    cache: SegmentCache,
    reference: str,
    profiles: Mapping[str, Profile],
    examples: Sequence[Example],
    inputs: str,
    *,
    links: Sequence[Conditions],
    private_depth: int = 0,
    edge_memory_bytes: int | None = None,
    int8: bool = True,
    most_cuts: int = MAX_CUTS,
    every: bool = False,
    table: Table | None = None,
    progress: Progress = silent,
    budget: Budget = UNLIMITED,
) -> Iterator[Draft]:
    """The draft for the model that `reference` names, its files there for as long as the block lasts.

    `profiles` are by tier, edge and cloud; `inputs` says what `examples` are: photo, tensors or random. `links` are
    what cuts are looked for under, unless `every` takes all prefix cuts; a prediction for another link is made of the
    same candidates. Neither looks at cuts whose head would exceed `edge_memory_bytes`. When the budget is spent no
    further cut is tried, nor the int8 variant; the draft's notes name what was left out.

    Raises:
        RegistryError: no such model.
        PlanMismatch: a profile of another model.
        ConstraintMalformed: a private depth beyond the model.
        ModelError, RunFailed: the model cannot be read, or does not run with the examples.
    """
    found = registry.resolve(reference)
    for profile in profiles.values():
        check_profile(profile, found.bundle)
    base = replace(found.bundle, plan=None)
    fidelity = read(base, registry.blob)
    progress(f"fetching {found.name}:{found.version}")
    with cache.locate(found.digest, WHOLE) as whole, tempfile.TemporaryDirectory(prefix="isthmus-") as place:
        folder = Path(place)
        arrays = examples[0].arrays
        model = open_model(whole.path, examples=dict(arrays), normalise=False)
        choices = usable_codecs(fidelity, "")
        progress("packing every tensor under every codec")
        packed = survey(model, arrays, choices)
        heads = Memory(model, base, profiles[EDGE], lambda segment: False).heads() if edge_memory_bytes else {}
        search = Search(
            model,
            profiles[EDGE],
            profiles[CLOUD],
            packed,
            private_depth,
            fits=lambda position: edge_memory_bytes is None or heads[position] <= edge_memory_bytes,
        )
        progress("searching cuts")
        found_cuts = search.prefixes() if every else search.cuts(links, choices, most_cuts)
        names, fresh = _named(model, base, found_cuts, fidelity, private_depth)
        with beside_weights(folder, whole.path):
            refused: list[CutError] = []
            made = [[c] for c in fresh]
            bundle, files = add_cuts(base, whole.path, made, folder, on_refusal=refused.append) if fresh else (base, {})
            names = [n for n in names if bundle.has_segments([n])]
            threads = min(profiles[EDGE].device.threads, 2)
            bench = Workbench(bundle, found.digest, files, cache, threads=threads)
            draft = Draft(
                found,
                bundle,
                files,
                model,
                profiles,
                examples,
                inputs,
                same_graph={tier: _same_graph(registry, profile, bundle) for tier, profile in profiles.items()},
                crossing_least=smallest_crossing(model, packed),
                private_depth=private_depth,
            )
            draft.notes.extend(e.message for e in refused)
            trials = _try_all(draft, bench, names, fidelity, table, progress, budget)
        if int8 and budget.spent:
            draft.notes.append("edge-int8 was left out: the time limit left no time to quantise the model")
        elif int8:
            _try_variant(draft, trials, registry, cache, whole.path, folder, threads, progress)
        yield draft


def check_profile(profile: Profile, bundle: Bundle) -> None:
    """See that a profile is of this model.

    Raises:
        PlanMismatch: it is of another one; names both.
    """
    if profile.content != (content := content_of(bundle)):
        raise PlanMismatch(
            f"the profile of tier {profile.tier} is of {profile.model}, {profile.content[:19]}…, and not of"
            f" {bundle.name}, {content[:19]}…",
            subject=profile.content,
            expected=content,
            hint=f"measure this one: isthmus profile {bundle.name}",
        )


def _named(
    model: Model, bundle: Bundle, cuts: Sequence[CutInfo], fidelity: Fidelity | None, private_depth: int
) -> tuple[list[str], list[str | CutInfo]]:
    """The names of the candidates' cuts, and those of which the bundle lacks a segment; its own keep their names."""
    known = {upstream_of(model, cut): name for name, cut in bundle.cuts.items()}
    calibrated = {known_name for known_name in (fidelity.cuts() if fidelity else []) if known_name in bundle.cuts}
    private = frozenset(i for i in range(private_depth) if model.dynamic[i])
    inputs = {s.name for s in bundle.inputs} if private_depth else set()
    names = [
        n
        for upstream, n in known.items()
        if n in calibrated and private <= upstream and not inputs & {t.name for t in bundle.cuts[n].tensors}
    ]
    new: dict[str, CutInfo] = {}
    for cut in cuts:
        if (name := known.get(upstream_of(model, cut))) is None:
            new[name := cut.name] = cut
        if name not in names:
            names.append(name)
    # A cut that only parts a longer partition has no head and tail of its own.
    lacking = [n for n in names if not bundle.has_segments([n])]
    return names, [new.get(name, name) for name in lacking]


def _same_graph(registry: Registry, profile: Profile, bundle: Bundle) -> Callable[[str], bool]:
    """Whether a segment that the profile timed is this bundle's: names of cuts may have meant others."""
    timed = registry.bundle(profile.bundle) if profile.bundle != digest_of(to_json(bundle)) else bundle

    def same(segment: str) -> bool:
        one, other = timed.segments.get(segment), bundle.segments.get(segment)
        return one is not None and other is not None and one.graph == other.graph

    return same


def _try_all(
    draft: Draft,
    bench: Workbench,
    cuts: Sequence[str],
    fidelity: Fidelity | None,
    table: Table | None,
    progress: Progress,
    budget: Budget,
) -> Trials:
    progress("running the uncut model")
    pre_s = _preprocess_seconds(draft.bundle, draft.examples)
    trials = Trials(draft.bundle, bench, draft.examples, table or (lambda name: None), pre_s)
    draft.slowdown = {
        tier: profile.whole.run.median / trials.whole_s if trials.whole_s else 1.0
        for tier, profile in draft.profiles.items()
    }
    here = speeds()
    draft.packing = {tier: compared(profile.codecs, here) for tier, profile in draft.profiles.items()}
    _add(draft, Option("edge-float", "edge"), trials.edge())
    if draft.private_depth:
        draft.notes.append(
            f"the first {draft.private_depth} nodes and the inputs stay at the edge, so cloud-only is no candidate"
        )
    else:
        _try_cloud(draft, trials, pre_s, usable_codecs(fidelity, ""), progress)
    pace = Pace(len(cuts))
    for i, cut in enumerate(cuts):
        if budget.spent:
            draft.untried = tuple(cuts[i:])
            draft.notes.append(f"the time limit left {len(draft.untried)} cuts untried: {', '.join(draft.untried)}")
            break
        progress(f"trying the cut {cut}, {i + 1} of {len(cuts)}{pace.left(i)}")
        for choice in usable_codecs(fidelity, cut):
            option = Option(f"split-{cut}-{short_name(choice)}", "split", (cut,), choice)
            _add(draft, option, _tried(trials, fidelity, cut, choice))
    bench.forget()
    return trials


def _try_cloud(draft: Draft, trials: Trials, pre_s: float, choices: Sequence[Choice], progress: Progress) -> None:
    progress("trying the whole model in the cloud")
    spec = draft.bundle.preprocess
    shape = None if spec is None else made_shape(spec)
    if spec is None:
        draft.notes.append("cloud-photo: the bundle declares no processing of photos")
    elif shape is None or any(e.photo is None for e in draft.examples):
        why = "no photos were given" if shape else "a photo's size decides the input's, so it must be made at the edge"
        draft.notes.append(f"cloud-photo: {why}")
    else:
        made = trials.photo(shape, spec["dtype"], spec["input"])
        # The cloud makes the input of it: that is what unpacking a photo means.
        _add(draft, Option("cloud-photo", "cloud", photo=True), replace(made, decode_s=pre_s))
    for choice in choices:
        _add(draft, Option(f"cloud-{short_name(choice)}", "cloud", (), choice), trials.cloud(choice))


def _try_variant(
    draft: Draft,
    trials: Trials,
    registry: Registry,
    cache: SegmentCache,
    whole: Path,
    folder: Path,
    threads: int,
    progress: Progress,
) -> None:
    progress("quantising the model to int8")
    arrays = [e.arrays for e in draft.examples]
    try:
        made = int8_variant(draft.bundle, registry, cache, whole, arrays, folder, threads=threads)
        run = made.runner
        trial = trials.edge(run.run)
    except FAILURES as e:
        draft.notes.append(why_not(e))
        return
    draft.variant = made
    _add(draft, Option("edge-int8", "edge", variant=True), trial)


def _add(draft: Draft, option: Option, trial: Trial | None) -> None:
    if trial is None:
        return
    draft.options.append(option)
    draft.trials[option.name] = trial


def _tried(trials: Trials, fidelity: Fidelity | None, cut: str, choice: Choice) -> Trial | None:
    """A split's trial, with the error that calibration measured over more inputs than a trial has."""
    known = next((e for e in fidelity.entries if e.cut == cut and e.choice == choice), None) if fidelity else None
    if fidelity is None or known is None:
        return trials.split(cut, choice)
    error = Error(known.error, fidelity.inputs.held_out, 1 - known.agreement, calibrated=True)
    if known.looks:
        return trials.closer(cut, choice, CloserLooks(fidelity.measure.output, known.looks, known.shares), error)
    trial = trials.split(cut, choice)
    return None if trial is None else replace(trial, error=error)


def _preprocess_seconds(bundle: Bundle, examples: Sequence[Example]) -> float:
    """What it takes here to make the input of a photo; 0 where requests bring tensors."""
    if bundle.preprocess is None:
        return 0.0
    taken = next(s for s in bundle.inputs if s.name == bundle.preprocess["input"])
    seconds = []
    for example in examples:
        if (photo := example.photo) is not None:
            least = float("inf")
            for _ in range(_TRIES):
                start = time.perf_counter()
                preprocess(photo, bundle.preprocess, input=taken, max_pixels=MAX_PIXELS)
                least = min(least, time.perf_counter() - start)
            seconds.append(least)
    return statistics.median(seconds) if seconds else 0.0
