"""Hops: the call of a segment, in this process or over HTTP; the only place that retries.

Segments are pure functions of their frame, so a call that got no response may be made again. The meaning of a failure
is read from its status, body and X-OpenFaaS-Internal as docs/reference/hops.md lists them. A call waits for a function
that is starting, within the deadline; a function that stays away, or fails, is tried `attempts` times.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, runtime_checkable
from urllib.parse import urlsplit

import stamina

from isthmus.arrays import Array
from isthmus.artifacts.bundle import is_digest
from isthmus.artifacts.json_documents import refuse_constant
from isthmus.codecs import Tables
from isthmus.context import Context, Deadline
from isthmus.errors import (
    CallerUnknown,
    HopBusy,
    HopError,
    HopMismatch,
    HopRejected,
    HopTimeout,
    HopUnavailable,
    HopUntrusted,
    IsthmusError,
    MemoryInUse,
    SegmentTooLarge,
    SettingsError,
    ShapeMismatch,
    StateMissing,
    ValueRefused,
)
from isthmus.http.pool import (
    NO_TIMES,
    BrokenOff,
    ConnectionPool,
    ExchangeTimes,
    Response,
    ResponseTooLong,
    TlsFailed,
    Unreachable,
    is_url,
    retry_after_seconds,
    stages_of,
)
from isthmus.http.tls import TlsProblem, TlsTrust, demand_in, open_trust
from isthmus.pipeline.hop_retries import HopRetries
from isthmus.security.protected_call import Buffer, CallFacts, CallProtection, open_protection
from isthmus.settings import RouterSettings, urls_of
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame, Step

if TYPE_CHECKING:  # a router with remote hops alone never loads onnxruntime
    from isthmus.runtime.store import TimedOutputs

# Bound on the body of a response other than 200; a hop's own errors are far shorter.
MAX_ERROR_BYTES = 2**16
# Replicas of a hop; each has a breaker that probes watch.
MAX_REPLICAS = 16
# The end of a session saves memory of a function; the function drops idle sessions by itself where the call is lost.
END_SESSION_S = 2.0
# Bound on a frame between this process and itself, where only memory limits it.
MAX_LOOPBACK_BYTES = 2**30
# A segment function's errors that the router's caller causes, and that of a session whose state is gone.
_INPUT_ERRORS = {c.__name__: c for c in (ShapeMismatch, ValueRefused, StateMissing)}
# Errors of `POST /load`, and those of an Isthmus function without that path.
_LOAD_ERRORS = {c.__name__: c for c in (MemoryInUse, SegmentTooLarge)}
_MISMATCH = "BundleMismatch"
# Bundles that a function with other ones names in its refusal.
MAX_HELD = 8
_KEYS_ADVICE = "give both functions the same secret hop-keys, and the same hop_security"
# Some servers end a connection without an alert where the client shows no certificate.
_TLS_END_ADVICE = "if it ends every connection, it may demand a client certificate: docs/how-to/tls.md"
_NO_SUCH_PATH = ("NotFound", "MethodNotAllowed")


class ServedTimes(NamedTuple):
    """Where the function spent a call, as its Server-Timing says, and never more than the call took.

    Units: seconds. `total_s` is the whole time between the request's last and the response's first byte, `wait_s` the
    wait for admission and for a CPU, `load_s` a segment's load into memory; 0 where the function does not report that.
    """

    total_s: float = 0.0
    wait_s: float = 0.0
    load_s: float = 0.0


class HopReply(NamedTuple):
    """A hop's response to one frame.

    Units: seconds and bytes. `run_s` is the segment's own computation, `decode_s` the decoding of the request's frame,
    0 where the hop does not report that; sent and received bytes are sizes of frames, 0 in this process, as is
    `exchange`, the times of the connection in the last try.
    """

    frame: Frame
    run_s: float
    decode_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    served: ServedTimes = ServedTimes()
    exchange: ExchangeTimes = NO_TIMES


class Hop(Protocol):
    """Where a segment runs."""

    @property
    def encodes(self) -> bool:
        """Whether tensors become bytes on the way, so that encoding them makes sense."""
        ...

    @property
    def name(self) -> str:
        """The hop's name in errors and timings."""
        ...

    def call(self, frame: Frame, context: Context) -> HopReply:
        """Run the segment that `frame` names on its tensors, within the context's deadline.

        Raises:
            HopTimeout: the deadline passed.
            HopUnavailable, HopBusy: not reached, or at its limit, until attempts were spent.
            HopMismatch: the hop holds another bundle than the frame names.
            HopRejected: the hop understood and refused; `facts["error"]` holds its error. ShapeMismatch and
                ValueRefused, errors of the inputs, keep their class.
        """
        ...

    def close(self) -> None:
        """Close idle connections."""
        ...


