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
from isthmus_tools.cli.here import Here
from isthmus_tools.cli.importing import publish_if_absent
from isthmus_tools.zoo.photos import sample_photos

MODEL = "efficientnet-lite0"
REGISTRY = ROOT / ".isthmus" / "registry"


def import_model() -> None:
    """Put the model in the registry if it is not there; takes half a minute then."""
    with contextlib.redirect_stdout(sys.stderr):
        publish_if_absent(MODEL, str(REGISTRY), quiet=True)


def resolved() -> Resolved:
    """The model's version that the functions run."""
    return open_registry(RegistrySettings(registry=str(REGISTRY))).resolve(MODEL)


def whole() -> Here:
    """The uncut model in this process, on one thread."""
    return Here(str(REGISTRY), MODEL, WHOLE, threads=1)


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
