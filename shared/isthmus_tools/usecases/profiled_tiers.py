"""The tiers that a profile is of: each measured on its function where no stored profile will do, and stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from msgspec import structs

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.profile import Profile
from isthmus.artifacts.segment_id import SegmentId, partition_ids
from isthmus.registry import Registry
from isthmus_tools.budget import Budget
from isthmus_tools.profiling import profiles
from isthmus_tools.profiling.measure import hop_cost
from isthmus_tools.profiling.remote import ProfiledFunction
from isthmus_tools.progress import Progress
from isthmus_tools.usecases.profile_request import ProfileRequest

EDGE, CLOUD = "edge", "cloud"


def tier_segment(tier: str, cut: str) -> SegmentId:
    """The segment that a tier runs at a cut: the head at the edge, else the tail."""
    return partition_ids([cut])[0 if tier == EDGE else 1]


class ProfiledTiers:
    """The functions of a request by tier, and the devices that these run on."""

    def __init__(self, request: ProfileRequest, registry: Registry, progress: Progress) -> None:
        self._request, self._registry, self._progress = request, registry, progress
        given = request.functions
        urls = {tier: url for tier, url in ((EDGE, given.head), (CLOUD, given.tail)) if url}
        self.functions = {
            tier: ProfiledFunction(url, given.token, protection=given.protection, trust=given.trust)
            for tier, url in urls.items()
        }
        progress("asking the functions what they run on")
        self._devices = {tier: function.device() for tier, function in self.functions.items()}

    def stored(self, bundle: Bundle) -> dict[str, Profile | None]:
        """The stored profile of each tier's device."""
        return {tier: profiles.find(self._registry, bundle, tier, d.id) for tier, d in self._devices.items()}

    def measured(
        self,
        fresh: Mapping[str, Profile],
        earlier: Mapping[str, Profile | None],
        measure: Callable[[str, Budget], Profile],
        is_comparable: Callable[[Profile], bool],
    ) -> dict[str, Profile]:
        """The profile of each tier, in order: that of `fresh`, or a new one by `measure`, which is stored.

        An `earlier` profile completes the new one where `is_comparable` says so of it.
        """
        due = [tier for tier in self.functions if tier not in fresh]
        found = dict(fresh)
        for i, tier in enumerate(due):
            # Equal shares, so that the first tier leaves time for the second.
            new = measure(tier, self._request.budget.share((i + 1) / len(due)))
            new = structs.replace(new, device=self._devices[tier])
            old = earlier[tier]
            found[tier] = profiles.merge(old, new) if old is not None and is_comparable(old) else new
            profiles.put(self._registry, found[tier])
        return {tier: found[tier] for tier in self.functions}

    def slowed(self, measured: dict[str, Profile], whole_cpu_s: Callable[[], float]) -> dict[str, Profile]:
        """`measured` with the edge as slow as the request has it, and stored; `whole_cpu_s` gives the CPU seconds of a
        run of the whole model there, at full speed.
        """
        edge = self._request.functions.edge
        if edge.slowdown == 1 or EDGE not in self.functions:
            return measured
        self._progress(f"the cost of a call at an edge {edge.slowdown:g} times slower")
        hop = hop_cost(self.functions[EDGE], edge)
        slow = dict(measured)
        slow[EDGE] = profiles.slowed(measured[EDGE], edge.slowdown, hop, whole_cpu_s())
        profiles.put(self._registry, slow[EDGE])
        if CLOUD in self.functions:
            # The caller of the cloud is at the edge as well. The stored profile stays that of a caller at full speed.
            hop = hop_cost(self.functions[CLOUD], replace(edge, pids=()))
            slow[CLOUD] = structs.replace(measured[CLOUD], hop=hop)
        return slow
