"""The setting `draft`: a further language model whose tokens are proposed at the edge, on the router's first hop."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Context, Deadline
from isthmus.errors import HopError, ModelError, SettingsError
from isthmus.generation.draft_model import DraftModel, check_vocabulary
from isthmus.generation.request import GenerationRequest
from isthmus.pipeline import Hop, Route, plan_route
from isthmus.pipeline.hop import SegmentLoader
from isthmus.registry import Registry
from isthmus.routing import ServedModel

if TYPE_CHECKING:  # a router with remote hops alone never loads onnxruntime
    from isthmus.runtime.store import SegmentStore


class Drafts:
    """Gives generations the draft model that `reference` names, which runs whole on `hop`.

    Its version is the one at the start: drafts of another would say nothing of the speed that was planned.
    """

    def __init__(self, reference: str, registry: Registry, hop: Hop) -> None:
        self._reference, self._registry, self._hop = reference, registry, hop
        self._lock = threading.Lock()
        self._route: Route | None = None
        self._fits: dict[str, bool] = {}

    def prepare(self, model: ServedModel, store: SegmentStore | None, deadline: Deadline) -> None:
        """Find the draft model, judge it by the default model, and have it loaded: in `store`, or by the hop.

        Raises:
            SettingsError: no language model, or one with another vocabulary.
            RegistryError, SegmentError: it cannot be read or loaded.
        """
        found = self._registry.resolve(self._reference)
        try:
            self._check(model.bundle, found.bundle)
        except ModelError as e:
            raise SettingsError(
                f"the setting draft: {e.message}", hint=e.hint, variable="draft", value=self._reference
            ) from e
        if store is not None:
            store.runner(found.digest, WHOLE, deadline)
        elif isinstance(self._hop, SegmentLoader):
            # A hop that is away loads it with the first draft.
            with contextlib.suppress(HopError):
                self._hop.load(found.digest, str(WHOLE), deadline)
        self._fits[model.digest] = True
        self._route = plan_route(found.digest, found.bundle, (self._hop,), ())

    def of(self, model: ServedModel, request: GenerationRequest, context: Context) -> DraftModel | None:
        """The draft model for one generation; None for a model with another vocabulary."""
        if self._route is None or not self._suits(model, self._route.bundle):
            return None
        tokens = len(request.prompt) + request.max_tokens
        # Nobody waits for a draft: without it the model itself goes on.
        return DraftModel(self._route, tokens, replace(context, waits=False))

    def _suits(self, model: ServedModel, draft: Bundle) -> bool:
        with self._lock:
            if model.digest not in self._fits:
                try:
                    self._check(model.bundle, draft)
                    self._fits[model.digest] = True
                except ModelError:
                    self._fits[model.digest] = False
            return self._fits[model.digest]

    def _check(self, bundle: Bundle, draft: Bundle) -> None:
        if bundle.text is None:
            raise ModelError(f"{bundle.name} generates no text, and so needs no drafts")
        if draft.text is None or draft.state is None:
            raise ModelError(f"{draft.name} is no language model", hint="set draft to a model with the same tokenizer")
        check_vocabulary(
            bundle, self._registry.blob(bundle.text.tokenizer), draft, self._registry.blob(draft.text.tokenizer)
        )
