"""Plans of language models by scripted profiles: the optimum is that of trying everything, and every bound binds."""

from __future__ import annotations

import itertools
import json
import math

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.plan import Candidate, Error, GenerationLoad, Measured, Plan, from_json, to_json
from isthmus.artifacts.profile import Timing
from isthmus.artifacts.segment_id import WHOLE, SegmentId, partition_ids
from isthmus.errors import Infeasible, ModelError, PlanMalformed, PlanMismatch, ProfileMalformed
from isthmus.registry import Resolved
from isthmus_tools.planner.choice import VALUES, choose, grid, over_link
from isthmus_tools.planner.costs import HEADERS_DOWN, HEADERS_UP
from isthmus_tools.planner.decoder_layers import DecoderLayers
from isthmus_tools.planner.language_candidates import LanguageCandidates
from isthmus_tools.planner.language_choice import binding_term, generation_contenders, language_plan
from isthmus_tools.planner.language_enumeration import language_candidates
from isthmus_tools.planner.layer_times import LayerTimes
from isthmus_tools.profiling.profiles import merge, slowed
from support.plans import HOP, SCHEMA, full_plan
from support.scripted_decoders import (
    STATE_BYTES,
    StepFormula,
    layers_of,
    scripted_bundle,
    scripted_profile,
)

LAYERS = 8
LOAD = GenerationLoad(prompt=600, tokens=100, context=1000, sessions=3, chunk=256)
LINK = Conditions(10e6, 20e6, 0.02)
SLOW, FAST = StepFormula(layer=0.008, token=0.001), StepFormula(layer=0.001, token=0.0001)


@pytest.fixture(autouse=True)
def instant_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codecs take no time, on both tiers: plans are then those of the formulas."""
    monkeypatch.setattr("isthmus_tools.planner.language_enumeration.speeds", dict)
    monkeypatch.setattr("isthmus_tools.planner.step_frames._timed", lambda work: (work(), 0.0))


def candidates_of(
    edge: StepFormula = SLOW, cloud: StepFormula = FAST, load: GenerationLoad = LOAD, private: int = 0
) -> LanguageCandidates:
    bundle = scripted_bundle(LAYERS)
    profiles = {"edge": scripted_profile(bundle, "edge", edge), "cloud": scripted_profile(bundle, "cloud", cloud)}
    model = Resolved("scripted", "1", profiles["edge"].bundle, bundle)
    return language_candidates(model, profiles, load, _no_blob, private)


def _no_blob(blob: object) -> bytes:
    raise AssertionError(blob)


def edge_layers(candidate: Candidate) -> int:
    """The layers that a candidate runs at the edge."""
    if candidate.cuts:
        return int(candidate.cuts[0].removeprefix("layer_"))
    return LAYERS if candidate.kind == "edge" else 0


class Trial:
    """The costs of a candidate by its formulas, step by step, without the planner's code."""

    def __init__(self, edge: StepFormula, cloud: StepFormula, link: Conditions, load: GenerationLoad) -> None:
        self.edge, self.cloud, self.link, self.load = edge, cloud, link, load

    def step(self, candidate: Candidate, tokens: int, past: int, up: float, down: float) -> float:
        seconds = 0.0
        before = edge_layers(candidate)
        if candidate.kind != "cloud":
            segment = WHOLE if candidate.kind == "edge" else SegmentId(stop=candidate.cuts[0])
            seconds += self.edge.seconds(segment, before, tokens, past) + HOP.fixed_s
        if candidate.kind != "edge":
            segment = WHOLE if candidate.kind == "cloud" else SegmentId(candidate.cuts[0])
            seconds += self.cloud.seconds(segment, LAYERS - before, tokens, past) + HOP.fixed_s
            seconds += self.link.rtt_s + (up + HEADERS_UP) * self.link.up_byte_s
            seconds += (down + HEADERS_DOWN) * self.link.down_byte_s
        return seconds

    def answer(self, candidate: Candidate) -> tuple[float, float, float]:
        """Seconds to the first token, of the mean further token, and of the answer."""
        costs, load = candidate.generation, self.load
        assert costs is not None
        chunks = [(min(load.chunk, load.prompt - at), at) for at in range(0, load.prompt, load.chunk)]
        up, down = costs.prompt_up_bytes / len(chunks), costs.prompt_down_bytes / len(chunks)
        first = sum(self.step(candidate, n, at, up, down) for n, at in chunks)
        later = [
            self.step(candidate, 1, load.prompt + i, costs.token_up_bytes, costs.token_down_bytes)
            for i in range(load.tokens - 1)
        ]
        return first, sum(later) / len(later), first + sum(later)