@runtime_checkable
class ProbedHop(Protocol):
    """A hop behind a link."""

    def probe(self, timeout_s: float) -> ExchangeTimes:
        """See `HttpHop.probe`."""
        ...


class SegmentRunner(Protocol):
    """Runs segments in this process: `SegmentStore`, or the substitute of a trial."""

    def run(self, bundle: str, segment: str, arrays: Mapping[str, Array], deadline: Deadline) -> TimedOutputs:
        """See `SegmentStore.run`."""
        ...


@runtime_checkable
class StepRunner(SegmentRunner, Protocol):
    """Also runs steps of sessions, for bundles with state."""

    def step(
        self, bundle: str, segment: str, arrays: Mapping[str, Array], step: Step, deadline: Deadline
    ) -> TimedOutputs:
        """See `SessionStore.step`."""
        ...

    def end_session(self, session: str) -> None:
        """See `SessionStore.end_session`."""
        ...


@runtime_checkable
class ExitRunner(SegmentRunner, Protocol):
    """Also runs the exit behind a segment in the same call."""

    def run_to_exit(
        self, bundle: str, segment: str, arrays: Mapping[str, Array], threshold: float, deadline: Deadline
    ) -> TimedOutputs:
        """See `SegmentStore.run_to_exit`."""
        ...


@runtime_checkable
class SegmentLoader(Protocol):
    """A hop or a runner that loads segments ahead of requests."""

    def load(self, bundle: str, segment: str, deadline: Deadline) -> bool:
        """Whether the segment is in memory; if not, its load begins in the background.

        Raises:
            MemoryInUse, SegmentTooLarge: no room beside the segments in use, or in an empty memory.
            IsthmusError: the segment cannot be loaded, or the hop gave no response.
        """
        ...


@runtime_checkable
class SessionHop(Protocol):
    """A hop whose functions may keep state of sessions."""

    def end_session(self, session: str, deadline: Deadline) -> None:
        """Have the hop forget a session, in at most END_SESSION_S seconds.

        Best effort and never an error: a function that cannot be reached drops the session once it is idle.
        """
        ...


class LocalHop:
    """A segment in this process: nothing is encoded, sent or copied."""

    name = "local"
    encodes = False

    def __init__(self, runner: SegmentRunner) -> None:
        self._runner = runner

    def close(self) -> None:
        """No-op: the runner belongs to its owner."""

    def call(self, frame: Frame, context: Context) -> HopReply:
        """See `Hop.call`; the segment's own errors pass unchanged."""
        if frame.step is None:
            ran = self._run(frame, context.deadline)
        elif isinstance(self._runner, StepRunner):
            ran = self._step(self._runner, frame, frame.step, context)
        else:
            raise HopRejected("this process keeps no sessions", hop=self.name)
        served = ServedTimes(ran.load_s + ran.wait_s + ran.run_s, ran.wait_s, ran.load_s)
        return HopReply(Frame(ran.outputs, frame.bundle, frame.segment, frame.request), ran.run_s, served=served)

    def _run(self, frame: Frame, deadline: Deadline) -> TimedOutputs:
        if (threshold := frame.exit) is None:
            return self._runner.run(frame.bundle, frame.segment, frame.tensors, deadline)
        if not isinstance(self._runner, ExitRunner):
            raise HopRejected("this process runs no exits", hop=self.name)
        return self._runner.run_to_exit(frame.bundle, frame.segment, frame.tensors, threshold, deadline)

    def load(self, bundle: str, segment: str, deadline: Deadline) -> bool:
        """See `SegmentLoader.load`."""
        return self._runner.load(bundle, segment, deadline) if isinstance(self._runner, SegmentLoader) else True

    def end_session(self, session: str, deadline: Deadline) -> None:
        """See `SessionHop.end_session`."""
        if isinstance(self._runner, StepRunner):
            self._runner.end_session(session)

    def _step(self, runner: StepRunner, frame: Frame, step: Step, context: Context) -> TimedOutputs:
        try:
            return runner.step(frame.bundle, frame.segment, frame.tensors, step, context.deadline)
        except StateMissing as e:
            raise StateMissing(e.message, hint=e.hint, **{**e.facts, "hop": self.name}) from e


