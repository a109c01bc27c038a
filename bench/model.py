"""The real model that benchmarks run, and inputs for it."""

from __future__ import annotations

import contextlib
import sys

import numpy as np
from report import ROOT

from isthmus.arrays import Array
from isthmus.artifacts.segment_id import WHOLE
from isthmus.registry import Resolved, open_registry
from isthmus.settings import RegistrySettings
from isthmus.wire.frame import Frame, encode
from isthmus_tools.usecases.local_model import LocalModel
from isthmus_tools.usecases.model_import import ImportRequest
from isthmus_tools.usecases.model_import import import_model as import_use_case
from isthmus_tools.zoo.photos import sample_photos

MODEL = "efficientnet-lite0"
REGISTRY = ROOT / ".isthmus" / "registry"


def import_model() -> None:
    """Put the model in the registry if it is not there; takes half a minute then."""
    with contextlib.redirect_stdout(sys.stderr):
        import_use_case(ImportRequest(model=MODEL, registry=RegistrySettings(registry=str(REGISTRY)), if_absent=True))


def resolved() -> Resolved:
    """The model's version that the functions run."""
    return open_registry(RegistrySettings(registry=str(REGISTRY))).resolve(MODEL)


def whole() -> LocalModel:
    """The uncut model in this process, on one thread."""
    return LocalModel(MODEL, RegistrySettings(registry=str(REGISTRY)), WHOLE, threads=1)


def photos() -> list[bytes]:
    """Real photos, as files hold them."""
    return [path.read_bytes() for path in sample_photos()]


def head_frame() -> bytes:
    """A frame for the head of the default partition, with one photo."""
    found = resolved()
    name, array = whole().preprocess(photos()[0])
    return encode(Frame({name: array}, found.digest, found.bundle.partition()[0].id, "bench"))


def inputs(count: int) -> list[tuple[str, Array]]:
    """Different inputs of the model: the photos, then the photos under noise of a fixed seed."""
    model, rng = whole(), np.random.default_rng(0)
    clean = [model.preprocess(photo) for photo in photos()]
    found = list(clean)
    while len(found) < count:
        name, array = clean[len(found) % len(clean)]
        noise = np.asarray(rng.normal(0, 0.1, array.shape), array.dtype)
        found.append((name, array + noise))
    return found[:count]
