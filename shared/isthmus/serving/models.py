"""The models that a router serves: what a name stands for now, kept for a while and through a registry's absence."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from isthmus.artifacts.bundle import Blob, Bundle
from isthmus.context import Deadline
from isthmus.errors import (
    CalibrationError,
    DeadlineExceeded,
    IsthmusError,
    ModelError,
    Overloaded,
    PlanError,
    RegistryError,
)
from isthmus.processing.classify import parse_labels
from isthmus.registry import Registry
from isthmus.registry.lookups import Lookups

MAX_KEPT = 256
"""Names and label lists kept; names come from callers, so there must be an end."""


REFRESH_WAIT_S = 0.25
"""The longest that a request waits to learn of a new version; a registry that is slower tells a later one."""


VERSIONS_WAIT_S = 2.0
"""The longest that a request waits for the list of a model's versions."""


@dataclass(frozen=True)
class Model:
    """One version of a model, and its class names where it has any."""

    name: str
    version: str
    digest: str
    bundle: Bundle
    labels: tuple[str, ...] | None


@dataclass
class _Kept:
    model: Model
    until: float
    refreshing: threading.Lock = field(default_factory=threading.Lock)


class Models:
    """Looks names up in the registry, each at most every `refresh_s`.

    What is known stays while the registry does not give it: a share that is not mounted looks like one without models.
    It stays, too, while a new version cannot be served: `prepare` is called with each before it takes the name.
    """

    def __init__(
        self,
        registry: Registry,
        refresh_s: float,
        log: logging.Logger,
        prepare: Callable[[Model], object] = lambda model: None,
    ) -> None:
        self._registry, self._prepare = registry, prepare
        self._refresh_s = refresh_s
        self._log = log
        self._lock = threading.Lock()
        self._lookups = Lookups(refresh_s)
        self._refresher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="refresh")
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def get(self, reference: str, deadline: Deadline) -> Model:
        """The model of `NAME` or `NAME:VERSION`.

        A name that is known is answered at once from memory; when its time is up, one caller asks the registry. A name
        that the registry lacks is not asked for again for `refresh_s`.

        Raises:
            Missing: no such model or version; names those that exist.
            RegistryUnavailable, DeadlineExceeded: not known yet, and the registry does not answer, or not in time.
            Overloaded: too many others wait for the registry.
        """
        with self._lock:
            if (kept := self._kept.get(reference)) is not None:
                self._kept.move_to_end(reference)  # callers name others, which must not drive out what is used
        if kept is None:
            return self._lookups.find(reference, partial(self._keep, reference), deadline)
        if time.monotonic() > kept.until and kept.refreshing.acquire(blocking=False):
            found = self._refresher.submit(self._refresh, reference, kept)
            with contextlib.suppress(TimeoutError):
                return found.result(timeout=REFRESH_WAIT_S)
        return kept.model

    def close(self) -> None:
        """Ask the registry no more; what is under way goes on to its end."""
        self._refresher.shutdown(wait=False, cancel_futures=True)
        self._lookups.close()

    def forget(self, reference: str) -> None:
        """Ask the registry anew for a name that it lacked."""
        self._lookups.forget(reference)

    def versions(self, model: Model, deadline: Deadline) -> list[str]:
        """The versions that a model has, oldest first; the known one while the registry does not tell."""
        until = Deadline.after(min(deadline.remaining(), VERSIONS_WAIT_S))
        try:
            key = ("versions", model.name)
            return self._lookups.find(key, lambda: [v.version for v in self._registry.versions(model.name)], until)
        except (RegistryError, DeadlineExceeded, Overloaded) as e:
            self._stays(model.name, e)
            return [model.version]

    def _refresh(self, reference: str, kept: _Kept) -> Model:
        try:
            return self._keep(reference)
        except (RegistryError, PlanError, CalibrationError) as e:
            self._stays(reference, e)
            return kept.model
        finally:
            kept.until = time.monotonic() + self._refresh_s
            kept.refreshing.release()

    def _stays(self, reference: str, error: IsthmusError) -> None:
        facts = {"error": error.message, "type": type(error).__name__} | ({"hint": error.hint} if error.hint else {})
        why = "the registry does not give it" if isinstance(error, RegistryError) else "the new one cannot be served"
        self._log.warning("%s stays as known: %s", reference, why, extra={"facts": facts})

    def _labels(self, blob: Blob) -> tuple[str, ...]:
        try:
            return parse_labels(self._registry.blob(blob))
        except ModelError as e:
            raise RegistryError(e.message, registry=self._registry.url, blob=blob.digest) from e

    def _keep(self, reference: str) -> Model:
        found = self._registry.resolve(reference)
        labels = found.bundle.labels
        model = Model(
            found.name,
            found.version,
            found.digest,
            found.bundle,
            None if labels is None else self._labels(labels),
        )
        self._prepare(model)
        kept = _Kept(model, time.monotonic() + self._refresh_s)
        with self._lock:
            # A number always means the same version: whoever asks for it need not wait for the registry.
            self._kept.setdefault(f"{model.name}:{model.version}", replace(kept, refreshing=threading.Lock()))
            self._kept[reference] = kept
            self._kept.move_to_end(reference)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return model
