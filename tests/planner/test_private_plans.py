"""Plans that bound what boundary tensors reveal: cuts by the leak document, and no input over the link."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.fidelity import model_digest
from isthmus.artifacts.leak import Leak, LeakEntry, LeakInputs, Likeness, to_json
from isthmus.artifacts.plan import from_json
from isthmus.artifacts.plan import to_json as plan_json
from isthmus.errors import ConstraintMalformed, Missing
from isthmus.routing.efficient import efficient_candidates
from isthmus_tools.planner.choice import build_plan
from isthmus_tools.planner.publishing import carry_over
from support.bundles import Published, publish_photos
from support.candidate_sets import LINK, evaluated
from support.cli import isthmus
from support.edge_extras import extended, with_served_exit, with_variants
from support.plans import candidate, plan_for


def revealing(published: Published, folder: Path, **raw: float) -> Published:
    """A version with a leak document: the similarity of reconstructions from raw tensors, by `cut_NAME`."""
    bundle = published.bundle
    entries = [
        LeakEntry(name.removeprefix("cut_"), codec, 1.0, "linear", like, like, 0)
        for name, similarity in raw.items()
        # A codec that reveals less than raw tensors does not make a cut private.
        for codec, like in (("raw", _likeness(similarity)), ("int4/1", _likeness(similarity / 2)))
    ]
    inputs = LeakInputs("photos", 10, 100, 100)
    whole, constant = _likeness(1.0), _likeness(0.1)
    data = to_json(Leak(model_digest(bundle), "ssim", "x", (3, 8, 8), inputs, constant, whole, tuple(entries)))
    (path := folder / "leak.json").write_bytes(data)
    blob = Blob(digest_of(data), len(data))
    return extended(published, replace(bundle, leak=blob), {blob.digest: path})


def _likeness(similarity: float) -> Likeness:
    return Likeness(similarity, similarity, 10.0)


def test_only_cuts_that_reveal_little_are_candidates_and_no_input_is_sent(tmp_path: Path) -> None:
    published = with_variants(with_served_exit(publish_photos(tmp_path), tmp_path), tmp_path)
    published = revealing(published, tmp_path, cut_1=0.9, cut_3=0.5, cut_6=0.2)
    with evaluated(published, private_ssim=0.3, max_cuts=2) as made:
        found = {c.name: c for c in made.predict(LINK)}
        notes = " ".join(made.notes)
    assert {c.kind for c in found.values()} == {"edge", "split"}
    assert {c.cuts for c in found.values() if c.kind == "split"} == {("6",)}
    assert {"split-6-raw", "split-6-raw-exit", "edge-small"} <= found.keys()
    assert not [c for c in found.values() if c.kind == "split" and c.head]
    assert "cloud-only is no candidate" in notes
    assert "reconstructions are above 0.3 at" in notes
    assert "the leak document has no cut" in notes
    assert "variants of the head at 6 were left out" in notes


def test_without_a_private_cut_the_model_stays_at_the_edge(tmp_path: Path) -> None:
    published = revealing(publish_photos(tmp_path), tmp_path, cut_6=0.5)
    slow = Conditions(1e9, 1e9, 0.0)
    with evaluated(published, private_ssim=0.3, max_cuts=1, cloud_s=1e-6, link=slow) as made:
        plan = build_plan(made, made.predict(slow), slow, "latency", Constraints(private_ssim=0.3))
    assert plan.chosen == "edge-float"
    assert "reconstructions are above 0.3 at 6 (0.50)" in plan.why
    assert not [sentence for sentence in plan.why if "one side of the link" in sentence or "mean input" in sentence]
    assert from_json(plan_json(plan)).constraints.private_ssim == 0.3


def test_a_bound_below_what_the_mean_input_reaches_is_named_as_such(tmp_path: Path) -> None:
    published = revealing(publish_photos(tmp_path), tmp_path, cut_6=0.2)
    with evaluated(published, private_ssim=0.05, max_cuts=1) as made:
        assert "the mean input alone is 0.10 similar to an input: no cut can be below that" in made.notes


def test_a_bound_without_a_leak_document_says_how_to_measure_one(tmp_path: Path) -> None:
    published = publish_photos(tmp_path)
    with pytest.raises(Missing, match="no leak document") as e, evaluated(published, private_ssim=0.3):
        pass
    assert "isthmus leak photos --data" in e.value.hint
    result = isthmus("plan", "photos", "--private-ssim", "0.3", "--registry", published.folder)
    assert result.exit_code == 1
    assert "isthmus leak photos --data" in result.output


def test_a_similarity_is_at_most_one() -> None:
    with pytest.raises(ConstraintMalformed, match=r"private_ssim is 1\.5"):
        Constraints(private_ssim=1.5)


def test_the_router_takes_no_route_that_sends_inputs_by_such_a_plan(tmp_path: Path) -> None:
    bundle = publish_photos(tmp_path).bundle
    both = candidate(), candidate("cloud-raw", "cloud", seconds=0.001)
    bounded = plan_for(bundle, both[0], candidates=both, constraints=Constraints(private_ssim=0.3))
    assert [c.name for c in efficient_candidates(bounded)] == ["edge-float"]
    assert len(efficient_candidates(replace(bounded, constraints=Constraints()))) == 2


def test_a_new_leak_document_needs_a_new_plan(tmp_path: Path) -> None:
    first = revealing(publish_photos(tmp_path), tmp_path, cut_6=0.2)
    second = revealing(first, tmp_path, cut_6=0.4)
    split = candidate("s", "split", cuts=("6",))
    bounded = plan_for(first.bundle, split, constraints=Constraints(private_ssim=0.3))
    assert carry_over(bounded, first.bundle, first.bundle, None) is not None
    assert carry_over(bounded, first.bundle, second.bundle, None) is None
    assert carry_over(plan_for(first.bundle, split), first.bundle, second.bundle, None) is not None