class LoopbackHop:
    """Another hop behind real frames without a socket: request and reply are encoded to bytes and decoded.

    `tables` gives the tables of calibrated codecs, as the function behind a real hop looks them up.
    """

    encodes = True

    def __init__(self, inner: Hop, tables: Tables | None = None, *, max_bytes: int = MAX_LOOPBACK_BYTES) -> None:
        self.name = f"loopback to {inner.name}"
        self._inner, self._tables, self._max_bytes = inner, tables, max_bytes

    def close(self) -> None:
        """Close the inner hop."""
        self._inner.close()

    def call(self, frame: Frame, context: Context) -> HopReply:
        """See `Hop.call`; errors of the inner hop, and of decoding, pass unchanged."""
        request = frames.encode(frame)
        start = time.perf_counter()
        arrived = frames.decode(request, max_bytes=self._max_bytes, tables=self._tables)
        decode_s = time.perf_counter() - start
        reply = self._inner.call(arrived, context)
        response = frames.encode(reply.frame)
        returned = frames.decode(response, max_bytes=self._max_bytes, tables=self._tables)
        return HopReply(returned, reply.run_s, decode_s, len(request), len(response), reply.served)

    def end_session(self, session: str, deadline: Deadline) -> None:
        """See `SessionHop.end_session`."""
        if isinstance(self._inner, SessionHop):
            self._inner.end_session(session, deadline)


