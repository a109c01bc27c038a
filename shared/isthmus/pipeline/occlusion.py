"""Occlusion: how far a class's probability falls where a part of the input is hidden.

At a cut, the head runs once, and parts of the boundary tensors are set to zero, a window of cells at a time; the
segments behind the cut run for each window. Nothing more runs before the link. Without a cut, or where boundary tensors
have no places, the input is hidden and the whole route runs.

Source: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014, section 4.2, of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.context import Deadline
from isthmus.errors import RequestMalformed, RequestTooLarge, RunFailed, ShapeMismatch
from isthmus.pipeline.agreement import are_probabilities
from isthmus.pipeline.execution import Result
from isthmus.pipeline.hidden_copies import HiddenCopies, Run, run_all
from isthmus.pipeline.places import Places, Sizes, boundary_places, input_places
from isthmus.pipeline.route import Route
from isthmus.processing.classify import softmax, table_of

# Cells of a picture's rows and of its columns: 32 pixels each for the usual input of 224.
GRID = 7
MAX_GRID = 32
# Cells of a window's side in a picture. Windows that overlap, and zero rather than the channels' means, came nearest to
# hiding the input at the cuts of EfficientNet-Lite0 (docs/how-to/why.md).
WINDOW = 2
# [PAD] of most vocabularies.
PADDING_ID = 0


@dataclass(frozen=True)
class OcclusionRequest:
    """The class to explain, and how finely.

    `scores` gives the classes' probabilities, (batch, classes), of outputs; `index` is the class, None for the
    likeliest. `grid` is the number of rows and of columns of cells, or of a sequence's cells; 0 for GRID, or a cell for
    each token. `window` is the side of the window that slides over a picture's cells. At most `max_runs` windows are
    hidden; a token is hidden by `hidden_id` in its place.
    """

    scores: Callable[[Mapping[str, Array]], Array]
    index: int | None = None
    grid: int = 0
    window: int = WINDOW
    max_runs: int = (MAX_GRID + WINDOW - 1) ** 2
    hidden_id: int = PADDING_ID


@dataclass(frozen=True)
class Occlusion:
    """An explanation: `drops`, (rows, columns) or (cells,), is how far the probability falls with each cell hidden.

    A cell's drop is the mean over the windows that cover the cell. `cut` names the cut whose boundary tensors were
    hidden, empty for the input. `base` is the result of the whole input, `runs` those of the copies with a window
    hidden, one a batch, without their tensors.
    """

    index: int
    classes: int
    probability: float
    drops: Array
    hidden: tuple[Places, ...]
    cut: str
    windows: int
    base: Result
    runs: tuple[Result, ...]

    @property
    def link_bytes(self) -> int:
        """Bytes over the link, of the prediction and of all hidden copies."""
        return sum(result.link_bytes for result in (self.base, *self.runs))

    def document(self, labels: Sequence[str] | None) -> dict[str, Any]:
        """The explanation in a response's JSON. Source: docs/reference/api.md, "Explanations"."""
        rows = np.atleast_2d(self.drops)
        # Another output than the declared one may have other classes.
        label = labels[self.index] if labels is not None and len(labels) == self.classes else None
        return {
            "class": {"label": label, "index": self.index, "probability": self.probability},
            "explanation": {
                "of": "picture" if self.drops.ndim == 2 else "sequence",
                "at": f"cut {self.cut}" if self.cut else "input",
                "tensors": [places.tensor for places in self.hidden],
                "grid": list(rows.shape),
                "drops": rows.tolist(),
                **({"areas": areas(self.drops)} if self.drops.ndim == 2 else {}),
                "runs": self.windows,
                "batches": len(self.runs),
            },
        }


