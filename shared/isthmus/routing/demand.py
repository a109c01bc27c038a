"""What a request takes of each resource between its arrival and its response: edge, link each way, cloud."""

from __future__ import annotations

from typing import NamedTuple, Self

from isthmus.artifacts.plan import Candidate

# The resources that requests share, in the order of a request.
RESOURCES = ("edge", "uplink", "downlink", "cloud")


class Demand(NamedTuple):
    """A request's use of the resources. Units: seconds of computation, bytes on the link, calls over the link."""

    edge_s: float = 0.0
    up_bytes: float = 0.0
    down_bytes: float = 0.0
    cloud_s: float = 0.0
    calls: float = 0.0

    def scaled(self, factor: float) -> Self:
        """The demand where `factor` times as many requests pass the exit, which is before the link and the cloud."""
        if factor == 1.0:
            return self
        up, down, cloud_s, calls = (factor * amount for amount in self[1:])
        return type(self)(self.edge_s, up, down, cloud_s, calls)

    @classmethod
    def planned(cls, candidate: Candidate) -> Self:
        """The demand of a plan's candidate, by its predicted terms; closer looks count with their shares.

        Of a language model it is that of a further token: live estimates are of steps of a single one.
        """
        if (costs := candidate.generation) is not None:
            each = costs.per_token
            up, down = float(costs.token_up_bytes), float(costs.token_down_bytes)
            return cls(each.edge_busy, up, down, each.cloud_busy, 0.0 if candidate.kind == "edge" else 1.0)
        terms = candidate.predicted
        return cls(
            terms.edge_busy,
            float(candidate.up_bytes),
            float(candidate.down_bytes),
            terms.cloud_busy,
            0.0 if candidate.kind == "edge" else candidate.calls,
        )
