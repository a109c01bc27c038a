"""The segment app: a frame in, the segment that it names, a frame out. edge-head and cloud-tail are both this."""

from __future__ import annotations

import time
from functools import partial

from flask import Flask

from isthmus.context import Deadline
from isthmus.processing.image_budget import ImageMemory
from isthmus.registry import BakedSegment, open_registry, open_source
from isthmus.runtime.store import SegmentStore
from isthmus.runtime.tables import Tables
from isthmus.serving.app import FunctionApp
from isthmus.serving.intake import accept, decoding
from isthmus.serving.memory import Turns
from isthmus.serving.preload import MAX_LOAD_S, parse, preload
from isthmus.serving.profiling import Profiling
from isthmus.serving.work import Reply, Work
from isthmus.settings import SegmentSettings
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame


def create_segment_app(settings: SegmentSettings) -> Flask:
    """The app of a function that runs segments. It loads `settings.preload` in the background.

    Raises:
        SettingsError: a setting that only building can judge, such as an execution provider that is not there.
    """
    app = _SegmentApp(settings)
    app.readiness.start()
    return app.flask


class _SegmentApp(FunctionApp):
    def __init__(self, settings: SegmentSettings) -> None:
        for entry in settings.preload:
            parse(entry)
        self._registry = None if settings.segment_dir else open_registry(settings)
        self._source = open_source(settings, self._registry)
        self._store = SegmentStore(self._source, settings)
        self._turns = Turns(self._store.device.cpus)
        images = ImageMemory(settings.image_memory_bytes)
        self._tables = Tables(self._source.bundle, self._source.blob, settings.max_image_pixels, images)
        super().__init__("segment", settings, self._prepare)
        self.closing.callback(self._store.close)
        self.closing.callback(self._tables.close)
        self.metrics.gauge_store(self._store)
        self.work("/", self.run, "run")
        Profiling(self._store, settings, self._tables, self._turns).serve_on(self)

    def run(self, work: Work) -> Reply:
        """Run the segment that the frame names, on its tensors."""
        start = time.perf_counter()
        frame = frames.decode(
            work.body,
            max_bytes=self._settings.max_request_bytes,
            tables=self._tables,
            accept=partial(accept, self._store, work),
            during=partial(decoding, self._turns, work),
        )
        work.timings.add("decode", time.perf_counter() - start)
        ran = self._store.run(frame.bundle, frame.segment, frame.tensors, work.context.deadline)
        work.timings.add("load", ran.load_s)
        work.timings.add("wait", ran.wait_s)
        work.timings.add("run", ran.run_s)
        start = time.perf_counter()
        body = frames.encode_parts(Frame(ran.outputs, frame.bundle, frame.segment, frame.request))
        work.timings.add("encode", time.perf_counter() - start)
        return Reply(body, {"Content-Type": frames.CONTENT_TYPE})

    def _prepare(self) -> None:
        if isinstance(self._source, BakedSegment):
            self._store.runner(self._source.digest, self._source.segment_id, Deadline.after(MAX_LOAD_S))
        if self._registry is not None:
            preload(self._settings.preload, self._registry, self._store)
