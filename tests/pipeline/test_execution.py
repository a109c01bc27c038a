"""A request along its route: the split answer is the whole model's, and each segment gets what it takes and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.codecs import Encoding
from isthmus.context import Context, Deadline
from isthmus.errors import DeadlineExceeded, HopRejected, HopUnavailable, Missing, ShapeMismatch
from isthmus.pipeline import Hop, HopReply, HttpHop, LocalHop, LoopbackHop, Result, execute, local_route, plan_route
from isthmus.runtime.store import SegmentStore
from isthmus.serving import create_segment_app
from isthmus.wire.frame import Frame
from support.bundles import (
    SKIP_CUTS,
    TOLERANCE,
    Published,
    cache_of,
    free_model,
    pair_model,
    publish,
    segment_settings,
    served,
)
from support.bundles import photos as photos


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(3)
    inputs = {name: rng.standard_normal((1, 32)).astype(np.float32) for name in ("x", "mask")}
    return publish(folder, pair_model(folder / "pair.onnx"), inputs, partitions=[["1"]])


@pytest.fixture
def local(tmp_path: Path) -> Callable[[Published], LocalHop]:
    return lambda published: LocalHop(
        SegmentStore(cache_of(published, tmp_path), segment_settings(published, tmp_path))
    )


@pytest.fixture(scope="module")
def remote(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hop, ...]]:
    settings = segment_settings(photos, tmp_path_factory.mktemp("cache"))
    with served(create_segment_app(settings)) as url:
        yield (HttpHop(url, attempts=4, connect_timeout_s=1, max_reply_bytes=2**20),)


@dataclass
class Between:
    """A hop that notes what it is sent, and may change what comes back."""

    inner: Hop
    change: Callable[[Frame], Frame] = lambda frame: frame
    name: str = "between"
    taken: list[dict[str, Any]] = field(default_factory=list)

    def call(self, frame: Frame, context: Context) -> HopReply:
        self.taken.append(dict(frame.tensors))
        reply = self.inner.call(frame, context)
        return reply._replace(frame=self.change(reply.frame))


def context(seconds: float = 20.0) -> Context:
    return Context(Deadline.after(seconds), "call-1", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")


def answer(published: Published, hops: tuple[Hop, ...], cuts: tuple[str, ...] | None) -> Result:
    return execute(plan_route(published.digest, published.bundle, hops, cuts), published.inputs, context())


@pytest.mark.parametrize("cuts", [None, (), ("1",), ("3",), ("6",), ("1", "6"), SKIP_CUTS])
@pytest.mark.parametrize("over", ["process", "http"])
def test_the_split_answer_is_the_whole_models(
    photos: Published,
    local: Callable[[Published], LocalHop],
    remote: tuple[Hop, ...],
    over: str,
    cuts: tuple[str, ...] | None,
) -> None:
    result = answer(photos, remote if over == "http" else (local(photos),), cuts)
    np.testing.assert_allclose(result.outputs["logits"], photos.whole["logits"], rtol=TOLERANCE, atol=TOLERANCE)
    assert [s.segment for s in result.runs] == [s.id for s in photos.bundle.partition(cuts)]
    for stage in result.runs:
        assert stage.total_s >= stage.run_s > 0
        assert (stage.sent_bytes > stage.raw_bytes) if over == "http" else stage.sent_bytes == stage.received_bytes == 0


def test_two_hops_share_two_segments_and_the_last_takes_what_is_over(
    photos: Published, local: Callable[[Published], LocalHop]
) -> None:
    head, tail = Between(local(photos)), Between(local(photos))
    answer(photos, (head, tail), SKIP_CUTS)
    assert (len(head.taken), len(tail.taken)) == (1, 2)


def test_a_value_that_passes_by_a_segment_is_not_sent_to_it(
    photos: Published, local: Callable[[Published], LocalHop]
) -> None:
    hop = Between(local(photos))
    result = answer(photos, (hop,), SKIP_CUTS)
    assert [sorted(tensors) for tensors in hop.taken] == [["x"], ["r3"], ["c4", "r1"]]
    np.testing.assert_allclose(result.outputs["logits"], photos.whole["logits"], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_result_holds_inputs_boundary_tensors_and_outputs(
    photos: Published, local: Callable[[Published], LocalHop]
) -> None:
    result = answer(photos, (local(photos),), SKIP_CUTS)
    assert sorted(result.tensors) == ["c4", "logits", "r1", "r3", "x"]
    assert result.outputs["logits"] is result.tensors["logits"]


def test_a_route_from_a_cut_goes_on_with_the_tensors_of_another(
    pair: Published, local: Callable[[Published], LocalHop]
) -> None:
    """A head's own outputs, and a model's input that only the tail takes, pass by it."""
    hop, (head, tail) = local(pair), pair.bundle.partition(("1",))
    first = execute(local_route(pair.digest, pair.bundle, (head,), hop), pair.inputs, context())
    assert list(first.outputs) == ["early"]
    second = execute(local_route(pair.digest, pair.bundle, (tail,), hop), first.tensors, context())
    assert list(second.outputs) == ["early", "late"]
    for name, array in pair.whole.items():
        np.testing.assert_allclose(second.outputs[name], array, rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(ShapeMismatch, match="r1"):
        execute(local_route(pair.digest, pair.bundle, (tail,), hop), pair.inputs, context())


def test_a_loopback_sends_what_http_sends(
    photos: Published, local: Callable[[Published], LocalHop], remote: tuple[Hop, ...]
) -> None:
    """The same bytes both ways and the same bits, with a codec that changes values and without."""
    for encodings in ({}, {"p6": Encoding("half/1")}):
        runs, outputs = [], []
        for hop in (LoopbackHop(local(photos)), remote[0]):
            route = plan_route(photos.digest, photos.bundle, (local(photos), hop), ("6",))
            result = execute(replace(route, encodings=({}, encodings)), photos.inputs, context())
            runs.append(result.runs[1])
            outputs.append(result.outputs["logits"].tobytes())
        assert outputs[0] == outputs[1]
        facts = [(run.sent_bytes, run.received_bytes, run.raw_bytes, run.payload_bytes, run.codecs) for run in runs]
        assert facts[0] == facts[1]
        assert runs[0].payload_bytes == runs[0].raw_bytes // (2 if encodings else 1) < runs[0].sent_bytes
        assert all(run.decode_s > 0 for run in runs)


def test_inputs_and_outputs_may_belong_to_either_end(pair: Published, local: Callable[[Published], LocalHop]) -> None:
    hop = Between(local(pair))
    result = answer(pair, (hop,), ("1",))
    assert [sorted(tensors) for tensors in hop.taken] == [["x"], ["mask", "r1"]]
    assert list(result.outputs) == ["early", "late"]
    for name, array in pair.whole.items():
        np.testing.assert_allclose(result.outputs[name], array, rtol=TOLERANCE, atol=TOLERANCE)


def test_bytes_over_the_link_are_those_sent_behind_the_first_hop(
    photos: Published, local: Callable[[Published], LocalHop], remote: tuple[Hop, ...]
) -> None:
    here, (there,) = local(photos), remote
    for hops, cuts in (((here,), ("6",)), ((here, there), ()), ((there, here), ("6",))):
        assert answer(photos, hops, cuts).sizes() == {"link_bytes": 0, "link_raw_bytes": 0}, "nothing leaves"
    split = answer(photos, (here, there), ("6",))
    assert split.link_raw_bytes == 16 * 4 * 4 * 4
    assert split.link_bytes == split.runs[1].sent_bytes > split.link_raw_bytes
    three = answer(photos, (here, there), SKIP_CUTS)
    assert three.link_raw_bytes == 3 * 16 * 8 * 8 * 4
    facts = {"segments": "..3,3..4,4..", "link_bytes": three.link_bytes, "link_raw_bytes": three.link_raw_bytes}
    assert three.facts() == facts
    again = replace(three, runs=(*three.runs, *three.runs[1:]))
    assert again.link_raw_bytes == three.link_raw_bytes, "closer looks send the same tensors"
    assert again.link_bytes == 2 * three.link_bytes
    single = answer(photos, (there,), ())
    assert single.link_raw_bytes == 3 * 8 * 8 * 4, "a single function is behind the link"


def test_a_deadline_that_has_passed_calls_nobody(photos: Published, local: Callable[[Published], LocalHop]) -> None:
    hop = Between(local(photos))
    with pytest.raises(DeadlineExceeded, match=r"\.\.6"):
        execute(plan_route(photos.digest, photos.bundle, (hop,)), photos.inputs, context(0))
    assert not hop.taken


def test_inputs_that_do_not_fit_are_refused_before_anything_is_called(
    photos: Published, local: Callable[[Published], LocalHop]
) -> None:
    hop = Between(local(photos))
    with pytest.raises(ShapeMismatch):
        execute(plan_route(photos.digest, photos.bundle, (hop,)), {"x": np.zeros((1, 3, 8, 7), "float32")}, context())
    assert not hop.taken


def renamed(frame: Frame) -> Frame:
    return frame._replace(tensors={f"{name}'": array for name, array in frame.tensors.items()})


def widened(frame: Frame) -> Frame:
    return frame._replace(tensors={name: array.astype("float64") for name, array in frame.tensors.items()})


def shortened(frame: Frame) -> Frame:
    return frame._replace(tensors={name: array[:, :1] for name, array in frame.tensors.items()})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, "missing p6"),
        (widened, "float64"),
        (shortened, r"\[1, 1, 4, 4\]"),
        (lambda frame: frame._replace(segment="6.."), "for segment"),
        (lambda frame: frame._replace(bundle="sha256:" + "0" * 64), "for bundle"),
        (lambda frame: frame._replace(request="somebody else's"), "for request"),
    ],
    ids=["names", "dtype", "shape", "segment", "bundle", "request"],
)
def test_an_answer_to_something_else_is_rejected_and_names_the_hop(
    photos: Published, local: Callable[[Published], LocalHop], change: Callable[[Frame], Frame], said: str
) -> None:
    hop = Between(local(photos), change)
    with pytest.raises(HopRejected, match=said) as e:
        answer(photos, (hop,), ("6",))
    assert e.value.facts["hop"] == "between"
    assert e.value.facts["expected"] != e.value.facts["got"]


@pytest.mark.parametrize(
    ("change", "hint"),
    [(renamed, "same version of Isthmus"), (widened, "same version of Isthmus"), (shortened, "import the model again")],
    ids=["names", "dtype", "shape"],
)
def test_only_tensors_of_other_kinds_blame_another_version(
    photos: Published, local: Callable[[Published], LocalHop], change: Callable[[Frame], Frame], hint: str
) -> None:
    with pytest.raises(HopRejected) as e:
        answer(photos, (Between(local(photos), change),), ("6",))
    assert hint in e.value.hint


def test_free_dimensions_that_the_graph_refuses_are_the_callers_fault_over_http_too(tmp_path: Path) -> None:
    inputs = {"a": np.ones((2, 32), np.float32), "b": np.ones((3, 32), np.float32)}
    free = publish(tmp_path, free_model(tmp_path / "free.onnx"), inputs, partitions=[["1"]])
    with served(create_segment_app(segment_settings(free, tmp_path / "cache"))) as url:
        hops = (HttpHop(url, attempts=2, connect_timeout_s=1, max_reply_bytes=2**20),)
        with pytest.raises(ShapeMismatch) as e:
            answer(free, hops, None)
    assert e.value.facts["hop"] == url


def test_a_cut_that_is_not_there_is_missing_and_names_those_that_are(photos: Published) -> None:
    with pytest.raises(Missing) as e:
        plan_route(photos.digest, photos.bundle, (), ("5",))
    assert e.value.facts["exists"] == ["1", "3", "4", "6"]
    with pytest.raises(Missing) as e:
        plan_route(photos.digest, photos.bundle, (), ("1", "3"))
    assert e.value.facts["name"] == "1..3"


def test_a_dead_second_hop_is_named(photos: Published, local: Callable[[Published], LocalHop]) -> None:
    dead = HttpHop("http://127.0.0.1:9/", attempts=1, connect_timeout_s=1, max_reply_bytes=2**20)
    with pytest.raises(HopUnavailable) as e:
        answer(photos, (local(photos), dead), None)
    assert e.value.facts["hop"] == "http://127.0.0.1:9/"
