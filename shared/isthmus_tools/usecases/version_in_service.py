"""The version of a model that an alias means, as the opponent of a newly trained version: classes and predictions."""

from __future__ import annotations

import contextlib

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import LearningError, Missing, ShapeMismatch
from isthmus.processing.classify_spec import parse_labels
from isthmus.registry import Registry, Resolved
from isthmus.settings import RegistrySettings
from isthmus_tools.learning.training.evaluation import PairedComparison, compare
from isthmus_tools.learning.training.samples import PreparedData
from isthmus_tools.usecases.local_model import LocalModel

# Rows of a run of the model: bounds the memory of a comparison.
_ROWS = 256


class VersionInService:
    """The version `model`, with its classes: empty where the bundle names none."""

    def __init__(self, registry: Registry, model: Resolved) -> None:
        self._model = model
        blob = model.bundle.labels
        self.labels = () if blob is None else parse_labels(registry.blob(blob))

    @property
    def version(self) -> str:
        return self._model.version

    def check_labels(self, labels: set[str]) -> None:
        """Check that the data has the classes of this version, before hours of training.

        Raises:
            LearningError: other classes: the two versions cannot be compared.
        """
        # A bundle without names is compared by the number of its scores.
        if self.labels and set(self.labels) != labels:
            raise LearningError(
                f"the data has the labels {', '.join(sorted(labels))}, and version {self.version} of"
                f" {self._model.name}, which is in service, has {', '.join(self.labels)}",
                labels=sorted(labels),
                served=list(self.labels),
                hint="another name, or --promote always (or never), which compare nothing",
            )

    def compared_with(
        self, predicted: Array, data: PreparedData, metric: str, registry: RegistrySettings
    ) -> PairedComparison:
        """The comparison of a new version's predictions of the held-out part with this version's.

        Raises:
            ShapeMismatch: this version takes other inputs, or gives other scores.
        """
        labels, groups = data.test.labels, data.test.groups
        own = self._predictions(data, registry)
        return compare(predicted, own, labels, groups, len(data.classes), metric, self.version)

    def _predictions(self, data: PreparedData, registry: RegistrySettings) -> Array:
        """Predictions of the held-out part, as indices of the new version's classes."""
        bundle = self._model.bundle
        # One thread: the same sums in the same order as in the evaluation of the new version.
        model = LocalModel(f"{self._model.name}:{self.version}", registry, threads=1)
        output = str((bundle.postprocess or {}).get("output") or bundle.outputs[0].name)
        spec, inputs = bundle.inputs[0], data.test.inputs
        # A model whose batch is fixed runs row by row.
        rows = 1 if spec.shape[:1] == (1,) else _ROWS
        scores = [model.run({spec.name: inputs[at : at + rows]}).outputs[output] for at in range(0, len(inputs), rows)]
        # The order of classes may have changed.
        order = [data.classes.index(label) for label in self.labels or data.classes]
        table = np.concatenate(scores)
        if table.shape != (len(inputs), len(order)):
            raise ShapeMismatch(f"{output} is {list(table.shape)}, and there are {len(order)} classes")
        predicted: Array = np.array(order)[table.argmax(1)]
        return predicted


def version_in_service(registry: Registry, name: str, alias: str) -> VersionInService | None:
    """The version that the alias means; None where there is no such model or alias.

    Raises:
        RegistryError: the registry cannot be read.
    """
    if alias:
        with contextlib.suppress(Missing):
            return VersionInService(registry, registry.resolve(f"{name}:{alias}"))
    return None
