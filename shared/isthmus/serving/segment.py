"""The segment app: a frame in, the segment named by the frame, a frame out: edge-head and cloud-tail."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, TypeVar

import msgspec
from flask import Flask, Response

from isthmus.admission import Turns, describe_work
from isthmus.artifacts.bundle import is_digest
from isthmus.artifacts.tensors import check_types
from isthmus.errors import BundleMismatch, RegistryMissing, RegistryUnavailable, RequestMalformed, RequestTooLarge
from isthmus.processing.image_budget import ImageMemory
from isthmus.registry import BakedSegment, open_registry, open_source
from isthmus.runtime.session_store import bytes_per_token, open_store
from isthmus.runtime.tables import Tables
from isthmus.serving.app import FunctionApp
from isthmus.serving.preload import load_deadline, parse_entry, preload
from isthmus.serving.profiling import Profiling
from isthmus.serving.protected_routes import needs_with, open_protection, protected
from isthmus.serving.request import FunctionRequest
from isthmus.settings import SegmentSettings
from isthmus.wire import frame as frames

# A digest, and a segment's id of two cuts by name; or a session's name.
MAX_LOAD_BODY_BYTES = 8192
# Bundles that a refusal names.
_MAX_NAMED = 8
_Body = TypeVar("_Body")


def create_segment_app(settings: SegmentSettings) -> Flask:
    """The app of a function that runs segments. `settings.preload` is loaded in the background.

    Raises:
        SettingsError: a setting that cannot be used, such as an execution provider that is not there.
    """
    app = _SegmentApp(settings)
    app.readiness.start()
    return app.flask


class LoadBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /load`."""

    bundle: str
    segment: str


class EndBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /sessions/end`."""

    session: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class _SegmentApp(FunctionApp):
    def __init__(self, settings: SegmentSettings) -> None:
        # A malformed entry ends the start. In the background it would be tried again for good.
        for entry in settings.preload:
            parse_entry(entry)
        self._registry = None if settings.segment_dir else open_registry(settings)
        self._source = open_source(settings, self._registry)
        self._sessions = open_store(self._source, settings)
        self._store = self._sessions.store
        # More decodings at a time than CPUs would take more memory and no less time.
        self._turns = Turns(self._store.device.cpus)
        images = ImageMemory(settings.image_memory_bytes)
        self._tables = Tables(self._source.bundle, self._source.blob, settings.max_image_pixels, images)
        protection = open_protection(settings)
        super().__init__("segment", settings, self._prepare, needs_with(protection))
        self._preload = settings.preload
        self.closing.callback(self._store.close)
        self.closing.callback(self._tables.close)
        self.metrics.gauge_store(self._sessions)
        self._store.share_memory(self._memory)
        self.slots.keep_at_least(self._sessions.room_for_batches)
        protect = partial(protected, protection)
        self.post("/", protect("/", self.run), "run")
        self.post("/load", protect("/load", self.load), "load")
        self.post("/sessions/end", protect("/sessions/end", self.end_session), "end_session")
        Profiling(self._store, settings, self._decode).serve_on(self)

    def run(self, request: FunctionRequest) -> Response:
        """Run the segment that the frame names, on its tensors."""
        start = time.perf_counter()
        frame = self._decode(request)
        request.facts.update(bundle=frame.bundle, segment=frame.segment)
        request.timings.add("decode", time.perf_counter() - start)
        # Steps of one token and chunks of a prompt are different work: the adaptive limit compares like with like.
        describe_work(f"{frame.bundle} {frame.segment} {frame.step_tokens.bit_length() or ''}".rstrip())
        with self._other_bundles(frame.bundle):
            ran = self._sessions.run_frame(frame, request.context.deadline)
        request.timings.add("load", ran.load_s)
        request.timings.add("wait", ran.wait_s)
        request.timings.add("run", ran.run_s, f"batch-of-{ran.batch}" if ran.batch > 1 else "")
        start = time.perf_counter()
        body = frames.encode(frames.Frame(ran.outputs, frame.bundle, frame.segment, frame.request))
        request.timings.add("encode", time.perf_counter() - start)
        return Response(body, content_type=frames.CONTENT_TYPE)

    def load(self, request: FunctionRequest) -> Response:
        """Load a segment in the background, ahead of requests: 200 once it is in memory, 202 until then."""
        wanted = _parsed(request.body, LoadBody, '{"bundle": DIGEST, "segment": ID}')
        if not is_digest(wanted.bundle):
            raise RequestMalformed(
                f"the body names bundle {wanted.bundle[:80]!r}; a bundle is a manifest's sha256 digest"
            )
        with self._other_bundles(wanted.bundle):
            is_loaded = self._store.load(wanted.bundle, wanted.segment, request.context.deadline)
        state = {"bundle": wanted.bundle, "segment": wanted.segment, "state": "loaded" if is_loaded else "loading"}
        return Response(msgspec.json.encode(state), 200 if is_loaded else 202, mimetype="application/json")

    @contextmanager
    def _other_bundles(self, wanted: str) -> Iterator[None]:
        """Refuse a bundle that the registry does not give at present, where others are in memory and can be served.

        Raises:
            BundleMismatch: in place of the registry's error. The router asks its own registry anew, and does not take
                this function to be down.
        """
        try:
            yield
        except (RegistryUnavailable, RegistryMissing) as e:
            has = sorted({loaded.bundle for loaded in self._store.loaded()})
            if not has or wanted in has:
                raise
            raise BundleMismatch(
                f"this function holds other bundles, and its registry does not give {wanted}: {e.message}",
                has=has[:_MAX_NAMED],
                wanted=wanted,
                hint=e.hint,
            ) from e

    def end_session(self, request: FunctionRequest) -> Response:
        """Forget a session in every segment: 200, also where no segment has it."""
        ended = _parsed(request.body, EndBody, '{"session": NAME}')
        self._sessions.end_session(ended.session)
        return Response(msgspec.json.encode(ended), mimetype="application/json")

    def _decode(self, request: FunctionRequest) -> frames.Frame:
        return frames.decode(
            request.body,
            max_bytes=self._settings.max_request_bytes,
            tables=self._tables,
            accept=partial(self._accept, request),
            during=partial(self._decoding, request),
        )

    def _accept(self, request: FunctionRequest, outline: frames.Outline) -> None:
        """Refuse a frame whose tensors its segment does not take, before their memory is allocated.

        The outputs of a step are reserved until the response.

        Raises:
            RequestMalformed: the frame names no bundle's digest, or an exit of a segment that has none.
            BundleMismatch: the function holds other bundles, and cannot have this one.
            Missing, RegistryError, NotReady: as `SegmentStore.segment`.
            ShapeMismatch: a tensor is missing, unknown, or of another dtype or shape.
        """
        if not is_digest(outline.bundle):
            raise RequestMalformed(f"the frame names bundle {outline.bundle!r}; a bundle is a manifest's sha256 digest")
        with self._other_bundles(outline.bundle):
            segment = self._store.segment(outline.bundle, outline.segment, request.context.deadline)
            if outline.exit is not None:
                self._store.exit_branch(outline.bundle, outline.segment, request.context.deadline)
        if outline.step is None:
            check_types(segment.inputs, outline.tensors)
        else:
            bundle = self._store.bundle(outline.bundle, outline.segment, request.context.deadline)
            check_types(bundle.carried(segment.inputs), outline.tensors)
            # The scores of a vocabulary are a hundred times a token's hidden state. Twice: the frame is a copy.
            sampling = outline.step.sampling
            tokens = max((shape[1] for _, shape in outline.tensors.values() if len(shape) > 1), default=0)
            tokens = tokens if sampling is None else min(tokens, sampling.last)
            request.memory.hold(2 * tokens * bytes_per_token(bundle.carried(segment.outputs)))

    @contextmanager
    def _decoding(self, request: FunctionRequest, outline: frames.Outline) -> Iterator[None]:
        """Reserve the working memory of decoding for its duration, and that of the tensors until the response.

        Raises:
            DeadlineExceeded: other frames were decoded until the deadline.
            Overloaded, RequestTooLarge: there is no memory to decode the frame, now or ever.
        """
        request.memory.hold(outline.decoded_bytes)
        if not outline.working_bytes:  # pictures wait for memory of their own
            yield
            return
        with self._turns.one(request.context.deadline), request.memory.scope():
            request.memory.hold(outline.working_bytes)
            yield

    def _prepare(self) -> None:
        if isinstance(self._source, BakedSegment):
            # The only segment that this function can serve, and the exit behind it.
            self._store.runner(self._source.digest, self._source.segment_id, load_deadline())
            if (branch := self._source.branch) is not None:
                self._store.runner(self._source.digest, branch.id, load_deadline())
        if self._registry is not None:
            preload(self._preload, self._registry, self._store)


def _parsed(body: bytes | memoryview, kind: type[_Body], form: str) -> _Body:
    """A short body of JSON.

    Raises:
        RequestTooLarge: longer than any body of that kind.
        RequestMalformed: not that JSON.
    """
    if len(body) > MAX_LOAD_BODY_BYTES:
        raise RequestTooLarge(
            f"the body has {len(body)} bytes; at most {MAX_LOAD_BODY_BYTES} are taken", limit=MAX_LOAD_BODY_BYTES
        )
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as e:
        raise RequestMalformed(f"the body is {form} as JSON: {e}") from e
