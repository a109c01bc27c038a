"""The planner's searches against all divisions of small graphs, and against the clock on large ones."""

from __future__ import annotations

import itertools
import math
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import parser

from isthmus.errors import CutError, Infeasible, ProblemMalformed
from isthmus.routing.demand import Demand
from isthmus.routing.mix import joint_capacity
from isthmus_tools.graph import build, open_model
from isthmus_tools.graph.cuts import boundary_values, upstream_of
from isthmus_tools.planner.search import (
    Labels,
    LinkTimes,
    Problem,
    Tensor,
    assignment,
    cost,
    earliest_tiers,
    min_cut,
    solve,
    sweep,
    usage,
    with_speed,
)
from isthmus_tools.planner.search.from_graph import boundaries, cut_of, from_model, positions
from isthmus_tools.planner.search.throughput import ALL_SECONDS, MixedDivisions, best_mix, stage_seconds
from support.models import REAL
from support.planner_problems import divisions, language_model, random_problem
from support.random_graphs import graphs

INF = math.inf


def chain(*seconds: tuple[float, ...], sizes: tuple[float, ...], links: tuple[LinkTimes, ...], **rest: Any) -> Problem:
    """Nodes in a row: `sizes` are the input's bytes, then each node's; the last returns to the caller."""
    n = len(seconds[0])
    tensors = [Tensor("x", None, (0,), sizes[0])]
    tensors += [Tensor(f"v{v}", v, (v + 1,) if v + 1 < n else (), sizes[v + 1], v + 1 == n) for v in range(n)]
    return Problem(seconds, tuple(tensors), links, **rest)


# --- what a division costs ---


def test_cost_of_a_chain_is_its_work_and_what_crosses() -> None:
    problem = chain((1, 2, 4), (0.1, 0.2, 0.4), sizes=(100, 30, 20, 5), links=(LinkTimes(0.01, 0.1, 0.7),))
    assert cost(problem, (0, 0, 0)) == 7
    assert cost(problem, (0, 1, 1)) == pytest.approx(1 + 0.6 + 30 * 0.01 + 5 * 0.1 + 0.7)
    assert cost(problem, (1, 1, 1)) == pytest.approx(0.7 + 100 * 0.01 + 5 * 0.1 + 0.7)
    assert cost(problem, (1, 0, 0)) == INF


def test_a_tensor_read_by_many_and_an_input_read_on_both_sides_pay_once() -> None:
    tensors = (
        Tensor("x", None, (0, 1, 2), 10),
        Tensor("a", 0, (1, 2), 3),
        Tensor("y", 2, (), 0, True),
        Tensor("z", 1, (), 0, True),
    )
    problem = Problem(((0, 0, 0), (0, 0, 0)), tensors, (LinkTimes(1, 0),))
    found = assignment(problem, (0, 1, 1))
    assert (found.seconds, found.up, found.down) == (13, ((0, 1),), ((2, 3),))


def test_every_boundary_on_the_way_is_paid_even_where_nothing_runs() -> None:
    problem = chain((5,), (5,), (0,), sizes=(10, 1), links=(LinkTimes(0.1, 0, 0.25), LinkTimes(0.2, 0, 0.5)))
    assert cost(problem, (2,)) == pytest.approx(10 * 0.1 + 10 * 0.2 + 0.75)


def test_an_output_that_is_read_beyond_goes_up_and_one_made_beyond_comes_back() -> None:
    tensors = (Tensor("x", None, (0,), 0), Tensor("a", 0, (1,), 4, True), Tensor("y", 1, (), 2, True))
    problem = Problem(((0, 0), (0, 0)), tensors, (LinkTimes(1, 10),))
    assert cost(problem, (0, 1)) == 4 + 20
    assert cost(problem, (1, 1)) == 40 + 20


