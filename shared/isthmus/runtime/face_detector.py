"""Face detectors of bundles in onnxruntime, and the redactor of a bundle's photos."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np

from isthmus.admission import current_deadline
from isthmus.arrays import Array
from isthmus.artifacts.bundle import Blob, Bundle
from isthmus.errors import DeadlineExceeded, RegistryError, RunFailed
from isthmus.processing.photo_redaction import PhotoRedactor
from isthmus.runtime.ort import ort, reason_of, time_limit

# Pixels of the side: activations grow with its square, and memory with these.
MIN_SIDE, MAX_SIDE = 64, 1024
# Of a run, for each pixel of the picture: measured with CenterFace at 320, 480 and 640 pixels, 131 to 161 bytes.
_PIXEL_BYTES = 256


class OrtFaceDetector:
    """See `FaceDetector`: a graph as `FaceBlur` describes it, in an onnxruntime session on the CPU."""

    def __init__(self, graph: bytes, threads: int) -> None:
        """Load the graph.

        Raises:
            RunFailed: onnxruntime refuses the graph, or its inputs and outputs are others.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        # Photos come seldom at a time: an arena would keep a run's memory for good.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except Exception as e:  # onnxruntime's own errors share no base but Exception
            raise RunFailed(f"the face detector cannot be loaded: {reason_of(e)}") from e
        inputs = [(i.name, i.type, i.shape) for i in self._session.get_inputs()]
        self.side = inputs[0][2][-1] if inputs and inputs[0][2] else 0
        expected = [("image", "tensor(float)", [1, 3, self.side, self.side])]
        outputs = {output.name for output in self._session.get_outputs()}
        if inputs != expected or not isinstance(self.side, int) or not {"boxes", "scores"} <= outputs:
            raise RunFailed(
                "the face detector has other inputs or outputs than image, float32[1, 3, side, side], to boxes and"
                " scores"
            )
        if not MIN_SIDE <= self.side <= MAX_SIDE:
            raise RunFailed(f"the face detector takes {self.side} pixels a side; {MIN_SIDE} to {MAX_SIDE} are taken")

    @property
    def working_bytes(self) -> int:
        """See `FaceDetector`."""
        return _PIXEL_BYTES * self.side**2

    def boxes(self, picture: Array) -> tuple[Array, Array]:
        """See `FaceDetector`."""
        deadline = current_deadline()
        try:
            with nullcontext() if deadline is None else time_limit(max(0.001, deadline.remaining())) as options:
                boxes, scores = self._session.run(["boxes", "scores"], {"image": picture}, options)
        except TimeoutError as e:
            raise DeadlineExceeded("the deadline passed while faces were looked for") from e
        except Exception as e:  # onnxruntime's own errors share no base but Exception
            raise RunFailed(f"the face detector failed: {reason_of(e)}") from e
        if boxes.shape != (len(scores), 4) or scores.ndim != 1 or not np.isfinite(scores).all():
            raise RunFailed(f"the face detector made boxes {list(boxes.shape)} and scores {list(scores.shape)}")
        # A box without end would reach every pixel, which is what its numbers say.
        return np.nan_to_num(boxes, posinf=1e6, neginf=-1e6), scores


def redactor_of(bundle: Bundle, blob: Callable[[Blob], bytes], threads: int = 1) -> PhotoRedactor | None:
    """The redactor of a bundle's photos, its detector read by `blob`; None for a bundle that redacts none.

    Raises:
        RegistryError: the detector cannot be read or loaded.
    """
    redaction = bundle.redaction
    if redaction is None or not redaction.of_photos:
        return None
    if redaction.faces is None:
        return PhotoRedactor(redaction)
    try:
        return PhotoRedactor(redaction, OrtFaceDetector(blob(redaction.faces.detector), threads))
    except RunFailed as e:
        raise RegistryError(f"bundle {bundle.name}: {e.message}", blob=redaction.faces.detector.digest) from e
