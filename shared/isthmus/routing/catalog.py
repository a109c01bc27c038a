"""The models that a router serves: names resolved in the registry, cached, and served on while the registry is away."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from cachetools import LRUCache, TTLCache

from isthmus.artifacts.alias import Alias
from isthmus.artifacts.bundle import Blob, Bundle
from isthmus.context import Deadline
from isthmus.errors import (
    CalibrationError,
    DeadlineExceeded,
    HopMismatch,
    IsthmusError,
    Missing,
    ModelError,
    Overloaded,
    PlanError,
    RegistryError,
)
from isthmus.processing.classify_spec import parse_labels
from isthmus.registry import Registry
from isthmus.registry.lookups import Lookups
from isthmus.retries import backoff
from isthmus.routing.canary_trial import CANARY, STABLE, CanaryTrial
from isthmus.routing.canary_trials import CanaryTrials
from isthmus.routing.candidates import RouteCandidate, ServedModel
from isthmus.routing.selection import RouteSelector

if TYPE_CHECKING:
    from isthmus.processing.photo_redaction import PhotoRedactor

# Models in the cache; names come from callers, so there must be an end.
MAX_CACHED = 256
# The longest that a request waits for a new version; where the registry is slower, a later request gets it. Requests
# wait only where there was none for half of `refresh_s`: before that the entry is looked up in the background.
MAX_REFRESH_WAIT_S = 0.25
# A new version whose segments are being loaded is looked at again after so long.
_PREPARING_S = 0.5
# Functions of one model that hold different bundles are waited for so long, and asked again after a pause that doubles.
MAX_ROLL_S = 10.0
_FIRST_ROLL_PAUSE_S, _MAX_ROLL_PAUSE_S = 0.05, 0.5
_ROLL_FAILED_S = 1.0
# Of a request's time for that wait: the rest is for the request itself.
_ROLL_SHARE = 0.8
# The longest that a request waits for the list of a model's versions.
MAX_VERSIONS_WAIT_S = 2.0
_ROLL_ADVICE = "deploy all functions of the model from one bundle, and let the alias mean that version"
# Models in a listing: each takes several reads of the registry.
MAX_LISTED = 200


@dataclass(frozen=True)
class ModelListing:
    """A published model: its versions, oldest first, and its aliases with the version of each."""

    name: str
    versions: tuple[str, ...]
    aliases: Mapping[str, str]


class VersionDraw(NamedTuple):
    """The version that a request gets; `alias` and `release`, stable or canary, where a canary is on trial."""

    model: ServedModel
    alias: str = ""
    release: str = ""


@dataclass
class _NameEntry:
    model: ServedModel
    refresh_at: float
    expires: float
    trial: CanaryTrial | None = None
    refreshing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def now(cls, model: ServedModel, seconds: float, trial: CanaryTrial | None = None) -> Self:
        now = time.monotonic()
        return cls(model, now + seconds / 2, now + seconds, trial)


class VersionLoading(Protocol):
    """The segments of versions in the memory of their functions; `Warming`."""

    def prepare(self, model: ServedModel) -> bool:
        """See `Warming.prepare`."""
        ...

    def holds(self, model: ServedModel) -> bool:
        """See `Warming.holds`."""
        ...


class ModelCatalog:
    """Resolves names in the registry, each at most every `refresh_s` seconds.

    An entry stays while the registry does not give a newer version, since a share that is not mounted looks like a
    registry without models, and while a new version cannot be served: a name moves to another version once the
    version's route is known and `loading` has prepared it, which loads its segments.
    """

    def __init__(
        self,
        registry: Registry,
        refresh_s: float,
        log: logging.Logger,
        routes: RouteSelector,
        loading: VersionLoading,
        trials: CanaryTrials,
    ) -> None:
        self._registry, self._routes, self._loading, self._trials = registry, routes, loading, trials
        self._refresh_s = refresh_s
        self._log = log
        self._lock = threading.Lock()
        self._lookups = Lookups(refresh_s)
        # Of their own: each may take MAX_ROLL_S.
        self._rolls, self._closed = Lookups(_ROLL_FAILED_S), threading.Event()
        # A single thread: a registry that hangs must not collect threads.
        self._refresher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="refresh")
        self._cache: LRUCache[str, _NameEntry] = LRUCache(MAX_CACHED)
        self._listings: TTLCache[object, tuple[ModelListing, ...]] = TTLCache(2, refresh_s)

    def get(self, reference: str, deadline: Deadline) -> ServedModel:
        """The model of `NAME` or `NAME:VERSION`.

        A cached name needs no wait: the registry is asked in the background once the entry is half as old as it may
        be. Of an expired entry, which nobody used meanwhile, a single caller waits. For a name that the registry lacks,
        the next question is `refresh_s` later.

        Raises:
            Missing: unknown model or version; the facts list all that exist.
            RegistryUnavailable, DeadlineExceeded: not cached yet, and the registry does not answer, or not in time.
            Overloaded: too many other requests wait for the registry.
            Untrusted: the alias's signature does not count, or no longer.
            Further errors as `RouteSelector.select`.
        """
        with self._lock:
            entry = self._cache.get(reference)
            if entry is not None and not self._registry.stands(reference):
                # A registry that is frozen, or away, must not have an old version served for good.
                del self._cache[reference]
                entry = None
        if entry is None:
            return self._lookups.find(reference, partial(self._resolve, reference), deadline)
        now = time.monotonic()
        if now > entry.refresh_at and entry.refreshing.acquire(blocking=False):
            refresh = self._refresher.submit(self._refresh, reference, entry)
            if now > entry.expires:
                with contextlib.suppress(TimeoutError):
                    return refresh.result(timeout=MAX_REFRESH_WAIT_S)
        return entry.model

    def draw(self, reference: str, caller: str, deadline: Deadline) -> VersionDraw:
        """The version of a name for a request: that of `get`, or for a share of the callers the canary of the alias.

        A caller with a name gets the same version each time; each request of one without a name is drawn by itself.

        Raises:
            As `get`.
        """
        model = self.get(reference, deadline)
        if not self._trials.any_begun:
            return VersionDraw(model)
        with self._lock:
            entry = self._cache.get(reference)
        trial = None if entry is None else entry.trial
        # The alias may have moved to a version that is not loaded yet, and have a canary beside that one.
        if trial is None or trial.reason or trial.stable.digest != model.digest:
            return VersionDraw(model)
        canary = trial.canary
        is_tried = canary.takes(caller) if caller else random.random() < canary.share  # noqa: S311 - no secret
        return VersionDraw(trial.tried if is_tried else model, trial.alias.alias, CANARY if is_tried else STABLE)

    def renew(self, reference: str, refusal: HopMismatch, deadline: Deadline) -> ServedModel:
        """The version that all functions of its route hold, after one of them refused the version in force.

        The registry and the functions are asked at once, and then until both agree: while functions are replaced one
        after the other, the first has the next bundle and the last one the present bundle. Requests for one name share
        the questions.

        Raises:
            HopMismatch: `refusal`; the functions hold no common bundle in time.
            Overloaded: too many requests wait.
        """
        wait_until = Deadline.after(_ROLL_SHARE * deadline.remaining())
        try:
            return self._rolls.find(reference, partial(self._common_version, reference, refusal), wait_until)
        except DeadlineExceeded:
            raise refusal from None

    def close(self) -> None:
        """Stop asking the registry; look-ups under way go on to their end."""
        self._closed.set()
        self._refresher.shutdown(wait=False, cancel_futures=True)
        self._lookups.close()
        self._rolls.close()

    def forget(self, reference: str) -> None:
        """Ask the registry again for a name that the registry lacked."""
        self._lookups.forget(reference)

    def versions(self, model: ServedModel, deadline: Deadline) -> list[str]:
        """The versions of a model, oldest first; `model`'s alone while the registry does not answer."""
        wait_until = Deadline.after(min(deadline.remaining(), MAX_VERSIONS_WAIT_S))
        try:
            key = ("versions", model.name)
            versions = self._lookups.find(key, lambda: self._registry.versions(model.name), wait_until)
            return [v.version for v in versions]
        except (RegistryError, DeadlineExceeded, Overloaded) as e:
            self._log_stale(model.name, e)
            return [model.version]

    def alternatives(self, model: ServedModel) -> dict[str, RouteCandidate]:
        """Other routes of this version, by name; see `alternative_routes`."""
        return self._routes.alternatives(model.digest, model.bundle, model.route)

    def listing(self, names: Sequence[str] | None, deadline: Deadline) -> tuple[ModelListing, ...]:
        """The published models of these names, or of all names, at most MAX_LISTED; asked every `refresh_s` seconds.

        Raises:
            RegistryError, DeadlineExceeded: the registry does not answer, or not in time.
            Overloaded: too many other requests wait for the registry.
        """
        key = ("listing", None if names is None else tuple(names))
        with self._lock:
            cached = self._listings.get(key)
        if cached is None:
            cached = self._lookups.find(key, partial(self._list, names), deadline)
            with self._lock:
                self._listings[key] = cached
        return cached

    def loaded(self) -> list[ServedModel]:
        """The versions whose routes are known, each once."""
        with self._lock:
            models = {(m.name, m.version): m for m in (entry.model for entry in self._cache.values())}
        return list(models.values())

    def _list(self, names: Sequence[str] | None) -> tuple[ModelListing, ...]:
        listings = []
        for name in (self._registry.models() if names is None else names)[:MAX_LISTED]:
            with contextlib.suppress(Missing):  # of another spelling than any, or removed meanwhile
                versions = tuple(v.version for v in self._registry.versions(name))
                listings.append(ModelListing(name, versions, self._registry.aliases(name)))
        return tuple(listings)

    def _refresh(self, reference: str, entry: _NameEntry) -> ServedModel:
        later = _NameEntry.now(entry.model, self._refresh_s, entry.trial)
        try:
            newest, alias = self._version(reference)
            if newest.digest == entry.model.digest or self._loading.prepare(newest):
                later = self._entry(newest, alias)
            else:
                later = _NameEntry.now(entry.model, min(self._refresh_s, _PREPARING_S))
        except (RegistryError, PlanError, CalibrationError) as e:
            self._log_stale(reference, e)
        finally:
            entry.model, entry.trial = later.model, later.trial
            entry.refresh_at, entry.expires = later.refresh_at, later.expires
            entry.refreshing.release()
        return later.model

    def _entry(self, model: ServedModel, alias: Alias | None) -> _NameEntry:
        """The entry of a name, with the trial of the alias's canary once the canary's segments are loaded."""
        if alias is None or (canary := alias.canary) is None:
            return _NameEntry.now(model, self._refresh_s)
        number = f"{alias.name}:{canary.version}"
        try:
            tried = self._served(alias.name, str(canary.version), canary.digest)
            if not self._loading.prepare(tried):
                return _NameEntry.now(model, min(self._refresh_s, _PREPARING_S))
        except (RegistryError, PlanError, CalibrationError) as e:
            facts = {"alias": alias.alias, "error": e.message, "type": type(e).__name__}
            self._log.warning("the canary %s cannot be served, and gets no requests", number, extra={"facts": facts})
            return _NameEntry.now(model, self._refresh_s)
        return _NameEntry.now(model, self._refresh_s, self._trials.trial(alias, model, tried))

    def _common_version(self, reference: str, refusal: HopMismatch) -> ServedModel:
        give_up = time.monotonic() + MAX_ROLL_S
        pauses = backoff(_FIRST_ROLL_PAUSE_S, _MAX_ROLL_PAUSE_S)
        while True:
            for model in self._newest_and_present(reference):
                if self._loading.holds(model):
                    with self._lock:
                        self._cache[reference] = _NameEntry.now(model, min(self._refresh_s, _PREPARING_S))
                    return model
            pause_s = next(pauses)
            if time.monotonic() + pause_s > give_up or self._closed.wait(pause_s):
                raise HopMismatch(refusal.message, hint=_ROLL_ADVICE, **refusal.facts)

    def _newest_and_present(self, reference: str) -> list[ServedModel]:
        """What a name means in the registry now, as far as that can be had, and what it meant until now."""
        with self._lock:
            entry = self._cache.get(reference)
        models = [] if entry is None else [entry.model]
        try:
            newest, _ = self._version(reference)
        except (RegistryError, PlanError, CalibrationError) as e:
            self._log_stale(reference, e)
            return models
        return [newest, *(model for model in models if model.digest != newest.digest)]

    def _log_stale(self, reference: str, error: IsthmusError) -> None:
        facts = {"error": error.message, "type": type(error).__name__} | ({"hint": error.hint} if error.hint else {})
        why = "the registry does not give it" if isinstance(error, RegistryError) else "the new one cannot be served"
        self._log.warning("%s stays as known: %s", reference, why, extra={"facts": facts})

    def _labels(self, blob: Blob) -> tuple[str, ...]:
        try:
            return parse_labels(self._registry.blob(blob))
        except ModelError as e:
            raise RegistryError(e.message, registry=self._registry.url, blob=blob.digest) from e

    def _redactor(self, bundle: Bundle) -> PhotoRedactor | None:
        if bundle.redaction is None or not bundle.redaction.of_photos:
            return None
        from isthmus.runtime.face_detector import redactor_of  # Pillow and onnxruntime, of which a router may need none

        return redactor_of(bundle, self._registry.blob)

    def _resolve(self, reference: str) -> ServedModel:
        model, alias = self._version(reference)
        entry = self._entry(model, alias)
        with self._lock:
            self._cache[reference] = entry
        return model

    def _version(self, reference: str) -> tuple[ServedModel, Alias | None]:
        """The version that a name means in the registry, and the document of the alias in it."""
        resolved = self._registry.resolve(reference)
        return self._served(resolved.name, resolved.version, resolved.digest, resolved.bundle), resolved.alias

    def _served(self, name: str, version: str, digest: str, bundle: Bundle | None = None) -> ServedModel:
        by_version = f"{name}:{version}"
        with self._lock:
            entry = self._cache.get(by_version)
        if entry is not None and entry.model.digest == digest:
            model = entry.model
        else:
            bundle = bundle or self._registry.bundle(digest)
            labels = None if bundle.labels is None else self._labels(bundle.labels)
            routes = self._routes.select(name, digest, bundle)
            model = ServedModel(name, version, digest, bundle, labels, routes, self._redactor(bundle))
        with self._lock:
            # A number always means the same version, so that a request for a number need not wait for the registry.
            self._cache.setdefault(by_version, _NameEntry.now(model, self._refresh_s))
        return model