def test_a_caller_in_the_cloud_sends_inputs_down_and_reads_outputs_there() -> None:
    tensors = (Tensor("x", None, (0, 1), 5), Tensor("a", 0, (1,), 4, True), Tensor("y", 1, (), 2, True))
    problem = Problem(((0, 0), (9, 9)), tensors, (LinkTimes(1, 10, 100),), caller=1)
    assert cost(problem, (1, 1)) == 18
    # x goes down once and is above already; a comes up once, though node 1 and the caller both read it.
    assert cost(problem, (0, 1)) == 9 + 5 * 10 + 4 + 100
    assert cost(problem, (0, 0)) == 5 * 10 + 4 + 2 + 100


@pytest.mark.parametrize("labels", [(0, 0), (0, 0, 2), (0, -1, 0)])
def test_labels_that_fit_no_problem_are_refused(labels: Labels) -> None:
    problem = chain((1, 2, 4), (0, 0, 0), sizes=(1, 1, 1, 1), links=(LinkTimes(1, 1),))
    with pytest.raises(ProblemMalformed, match="labels must be 3 tiers, each below 2"):
        cost(problem, labels)


# --- the minimum cut ---


@pytest.mark.parametrize(("tiers", "nodes", "count"), [(2, 8, 150), (3, 6, 120), (4, 5, 40)])
def test_the_minimum_cut_is_the_best_of_all_divisions_and_the_earliest_of_equals(
    tiers: int, nodes: int, count: int
) -> None:
    solved = tied = 0
    for seed in range(count):
        problem = random_problem(seed, tiers, nodes - seed % 3)
        costs = {labels: cost(problem, labels) for labels in divisions(problem)}
        if not costs:
            with pytest.raises(Infeasible):
                solve(problem)
            continue
        least = min(costs.values())
        equal = [labels for labels, seconds in costs.items() if seconds <= least + 1e-9]
        found = solve(problem)
        assert found.seconds == pytest.approx(least, abs=1e-9), seed
        assert found.labels == tuple(map(min, zip(*equal, strict=True))), seed
        assert found == assignment(problem, found.labels)
        assert earliest_tiers(problem) == tuple(map(min, zip(*costs, strict=True))), seed
        solved, tied = solved + 1, tied + (len(equal) > 1)
    assert solved > count * 0.7
    assert tied >= 2


def test_equal_divisions_stay_on_the_earliest_tier() -> None:
    same = chain((0.1, 0.2), (0.2, 0.1), sizes=(0, 0, 0), links=(LinkTimes(1, 1),))
    assert solve(same).labels == (0, 1)
    assert solve(chain((0.3, 0.3), (0.3, 0.3), sizes=(0, 0, 0), links=(LinkTimes(1, 1),))).labels == (0, 0)
    # 0.1 + 0.2 is not 0.3 in doubles, and still a tie.
    assert solve(chain((0.3,), (0.2,), sizes=(1, 0), links=(LinkTimes(0.1, 1),))).labels == (0,)
    assert solve(chain((0.0,), (0.0,), sizes=(0, 0), links=(LinkTimes(0, 0),))).labels == (0,)


def test_one_node_goes_where_it_is_faster() -> None:
    problem = chain((1.0,), (0.1,), sizes=(10, 1), links=(LinkTimes(0.01, 0.01, 0.5),))
    assert solve(problem).labels == (1,)
    assert solve(with_speed(problem, 0, 0.1)).labels == (0,)


def test_fixed_seconds_are_worth_it_only_together() -> None:
    links = (LinkTimes(0, 0, 1.0), LinkTimes(0, 0, 1.0))
    problem = chain((0.7, 0.7), (0.7, 0.7), (0.0, 0.0), sizes=(0, 0, 0), links=links)
    assert solve(problem).labels == (0, 0)
    slower = chain((1.1, 1.1), (1.1, 1.1), (0.0, 0.0), sizes=(0, 0, 0), links=links)
    assert solve(slower).labels == (2, 2)


