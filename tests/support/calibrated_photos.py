"""The small model for photos, calibrated so that closer looks pay; photos and hops to plan and measure with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.arrays import Array
from isthmus.artifacts.choice import RAW, Choice
from isthmus.artifacts.fidelity import Entry, Fidelity, Measure, measure_for, offered
from isthmus.pipeline import HttpHop
from isthmus.processing.image_decoding import MAX_PIXELS
from isthmus.runtime.tables import Tables, tables_of
from isthmus_tools.calibration.calibrate import Calibrated, CalibrationSpec, calibrate
from isthmus_tools.calibration.inputs import list_files, open_source
from isthmus_tools.calibration.scoring import CodecSender, Transmission
from isthmus_tools.planner.inputs import TrialInput, from_photos
from support.bundles import Published, photo, publish_photos
from support.executors import executor_of

QUALITIES = (0.6, 0.8, 1.0)
_send = CodecSender.send


@dataclass(frozen=True)
class Known:
    """A calibrated version of the model, and the entry of its chain of two closer looks."""

    published: Published
    fidelity: Fidelity
    chain: Entry

    def table(self, name: str) -> object:
        """The table of a tensor."""
        registry = self.published.registry
        tables = Tables(registry.bundle, registry.blob, MAX_PIXELS)
        return tables_of(self.published.bundle, self.published.digest, "transform/4", tables)(name)


def calibrated(photos: Published, folder: Path, measure: Measure) -> Calibrated:
    """Calibrated with noisy photos of one colour each, most of which are clear and some are not."""
    data = folder / "data"
    data.mkdir()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        pixels = rng.uniform(-1, 1, (3, 1, 1)) + 0.2 * rng.standard_normal((3, 8, 8))
        np.save(data / f"{seed}.npy", np.clip(pixels, -1, 1)[None].astype(np.float32))
    choices = [RAW, Choice("int8/1"), *(Choice("transform/4", q) for q in QUALITIES)]
    return calibrate(
        executor_of(photos, folder),
        open_source(photos.bundle, list_files(data), "colours", 100),
        CalibrationSpec(["6"], 100, 0.97, measure, choices),
        folder,
    )


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("calibrated")
    photos = publish_photos(folder / "model")
    # Frames' headers of half a kB weigh more than this model's tensors; those of a model worth splitting do not.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CodecSender, "send", without_header)
        made = calibrated(photos, folder, measure_for(photos.bundle))
    version = photos.registry.publish(made.bundle, made.files, alias="prod")
    published = replace(photos, bundle=made.bundle, version=version.version, digest=version.digest)
    chain = next(e for e in offered(made.fidelity, "6") if len(e.looks) == 2)
    return Known(published, made.fidelity, chain)


def without_header(sender: CodecSender, tensors: Mapping[str, Array]) -> Transmission:
    sent = _send(sender, tensors)
    return replace(sent, frame_bytes=sent.payload_bytes)


def shown(known: Known) -> list[TrialInput]:
    return from_photos(known.published.bundle, [photo(seed=n) for n in range(1000, 1005)])


def remote(*urls: str) -> tuple[HttpHop, HttpHop]:
    head, tail = (HttpHop(u, attempts=1, connect_timeout_s=5, max_reply_bytes=2**20) for u in urls)
    return head, tail


def no_variant(digest: str) -> Any:
    raise AssertionError(digest)