def areas(drops: Array) -> list[dict[str, Any]]:
    """The areas of a picture that hold most of the drops, each with its share; at most three, largest first.

    A share is of all cells whose hiding lowers the probability.
    """
    # A cell belongs to the third of its centre.
    rows, columns = ((2 * np.arange(count) + 1) * 3 // (2 * count) for count in drops.shape)
    falls = np.maximum(drops, 0)
    total = float(falls.sum())
    shares = {
        "centre" if i == j == 1 else f"{row} {column}": float(falls[np.ix_(rows == i, columns == j)].sum())
        for i, row in enumerate(("upper", "middle", "lower"))
        for j, column in enumerate(("left", "centre", "right"))
    }
    largest = sorted(shares, key=lambda where: -shares[where])[:3]
    return [{"where": where, "share": round(shares[where] / total, 4)} for where in largest if shares[where]]


def class_scores(bundle: Bundle, output: str = "") -> Callable[[Mapping[str, Array]], Array]:
    """The classes' probabilities of the model's outputs, (batch, classes), by its post-processing or of `output`.

    Raises:
        RequestMalformed: no such output, or several without a name.
        ShapeMismatch: that output is no table of classes.
    """
    after = bundle.postprocess or {}
    names = [output or after.get("output") or spec.name for spec in bundle.outputs]
    if len(set(names)) > 1 or names[0] not in {spec.name for spec in bundle.outputs}:
        raise RequestMalformed(
            f"an explanation is of a class, and {bundle.name} has no output {output!r}"
            if output
            else f"{bundle.name} has several outputs: name the one of classes",
            parameter="output",
            exists=[spec.name for spec in bundle.outputs],
        )
    spec = next(spec for spec in bundle.outputs if spec.name == names[0])
    if len(spec.shape) < 2 or spec.shape[1] in (0, 1) or any(size != 1 for size in spec.shape[2:]):
        raise ShapeMismatch(
            f"an explanation is of a class, and {spec.name} of {bundle.name} is no table of classes",
            tensor=spec.name,
            expected="(batch, classes)",
            got=list(spec.shape),
        )

    def scores(outputs: Mapping[str, Array]) -> Array:
        table = table_of(outputs[spec.name], {"output": spec.name}, None)
        plain = not after["softmax"] if after.get("output") == spec.name else are_probabilities(table)
        return table if plain else softmax(table)

    return scores


def occlude(
    route: Route, inputs: Mapping[str, Array], request: OcclusionRequest, run: Run, deadline: Deadline
) -> Occlusion:
    """Explain the prediction of `route` for one input.

    Hidden copies travel encoded as the route's tensors do, several in a frame where the batch is free. Closer looks are
    left out.

    Raises:
        RequestMalformed: `index` is no class, or `grid` or `hidden_id` is out of range.
        RequestTooLarge: more parts than `max_runs`.
        ShapeMismatch: several inputs in a batch, or inputs without places.
        RunFailed: a probability is not finite.
        DeadlineExceeded: the copies will not be done in time; HopError as `execute`.
    """
    route = replace(route, looks=None)
    if any(array.shape[:1] not in ((1,), ()) for array in inputs.values()):
        raise ShapeMismatch("an explanation is of one input, and the batch has several", expected="a batch of 1")
    source = input_places(route.bundle, inputs)
    wanted = _grid(request, source.sizes)
    base = run(route, inputs)
    row = request.scores(base.outputs)[0]
    index = int(row.argmax()) if request.index is None else request.index
    if not 0 <= index < row.size:
        raise RequestMalformed(f"class {index} is none of the model's {row.size} classes", parameter="class")
    start = _start(route)
    rest = _from(route, start)
    hidden = boundary_places(rest.inputs, base.tensors, source.sizes) if start else []
    if not hidden:
        rest, hidden = route, [source]
    # No more cells than the finest tensor has places.
    grid = tuple(min(count, max(p.sizes[i] for p in hidden)) for i, count in enumerate(wanted))
    copies = HiddenCopies(rest, base.tensors, hidden, grid, _width(request, grid), request.hidden_id)
    results, rows = [], []
    for result in run_all(copies, run, deadline):
        rows.append(request.scores(result.outputs)[:, index])
        # Without its tensors: all copies together may be larger than memory.
        results.append(replace(result, outputs={}, tensors={}))
    probabilities = np.concatenate(rows)
    if not np.isfinite([row[index], *probabilities]).all():
        raise RunFailed(f"the probability of class {index} is not finite", got=str(row[index]))
    drops = copies.spread(float(row[index]) - probabilities)
    cut = rest.segments[0].id.start
    return Occlusion(
        index, row.size, float(row[index]), drops, tuple(hidden), cut, probabilities.size, base, tuple(results)
    )


def _grid(request: OcclusionRequest, sizes: Sizes) -> Sizes:
    """The cells along each of the input's axes, as asked for."""
    picture = len(sizes) == 2
    most = MAX_GRID if picture else sizes[0]
    count = request.grid or (GRID if picture else max(1, min(sizes[0], request.max_runs)))
    if not 1 <= count <= most:
        raise RequestMalformed(f"grid is {count}; it is a whole number from 1 to {most}", parameter="grid")
    grid = (count,) * len(sizes)
    if (runs := (count + _width(request, grid) - 1) ** len(sizes)) > request.max_runs:
        raise RequestTooLarge(
            f"a grid of {count} takes {runs} runs of the model behind the cut; at most {request.max_runs} are made",
            limit=request.max_runs,
            hint="ask for a smaller grid",
        )
    return grid


def _width(request: OcclusionRequest, grid: Sizes) -> int:
    """Cells of a window's side: tokens are hidden one by one."""
    return min(request.window, *grid) if len(grid) == 2 else 1


def _start(route: Route) -> int:
    """The index of the first segment behind the link, else of the second segment; 0 for an uncut route."""
    beyond = (i for i, hop in enumerate(route.hops) if i and hop.name != route.near)
    return next(beyond, min(1, len(route.segments) - 1))


def _from(route: Route, start: int) -> Route:
    """The route from its segment `start` on."""
    return replace(route, segments=route.segments[start:], hops=route.hops[start:], encodings=route.encodings[start:])