def test_pins_are_kept() -> None:
    problem = chain((9, 9, 9), (0, 0, 0), sizes=(0, 0, 0, 0), links=(LinkTimes(0, 0),), pins={1: (0, 0)})
    assert solve(problem).labels == (0, 0, 1)


def test_contradictory_pins_name_the_node() -> None:
    arguments: dict[str, Any] = {"sizes": (1, 1, 1), "links": (LinkTimes(1, 1),), "names": ("conv", "relu")}
    with pytest.raises(Infeasible, match="relu may run on only tiers") as caught:
        solve(chain((1, 1), (1, 1), pins={0: (1, 1), 1: (0, 0)}, **arguments))
    assert caught.value.facts == {"node": 1, "name": "relu", "because": "conv"}
    with pytest.raises(Infeasible, match="conv is pinned to tier 1 or later and to tier 0 or earlier"):
        chain((1, 1), (1, 1), pins={0: (1, 0)}, **arguments)
    with pytest.raises(Infeasible, match="relu may run on no tier"):
        solve(chain((1, INF), (1, INF), **arguments))
    with pytest.raises(Infeasible, match="must run no earlier than conv"):
        sweep(chain((INF, 1), (1, INF), **arguments))


def test_what_cannot_cross_stays_on_one_tier() -> None:
    for size, labels in ((0, (0, 0, 1)), (INF, (0, 0, 0))):
        problem = chain((5, 5, 5), (9, 9, 1), sizes=(0, 0, size, 0), links=(LinkTimes(0, 0),))
        assert solve(problem).labels == labels
    assert solve(chain((5, 5), (1, 1), sizes=(INF, 0, 0), links=(LinkTimes(0, 0),))).labels == (0, 1)
    assert solve(chain((5, 5), (1, 1), sizes=(0, 0, INF), links=(LinkTimes(0, 0),))).labels == (0, 0)


ONE: dict[str, Any] = {
    "seconds": ((1.0,), (1.0,)),
    "tensors": (Tensor("x", None, (0,), 1), Tensor("y", 0, (), 1, True)),
    "links": (LinkTimes(1, 1),),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": ((1.0,),), "links": ()}, "two tiers or more"),
        ({"seconds": ((), ())}, "no node to place"),
        ({"seconds": ((1.0,), (1.0, 2.0))}, "one time"),
        ({"seconds": ((1.0,), (-1.0,))}, "node 0 takes -1.0 seconds on tier 1"),
        ({"seconds": ((math.nan,), (1.0,))}, "node 0 takes nan seconds on tier 0"),
        ({"links": ()}, "2 tiers need 1 links"),
        ({"links": (LinkTimes(INF, 1),)}, "link 0 has a negative or unbounded time"),
        ({"links": (LinkTimes(1, 1, -1),)}, "link 0 has a negative or unbounded time"),
        ({"caller": 2}, "the caller's tier 2 is none of 2"),
        ({"tensors": ONE["tensors"][:1]}, "there is no output"),
        ({"tensors": ONE["tensors"][1:]}, "there is no graph input"),
        ({"tensors": (*ONE["tensors"], Tensor("z", 0, (0,), 1))}, "z is not made before it is read"),
        ({"tensors": (*ONE["tensors"], Tensor("z", 0, (1,), 1))}, "z is not made before it is read"),
        ({"tensors": (*ONE["tensors"], Tensor("z", -1, (0,), 1))}, "z is not made before it is read"),
        ({"tensors": (*ONE["tensors"], Tensor("z", 0, (), -1))}, "z has -1 bytes"),
        ({"pins": {1: (0, 0)}}, "names no node or no tier"),
        ({"pins": {0: (0, 2)}}, "names no node or no tier"),
        ({"names": ("a", "b")}, "one name"),
    ],
)
def test_a_malformed_problem_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemMalformed, match=message):
        Problem(**{**ONE, **change})


# --- bandwidth ---