def test_every_cut_and_both_sides_are_candidates() -> None:
    names = {c.name for c in candidates_of().predict(LINK)}
    cuts = [f"layer_{n}" for n in range(1, LAYERS)]
    codecs = ("raw", "half", "bfloat16", "lossless", "int8-token")
    # Codecs whose values of a token depend on its neighbours are none: an answer would depend on the chunks.
    assert names == {"edge-whole", "cloud-whole"} | {f"split-{c}-{k}" for c, k in itertools.product(cuts, codecs)}


def test_predictions_are_those_of_every_step_on_its_own() -> None:
    trial = Trial(SLOW, FAST, LINK, LOAD)
    for candidate in candidates_of().predict(LINK):
        first, each, answer = trial.answer(candidate)
        # Bytes cost the hop a nanosecond each.
        assert candidate.first_token_s == pytest.approx(first, abs=1e-3), candidate.name
        assert candidate.per_token_s == pytest.approx(each, abs=1e-5), candidate.name
        assert candidate.seconds == pytest.approx(answer, abs=2e-3), candidate.name


@given(
    edge=st.floats(0.0005, 0.02),
    cloud=st.floats(0.0005, 0.02),
    rate=st.floats(1e5, 1e9),
    rtt_s=st.floats(0, 0.1),
    objective=st.sampled_from(["latency", "first-token", "per-token"]),
    memory=st.none() | st.integers(40_000_000, 130_000_000),
    private=st.integers(0, LAYERS),
)
@settings(max_examples=15, deadline=None)
def test_the_choice_is_the_best_of_all(
    edge: float, cloud: float, rate: float, rtt_s: float, objective: str, memory: int | None, private: int
) -> None:
    """Against trying every admissible candidate by the formulas, within the nanoseconds of bytes on a hop."""
    formulas = StepFormula(layer=edge, token=edge / 10), StepFormula(layer=cloud, token=cloud / 10)
    link = Conditions(rate, rate, rtt_s)
    candidate_set = candidates_of(*formulas, private=private)
    candidates = candidate_set.predict(link)
    trial = Trial(*formulas, link, LOAD)
    index = {"first-token": 0, "per-token": 1, "latency": 2}[objective]

    def edge_memory(c: Candidate) -> int:
        layers = edge_layers(c)
        state = LOAD.sessions * LOAD.context * STATE_BYTES * layers
        return 0 if c.kind == "cloud" else formulas[0].memory(layers) + state

    admissible = [c for c in candidates if memory is None or edge_memory(c) <= memory]
    constraints = Constraints(edge_memory_bytes=memory, private_depth=private)
    if not admissible:
        with pytest.raises(Infeasible, match="edge-memory"):
            choose(candidates, objective, constraints)
        return
    best = min(trial.answer(c)[index] for c in admissible)
    _, found, _ = choose(candidates, objective, constraints)
    assert found in admissible
    slack = {"first-token": 1e-3, "per-token": 1e-5, "latency": 2e-3}[objective]
    assert trial.answer(found)[index] <= best + slack


def test_memory_holds_the_head_and_the_state_of_all_sessions() -> None:
    by_name = {c.name: c for c in candidates_of().predict(LINK)}
    split = by_name["split-layer_3-raw"]
    assert split.generation is not None
    assert split.generation.edge_state_bytes == 3 * STATE_BYTES * LOAD.context
    assert split.generation.cloud_state_bytes == 5 * STATE_BYTES * LOAD.context
    assert split.edge_memory_bytes == SLOW.memory(3) + LOAD.sessions * split.generation.edge_state_bytes
    assert by_name["cloud-whole"].edge_memory_bytes == 0
    assert by_name["edge-whole"].cloud_memory_bytes == 0


