"""Early exits along a route: where a request ends, what travels, and what hops may answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES
from isthmus.context import Context, Deadline
from isthmus.errors import HopRejected, HopUnavailable, RequestMalformed
from isthmus.pipeline import (
    HttpHop,
    Interruption,
    LocalHop,
    LoopbackHop,
    Route,
    execute,
    execute_resumably,
    exit_branch,
    local_route,
    plan_route,
)
from isthmus.runtime.early_exit import is_sure
from isthmus.runtime.session_store import open_store
from isthmus.serving import create_segment_app
from support.bundles import Published, cache_of, segment_settings, served
from support.exits import publish_classifier, rows
from support.hops import Echo
from support.patience import LONG_S


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_classifier(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def local(classes: Published, tmp_path_factory: pytest.TempPathFactory) -> LocalHop:
    folder = tmp_path_factory.mktemp("local")
    return LocalHop(open_store(cache_of(classes, folder), segment_settings(classes, folder)))


@pytest.fixture(scope="module")
def remote(classes: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpHop]:
    app = create_segment_app(segment_settings(classes, tmp_path_factory.mktemp("function")))
    with served(app) as url:
        hop = HttpHop(url, attempts=1, connect_timeout_s=1, max_reply_bytes=2**20)
        yield hop
        hop.close()
    app.extensions["isthmus"].close()


@pytest.fixture(params=["in this process", "loopback", "function"])
def head(request: pytest.FixtureRequest, local: LocalHop, remote: HttpHop) -> Any:
    return {"in this process": local, "loopback": LoopbackHop(local), "function": remote}[request.param]


def context() -> Context:
    return Context(Deadline.after(LONG_S), "call-1", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")


def gated(published: Published, *hops: Any, threshold: float | None = None) -> Route:
    route = plan_route(published.digest, published.bundle, hops).with_exit()
    if route.exit is None or threshold is None:
        return route
    return replace(route, exit=replace(route.exit, gate=structs.replace(route.exit.gate, threshold=threshold)))


def confidence_of(published: Published, hop: Any, inputs: Any) -> float:
    outcome = execute(gated(published, hop, threshold=-1.0), inputs, context()).exit
    assert outcome is not None
    return outcome.confidence


def test_a_sure_request_ends_at_the_exit_and_an_unsure_one_travels(
    classes: Published, head: Any, local: LocalHop
) -> None:
    route, full = gated(classes, head, local), plan_route(classes.digest, classes.bundle, (local,))
    met = set()
    for seed in range(20):
        inputs = rows(1, seed)
        found, expected = execute(route, inputs, context()), execute(full, inputs, context())
        assert found.exit is not None
        assert found.is_early == (found.exit.confidence >= 0.5)
        assert [run.segment for run in found.runs] == (["..1"] if found.is_early else ["..1", "1.."])
        assert ("r1" in found.tensors) == (not found.is_early)
        assert np.allclose(found.outputs["logits"], expected.outputs["logits"], rtol=1e-5, atol=1e-5)
        facts = found.facts()
        assert facts["exit_confidence"] == pytest.approx(found.exit.confidence, abs=1e-6)
        assert facts.get("exit") == ("1" if found.is_early else None)
        met.add(found.is_early)
    assert met == {True, False}


def test_a_reply_without_activations_is_a_tenth_of_the_one_with_them(classes: Published, remote: HttpHop) -> None:
    inputs = rows(64)
    early = execute(gated(classes, remote, threshold=-1.0), inputs, context()).runs[0].received_bytes
    late = execute(gated(classes, remote, threshold=2.0), inputs, context()).runs[0].received_bytes
    assert late - early >= 64 * 32 * 4


def test_a_batch_exits_where_every_row_is_sure(classes: Published, head: Any, local: LocalHop) -> None:
    inputs = rows(4)
    each = [confidence_of(classes, local, {"x": inputs["x"][i : i + 1]}) for i in range(4)]
    for threshold, is_early in ((min(each) - 1e-3, True), (min(each) + 1e-3, False)):
        found = execute(gated(classes, head, local, threshold=threshold), inputs, context())
        assert found.is_early == is_early
        assert found.outputs["logits"].shape == (4, 4)
        assert found.exit is not None
        assert found.exit.confidence == pytest.approx(min(each), abs=1e-5)


def test_the_threshold_itself_is_sure_and_what_is_no_number_is_not() -> None:
    assert is_sure(np.array([0.1, 0.9], np.float32), float(np.float32(0.1)))
    # 0.1 as float32 is above 0.1: in float32 both sides of a threshold between them would be equal.
    assert not is_sure(np.array([0.1], np.float32), float(np.nextafter(float(np.float32(0.1)), 1)))
    assert not is_sure(np.array([np.nan, 1.0], np.float32), -1.0)
    assert not is_sure(np.array([], np.float32), -1.0)


def test_inputs_that_are_no_numbers_travel(classes: Published, head: Any, local: LocalHop) -> None:
    found = execute(gated(classes, head, local, threshold=-1.0), {"x": np.full((1, 32), np.nan, np.float32)}, context())
    assert not found.is_early
    assert len(found.runs) == 2
    assert found.facts()["exit_confidence"] == 0.0


def test_the_route_behind_the_head_and_the_full_route_have_no_exit(classes: Published, local: LocalHop) -> None:
    route = gated(classes, local)
    assert route.exit is not None
    assert route.after(1).exit is None
    assert route.between(0, 1).exit == route.exit
    assert route.full().exit is None
    assert route.raw().exit == route.exit
    assert len(execute(replace(route.full()), classes.inputs, context()).runs) == 2


def test_a_bundle_with_other_outputs_than_the_exits_has_no_exit_on_a_route(classes: Published) -> None:
    assert exit_branch(classes.bundle, "1") is not None
    other = structs.replace(classes.bundle.outputs[0], name="second")
    two = structs.replace(classes.bundle, outputs=(*classes.bundle.outputs, other))
    assert exit_branch(two, "1") is None
    assert exit_branch(classes.bundle, "2") is None


def test_where_the_tail_gives_no_response_the_early_scores_are_at_hand(classes: Published, local: LocalHop) -> None:
    away = Echo({})
    away.fails = True
    route = gated(classes, local, away, threshold=2.0)
    outcome = execute_resumably(route, classes.inputs, context())
    assert isinstance(outcome, Interruption)
    assert isinstance(outcome.error, HopUnavailable)
    unsure = outcome.unsure()
    assert unsure is not None
    assert not unsure.is_early
    assert np.allclose(unsure.outputs["logits"], classes.whole["logits"], rtol=1e-5, atol=1e-5)
    assert [run.segment for run in unsure.runs] == ["..1"]
    again = execute(replace(outcome.rest, hops=(local,)), outcome.tensors, context())
    assert np.allclose(again.outputs["logits"], classes.whole["logits"], rtol=1e-5, atol=1e-5)


def scores(count: int = 1, **changes: Any) -> dict[str, Any]:
    tensors = {EXIT_SCORES: np.zeros((count, 4), np.float32), EXIT_CONFIDENCE: np.full(count, 0.9, np.float32)}
    return tensors | changes


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (scores(**{EXIT_CONFIDENCE: np.full(1, 0.1, np.float32)}), "not sure, and no boundary tensors"),
        ({EXIT_SCORES: np.zeros((1, 4), np.float32)}, "did not answer as segment"),
        ({"r1": np.zeros((1, 32), np.float32)}, "did not answer as segment"),
        (scores(r1=np.zeros((1, 31), np.float32)), "did not answer as segment"),
        (scores(**{EXIT_SCORES: np.zeros((1, 5), np.float32)}), "did not answer as segment"),
        (scores(**{EXIT_CONFIDENCE: np.zeros((1, 2), np.float32)}), "did not answer as segment"),
    ],
)
def test_a_reply_that_is_neither_an_exit_nor_a_heads_is_refused(
    classes: Published, tensors: dict[str, Any], match: str
) -> None:
    with pytest.raises(HopRejected, match=match):
        execute(gated(classes, Echo(tensors)), classes.inputs, context())


def test_a_frame_to_the_end_of_the_model_with_an_exit_is_refused(classes: Published, head: Any) -> None:
    """The branch of a tail would have the id of the whole model."""
    route = gated(classes, head)
    whole = local_route(classes.digest, classes.bundle, (classes.bundle.segment(".."),), head)
    with pytest.raises((RequestMalformed, HopRejected), match="ends the model"):
        execute(replace(whole, exit=route.exit), classes.inputs, context())


class _Plain:
    """A runner that knows of no exits."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run


def test_a_process_that_runs_no_exits_says_so(classes: Published, local: LocalHop) -> None:
    with pytest.raises(HopRejected, match="runs no exits"):
        execute(gated(classes, LocalHop(_Plain(lambda *_: None))), classes.inputs, context())


def test_an_exit_is_loaded_by_its_first_call_and_with_its_head(classes: Published, tmp_path: Path) -> None:
    store = open_store(cache_of(classes, tmp_path), segment_settings(classes, tmp_path))
    hop = LocalHop(store)
    execute(gated(classes, hop, threshold=-1.0), classes.inputs, context())
    assert {each.segment for each in store.store.loaded()} == {"..1", "1..1"}
    store.store.close()