def _lines(problem: Problem, boundary: int, down: float) -> dict[Labels, tuple[Fraction, Fraction]]:
    """Each division's seconds at 0 seconds per byte, and its bytes, those down weighed with `down`."""
    still = with_speed(problem, boundary, 0.0)
    found = {}
    for labels in divisions(problem):
        amounts = usage(problem, labels)
        slope = Fraction(amounts.up_bytes[boundary]) + Fraction(down) * Fraction(amounts.down_bytes[boundary])
        found[labels] = (Fraction(cost(still, labels)), slope)
    return found


@pytest.mark.parametrize(("tiers", "boundary", "down"), [(2, 0, 1.0), (2, 0, 0.25), (3, 0, 1.0), (3, 1, 0.0)])
def test_the_sweep_is_the_lower_envelope_of_all_divisions(tiers: int, boundary: int, down: float) -> None:
    most = 0
    for seed in range(40):
        problem = random_problem(seed, tiers, 8 if tiers == 2 else 5, plain=seed % 4 > 1)
        lines = _lines(problem, boundary, down)
        if not lines:
            continue
        pieces = sweep(problem, boundary, down)
        most = max(most, len(pieces))
        assert pieces[0].low == 0
        assert pieces[-1].high == INF
        assert all(a.high == b.low for a, b in itertools.pairwise(pieces))
        assert all(a.bytes > b.bytes and a.base < b.base for a, b in itertools.pairwise(pieces))
        for piece in pieces:
            base, slope = lines[piece.labels]
            assert (piece.base, piece.bytes) == (pytest.approx(float(base), abs=1e-12), float(slope))
            inside = piece.low + 1 if piece.high == INF else (piece.low + piece.high) / 2
            for s in (piece.low, inside):
                least = min(b + Fraction(s) * w for b, w in lines.values())
                assert float(base + Fraction(s) * slope) == pytest.approx(float(least), abs=1e-9), (seed, s)
            # Inside a piece no division of fewer bytes or less time is as fast.
            ties = {
                x
                for x in lines.values()
                if abs(x[0] + Fraction(inside) * x[1] - base - Fraction(inside) * slope) < 1e-9
            }
            assert {float(w) for _, w in ties} == {float(slope)}, seed
            assert piece.at(problem, boundary, inside, down).seconds == pytest.approx(float(least), abs=1e-9)
        floats = {(float(b), float(w)) for b, w in lines.values()}
        for s in [i * 0.05 for i in range(60)]:
            piece = next(p for p in pieces if p.low <= s < p.high)
            assert piece.base + s * piece.bytes == pytest.approx(min(b + s * w for b, w in floats)), (seed, s)
    assert most >= 3


def test_a_sweep_cuts_about_twice_for_each_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, cut = [0], min_cut.source_side

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        return cut(*arguments)

    monkeypatch.setattr(min_cut, "source_side", counted)
    sizes = tuple(float((40 - v) ** 2) for v in range(41))
    problem = chain((1.0,) * 40, (0.5,) * 40, sizes=sizes, links=(LinkTimes(0, 0),))
    pieces = sweep(problem)
    assert len(pieces) >= 10
    assert calls[0] <= 2 * len(pieces) + 1


def test_a_sweep_of_no_such_link_is_refused() -> None:
    with pytest.raises(ProblemMalformed, match="nothing to sweep at boundary 1"):
        sweep(Problem(**ONE), boundary=1)


# --- throughput ---


def test_the_best_mix_is_the_best_of_all_divisions_together() -> None:
    mixed = 0
    for seed in range(60):
        problem = random_problem(seed, 2, 6)
        every = list(divisions(problem))
        if not every:
            with pytest.raises(Infeasible):
                best_mix(problem)
            continue
        found = best_mix(problem)
        demands = [Demand(*stage_seconds(problem, labels)) for labels in every]
        assert found.rate == pytest.approx(joint_capacity(demands, ALL_SECONDS).rate), seed
        assert sum(found.shares) == pytest.approx(1)
        if not math.isinf(found.rate):
            assert max(_used(problem, found)) == pytest.approx(1)
            mixed += len(found.divisions) > 1
    assert mixed > 10


