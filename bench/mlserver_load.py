"""The uncut model of bench/load.py as a runtime of MLServer.

MLServer has none for ONNX. bench/load.py writes its settings files and starts it in the environment of
requirements-mlserver.txt. Requests are of the Open Inference Protocol with the tensor's bytes in base64: MLServer takes
no binary data over HTTP, and numbers as JSON would take it longer. Two workers with a thread each.
"""

from __future__ import annotations

import base64
from typing import Any, cast

import mlserver  # type: ignore[import-not-found]
import numpy as np
from mlserver import types
from sessions import open_session


class UncutRuntime(cast(type, mlserver.MLModel)):  # type: ignore[misc]
    """The whole model in one session; the settings' parameters hold its path and its input's shape."""

    async def load(self) -> bool:
        """Open the session, in the worker's process."""
        extra = self.settings.parameters.extra
        self._session, self._shape = open_session(extra["path"], 1), extra["shape"]
        self._name = self._session.get_inputs()[0].name
        return True

    async def predict(self, payload: Any) -> Any:
        """The model's only output, as base64."""
        text = payload.inputs[0].data.root[0]
        x = np.frombuffer(base64.b64decode(text), np.float32).reshape(self._shape)
        (output,) = self._session.run(None, {self._name: x})
        data = [base64.b64encode(output.tobytes()).decode()]
        outputs = [types.ResponseOutput(name="output", shape=[1], datatype="BYTES", data=data)]
        return types.InferenceResponse(model_name=self.name, outputs=outputs)
