"""Cuts worth an evaluation: the fastest for some codec and link, and the near-fastest after those.

The search weighs encoded sizes, from runs of the uncut model on real inputs: half of a ReLU's output is zeros, of a
bottleneck's output nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import RAW_ID, Choice
from isthmus.artifacts.conditions import Conditions, Objective
from isthmus.artifacts.profile import Profile
from isthmus.codecs import EncodedTensor, encode_tensor, encodings, is_activation
from isthmus.errors import ConstraintMalformed
from isthmus_tools.graph import CutInfo, Model, cuts
from isthmus_tools.graph.cuts import upstream_of
from isthmus_tools.graph.probe import values
from isthmus_tools.planner.memory import MemoryModel
from isthmus_tools.planner.search.from_graph import boundaries, cut_of, from_model, positions
from isthmus_tools.planner.search.latency import solve, sweep
from isthmus_tools.planner.search.problem import LinkTimes, Problem
from isthmus_tools.planner.search.throughput import best_mix

NEAR = 3
"""Number of fastest prefix cuts to evaluate per codec and link: predictions are too coarse to trust the first rank."""
ENCODING_BUDGET_S = 15.0
# Values of one probing run are in memory at once; a large model's activations sum to gigabytes.
_MAX_BATCH_BYTES = 256 * 2**20

UpstreamCut: TypeAlias = tuple[frozenset[int], CutInfo]
"""A cut with the positions of the nodes before."""


@dataclass(frozen=True)
class EncodedSizes:
    """Bytes of encoded tensors, and seconds here to encode and decode, by codec and by the tensor's name.

    A tensor without an entry was not measured, or is sent raw: its raw size holds.
    """

    bytes: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, Mapping[str, float]]


def measure_encoded_sizes(
    model: Model, arrays: Mapping[str, Array], choices: Sequence[Choice], budget_s: float = ENCODING_BUDGET_S
) -> EncodedSizes:
    """Encode every boundary tensor of a prefix cut, with the values of these inputs, under each of `choices`.

    Tensors after the time budget get the compression ratio of the tensors before. Calibrated codecs need tables and
    are not measured.
    """
    encoding = [c for c in choices if c.codec != RAW_ID]
    sizes: dict[str, dict[str, float]] = {c.codec: {} for c in encoding}
    seconds: dict[str, dict[str, float]] = {c.codec: {} for c in encoding}
    if not encoding:
        return EncodedSizes(sizes, seconds)
    until = time.monotonic() + budget_s
    skipped: list[tuple[str, int]] = []
    for name, array in _boundary_tensors(model, arrays):
        if time.monotonic() > until:
            skipped.append((name, array.nbytes))
            continue
        for choice in encoding:
            start = time.perf_counter()
            encoded = encode_tensor(array, encodings([model.specs[name]], choice)[name])
            took = time.perf_counter() - start
            sizes[choice.codec][name] = float(encoded.nbytes)
            # Decoding takes about as long; evaluations measure both.
            seconds[choice.codec][name] = 2 * took if isinstance(encoded, EncodedTensor) else took
    for choice in encoding:
        measured = sizes[choice.codec]
        raw = {n: model.nbytes(model.values[n]) for n in measured if is_activation(model.specs[n])}
        ratio = sum(measured[n] for n in raw) / sum(raw.values()) if sum(raw.values()) else 1.0
        for name, nbytes in skipped:
            measured[name] = nbytes * (ratio if is_activation(model.specs[name]) else 1.0)
    return EncodedSizes(sizes, seconds)


def _boundary_tensors(model: Model, arrays: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    names = dict.fromkeys(t.name for cut in cuts(model) for t in cut.tensors)
    batch: list[str] = []
    weight = 0
    for name in [*names, ""]:
        size = model.nbytes(model.values[name]) if name else 0
        if batch and (not name or weight + size > _MAX_BATCH_BYTES):
            yield from ((n, np.ascontiguousarray(a)) for n, a in values(model.document, batch, arrays).items())
            batch, weight = [], 0
        # onnxruntime returns no bfloat16 to numpy.
        if name and model.specs[name].dtype != "bfloat16":
            batch.append(name)
            weight += size


@dataclass(frozen=True)
class CutSearch:
    """The cuts of a model, for profiles of the two tiers and encoded sizes."""

    model: Model
    edge: Profile
    cloud: Profile
    encoded: EncodedSizes
    private_depth: int = 0
    fits: Callable[[int], bool] = lambda position: True
    """Whether the head of the prefix cut at a position fits into the edge's memory."""

    def __post_init__(self) -> None:
        if self.private_depth > len(self.model.nodes):
            raise ConstraintMalformed(
                f"--private-depth is {self.private_depth}, and the model has {len(self.model.nodes)} nodes",
                what="private_depth",
            )

    def cuts(
        self, links: Sequence[Conditions], choices: Sequence[Choice], max_cuts: int, objective: Objective = "latency"
    ) -> list[CutInfo]:
        """At most `max_cuts` cuts, the most promising first; empty where splitting never pays, or is impossible.

        For throughput the cuts that together serve the most requests come first.
        """
        cut_by_upstream: dict[frozenset[int], CutInfo] = {}
        searches = [self._optima(links, choices), self._near(links, choices), self._envelopes(links, choices)]
        if objective == "throughput":
            searches.insert(0, self._mixes(links, choices))
        for search in searches:
            for upstream, cut in search:
                # A head that is no prefix is at most as large as the prefix up to the last node.
                if len(cut_by_upstream) < max_cuts and self.fits(max(upstream)):
                    cut_by_upstream.setdefault(upstream, cut)
        return list(cut_by_upstream.values())

    def prefixes(self) -> list[CutInfo]:
        """All prefix cuts within the private depth and the edge's memory."""
        return [
            c
            for c in cuts(self.model)
            if c.position is not None
            and c.position + 1 >= self.private_depth
            and not (self.private_depth and c.passing)
            and self.fits(c.position)
        ]

    def problem(self, conditions: Conditions, choice: Choice, *, codec_time: bool = True) -> Problem:
        """The partitioning problem with tensors as encoded; with `codec_time`, codec seconds count as bytes."""
        fixed_s, hop_up_s, hop_down_s = _hop_times(self.cloud)
        up, down = conditions.up_byte_s + hop_up_s, conditions.down_byte_s + hop_down_s
        problem = from_model(
            self.model,
            [self.edge.nodes, self.cloud.nodes],
            [LinkTimes(up, down, conditions.rtt_s + fixed_s)],
            pins=dict.fromkeys(self._private_nodes(), (0, 0)),
        )
        sizes, seconds = self._codec_tables(choice)

        def weight(name: str, nbytes: float) -> float:
            return sizes.get(name, nbytes) + (seconds.get(name, 0.0) / up if codec_time and up > 0 else 0.0)

        tensors = tuple(
            t if t.output or math.isinf(t.bytes) else replace(t, bytes=weight(t.name, t.bytes)) for t in problem.tensors
        )
        return replace(problem, tensors=tensors)

    def _optima(self, links: Sequence[Conditions], choices: Sequence[Choice]) -> Iterator[UpstreamCut]:
        """The fastest division, prefix or not, for each link and codec."""
        for conditions in links:
            for choice in choices:
                yield from self._cut(solve(self.problem(conditions, choice)).labels)

    def _mixes(self, links: Sequence[Conditions], choices: Sequence[Choice]) -> Iterator[UpstreamCut]:
        """The divisions that together have the highest throughput, for each link and codec."""
        for conditions in links:
            for choice in choices:
                for labels in best_mix(self.problem(conditions, choice)).divisions:
                    yield from self._cut(labels)

    def _envelopes(self, links: Sequence[Conditions], choices: Sequence[Choice]) -> Iterator[UpstreamCut]:
        """The fastest divisions over all bandwidths."""
        for choice in choices:
            for piece in sweep(self.problem(links[0], choice, codec_time=False)):
                yield from self._cut(piece.labels)

    def _near(self, links: Sequence[Conditions], choices: Sequence[Choice]) -> Iterator[UpstreamCut]:
        """The fastest prefix cuts for each link and codec; every ranking's best before any second best."""
        prefixes = self.prefixes()
        if not prefixes:
            return
        at = np.array([c.position for c in prefixes], np.int64)
        before = np.cumsum(self.edge.nodes)[at]
        after = sum(self.cloud.nodes) - np.cumsum(self.cloud.nodes)[at]
        ranks = []
        for choice in choices:
            sizes, seconds = self._codec_tables(choice)
            weight = np.array([sum(sizes.get(t.name, self._bytes(t.name)) for t in c.tensors) for c in prefixes])
            codec_s = np.array([sum(seconds.get(t.name, 0.0) for t in c.tensors) for c in prefixes])
            for conditions in links:
                up = conditions.up_byte_s + _hop_times(self.cloud)[1]
                ranks.append(np.argsort(before + after + codec_s + weight * up, kind="stable"))
        for place in range(min(NEAR, len(prefixes))):
            for rank in ranks:
                cut = prefixes[int(rank[place])]
                yield frozenset(i for i in positions(self.model) if i <= (cut.position or 0)), cut

    def _private_nodes(self) -> set[int]:
        """The nodes pinned to the edge: the first nodes, and all readers of an input, which would else leave it."""
        if not self.private_depth:
            return set()
        readers = {i for i, used in enumerate(self.model.uses) if any(v.is_graph_input() for v in used)}
        return readers | set(range(self.private_depth))

    def _cut(self, labels: tuple[int, ...]) -> Iterator[UpstreamCut]:
        boundary = boundaries(self.model, labels, 2)[0]
        if (cut := cut_of(self.model, boundary)) is not None:
            yield boundary.upstream, cut

    def _codec_tables(self, choice: Choice) -> tuple[Mapping[str, float], Mapping[str, float]]:
        return self.encoded.bytes.get(choice.codec, {}), self.encoded.seconds.get(choice.codec, {})

    def _bytes(self, name: str) -> int:
        return self.model.nbytes(self.model.values[name])


