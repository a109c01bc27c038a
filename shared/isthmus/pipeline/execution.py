"""One request along one route."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus.arrays import Array, check_tensors
from isthmus.codecs import EncodedTensor
from isthmus.context import Context
from isthmus.pipeline.looks import Looked, look_closer
from isthmus.pipeline.passage import Passage, Stage
from isthmus.pipeline.route import Route


@dataclass(frozen=True)
class Result:
    """The model's outputs, and what each segment took; those of closer looks come after the first's."""

    outputs: dict[str, Array]
    stages: tuple[Stage, ...]
    looked: Looked | None = None
    """How closer looks went; None where the route has none, or nothing was packed for the first."""
    notes: Mapping[str, str | int] = field(default_factory=dict)
    """What else an answer says of its route: that its codecs are not those that were chosen."""

    @property
    def link_bytes(self) -> int:
        """Bytes sent over the link: the frames of every call to a hop behind it, tensors as they were coded."""
        return sum(stage.sent for stage in self.stages if stage.linked)

    @property
    def link_raw_bytes(self) -> int:
        """What the tensors in those frames weigh raw, each counted once: closer looks send more of the same."""
        return sum({stage.segment: stage.tensor_bytes for stage in reversed(self.stages) if stage.linked}.values())

    def facts(self) -> dict[str, Any]:
        """The route as an Open Inference Protocol answer's parameters tell it."""
        codecs = [f"{name}={codec}" for stage in self.stages for name, codec in stage.codecs.items()]
        facts = {"segments": ",".join(s.segment for s in self.stages), **self.sizes()}
        return {**facts, **({"codecs": ",".join(codecs)} if codecs else {}), **self.looks(), **self.notes}

    def sizes(self) -> dict[str, int]:
        """Bytes over the link as answers give them. Source: docs/api.md, "Bytes over the link"."""
        return {"link_bytes": self.link_bytes, "link_raw_bytes": self.link_raw_bytes}

    def looks(self) -> dict[str, str | int]:
        """What answers say of closer looks; nothing where there were none to take."""
        return {"looks": self.looked.taken, "looks_ended": self.looked.outcome} if self.looked is not None else {}


def run(
    route: Route, inputs: Mapping[str, Array], context: Context, encoded: Mapping[str, EncodedTensor] | None = None
) -> Result:
    """Take `inputs` through every segment of `route`, and closer looks where it has some.

    Shapes: `inputs` and the outputs are as the bundle declares them. `packed` are inputs that the caller has packed
    already, such as a photo as it came; only the first segment's hop, over HTTP, can take those.

    Raises:
        ShapeMismatch: the inputs do not fit the model; nothing was called.
        DeadlineExceeded, HopError: as the segments' hops report.
    """
    ready = encoded or {}
    check_tensors(tuple(spec for spec in route.bundle.inputs if spec.name not in ready), inputs)
    passage = Passage(route, context, dict(inputs))
    passage.through(0, ready)
    looked = look_closer(passage, route.looks) if route.looks is not None else None
    return Result(passage.outputs(), tuple(passage.stages), looked)
