"""What a command can start from: an ONNX file, a torch model, or a model of the zoo."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus_tools.cli.shapes import InputsGiven
from isthmus_tools.graph import torch_export
from isthmus_tools.progress import Progress
from isthmus_tools.zoo import models as zoo


@contextmanager
def onnx_file(model: str, given: InputsGiven, step: Progress) -> Iterator[Path]:
    """The ONNX file of `model`, exported for as long as the block lasts where it is no file itself.

    Raises:
        ModelError: a torch model that cannot be exported.
    """
    if model not in zoo.ENTRIES and not torch_export.is_torch_spec(model):
        yield Path(model)
        return
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        path = Path(folder) / "model.onnx"
        step(f"exporting {model} from torch")
        if model in zoo.ENTRIES:
            zoo.entry(model).write(path)
        else:
            torch_export.export_named(model, path, shapes=given.shapes, examples=given.examples, free=given.free)
        # The module and its program hold each other, and weights as large as the file with them.
        gc.collect()
        yield path
