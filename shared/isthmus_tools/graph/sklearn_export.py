"""Export of fitted scikit-learn estimators and pipelines by skl2onnx.

A file is read by skops, which builds only types that it knows: a pickle or joblib file would be executed. The output of
a classifier is its probabilities, in the order of its `classes_`.

Source: onnx.ai/sklearn-onnx, skops.readthedocs.io/en/stable/persistence.html.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from isthmus.errors import ModelError
from isthmus_tools.graph.exporting import FactoryResult, ModelInputs, failures, missing_package, quiet, reason_of

# Opsets that onnxruntime runs and onnx checks.
_OPSETS = {"": 18, "ai.onnx.ml": 3}
_INPUT = "input"
# Plain state of a fitted network, which skops does not list as known.
_PLAIN_TYPES = {
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
}


def export(model: str, out: Path, inputs: ModelInputs) -> Path:
    """Write the estimator of a .skops file as ONNX, with a float32 input `input` of free rows.

    Raises:
        ModelError: skl2onnx or skops is missing, the file holds types that skops does not know, or the export failed.
    """
    try:
        import skops.io
    except ImportError as e:
        raise missing_package(model, "skops", "sklearn") from e
    with quiet():
        try:
            unknown = sorted(set(skops.io.get_untrusted_types(file=model)) - _PLAIN_TYPES)
            estimator = None if unknown else skops.io.load(model, trusted=sorted(_PLAIN_TYPES))
        except Exception as e:  # a zip file of JSON and arrays, each possibly broken
            raise ModelError(
                f"{model} cannot be read: {reason_of(e)}", spec=model, hint="write it with skops.io.dump"
            ) from e
    if unknown:
        raise ModelError(
            f"{model} holds types that are not known to be safe: {', '.join(unknown)[:300]}",
            spec=model,
            types=unknown,
            hint="give package.module:factory, a function of yours that loads and returns the estimator",
        )
    return convert(FactoryResult(model, estimator), out)


def is_estimator(value: Any) -> bool:
    """Whether a factory's result is scikit-learn's, without importing it."""
    base = sys.modules.get("sklearn.base")
    return base is not None and isinstance(value, base.BaseEstimator)


def convert(made: FactoryResult, out: Path) -> Path:
    """Write a fitted estimator as ONNX.

    Raises:
        ModelError: skl2onnx is missing, or cannot convert it.
    """
    try:
        import skl2onnx
        from skl2onnx.common.data_types import FloatTensorType
        from skl2onnx.helpers.onnx_helper import select_model_inputs_outputs
    except ImportError as e:
        raise missing_package(made.name, "skl2onnx", "sklearn") from e
    estimator = made.value
    features = getattr(estimator, "n_features_in_", None)
    if features is None:
        raise ModelError(f"{made.name} gives no fitted estimator of one table of numbers", spec=made.name)
    is_classifier = hasattr(estimator, "predict_proba")
    with quiet(), failures("skl2onnx", made.name):
        converted = skl2onnx.convert_sklearn(
            estimator,
            initial_types=[(_INPUT, FloatTensorType([None, features]))],
            # Probabilities as one tensor, not as a list of dictionaries.
            options={id(estimator): {"zipmap": False}} if is_classifier else None,
            target_opset=_OPSETS,
        )
        if is_classifier:
            # Labels may be texts, which no frame carries.
            probabilities = converted.graph.output[1]
            converted = select_model_inputs_outputs(converted, [probabilities.name])
            # The selection loses the output's type.
            converted.graph.output[0].CopyFrom(probabilities)
        converted.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
        out.write_bytes(converted.SerializeToString())
    return out
