"""A model in this process: the same bundle, segments and pipeline as the functions', without HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isthmus.arrays import Array
from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Context
from isthmus.errors import MediaUnsupported
from isthmus.pipeline import LocalHop, Result, Route, execute, plan_route
from isthmus.processing.classify import classify, parse_labels
from isthmus.processing.image import MAX_PIXELS, preprocess
from isthmus.registry import open_cache, open_registry
from isthmus.runtime.store import SegmentStore
from isthmus_tools.cli.console import segment_settings


class Here:
    """The model that `reference` names, run by this process.

    `cuts` say a partition (docs/cuts.md); empty takes the bundle's, and `..` the uncut model.

    Raises:
        RegistryError: no such model, version or cut.
    """

    def __init__(self, registry: str, reference: str, cuts: str = "", *, threads: int = 0) -> None:
        settings = segment_settings(registry, threads=threads)
        self._registry = open_registry(settings)
        self.model = self._registry.resolve(reference or _only(self._registry.models()))
        store = SegmentStore(open_cache(settings, self._registry), settings)
        bundle, hop = self.model.bundle, LocalHop(store)
        if cuts == WHOLE:
            self._route = Route(self.model.digest, bundle, (bundle.segment(WHOLE),), (hop,))
        else:
            self._route = plan_route(self.model.digest, bundle, (hop,), cuts or None)

    def preprocess(self, photo: bytes) -> tuple[str, Array]:
        """The input's name and the array that the bundle makes of `photo`.

        Raises:
            MediaUnsupported: the bundle declares no pre-processing.
        """
        bundle = self.model.bundle
        if bundle.preprocess is None or bundle.postprocess is None:
            raise MediaUnsupported(f"{bundle.name} declares no processing of photos; give it tensors")
        taken = next(s for s in bundle.inputs if s.name == bundle.preprocess["input"])
        return taken.name, preprocess(photo, bundle.preprocess, input=taken, max_pixels=MAX_PIXELS)

    def classes(self, outputs: Mapping[str, Array], top_k: int | None = None) -> list[dict[str, Any]]:
        """The classes that the bundle reads from the outputs of one photo."""
        after = self.model.bundle.postprocess or {}
        blob = self.model.bundle.labels
        labels = None if blob is None else parse_labels(self._registry.blob(blob))
        return classify(outputs[after["output"]], after, labels, top_k)[0]

    def run(self, arrays: Mapping[str, Array], timeout_s: float = 60.0) -> Result:
        """The outputs, and what each segment took."""
        return execute(self._route, arrays, Context.from_headers({}, longest_s=timeout_s))

    def photo(self, photo: bytes, top_k: int | None, timeout_s: float) -> dict[str, Any]:
        """What the router would answer to `photo`."""
        name, array = self.preprocess(photo)
        result = self.run({name: array}, timeout_s)
        return {
            "model_name": self.model.name,
            "model_version": self.model.version,
            "classes": self.classes(result.outputs, top_k),
            "route": {
                **result.sizes(),
                "photo_bytes": len(photo),
                "input_bytes": array.nbytes,
                "segments": [stage.document() for stage in result.runs],
            },
        }

    def infer(self, arrays: Mapping[str, Array], timeout_s: float) -> tuple[dict[str, Array], dict[str, Any]]:
        """The outputs, and the route's facts as the router gives them."""
        result = self.run(arrays, timeout_s)
        return result.outputs, result.facts()


def _only(models: list[str]) -> str:
    return models[0] if len(models) == 1 else "efficientnet-lite0"
