"""Structured pruning of a head's channels, with least-squares repair of the layers that read the others.

One pass over the samples says what the removal of each channel costs its layer, a trial of each group what such a cost
does at the cut; one price of a MAC over all groups then says how many go where. Each group loses its channels in the
order of the graph, and the layers that read it are refit to what they computed before, on activations of the head as
pruned so far: a layer makes up for those before it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus.runtime.ort_runner import OrtRunner
from isthmus_tools.graph.channel_edits import EditableGraph, LayerGeometry, LayerWeights
from isthmus_tools.graph.channel_groups import ChannelGroup, ConsumerLayer, macs_left
from isthmus_tools.learning.compression.repair import Elimination, GramSums, ReadingLayer, eliminate, merged, repaired
from isthmus_tools.learning.compression.subject import HeadSubject
from isthmus_tools.progress import Progress, silent

# Vector registers: onnxruntime's convolutions compute 8 or 16 channels at once, and pad others.
_STEP, _NARROW_STEP, _NARROW = 16, 8, 64
# Of a group's channels; a layer of fewer could not be refit.
_MIN_KEPT = 0.25
# Samples for a Gram matrix: some times as many as features, at places of the output that a fixed seed draws.
_MIN_SAMPLES, _SAMPLES_PER_FEATURE = 4096, 4
# 4,096 features take 134 MB in float64, and the choice holds three such matrices.
MAX_FEATURES = 4096
_MAX_SUMS_BYTES = 2**28
# A trial removes one channel in so many of a group, and looks at the cut on so many samples.
_TRIAL_PART, _TRIAL_SAMPLES = 8, 24


@dataclass(frozen=True)
class PrunedHead:
    """A pruned graph, its MACs, and channels left of how many."""

    path: Path
    macs: int
    kept: int
    channels: int


class ChannelPruner:
    """The groups of a head's graph and what their channels cost, measured once for any number of shares."""

    def __init__(self, subject: HeadSubject, progress: Progress = silent) -> None:
        """Measure the cost of every channel.

        Raises:
            ModelError: the graph has no channels that may go; the message says why for some.
        """
        self._subject, self._progress = subject, progress
        self._original = EditableGraph(subject.graph)
        groups, reasons = self._original.groups
        self.groups = [group for group in groups if self._features(group) <= MAX_FEATURES]
        if not self.groups:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
            raise ModelError(
                f"no channels of {subject.segment.id} can be removed{': ' if some else ''}{some}",
                hint="pruning takes channels between two layers: not those of a residual stream or of the cut",
            )
        self._macs = self._original.macs(next(subject.head_samples()))
        self._costs = dict(self._eliminations())

    def prune(self, share: float, path: Path, *, repair: bool = True) -> PrunedHead:
        """Write the head with at most `share` of its MACs; without `repair` the other weights stay as they are.

        Raises:
            ModelError: the channels that may go are fewer work than that.
        """
        counts = self._counts(share)
        graph = EditableGraph(self._subject.graph)
        refit = set[str]()
        for number, group in enumerate(self.groups):
            self._progress("pruning", number, len(self.groups))
            gone = self._costs[group.name].order[: group.channels - counts[group.name]]
            if gone:
                graph.remove(group, sorted({*range(group.channels)} - {*gone}))
            if repair:
                self._repair(graph, group.consumers)
                refit |= {consumer.node for consumer in group.consumers}
        if repair and (last := [layer for layer in graph.boundary_layers() if layer.node not in refit]):
            self._repair(graph, last)
        macs = round(macs_left(self.groups, counts, self._macs, self._original.depthwise))
        total = sum(group.channels for group in self.groups)
        return PrunedHead(graph.save(path), macs, sum(counts.values()), total)

    def _features(self, group: ChannelGroup) -> int:
        layers = [self._original.layer(consumer.node) for consumer in group.consumers]
        return max(len(layer.matrix) for layer in layers) + 1

    def _eliminations(self) -> Iterator[tuple[str, Elimination]]:
        batch, size = list[ChannelGroup](), 0
        for group in (*self.groups, None):
            needed = 0 if group is None else 8 * len(group.consumers) * self._features(group) ** 2
            # Sums of as many groups at once as fit: each batch is another pass over the samples.
            if batch and (group is None or size + needed > _MAX_SUMS_BYTES):
                yield from self._eliminated(batch)
                batch, size = [], 0
            if group is not None:
                batch.append(group)
                size += needed

    def _eliminated(self, groups: Sequence[ChannelGroup]) -> Iterator[tuple[str, Elimination]]:
        consumers = [consumer for group in groups for consumer in group.consumers]
        folds = self._sums(self._original, self._original, consumers, residual=False)
        for group in groups:
            self._progress(f"choosing channels of {group.name}")
            layers = []
            for consumer in group.consumers:
                layer = self._original.layer(consumer.node)
                layers.append(ReadingLayer(layer.matrix, layer.block, merged(folds[consumer.node])))
            elimination = eliminate(layers, group.channels, _least(group))
            yield group.name, self._weighted(group, elimination, folds)

    def _weighted(
        self, group: ChannelGroup, elimination: Elimination, folds: Mapping[str, tuple[GramSums, GramSums]]
    ) -> Elimination:
        """The elimination with losses at the cut: those of the layers times what a trial shows that they do there."""
        gone = max(1, min(len(elimination.order), group.channels // _TRIAL_PART))
        kept = sorted({*range(group.channels)} - {*elimination.order[:gone]})
        graph = EditableGraph(self._subject.graph)
        graph.remove(group, kept)
        for consumer in group.consumers:
            layer = graph.layer(consumer.node)
            rows = np.concatenate([np.arange(layer.block) + channel * layer.block for channel in kept])
            if layer.bias is not None:
                rows = np.append(rows, group.channels * layer.block)
            _refit_layer(graph, consumer.node, tuple(sums.rows(rows) for sums in folds[consumer.node]))
        error = self._error(graph) ** 2
        scale = error / max(elimination.losses[gone - 1], 1e-12)
        return Elimination(elimination.order, tuple(scale * loss for loss in elimination.losses))

    def _error(self, graph: EditableGraph) -> float:
        """The relative RMS error at the cut on a few samples, of the worst tensor."""
        names = [spec.name for spec in self._subject.segment.outputs]
        before, after = self._observer(self._original, names), self._observer(graph, names)
        difference, power = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        every = max(1, len(self._subject.samples) // _TRIAL_SAMPLES)
        for index, arrays in enumerate(self._subject.head_samples()):
            if index % every == 0:
                expected, now = before.run(arrays), after.run(arrays)
                for name in names:
                    difference[name] += float(np.square(expected[name] - now[name], dtype=np.float64).sum())
                    power[name] += float(np.square(expected[name], dtype=np.float64).sum())
        return float(np.sqrt(max(difference[name] / (power[name] or 1.0) for name in names)))

    def _counts(self, share: float) -> dict[str, int]:
        """Channels to keep of each group: the least loss at one price of a MAC, raised until `share` is met."""
        total = sum(self._macs.values())
        depthwise = self._original.depthwise

        def left(counts: Mapping[str, int]) -> float:
            return macs_left(self.groups, counts, self._macs, depthwise) / total

        low, high = 0.0, 1e-12
        while (least := left(self._at_price(high))) > share:
            low, high = high, 4 * high
            # More than any loss for a single MAC: nothing is left to give up.
            if high > 1e6:
                raise ModelError(
                    f"pruning leaves {least:.0%} of the work at least, and {share:.0%} is asked for",
                    hint="--keep with a larger share",
                )
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if left(self._at_price(middle)) > share else (low, middle)
        return self._at_price(high)

    def _at_price(self, price: float) -> dict[str, int]:
        return {group.name: self._cheapest(group, price) for group in self.groups}

    def _cheapest(self, group: ChannelGroup, price: float) -> int:
        """The number of channels with the least sum of loss and price."""
        one_less = {group.name: group.channels - 1}
        saved = sum(self._macs.values()) - macs_left(self.groups, one_less, self._macs, self._original.depthwise)
        losses = (0.0, *self._costs[group.name].losses)
        options = {group.channels, *range(_least(group), group.channels, _step(group))}
        # The larger number where two are even.
        return int(min(sorted(options, reverse=True), key=lambda n: losses[group.channels - n] + price * saved * n))

    def _repair(self, graph: EditableGraph, consumers: Sequence[ConsumerLayer]) -> None:
        folds = self._sums(self._original, graph, consumers, residual=True)
        for consumer in consumers:
            _refit_layer(graph, consumer.node, folds[consumer.node])

    def _sums(
        self, original: EditableGraph, graph: EditableGraph, consumers: Sequence[ConsumerLayer], *, residual: bool
    ) -> dict[str, tuple[GramSums, GramSums]]:
        """Gram sums of each consumer: its inputs in `graph`, and what it gives in `original`, in two folds.

        With `residual`, a layer whose output is added to a stream gives the rest of the original's sum instead.
        """
        layers = {c.node: graph.layer(c.node) for c in consumers}
        wanted = {c.node: (c.residual if residual else None) for c in consumers}
        targets = {c.node: wanted[c.node][0] if wanted[c.node] else c.output for c in consumers}  # type: ignore[index]
        sources = list(dict.fromkeys([c.source for c in consumers] + [r[1] for r in wanted.values() if r]))
        before = self._observer(original, list(dict.fromkeys(targets.values())))
        after = self._observer(graph, sources)
        folds = {name: (_empty(layer), _empty(layer)) for name, layer in layers.items()}
        samples = self._subject.samples
        for index, arrays in enumerate(samples):
            inputs = self._subject.head_inputs(arrays)
            expected, now = before.run(inputs), after.run(inputs)
            for number, consumer in enumerate(consumers):
                layer, target = layers[consumer.node], expected[targets[consumer.node]]
                if (pair := wanted[consumer.node]) is not None:
                    target = target - now[pair[1]]
                # A gate's last layer belongs to a group whose channels went before.
                if (left := graph.outputs_left.get(consumer.node)) is not None:
                    target = np.take(target, left, axis=1 if layer.geometry.kernel else -1)
                sums = folds[consumer.node][index * 2 // len(samples)]
                count = -(-max(_MIN_SAMPLES, _SAMPLES_PER_FEATURE * len(layer.matrix)) // len(samples))
                x, y = sampled(now[consumer.source], target, layer, count, seed=(index, number))
                sums.add(x, y)
        return folds

    def _observer(self, graph: EditableGraph, names: list[str]) -> OrtRunner:
        data, segment = graph.observing(names, self._subject.segment)
        return self._subject.runner(data, segment)


def _refit_layer(graph: EditableGraph, name: str, folds: tuple[GramSums, ...]) -> None:
    layer = graph.layer(name)
    start = layer.matrix if layer.bias is None else np.vstack([layer.matrix, layer.bias[None]])
    weights = repaired(folds, start.astype(np.float64))
    if layer.bias is None:
        graph.set_layer(name, weights, None)
    else:
        graph.set_layer(name, weights[:-1], weights[-1])


def _least(group: ChannelGroup) -> int:
    """The fewest channels that stay, in whole steps from the group's own number."""
    return max(1, -(-int(group.channels * _MIN_KEPT) // _step(group)) * _step(group))


def _step(group: ChannelGroup) -> int:
    return _NARROW_STEP if group.channels < _NARROW else _STEP


def _empty(layer: LayerWeights) -> GramSums:
    return GramSums.empty(len(layer.matrix) + (layer.bias is not None), layer.matrix.shape[1])


def sampled(source: Array, target: Array, layer: LayerWeights, count: int, seed: Sequence[int]) -> tuple[Array, Array]:
    """Features and outputs of a layer at up to `count` places of its output; with a 1 behind for the bias.

    Shapes: source and target as in the graph; (places, channels * block, + 1), (places, outputs).
    """
    rng = np.random.default_rng(seed)
    if not layer.geometry.kernel:
        x, y = source.reshape(-1, source.shape[-1]), target.reshape(-1, target.shape[-1])
        rows = rng.permutation(len(x))[:count]
        x, y = x[rows], y[rows]
    else:
        places = rng.permutation(target.shape[0] * int(np.prod(target.shape[2:])))[:count]
        index, *where = np.unravel_index(places, (target.shape[0], *target.shape[2:]))
        x = _patches(source, layer.geometry, index, where).reshape(len(places), -1)
        y = np.moveaxis(target, 1, -1)[(index, *where)]
    return (x if layer.bias is None else np.hstack([x, np.ones((len(x), 1), x.dtype)])), y


def _patches(source: Array, geometry: LayerGeometry, index: Array, where: Sequence[Array]) -> Array:
    """What a convolution reads for each place of its output. Shapes: (places, channels, kernel…)."""
    # Zeros behind the end too, as far as the last place reads.
    ends = [
        int(w.max(initial=0)) * s + (k - 1) * d + 1 - p - n
        for w, s, k, d, p, n in zip(
            where, geometry.strides, geometry.kernel, geometry.dilations, geometry.pads, source.shape[2:], strict=True
        )
    ]
    padded = np.pad(source, [(0, 0), (0, 0), *((p, max(0, e)) for p, e in zip(geometry.pads, ends, strict=True))])
    out = np.empty((len(index), source.shape[1], *geometry.kernel), source.dtype)
    for offset in np.ndindex(*geometry.kernel):
        at = [w * s + o * d for w, s, o, d in zip(where, geometry.strides, offset, geometry.dilations, strict=True)]
        out[(slice(None), slice(None), *offset)] = np.moveaxis(padded, 1, -1)[(index, *at)]
    return out