def _used(problem: Problem, found: MixedDivisions) -> list[float]:
    seconds = [stage_seconds(problem, labels) for labels in found.divisions]
    return [found.rate * sum(share * s[r] for share, s in zip(found.shares, seconds, strict=True)) for r in range(4)]


def test_two_divisions_serve_more_than_either_of_them() -> None:
    # The edge alone takes 7 seconds, the cloud alone 5 of the link; half of each would take 4 and 2.
    problem = chain((3, 4), (0.1, 0.1), sizes=(50, 20, 0), links=(LinkTimes(0.1, 0.1),))
    found = best_mix(problem)
    assert set(found.divisions) == {(0, 1), (1, 1)}
    assert found.rate == pytest.approx(1 / 3 + 1 / 15)


def test_stages_are_of_two_tiers() -> None:
    with pytest.raises(ProblemMalformed, match="two tiers"):
        best_mix(random_problem(1, 3, 4))


# --- models ---

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'
FORKED = """
g (float[2, 4] x, bool on) => (float[2, 4] y, float[2, 4] early) {
    shape = Constant <value = float[4] {1, 2, 3, 4}> ()
    a = Add(x, shape)
    b = Neg(a)
    early = Exp(b)
    c = Relu(a)
    d = If (on) <
        then_branch = yes () => (float[2, 4] t) { t = Mul(b, c) },
        else_branch = no () => (float[2, 4] e) { e = Identity(c) }
    >
    y = Sqrt(d)
}
"""