class HttpHop:
    """A segment behind a URL: an OpenFaaS function, through a gateway or directly."""

    encodes = True

    def __init__(
        self,
        url: str,
        *,
        attempts: int,
        connect_timeout_s: float,
        max_reply_bytes: int,
        protection: CallProtection | None = None,
        trust: TlsTrust | None = None,
    ) -> None:
        self.name = url
        self._protection = protection
        self._pool = ConnectionPool(url, connect_timeout_s=connect_timeout_s, trust=trust)
        self._retries = HopRetries(attempts)
        self._max_reply_bytes = max_reply_bytes

    def call(self, frame: Frame, context: Context) -> HopReply:
        """See `Hop.call`."""
        # Encoded once for all tries.
        body = frames.encode_parts(frame)
        retries = self._retries.of(context)
        for attempt in stamina.retry_context(on=retries.pause, attempts=None, timeout=None):
            with attempt:
                reply = self._once(body, context)
        self._retries.succeeded()
        return reply

    def is_ready(self, timeout_s: float) -> bool:
        """Whether the function says within `timeout_s` seconds, by GET /ready, that it can run segments."""
        try:
            return self._pool.get_status("/ready", Deadline.after(timeout_s)) == 200
        except (Unreachable, BrokenOff, ResponseTooLong, TimeoutError):
            return False

    def close(self) -> None:
        """Close the connections that wait for the next call; calls under way try no more."""
        self._retries.is_closed = True
        self._pool.close()

    def load(self, bundle: str, segment: str, deadline: Deadline) -> bool:
        """See `SegmentLoader.load`; asked once, without retries. True for a function without `POST /load`."""
        body = json.dumps({"bundle": bundle, "segment": segment}).encode()
        context = Context.from_headers({}, longest_s=deadline.remaining())
        response = self._post([body], "application/json", context, MAX_ERROR_BYTES, "/load")
        error = _error_document(response.body)
        if (refused := _LOAD_ERRORS.get(str(error.get("type")))) is not None:
            raise refused(str(error["error"])[:1000], hint=str(error.get("hint", ""))[:1000], hop=self.name)
        if response.status not in (200, 202) and error.get("type") not in _NO_SUCH_PATH:
            self._refuse(response)
        return response.status != 202

    def end_session(self, session: str, deadline: Deadline) -> None:
        """See `SessionHop.end_session`; asked once, without retries."""
        context = Context.from_headers({}, longest_s=min(deadline.remaining(), END_SESSION_S))
        body = json.dumps({"session": session}).encode()
        with contextlib.suppress(HopError):
            self._post([body], "application/json", context, MAX_ERROR_BYTES, "/sessions/end")

    def _once(self, body: Sequence[bytes | memoryview], context: Context) -> HopReply:
        response = self._post(body, frames.CONTENT_TYPE, context, self._max_reply_bytes)
        if response.status != 200:
            self._refuse(response)
        try:
            reply = frames.decode(response.body, max_bytes=self._max_reply_bytes)
        except IsthmusError as e:
            raise HopRejected(
                f"{self.name} answered with something that is no frame: {e}", hop=self.name, status=200
            ) from e
        stages, limit_s = stages_of(response.headers.get("server-timing", "")), response.times.first_byte_s
        # A function cannot have worked for longer than the caller waited, whatever its header says.
        run_s, decode_s, load_s, total_s = (
            min(stages.get(stage, 0.0), limit_s) for stage in ("run", "decode", "load", "total")
        )
        wait_s = min(stages.get("queue", 0.0) + stages.get("wait", 0.0), limit_s)
        served = ServedTimes(min(max(total_s, run_s + decode_s + wait_s + load_s), limit_s), wait_s, load_s)
        return HopReply(reply, run_s, decode_s, sum(map(len, body)), len(response.body), served, response.times)

    def probe(self, timeout_s: float) -> ExchangeTimes:
        """The times of the smallest exchange with the function: GET /ready, on a connection of the calls' own.

        Raises:
            HopTimeout, HopUnavailable: no response within `timeout_s` seconds, or another status than 200.
        """
        try:
            response = self._pool.post(
                (),
                {},
                Deadline.after(timeout_s),
                max_bytes=MAX_ERROR_BYTES,
                max_error_bytes=MAX_ERROR_BYTES,
                path="/ready",
                method="GET",
            )
        except TimeoutError as e:
            raise HopTimeout(f"{self.name} did not answer a probe within {timeout_s:g} s", hop=self.name) from e
        except (Unreachable, BrokenOff, ResponseTooLong) as e:
            raise HopUnavailable(f"{self.name} cannot be probed: {e}", hop=self.name) from e
        if response.status != 200:
            raise HopUnavailable(
                f"{self.name} answered a probe with {response.status}", hop=self.name, status=response.status
            )
        return response.times

    def _post(
        self, body: Sequence[bytes | memoryview], content_type: str, context: Context, max_bytes: int, path: str = ""
    ) -> Response:
        if self._protection is None:
            return self._exchange(body, {"Content-Type": content_type}, context, max_bytes, path)
        # Anew for each try: a call that comes twice is refused.
        sent = self._protection.protect(body, CallFacts("POST", path or "/", content_type))
        response = self._exchange(sent.body, sent.headers, context, max_bytes, path)
        if response.status not in (200, 202):
            return response
        try:
            opened = sent.open_reply(response.status, response.headers, response.body)
        except CallerUnknown as e:
            raise HopRejected(f"{self.name} answered, and {e}", hop=self.name, status=200, hint=_KEYS_ADVICE) from e
        return replace(response, body=opened)

    def _exchange(
        self, body: Sequence[Buffer], headers: Mapping[str, str], context: Context, max_bytes: int, path: str
    ) -> Response:
        if context.deadline.remaining() <= 0:
            raise HopTimeout(f"the deadline passed before {self.name} could be called", hop=self.name)
        try:
            return self._pool.post(
                body,
                {**headers, **context.to_headers()},
                context.deadline,
                max_bytes=max_bytes,
                max_error_bytes=MAX_ERROR_BYTES,
                path=path,
                abandonment=context.abandonment,
            )
        except TlsFailed as e:
            raise untrusted(self.name, e.problem) from e
        except Unreachable as e:
            raise HopUnavailable(f"{self.name} cannot be reached: {e}", hop=self.name) from e
        except ResponseTooLong as e:
            raise HopRejected(
                f"{self.name} answered with more than {max_bytes} bytes", hop=self.name, status=200
            ) from e
        except TimeoutError as e:
            raise HopTimeout(f"{self.name} did not answer within the deadline", hop=self.name) from e
        except BrokenOff as e:
            hint = _TLS_END_ADVICE if self.name.startswith("https:") else ""
            raise HopUnavailable(f"{self.name} broke off: {e}", hint=hint, hop=self.name) from e

    def _refuse(self, response: Response) -> NoReturn:
        """Raise the error of a status other than 200. Source: docs/reference/hops.md, from OpenFaaS's sources."""
        status, internal = response.status, response.headers.get("x-openfaas-internal", "")
        error = _error_document(response.body)
        text = str(error.get("error") or response.body[:200].decode("utf-8", "replace")).strip()[:1000] or "no body"
        facts: dict[str, Any] = {"hop": self.name, "status": status, "error": error}
        after = retry_after_seconds(response.headers.get("retry-after", ""))
        message = f"{self.name} answered {status}: {text}"
        if problem := demand_in(status, response.body):
            raise untrusted(self.name, problem)
        if status == 429:
            raise HopBusy(message, retry_after_s=after, **facts)
        if status in (408, 504):
            raise HopTimeout(message, **facts)
        if status in (502, 503) or (status == 500 and (internal or not error)):
            # 500 with X-OpenFaaS-Internal is from the proxy or the watchdog: nothing listened, or the function died.
            raise HopUnavailable(message, retry_after_s=after, **facts)
        if status == 404 and not error:
            # The gateway's own: the function is not deployed there, or is being replaced at this moment.
            raise HopUnavailable(message, hint=f"is a function deployed at {self.name}?", **facts)
        if (refused := _INPUT_ERRORS.get(str(error.get("type")))) is not None:
            # Only running the graph shows that free dimensions do not go together, or that an index is out of range:
            # the caller's fault, not the hop's.
            raise refused(text, **{**_own_facts(error), **facts})
        if error.get("type") == _MISMATCH:
            raise HopMismatch(message, **_mismatch_facts(error), **facts)
        # Whoever called this function has a key; it is this function that the hop does not know.
        hint = _KEYS_ADVICE if status == 401 else ""
        raise HopRejected(message, hint=hint, **facts)


