"""Responses of completions: one document, or server-sent events while tokens come."""

from __future__ import annotations

import logging
import queue
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import msgspec
from flask import Response
from msgspec import Struct

from isthmus.context import Abandonment
from isthmus.errors import IsthmusError, http_status
from isthmus.generation.completion import CompletionText, TextPiece
from isthmus.generation.request import GenerationRequest
from isthmus.generation.text import TextCodec
from isthmus.routing import DEGRADED_HEADER, ROUTE_HEADER, RouteCandidate, ServedModel
from isthmus.serving.error_responses import UNEXPECTED, error_document
from isthmus.serving.generations import Generations
from isthmus.serving.openai.documents import CompletionDocuments, Ending, GenerationFactsBody, UsageBody
from isthmus.serving.openai.errors import openai_error
from isthmus.serving.openai.models import context_of, places_of
from isthmus.serving.openai.streaming import DONE, KEEP_ALIVE, KEEP_ALIVE_S, PieceFeed
from isthmus.serving.request import FunctionRequest
from isthmus.settings import RouterSettings


@dataclass(frozen=True)
class CompletionJob:
    """A completion to generate, and the documents of its response."""

    model: ServedModel
    codec: TextCodec
    generation: GenerationRequest
    stops: tuple[str, ...]
    documents: CompletionDocuments
    includes_usage: bool
    settings: RouterSettings


class CompletionResponder:
    """Runs generations and builds their responses."""

    def __init__(self, settings: RouterSettings, generations: Generations) -> None:
        self._settings, self._generations = settings, generations
        self._log = logging.getLogger("isthmus")

    def whole(self, request: FunctionRequest, job: CompletionJob) -> Response:
        """The completion in one document."""
        run = _Run(job, request, self._generations)
        with closing(run.pieces) as pieces:
            document = job.documents.whole(list(pieces), run.ending())
        self._note_route(request, run)
        request.facts["tokens"] = str(run.tokens)
        return Response(msgspec.json.encode(document), mimetype="application/json")

    def stream(self, request: FunctionRequest, job: CompletionJob) -> Response:
        """The completion as server-sent events.

        Raises:
            As the generation, before the first piece; later errors are events.
        """
        abandonment = Abandonment()
        context = replace(request.context, abandonment=abandonment)
        run = _Run(job, request._replace(context=context), self._generations)
        feed = PieceFeed(run.pieces, abandonment)
        try:
            first: tuple[TextPiece | None, ...] = (feed.next(KEEP_ALIVE_S),)
        except queue.Empty:  # a long prompt: the status cannot wait longer for it
            first = ()
        except BaseException:
            feed.close()
            raise
        self._note_route(request, run)
        response = Response(self._events(request, run, feed, first), mimetype="text/event-stream")
        response.call_on_close(feed.close)
        response.headers["Cache-Control"] = "no-store"
        # nginx in front of a gateway would hold events back.
        response.headers["X-Accel-Buffering"] = "no"
        return response

    def _events(
        self, request: FunctionRequest, run: _Run, feed: PieceFeed, first: tuple[TextPiece | None, ...]
    ) -> Iterator[bytes]:
        """The chunks, then `[DONE]`; after an error an event with it, and no `[DONE]`."""
        sent_bytes = 0
        try:
            for event in self._chunks(run, feed, first):
                # The server keeps events that a slow client has not read.
                request.memory.hold(len(event))
                sent_bytes += len(event)
                yield event
        except Exception as e:  # the status was sent: an event is the only place left for an error
            request.facts["error"] = type(e).__name__
            yield _event({"error": self._error(e)})
        finally:
            request.facts["out_bytes"] = str(sent_bytes)
            request.facts["tokens"] = str(run.tokens)

    def _chunks(self, run: _Run, feed: PieceFeed, first: tuple[TextPiece | None, ...]) -> Iterator[bytes]:
        documents = run.job.documents
        for document in documents.opening():
            yield _event(document)
        for piece in _waited(feed, first):
            yield KEEP_ALIVE if piece is None else _event(documents.chunk(piece))
        ending = run.ending()
        yield _event(documents.closing(ending))
        if run.job.includes_usage:
            yield _event(documents.usage(ending))
        yield DONE

    def _error(self, error: Exception) -> dict[str, object]:
        if isinstance(error, IsthmusError):
            status = http_status(error)
            document = error_document(error, expose_details=self._settings.expose_details)
        else:
            status, document = 500, UNEXPECTED
            self._log.error("unexpected: %s", type(error).__name__, exc_info=error)
        return openai_error(document, status)

    def _note_route(self, request: FunctionRequest, run: _Run) -> None:
        model, route = run.job.model, run.route
        request.facts.update(model=model.name, version=model.version, route=route.name, degraded=route.degradation)
        for header, text in ((ROUTE_HEADER, route.name), (DEGRADED_HEADER, route.degradation)):
            if text:
                request.reply_headers[header] = text


class _Run:
    """A generation, its text and its numbers."""

    def __init__(self, job: CompletionJob, request: FunctionRequest, generations: Generations) -> None:
        self.job = job
        self._text = CompletionText(job.codec, job.stops, prompt=job.generation.prompt, ends=job.generation.stop)
        self._running = generations.begin(job.model, job.generation, request.context, request.headers)
        self.pieces: Generator[TextPiece, None, None] = self._text.pieces(self._running.tokens())

    @property
    def route(self) -> RouteCandidate:
        """The route in force."""
        return self._running.candidate

    @property
    def tokens(self) -> int:
        """Tokens generated so far."""
        return len(self._running.done.tokens)

    def ending(self) -> Ending:
        """The numbers, after the last piece."""
        done, route = self._running.done, self.route
        prompt_tokens = len(self.job.generation.prompt)
        cut_off = done.finish == "length" and not self._text.stopped
        return Ending(
            "length" if cut_off else "stop",
            UsageBody(prompt_tokens, len(done.tokens), prompt_tokens + len(done.tokens)),
            GenerationFactsBody(
                route=route.name,
                degraded=route.degradation,
                steps=done.steps,
                link_bytes=done.link_bytes,
                first_token_ms=round(done.first_token_s * 1000, 3),
                segments=places_of(route.route, self.job.settings),
                context=context_of(self.job.model, self.job.settings),
                proposed=done.proposed,
                accepted=done.accepted,
                recoveries=done.recoveries,
            ),
        )


def _waited(feed: PieceFeed, first: tuple[TextPiece | None, ...]) -> Iterator[TextPiece | None]:
    """The pieces to the end; None for each pause of KEEP_ALIVE_S seconds."""
    if first:
        if first[0] is None:
            return
        yield first[0]
    else:
        yield None
    while True:
        try:
            piece = feed.next(KEEP_ALIVE_S)
        except queue.Empty:
            yield None
            continue
        if piece is None:
            return
        yield piece


def _event(document: Struct | dict[str, object]) -> bytes:
    # JSON has no line breaks, which would end the field.
    return b"data: " + msgspec.json.encode(document) + b"\n\n"