def edge_fits(model: Model, bundle: Bundle, edge: Profile, max_bytes: int | None) -> Callable[[int], bool]:
    """A test of prefix positions: whether the head needs at most `max_bytes` of memory at the edge."""
    if max_bytes is None:
        return lambda position: True
    heads = MemoryModel(model, bundle, edge, same_graph=lambda segment: False).heads()
    return lambda position: heads[position] <= max_bytes


def named_cuts(
    model: Model, bundle: Bundle, cuts: Sequence[CutInfo], prepared: Iterable[str], private_depth: int
) -> tuple[list[str], list[str | CutInfo]]:
    """The names of the candidates' cuts, and the cuts for which the bundle lacks a head or a tail.

    Prepared cuts (calibrated, with an exit or a compressed head) within the private depth come first. A cut of the
    bundle keeps its name there.
    """
    published = {upstream_of(model, cut): name for name, cut in bundle.cuts.items()}
    private = frozenset(i for i in range(private_depth) if model.dynamic[i])
    inputs = {s.name for s in bundle.inputs} if private_depth else set()
    prepared = set(prepared)
    names = [
        n
        for upstream, n in published.items()
        if n in prepared and private <= upstream and not inputs & {t.name for t in bundle.cuts[n].tensors}
    ]
    added: dict[str, CutInfo] = {}
    for cut in cuts:
        if (name := published.get(upstream_of(model, cut))) is None:
            added[name := cut.name] = cut
        if name not in names:
            names.append(name)
    # A cut inside a longer partition has no head and tail of its own.
    return names, [added.get(n, n) for n in names if not bundle.has_segments([n])]


def min_boundary_bytes(model: Model, encoded: EncodedSizes) -> float:
    """The fewest bytes over all prefix cuts, each under the best codec; infinite without a cut."""
    tables: list[Mapping[str, float]] = [{}, *encoded.bytes.values()]
    return min(
        (
            sum(sizes.get(t.name, model.nbytes(model.values[t.name])) for t in cut.tensors)
            for cut in cuts(model)
            for sizes in tables
        ),
        default=math.inf,
    )


def _hop_times(profile: Profile) -> tuple[float, float, float]:
    """Fixed seconds of a call, and seconds per byte up and down; fits of noise may be negative and count as 0."""
    hop = profile.hop
    return (hop.fixed_s, max(0.0, hop.up_byte_s), max(0.0, hop.down_byte_s)) if hop else (0.0, 0.0, 0.0)