def _saved(tmp_path: Path, text: str) -> Path:
    onnx.save(parser.parse_model(HEAD + text), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_problem_of_a_model_has_its_dynamic_nodes_captures_and_bytes(tmp_path: Path) -> None:
    model = open_model(_saved(tmp_path, FORKED))
    problem = from_model(model, [[1.0] * len(model.nodes)] * 2, [LinkTimes(1, 1)], early_outputs=True)
    ops = [model.nodes[i].op_type for i in positions(model)]
    assert sorted(ops) == ["Add", "Exp", "If", "Neg", "Relu", "Sqrt"]
    readers = {t.name: sorted(ops[v] for v in t.consumers) for t in problem.tensors}
    assert readers["b"] == ["Exp", "If"]
    assert readers["c"] == ["If"]
    assert {t.name: t.bytes for t in problem.tensors}["a"] == 32
    assert [t.name for t in problem.tensors if t.output] == ["early", "y"]
    assert [t.name for t in problem.tensors if t.producer is None] == ["x", "on"]


def test_outputs_stay_together_unless_early_ones_are_wanted(tmp_path: Path) -> None:
    model = open_model(_saved(tmp_path, FORKED))
    slow = [[0.0 if n.op_type == "Exp" else 9.0 for n in model.nodes], [0.0] * len(model.nodes)]
    slow[1] = [9.0 if n.op_type in ("Exp", "Neg", "Add") else 0.0 for n in model.nodes]
    free = from_model(model, slow, [LinkTimes(0, 0)], early_outputs=True)
    ops = [model.nodes[i].op_type for i in positions(model)]
    left = [op for op, tier in zip(ops, solve(free).labels, strict=True) if tier == 0]
    assert sorted(left) == ["Add", "Exp", "Neg"]
    together = solve(from_model(model, slow, [LinkTimes(0, 0)])).labels
    assert together[ops.index("Exp")] == together[ops.index("Sqrt")]


def test_a_division_that_no_cut_can_name_is_refused_with_its_nodes(tmp_path: Path) -> None:
    text = "g (float[4] x) => (float[4] y, float[4] z) { a = Neg(x) \n b = Exp(a) \n y = Sin(b) \n z = Cos(a) }"
    model = open_model(_saved(tmp_path, text))
    (boundary,) = boundaries(model, (0, 1, 1, 0), 2)
    assert boundary.tensors == ("a",)
    with pytest.raises(CutError, match="lead to none of its tensors") as caught:
        cut_of(model, boundary)
    assert len(caught.value.facts["nodes"]) == 1


def test_a_division_of_a_model_needs_a_time_for_each_node(tmp_path: Path) -> None:
    model = open_model(_saved(tmp_path, FORKED))
    with pytest.raises(ProblemMalformed, match="every tier needs one time for each of"):
        from_model(model, [[1.0], [1.0]], [LinkTimes(1, 1)])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(graphs())
def test_every_division_of_any_model_becomes_cuts(tmp_path_factory: Any, proto: onnx.ModelProto) -> None:
    path = tmp_path_factory.mktemp("any") / "model.onnx"
    onnx.save(proto, path)
    model = open_model(path)
    if not any(model.dynamic):
        return
    n = len(model.nodes)
    times = [[((i * 7 + t * 5) % (9 - 2 * t)) / (t + 1) for i in range(n)] for t in range(3)]
    problem = from_model(model, times, [LinkTimes(0.02, 0), LinkTimes(0.05, 0, 0.1)])
    _assert_cuts(model, problem, solve(problem).labels)


def _assert_cuts(model: Any, problem: Problem, labels: Labels) -> list[Any]:
    found = []
    crossing = usage(problem, labels).up
    for b, boundary in enumerate(boundaries(model, labels, problem.tiers)):
        if problem.caller == 0:
            assert {problem.tensors[i].name for i in crossing[b]} == set(boundary.tensors)
        if (cut := cut_of(model, boundary)) is not None:
            assert upstream_of(model, cut) == boundary.upstream
            assert {t.name for t in cut.tensors} == set(boundary.tensors)
            found.append(cut)
    return found


@pytest.mark.parametrize("name", ["efficientnet-lite0", "silero-in-if"])
def test_a_real_model_is_divided_and_its_segments_made(name: str, tmp_path: Path) -> None:
    real = REAL[name]
    model = open_model(real.path(), **real.open_arguments())
    edge = [m * 1e-9 + 1e-5 for m in model.macs]
    weight = sum(model.nbytes(v) for v in boundary_values(model, frozenset()))
    link = LinkTimes(0.3 * sum(edge) / weight, 1e-9)
    problem = from_model(model, [edge, [s / 10 for s in edge]], [link])
    pieces = sweep(problem)
    made = 0
    for piece in pieces:
        partition = _assert_cuts(model, problem, piece.labels)
        if partition:
            build(model, "planned", tmp_path / str(made), partitions=[partition])
            made += 1
    print(f"{name}: {problem.nodes} nodes, {len(pieces)} pieces, {made} of them split")  # noqa: T201
    assert made >= 1 or name != "efficientnet-lite0"


# --- the clock ---


@pytest.mark.parametrize("tiers", [2, 3])
def test_thousands_of_nodes_take_about_a_second(tiers: int) -> None:
    for nodes in (2_000, 10_000):
        problem = language_model(nodes, tiers)
        assert problem.nodes == nodes
        start = time.perf_counter()
        found = solve(problem)
        middle = time.perf_counter()
        pieces = sweep(problem) if nodes == 2_000 else []
        end = time.perf_counter()
        uniform = [cost(problem, (t,) * nodes) for t in range(tiers)]
        assert found.seconds <= min(uniform) + 1e-12
        spread = [found.labels.count(t) for t in range(tiers)]
        print(f"{nodes} nodes, {tiers} tiers: {middle - start:.2f} s, {spread} nodes on each")  # noqa: T201
        if pieces:
            print(f"  sweep: {end - middle:.2f} s, {len(pieces)} pieces")  # noqa: T201