def test_ids_cross_to_the_cloud_and_hidden_states_over_a_cut() -> None:
    by_name = {c.name: c for c in candidates_of().predict(LINK)}
    ids, raw, half = (by_name[n].generation for n in ("cloud-whole", "split-layer_3-raw", "split-layer_3-half"))
    assert ids is not None
    assert raw is not None
    assert half is not None
    # Float32 of width 64 against an id of 8 bytes, both in a frame of their own, at 64 bytes' alignment.
    assert raw.token_up_bytes - ids.token_up_bytes == pytest.approx(64 * 4 - 8, abs=70)
    assert raw.token_up_bytes - half.token_up_bytes == pytest.approx(64 * 2, abs=70)
    assert ids.prompt_calls == 3
    assert ids.token_calls == 99
    assert raw.prompt_up_bytes > 600 * 64 * 4


def test_private_layers_stay_at_the_edge_and_so_do_the_ids() -> None:
    candidates = candidates_of(private=3).predict(LINK)
    assert all(c.kind != "cloud" for c in candidates)
    assert {c.cuts[0] for c in candidates if c.cuts} == {f"layer_{n}" for n in range(3, LAYERS)}


def test_a_deadline_for_either_kind_of_token_refuses_the_slower() -> None:
    candidates = candidates_of().predict(LINK)
    refused, best, _ = choose(candidates, "first-token", Constraints(per_token_s=0.045))
    assert best.per_token_s <= 0.045
    assert {c.name for c in refused if c.refused} == {c.name for c in candidates if c.per_token_s > 0.045}
    with pytest.raises(Infeasible, match="first-token") as e:
        choose(candidates, "per-token", Constraints(first_token_s=0.001))
    assert e.value.facts["constraint"] == "first-token"


def test_steps_of_an_unmeasured_cut_are_those_of_the_formula() -> None:
    bundle = scripted_bundle(LAYERS)
    times = LayerTimes(scripted_profile(bundle, "edge", SLOW), DecoderLayers.of(bundle))
    for cut, tokens, past in itertools.product(("layer_1", "layer_5"), (1, 20, 100, 256), (0, 300, 2000)):
        segment = SegmentId(stop=cut)
        expected = SLOW.seconds(segment, layers_of(segment, LAYERS), tokens, past)
        # Between 1 and 32 tokens, the growth by attention is a line between its two ends.
        assert times.seconds(segment, tokens, past).seconds == pytest.approx(expected, rel=0.02), (cut, tokens, past)
        assert times.seconds(segment, tokens, past).source == "predicted"
    assert times.seconds(SegmentId(stop="layer_2"), 1, 32).source == "measured"
    assert times.seconds(WHOLE, 256, 0).seconds == pytest.approx(SLOW.seconds(WHOLE, LAYERS, 256, 0))


def test_layers_of_another_precision_have_another_slope() -> None:
    bundle = replace(scripted_bundle(LAYERS), source={"precisions": [["int4", 3], ["float16", 5]]})
    layers = DecoderLayers.of(bundle)
    assert layers.changes == (3,)
    assert layers.telling_cuts == ("layer_1", "layer_3", "layer_7")

    def seconds(segment: SegmentId, tokens: int, past: int) -> float:
        start = int(segment.start.removeprefix("layer_") or 0)
        stop = int(segment.stop.removeprefix("layer_") or LAYERS)
        few = max(0, min(stop, 3) - start)
        return SLOW.seconds(segment, few, tokens, past) + 3 * (stop - start - few) * SLOW.layer * tokens

    for tier in ("edge", "cloud"):
        profile = scripted_profile(bundle, tier, SLOW, layers.telling_cuts)
        steps = tuple(replace(s, run=timing_of(seconds(s.segment, s.tokens, s.past))) for s in profile.steps)
        times = LayerTimes(replace(profile, steps=steps), layers)
        for cut in layers.cuts:
            segment = SegmentId(stop=cut) if tier == "edge" else SegmentId(cut)
            assert times.seconds(segment, 1, 32).seconds == pytest.approx(seconds(segment, 1, 32)), segment


def timing_of(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds, 5)


