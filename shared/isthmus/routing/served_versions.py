"""The served versions: the chooser of each, and the thread that renews their forecasts."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cachetools import LRUCache

from isthmus.routing.candidates import ServedModel
from isthmus.routing.capacity import Capacities
from isthmus.routing.catalog import MAX_CACHED
from isthmus.routing.choice import RouteChooser
from isthmus.routing.estimates import Estimates
from isthmus.routing.forecast import forecast
from isthmus.routing.outstanding import IDLE, Outstanding
from isthmus.routing.state import ModelState

# Forecasts are made anew this often while requests come, and a preference changes no more often.
REFRESH_S = 0.1
# A version that no request has named for so long leaves the state, where another version of the model is served.
FORGOTTEN_S = 300.0


@dataclass
class _Served:
    """A version, and when the latest request named it."""

    model: ServedModel
    chooser: RouteChooser
    used_at: float

    def serves(self, model: ServedModel) -> bool:
        """Whether the candidates are the same; a variant that was removed and is back changes them."""
        return model is self.model or [c.name for c in model.candidates] == [c.name for c in self.model.candidates]


class ServedVersions:
    """The choosers of the latest MAX_CACHED versions; thread-safe. `hops` are the names of the tiers in order."""

    def __init__(self, hops: Sequence[str], estimates: Estimates, log: logging.Logger) -> None:
        self._first_hop, self._last_hop, self._log = hops[0], hops[-1], log
        self._estimates = estimates
        self._outstanding, self._capacities = Outstanding(), Capacities()
        self._lock = threading.Lock()
        self._served: LRUCache[tuple[str, str, str], _Served] = LRUCache(MAX_CACHED)
        self._requested, self._closed = threading.Event(), threading.Event()
        self._refresher: threading.Thread | None = None

    def chooser(self, model: ServedModel) -> RouteChooser:
        """The chooser of a version that a request names."""
        key = (model.name, model.version, model.digest)
        now = time.monotonic()
        with self._lock:
            served = self._served.get(key)
            if served is None or not served.serves(model):
                chooser = RouteChooser(model.candidates, self._outstanding)
                chooser.refresh(forecast(model.candidates, self._estimates))
                served = self._served[key] = _Served(model, chooser, now)
                if self._refresher is None and len(model.candidates) > 1:
                    self._refresher = threading.Thread(target=self._refresh_often, name="routes", daemon=True)
                    self._refresher.start()
            served.used_at = now
        self._requested.set()
        return served.chooser

    def states(self) -> list[tuple[ServedModel, ModelState]]:
        """The present state of each version that is served."""
        with self._lock:
            served = [each for each in self._served.values() if not self._is_forgotten(each)]
        return [(each.model, each.chooser.state(each.model.name, each.model.version)) for each in served]

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._requested.set()
        if self._refresher is not None:
            self._refresher.join()

    def _is_forgotten(self, served: _Served) -> bool:
        latest = max(each.used_at for each in self._served.values() if each.model.name == served.model.name)
        return served.used_at < latest - FORGOTTEN_S

    def _refresh_often(self) -> None:
        """New forecasts for the versions that requests named since the last ones, until `close`."""
        refreshed_at = -math.inf
        while not self._closed.wait(REFRESH_S):
            self._requested.wait()
            self._requested.clear()
            began = time.monotonic()
            with self._lock:
                served = [each for each in self._served.values() if each.used_at >= refreshed_at]
            try:
                self._refresh(served, began)
            # Defects as well: without this thread the forecasts would stay as they are for good, unseen.
            except Exception as e:
                self._log.error("unexpected in the forecasts: %s", type(e).__name__, exc_info=e)
            refreshed_at = began

    def _refresh(self, served: Sequence[_Served], now: float) -> None:
        """New forecasts; each version may use what the others leave of the resources."""
        used = [each.chooser.used for each in served]
        total = [sum(seconds) for seconds in zip(*used, strict=True)] or list(IDLE)
        rate = sum(each.chooser.usage.rate() for each in served)
        edge_wait_s, cloud_wait_s = self._estimates.wait_s(self._first_hop), self._estimates.wait_s(self._last_hop)
        calls = sum(each.chooser.calls for each in served)
        self._capacities.update(now, total, rate, calls, edge_wait_s, cloud_wait_s)
        for each, own in zip(served, used, strict=True):
            others = [all_s - own_s for all_s, own_s in zip(total, own, strict=True)]
            expected = forecast(each.model.candidates, self._estimates)
            each.chooser.refresh(expected, self._capacities.left(others))
