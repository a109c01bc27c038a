"""The uncut model of bench/load.py behind LitServe; serves until SIGTERM.

Run by bench/load.py as `litserve_load.py PORT WHOLE SHAPE`, in the environment of requirements-litserve.txt. POST
/predict takes JSON with a float32 tensor's bytes in base64, the densest form that LitServe passes to its workers, and
gives the output's bytes. Two workers with a thread each.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any, cast

import litserve  # type: ignore[import-not-found]
import numpy as np
from fastapi import Response  # type: ignore[import-not-found]
from sessions import open_session


class UncutLit(cast(type, litserve.LitAPI)):  # type: ignore[misc]
    """The whole model in one session."""

    def __init__(self, path: str, shape: list[int]) -> None:
        super().__init__()
        self._path, self._shape = path, shape

    def setup(self, device: Any) -> None:
        """Open the session, in the worker's process."""
        self._session = open_session(self._path, 1)
        self._name = self._session.get_inputs()[0].name

    def decode_request(self, request: dict[str, str]) -> Any:
        """The tensor of a request."""
        return np.frombuffer(base64.b64decode(request["tensor"]), np.float32).reshape(self._shape)

    def predict(self, x: Any) -> Any:
        """The model's only output."""
        return self._session.run(None, {self._name: x})[0]

    def encode_response(self, output: Any) -> Response:
        """The output's bytes."""
        return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    port, path, shape = sys.argv[1:]
    server = litserve.LitServer(UncutLit(path, json.loads(shape)), accelerator="cpu", workers_per_device=2)
    server.run(host="127.0.0.1", port=int(port), log_level="error", generate_client_file=False)