def test_noise_never_makes_a_step_faster_behind_more_tokens_or_in_more_layers() -> None:
    bundle = scripted_bundle(LAYERS)
    shrinking = StepFormula(layer=-1e-5, token=1e-6, attention=-1e-9)
    times = LayerTimes(scripted_profile(bundle, "edge", shrinking), DecoderLayers.of(bundle))
    few, many = (times.seconds(SegmentId(stop=f"layer_{n}"), 1, 32).seconds for n in (3, 5))
    assert few == many > 0
    assert times.seconds(WHOLE, 1, 4000).seconds == times.seconds(WHOLE, 1, 32).seconds


def test_a_profile_without_steps_is_refused() -> None:
    bundle = scripted_bundle(LAYERS)
    profile = replace(scripted_profile(bundle, "edge", SLOW), steps=())
    with pytest.raises(ProfileMalformed, match="too few steps"):
        LayerTimes(profile, DecoderLayers.of(bundle)).seconds(WHOLE, 1, 0)
    one = scripted_profile(bundle, "edge", SLOW, ("layer_2", "layer_2"))
    with pytest.raises(ProfileMalformed, match="too few steps"):
        LayerTimes(one, DecoderLayers.of(bundle)).seconds(SegmentId(stop="layer_3"), 1, 0)


def test_a_profile_of_another_model_is_refused() -> None:
    bundle, other = scripted_bundle(LAYERS), scripted_bundle(LAYERS)
    profiles = {t: replace(scripted_profile(bundle, t, SLOW), content="sha256:" + "1" * 64) for t in ("edge", "cloud")}
    with pytest.raises(PlanMismatch, match="of tier edge"):
        language_candidates(Resolved("scripted", "1", "sha256:" + "0" * 64, other), profiles, LOAD, _no_blob)


def test_a_slower_edge_has_slower_steps_and_merged_profiles_keep_theirs() -> None:
    profile = scripted_profile(scripted_bundle(LAYERS), "edge", SLOW)
    slow = slowed(profile, 4.0, HOP, profile.whole.run.median)
    assert [s.run.median for s in slow.steps] == pytest.approx([4 * s.run.median for s in profile.steps])
    other = scripted_profile(scripted_bundle(LAYERS), "edge", FAST, ("layer_3", "layer_6"))
    both = merge(profile, other)
    heads = [s for s in both.steps if s.segment == "..layer_2"]
    assert heads == [s for s in profile.steps if s.segment == "..layer_2"]
    assert [s for s in both.steps if s.segment == WHOLE] == [s for s in other.steps if s.segment == WHOLE]


def test_contenders_have_both_sides_the_raw_cut_and_every_codec_that_promises_more() -> None:
    candidates = candidates_of().predict(Conditions(1e6, 1e6, 0.02))
    names = [c.name for c in generation_contenders(candidates, "per-token", Constraints())]
    assert {"edge-whole", "cloud-whole", "split-layer_1-raw", "split-layer_1-half", "split-layer_1-int8-token"} <= {
        *names
    }
    assert "split-layer_2-raw" in names
    assert len(names) <= 8


def plan_of(candidate_set: LanguageCandidates, *candidates: Candidate, **constraints: object) -> Plan:
    rest = [c for c in candidate_set.predict(LINK) if c.name not in {m.name for m in candidates}]
    return language_plan(candidate_set, [*candidates, *rest], LINK, "per-token", Constraints(**constraints))  # type: ignore[arg-type]


def test_a_plan_of_a_language_model_survives_its_document_and_keeps_to_the_schema() -> None:
    plan = plan_of(candidates_of(), first_token_s=100.0)
    assert from_json(to_json(plan)) == plan
    jsonschema.validate(json.loads(to_json(plan)), SCHEMA)
    assert plan.generation == LOAD
    assert plan.inputs == "text"


def test_plans_from_before_language_models_keep_their_bytes() -> None:
    document = json.loads(to_json(full_plan()))
    assert "generation" not in document
    assert all("generation" not in c for c in document["candidates"])
    assert document["constraints"].keys() == {
        "edge_memory_bytes",
        "private_depth",
        "latency_s",
        "max_error",
        "max_disagreement",
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("generation"),
        lambda d: d["candidates"][0].pop("generation"),
        lambda d: d["generation"].update(prompt=0),
        lambda d: d["generation"].update(sessions=1.5),
        lambda d: d["candidates"][0]["generation"].update(token_up_bytes=-1),
        lambda d: d["candidates"][0]["generation"].update(tokens=1),
        lambda d: d["constraints"].update(first_token_s=-1),
    ],
)
def test_a_malformed_generation_is_refused(change: object) -> None:
    document = json.loads(to_json(plan_of(candidates_of())))
    change(document)  # type: ignore[operator]
    with pytest.raises(PlanMalformed):
        from_json(json.dumps(document).encode())