def untrusted(url: str, problem: TlsProblem) -> HopUntrusted:
    """The error of a call to `url` for want of trust between the two sides."""
    return HopUntrusted(f"{url} is not called: {problem.text}", hint=problem.hint, hop=url, reason=problem.reason)


def _mismatch_facts(error: Mapping[str, Any]) -> dict[str, Any]:
    """The digests that a function has and was to have; anything else in their place is left out."""
    own = error.get("facts")
    own = own if type(own) is dict else {}
    has, wanted = own.get("has"), own.get("wanted")
    return {
        "has": [each for each in has if is_digest(str(each))][:MAX_HELD] if type(has) is list else [],
        "wanted": wanted if is_digest(str(wanted)) else "",
    }


def _own_facts(error: Mapping[str, Any]) -> dict[str, Any]:
    """An error's facts about tensors, which the caller sent."""
    own = error.get("facts")
    named = ("tensor", "value", "expected", "got", "segment", "session", "position")
    return {key: own[key] for key in named if key in own} if type(own) is dict else {}


def check_hops(tiers: tuple[str, ...]) -> None:
    """Refuse the setting `hops` where an entry is neither `local` nor a URL, or several URLs that differ.

    Raises:
        SettingsError: the setting is empty, or an entry is something else or has a user or password.
    """
    for tier in tiers:
        urls = urls_of(tier)
        # A password would be in every error and metric that names the hop.
        is_usable = all(is_url(url) and "@" not in urlsplit(url).netloc for url in urls)
        if tier != "local" and not (is_usable and len(set(urls)) == len(urls) <= MAX_REPLICAS):
            raise SettingsError(
                f"the setting hops holds {tier!r}; a hop is `local`, a URL such as http://HOST:PORT/function/NAME, or"
                f" at most {MAX_REPLICAS} different URLs with | between them, without a user or password",
                variable="hops",
                value=tier,
            )
    if not tiers:
        raise SettingsError("the setting hops is empty; name at least one hop", variable="hops", value="")


def open_hops(settings: RouterSettings, store: SegmentRunner | None) -> list[tuple[Hop, ...]]:
    """The hops of each tier, several where it has replicas; `local` needs a store.

    Raises:
        SettingsError: the secret `hop-keys`, or a file for TLS, cannot be used.
    """
    connect = partial(
        HttpHop,
        attempts=settings.hop_attempts,
        connect_timeout_s=settings.hop_connect_timeout_s,
        max_reply_bytes=settings.max_request_bytes,
        protection=open_protection(settings),
        trust=open_trust(settings),
    )
    return [
        tuple(LocalHop(store) if url == "local" and store is not None else connect(url) for url in urls_of(tier))
        for tier in settings.hops
    ]


@contextlib.contextmanager
def hops_by_url(
    urls: Iterable[str], protection: CallProtection | None = None, trust: TlsTrust | None = None
) -> Iterator[Mapping[str, HttpHop]]:
    """A hop to each of the URLs, each once, for the block: for measurements of functions."""
    with contextlib.ExitStack() as stack:
        hops = {
            url: HttpHop(
                url,
                attempts=3,
                connect_timeout_s=5.0,
                max_reply_bytes=MAX_LOOPBACK_BYTES,
                protection=protection,
                trust=trust,
            )
            for url in dict.fromkeys(urls)
        }
        for hop in hops.values():
            stack.callback(hop.close)
        yield hops


def _error_document(data: bytes | bytearray) -> dict[str, Any]:
    """The hop's error document (docs/reference/api.md); empty where the body is no such document, or no strict JSON."""
    try:
        doc = json.loads(data, parse_constant=refuse_constant, parse_int=_bounded_int, parse_float=_finite)
    except (ValueError, RecursionError):
        return {}
    return doc if isinstance(doc, dict) and "error" in doc else {}


def _bounded_int(text: str) -> int:
    if len(text) > 20:  # int() of a long text takes quadratic time
        raise ValueError("a number of more than 20 digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value
