"""The segments of one bundle in this process, to try candidates with: what they pack to, and what their answers are."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.segment_id import WHOLE
from isthmus.registry.cache import SegmentCache
from isthmus.runtime.ort_runner import OrtRunner, Runner

_WEIGHTS = "weights.bin"


class Workbench:
    """Runs the segments of `bundle`, whose new graphs lie in `files` and whose older ones in the cache under `digest`.

    Sessions are kept until `forget`: a candidate's two are needed together, all of them would fill the memory.
    """

    def __init__(
        self, bundle: Bundle, digest: str, files: Mapping[str, Path], cache: SegmentCache, *, threads: int = 1
    ) -> None:
        self._bundle, self._digest, self._files = bundle, digest, files
        self._cache, self._threads = cache, threads
        self._runners: dict[str, Runner] = {}
        self._held = contextlib.ExitStack()

    def run(self, segment: Segment, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The segment's outputs.

        Raises:
            RunFailed, ShapeMismatch: as `Runner.run`.
        """
        if (runner := self._runners.get(segment.id)) is None:
            runner = self._runners[segment.id] = OrtRunner(
                self._path(segment), segment, providers=("CPUExecutionProvider",), threads=self._threads
            )
        return runner.run(arrays)

    def forget(self) -> None:
        """Let all sessions go but the whole model's."""
        self._runners = {name: runner for name, runner in self._runners.items() if name == WHOLE}
        self._held.close()

    def _path(self, segment: Segment) -> Path:
        if (path := self._files.get(segment.graph.digest)) is not None:
            return path
        located = self._cache.locate(self._digest, segment.id)
        self._held.callback(located.release)
        return located.path


@contextlib.contextmanager
def beside_weights(folder: Path, whole: Path) -> Iterator[Path]:
    """`folder`, with the weights of the uncut model at `whole` beside the graphs in it, for as long as the block lasts.

    As a second name of the file: onnxruntime follows no links out of a model's folder.
    """
    weights, there = whole.parent / _WEIGHTS, folder / _WEIGHTS
    if weights.exists():
        try:
            os.link(weights, there)
        except OSError:  # another file system
            shutil.copyfile(weights, there)
    try:
        yield folder
    finally:
        there.unlink(missing_ok=True)