def measured(candidate: Candidate, each: float) -> Candidate:
    parts = {"first_token": 1.0, "per_token": each}
    return replace(candidate, measured=Measured(1 + 99 * each, 1.0, 9.0, 3, parts), error=Error(0.0, 100, 0.0))


def test_measurements_decide_and_the_reasons_say_not_to_split() -> None:
    by_name = {c.name: c for c in candidates_of().predict(LINK)}
    # By prediction the cloud is the best; measured it is not.
    slow = [measured(by_name["cloud-whole"], 0.5), measured(by_name["edge-whole"], 0.1)]
    plan = plan_of(candidates_of(), *slow, measured(by_name["split-layer_4-raw"], 0.2))
    assert plan.chosen == "edge-whole"
    assert plan.choice.per_token_s == 0.1
    text = " ".join(plan.why)
    assert "do not split" in text
    assert "100 ms more a token" in text
    assert "--private-depth 1" in text


def test_a_codec_that_changes_tokens_is_refused_unless_allowed() -> None:
    by_name = {c.name: c for c in candidates_of().predict(LINK)}
    changed = replace(measured(by_name["split-layer_4-int8-token"], 0.01), error=Error(0.0, 200, 0.03))
    plan = plan_of(candidates_of(), changed)
    refused = next(c.refused for c in plan.candidates if c.name == "split-layer_4-int8-token")
    assert refused == "3.0% of its 200 tokens differ, of 1.0%"
    assert plan_of(candidates_of(), changed, max_disagreement=0.05).chosen == "split-layer_4-int8-token"


def test_a_codec_of_unknown_error_may_not_serve_unless_any_is_allowed() -> None:
    plan = plan_of(candidates_of(), private_depth=1)
    refused = {c.name: c.refused for c in plan.candidates}
    assert "nothing has told" in refused["split-layer_1-half"]
    assert not refused["split-layer_1-lossless"]
    assert not refused["split-layer_1-raw"]
    assert all(not c.refused for c in plan_of(candidates_of(), max_disagreement=1.0).candidates)


def test_over_another_link_both_kinds_of_token_move() -> None:
    candidate_set = candidates_of()
    far = Conditions(1e6, 1e6, 0.1)
    moved = {c.name: over_link(c, far) for c in candidate_set.predict(LINK)}
    for expected in candidate_set.predict(far):
        assert moved[expected.name].first_token_s == pytest.approx(expected.first_token_s)
        assert moved[expected.name].per_token_s == pytest.approx(expected.per_token_s)
        assert moved[expected.name].seconds == pytest.approx(expected.seconds)
    cells = grid(candidate_set.predict(LINK), "per-token", Constraints(), rates=(1e5, 1e9), round_trips=(0.0, 1.0))
    assert cells[1][0].best == "edge-whole"
    assert cells[0][1].best == "cloud-whole"


def test_the_binding_term_is_the_largest() -> None:
    by_name = {c.name: c for c in candidates_of().predict(Conditions(1e9, 1e9, 0.5))}
    assert binding_term(by_name["cloud-whole"])[0] == "round trip"
    name, share = binding_term(by_name["edge-whole"])
    assert name == "edge"
    assert share > 0.9


def test_every_objective_has_a_value_for_other_models_too() -> None:
    candidate = full_plan().candidates[0]
    assert VALUES["first-token"](candidate) == math.inf


def test_a_bundle_of_another_kind_has_no_layers() -> None:
    bundle: Bundle = replace(scripted_bundle(), text=None)
    with pytest.raises(ModelError, match="no language model"):
        DecoderLayers.of(bundle)
    head, tail = partition_ids(["layer_3"])
    assert (layers_of(head, 8), layers_of(tail, 8)) == (3, 5)
