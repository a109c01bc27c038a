"""A bundle's model in this process: the functions' segments and pipeline, without HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from isthmus.arrays import Array
from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Context
from isthmus.errors import MediaUnsupported
from isthmus.pipeline import LocalHop, Result, execute, local_route, plan_route
from isthmus.pipeline.occlusion import PADDING_ID, OcclusionRequest, class_scores, occlude
from isthmus.processing.classify import class_index, classify
from isthmus.processing.classify_spec import parse_labels
from isthmus.processing.image import model_input, seen_part
from isthmus.processing.photo_redaction import PhotoRedactor
from isthmus.registry import open_cache, open_registry
from isthmus.runtime.face_detector import redactor_of
from isthmus.runtime.store import SegmentStore
from isthmus.settings import RegistrySettings, SegmentSettings


class LocalModel:
    """A model of the registry, NAME or NAME:VERSION, run by this process.

    `cuts` is a partition as text (docs/explanation/cuts.md): empty for the bundle's own, `..` for the uncut model.
    `threads` of one run; 0 for the CPUs available.

    Raises:
        RegistryError: unknown model, version or cut.
    """

    def __init__(self, model: str, registry: RegistrySettings, cuts: str = "", *, threads: int = 0) -> None:
        settings = SegmentSettings(**vars(registry), threads=threads)
        self._registry = open_registry(settings)
        self.model = self._registry.resolve(model)
        bundle, hop = self.model.bundle, LocalHop(SegmentStore(open_cache(settings, self._registry), settings))
        # `..` is a segment and no cut, so `plan_route` cannot read the text as a partition.
        if cuts == WHOLE:
            self._route = local_route(self.model.digest, bundle, (bundle.segment(WHOLE),), hop)
        else:
            self._route = plan_route(self.model.digest, bundle, (hop,), cuts or None)

    def preprocess(self, photo: bytes) -> dict[str, Array]:
        """The model's input by name, made of a photo's file.

        Raises:
            MediaUnsupported: the bundle declares no pre-processing.
            ImageMalformed: the bytes are no image.
        """
        return model_input(self.model.bundle, photo, redactor=self._redactor)

    def classes(self, outputs: Mapping[str, Array], top_k: int | None = None) -> list[dict[str, Any]]:
        """The classes of a photo's outputs, likeliest first: label, index and probability of each."""
        after = self.model.bundle.postprocess or {}
        return classify(outputs[after["output"]], after, self._labels, top_k)[0]

    @cached_property
    def _labels(self) -> tuple[str, ...] | None:
        blob = self.model.bundle.labels
        return None if blob is None else parse_labels(self._registry.blob(blob))

    @cached_property
    def _redactor(self) -> PhotoRedactor | None:
        return redactor_of(self.model.bundle, self._registry.blob)

    def run(self, arrays: Mapping[str, Array], timeout_s: float = 60.0) -> Result:
        """The outputs by name, and the run of each segment.

        Raises:
            ShapeMismatch: the arrays do not fit the model's inputs.
            HopTimeout: the run took longer than timeout_s.
        """
        # A request without headers: its deadline is this call's time limit.
        return execute(self._route, arrays, Context.from_headers({}, longest_s=timeout_s))

    def explain(
        self,
        inputs: bytes | Mapping[str, Array],
        *,
        class_name: str = "",
        grid: int = 0,
        output: str = "",
        hidden_id: int = PADDING_ID,
        timeout_s: float = 60.0,
    ) -> dict[str, Any]:
        """Which parts of a photo's file, or of tensors, decided: the document that a router responds with.

        Raises:
            RequestMalformed: unknown class, output or grid.
            ShapeMismatch: the model's output is no table of classes, or its inputs are neither a picture nor tokens.
            As `preprocess` and `run`.
        """
        arrays = self.preprocess(inputs) if isinstance(inputs, bytes) else inputs
        bundle, context = self.model.bundle, Context.from_headers({}, longest_s=timeout_s)
        index = class_index(class_name, self._labels) if class_name else None
        request = OcclusionRequest(class_scores(bundle, output), index, grid, hidden_id=hidden_id)
        result = occlude(
            self._route, arrays, request, lambda route, each: execute(route, each, context), context.deadline
        )
        document = result.document(self._labels)
        if isinstance(inputs, bytes):
            document["explanation"]["part"] = seen_part(inputs, bundle.preprocess or {})
        hidden_s = sum(run.total_s for each in result.runs for run in each.runs)
        return {
            "model_name": self.model.name,
            "model_version": self.model.version,
            **document,
            "route": {
                "link_bytes": result.link_bytes,
                "segments": [stage.document() for stage in result.base.runs],
            },
            "timings_ms": {"hidden": round(hidden_s * 1000, 3)},
        }

    def photo(self, photo: bytes, top_k: int | None = None, timeout_s: float = 60.0) -> dict[str, Any]:
        """The document that a router responds to a photo with.

        Raises:
            MediaUnsupported: the bundle declares no post-processing.
            As `preprocess` and `run`.
        """
        if self.model.bundle.postprocess is None:
            raise MediaUnsupported(f"{self.model.name} declares no post-processing to classes; give it tensors")
        arrays = self.preprocess(photo)
        result = self.run(arrays, timeout_s)
        return {
            "model_name": self.model.name,
            "model_version": self.model.version,
            "classes": self.classes(result.outputs, top_k),
            "route": {
                **result.sizes(),
                "photo_bytes": len(photo),
                "input_bytes": sum(array.nbytes for array in arrays.values()),
                "segments": [stage.document() for stage in result.runs],
            },
        }
