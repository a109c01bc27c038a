"""The tree of errors, and the table of HTTP statuses.

Errors carry facts as attributes and in `facts`, so that a JSON body names the facts and callers need not parse
sentences. `hint` is advice for the reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


class IsthmusError(Exception):
    """Base of all errors raised by Isthmus; `facts` are JSON-ready."""

    hint: str = ""
    public_message: str = "the request cannot be served; the function's log says why"
    """The message for callers of functions without `expose_details`; the log has the full message. Empty if message and
    facts concern the request itself, so that the caller needs both to correct the request.
    """

    def __init__(self, message: str, *, hint: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.facts: Mapping[str, Any] = facts
        if hint:
            self.hint = hint

    @property
    def message(self) -> str:
        """The sentence, without its facts."""
        return str(self.args[0])

    def document(self) -> dict[str, Any]:
        """The error as JSON with all its facts, for whoever runs the program; functions tell their callers less."""
        doc = {"error": self.message, "type": type(self).__name__, "facts": dict(self.facts)}
        return doc | ({"hint": self.hint} if self.hint else {})


class SettingsError(IsthmusError):
    """A setting is absent or malformed; stops the start. Facts: `variable`, `value`."""


class RequestError(IsthmusError):
    """The request cannot be served in this form."""

    public_message = ""


class RequestMalformed(RequestError):
    """The body or a parameter does not follow its format."""


class ContextTooLong(RequestMalformed):
    """A prompt fills a language model's context, or a text an encoder's. Facts: `prompt_tokens`, `context`."""


class RequestTooLarge(RequestError):
    """The body, compressed or decompressed, exceeds a bound. Facts: `limit`."""


class MediaUnsupported(RequestError):
    """The model does not accept this media type. Facts: `accepted`."""


class EncodingUnsupported(MediaUnsupported):
    """The Content-Encoding is not supported. Facts: `accepted`, also in the response's Accept-Encoding."""


class ImageMalformed(RequestError):
    """The bytes have an image type and do not decode."""


class ProfilingOff(RequestError):
    """Profiling is disabled: this function has no secret `profile-token`. Facts: `secret`."""


class ProfilingRefused(RequestError):
    """The bearer token is absent or differs from this function's `profile-token`."""


class CallerUnknown(RequestError):
    """A call between functions, or its reply, is not authenticated as the secret `hop-keys` demands.

    Facts: `reason` (`not_signed`, `not_sealed`, `key`, `altered`, `time`, `replayed`), and `off_s` for a clock.
    """


class CallerUnauthenticated(RequestError):
    """A request has no API key or token that this function takes.

    Facts: `reason` (`missing`, `not_configured`, `malformed`, `unknown`, `algorithm`, `signature`, `expired`,
    `not_yet`, `issuer`, `audience`, `claims`).
    """


class CallerForbidden(RequestError):
    """The caller lacks a role. Facts: `role`, `model` where it is about one."""


class FrameError(RequestError):
    """A frame is unreadable. Facts: `rule`, the name of the broken rule in docs/reference/frame.md."""


class FrameTooLarge(FrameError):
    """A bound is exceeded (bytes, header, tensors, decoded bytes); nothing beyond the bound was parsed or allocated."""


class FrameMalformed(FrameError):
    """Lengths, offsets, names or dtypes disagree."""


class CutError(IsthmusError):
    """A cut is impossible."""


class UnknownValue(CutError):
    """A cut names an unknown tensor or position. Facts: `unknown`, `similar`."""


class UnboundedCut(CutError):
    """A cut does not separate the graph's inputs from its outputs. Facts: `leaks`, the values that bypass the cut."""


class ModelError(IsthmusError):
    """A model cannot be imported: unreadable, of an unsupported opset, or with unbound shapes."""


class PlanError(IsthmusError):
    """A model cannot be partitioned among tiers as requested."""


class ProblemMalformed(PlanError):
    """The planner's times, tensors, links or labels contradict each other. Facts: the values at fault."""


class Infeasible(PlanError):
    """Pinned and forbidden tiers leave no tier for a node. Facts: `node`, `name`, `because` (the excluding node).

    Or no candidate of a plan meets the constraints. Facts: `constraint`, `limit`, `nearest`, `value`, `by`.
    """


class ConstraintMalformed(PlanError):
    """A constraint of a plan is contradictory, negative, or needs absent prices. Facts: `what`."""


class PlanMalformed(PlanError):
    """A plan document does not follow its format."""


class PlanMismatch(PlanError):
    """A plan or profile belongs to another bundle. Facts: `subject`, `expected`."""


class ProfileMalformed(PlanError):
    """A profile, or a function's response to a measurement, does not follow its format. Facts: `path`, `model`."""


class CalibrationError(IsthmusError):
    """Calibration failed, or its measured fidelity is unusable. Facts: the data at fault."""


class LearningError(IsthmusError):
    """Nothing can be learned from the data or for the model: labels, classes, too few inputs. Facts: those at fault."""


class RegistryError(IsthmusError):
    """The registry cannot supply the requested content."""

    public_message = "the registry does not give what the request needs; the function's log says why"


class Missing(RegistryError):
    """No such model, version, alias, cut, segment or blob. Facts: `kind`, `name`, `exists` (the existing names)."""

    public_message = "there is no model, version, segment or object of that name"


class RegistryMissing(Missing):
    """The folder or bucket itself is absent: a share not mounted, a wrong setting. Facts as of Missing."""

    public_message = RegistryError.public_message


class Denied(RegistryError):
    """The registry refused the credentials."""


class NotGranted(RegistryError):
    """Content is encrypted, and this process has no grant for it. Facts: `segment`, `recipient`, `blob`.

    `segment` is `documents` for content of no segment; `recipient` is empty without a recipient key.
    """

    # The caller names the segment, and whoever reads the message has to know the recipient; neither is a secret.
    public_message = ""


class Corrupt(RegistryError):
    """Bytes do not hash to their digest and were never used. Facts: `blob`."""


class Untrusted(RegistryError):
    """The setting trusted_keys demands a signature, and none counts; nothing was loaded or run.

    Facts: `reason` (`not_signed`, `unknown_key`, `revoked`, `expired`, `rolled_back`, `altered`), and as far as known
    `key`, `bundle`, `model`.
    """

    public_message = "the signature of the model, or of its alias, is not trusted; the function's log says why"


class RegistryUnavailable(RegistryError):
    """The registry did not answer, after retries. Facts: `registry`, `blob`."""


class ConditionsIgnored(RegistryError):
    """The store cannot compare before it writes; nothing was published. Facts: `registry`."""


class AliasMoved(RegistryError):
    """Somebody moved the alias first. Facts: `alias`, `counter` (of the present document), `expected`."""


class StoreFull(RegistryError):
    """The disk of a registry's folder is full. Facts: `registry`."""


class CacheFull(RegistryError):
    """A segment exceeds the local cache, or the space on its disk. Facts: `cache_dir`, `bytes`, `limit`."""


class SegmentError(IsthmusError):
    """A segment cannot run."""

    public_message = "the model does not run on this request; the function's log says why"


class ShapeMismatch(SegmentError):
    """A tensor has the wrong name, dtype or shape. Facts: `tensor`, `expected`, `got`."""

    public_message = ""


class ValueRefused(SegmentError):
    """The graph cannot run with a tensor's values, for example an index beyond a table.

    Facts: `segment`, and if known `tensor`, `value` and `expected`, the range.
    """

    public_message = ""


class SegmentTooLarge(SegmentError):
    """A single segment exceeds the memory bound. Facts: `segment`, `bytes`, `limit`."""


class MemoryInUse(SegmentError):
    """A load ahead of requests has no room beside the segments in use. Facts: `segment`, `bytes`, `limit`."""

    public_message = ""


class StateMissing(SegmentError):
    """A session's state is not there, or ends earlier.

    Facts: `segment`, `session`, and `position`, the tokens that are there; `hop` where a hop said so.
    """

    public_message = ""


class BundleMismatch(SegmentError):
    """A function holds another bundle than the call names. Facts: `has`, digests; `wanted`, a digest."""

    public_message = ""


class RunFailed(SegmentError):
    """The runtime failed while loading or running a segment. Facts: `segment`."""


class HopError(IsthmusError):
    """A call to the next segment failed. Facts: `hop`."""

    public_message = "a function that the model needs failed; the function's log says why"


class HopTimeout(HopError):
    """The deadline passed during the call."""

    public_message = "a function that the model needs did not answer in time"


class HopUnavailable(HopError):
    """The hop was unreachable or not ready, and retries are exhausted."""

    public_message = "a function that the model needs cannot be reached; try again"


class HopUntrusted(HopUnavailable):
    """TLS with the hop failed: one side does not trust the other's certificate; never retried.

    Facts: `reason` (`unknown_ca`, `wrong_host`, `expired`, `certificate_demanded`, …), as docs/how-to/tls.md lists.
    """

    public_message = "a function that the model needs cannot be reached safely; the function's log says why"


class HopBusy(HopError):
    """The hop was at its concurrency limit, and retries are exhausted."""

    public_message = "a function that the model needs is at its limit; try again"


class HopRejected(HopError):
    """The hop refused the frame; never retried. Facts: `status` and the hop's own error."""


class HopMismatch(HopRejected):
    """The hop holds another bundle than the request's. Facts: `has`, `wanted`, as of BundleMismatch."""

    public_message = "the functions of this model do not hold the same bundle at this moment; try again"


class Overloaded(IsthmusError):
    """This function is at its own concurrency limit; retry after `retry_after_s`."""

    public_message = ""


class CallerLimited(Overloaded):
    """The caller is beyond its own rate limit. Facts: `limit` (`requests`, `bytes`), `per_second`, `retry_after_s`."""


class IssuerUnavailable(IsthmusError):
    """The public keys of the tokens' issuer are not there: the function cannot tell whether a token is valid."""

    public_message = "the keys of the tokens' issuer cannot be had now; try again"


class NotReady(IsthmusError):
    """This function is still loading; retry after `retry_after_s`."""

    public_message = "not ready: still loading; try again"


class NotConfigured(NotReady):
    """The function has no configuration, and waits for a deployment with one."""

    public_message = ""


class DeadlineExceeded(IsthmusError):
    """The request's deadline passed inside this function."""

    public_message = ""


class EventError(IsthmusError):
    """A message, its broker, or the store of its results."""

    public_message = "the event cannot be taken; the function's log says why"


class ConfigurationMalformed(EventError):
    """A trigger's configuration cannot be used. Facts: `where`, the field."""


class BrokerUnavailable(EventError):
    """The broker does not answer; a later try may succeed. Facts: `broker`."""


class BrokerRefused(EventError):
    """The broker refused credentials, a subject or an operation; a second try fails as well. Facts: `broker`."""


class MessageTooLarge(EventError):
    """A body exceeds what the broker or the object store takes. Facts: `bytes`, `limit`."""

    public_message = ""


class EventMalformed(RequestMalformed):
    """An envelope (CloudEvents, S3 notification, claim check) breaks its specification. Facts: `attribute`."""


class BucketRefused(RequestError):
    """A notification names an object of a bucket that is not among `event_buckets`. Facts: `bucket`."""


class ClaimExpired(EventError):
    """The object that a claim check refers to is gone or past its expiry. Facts: `reference`."""

    public_message = ""


class ResultStoreUnavailable(EventError):
    """The store of results and call states does not answer."""


class StoreDamaged(EventError):
    """A file of the trigger is damaged, or no database. Facts: `store`."""


class CallUnknown(EventError):
    """No call of that id, or its result has expired. Facts: `call`."""

    public_message = ""


class SpoolFull(EventError):
    """The spool of deferred requests has reached its bound, or its disk is full. Facts: `bytes`, `limit`, `of`."""

    public_message = ""


class LocalError(IsthmusError):
    """The local engine failed: stack.yml, a port, a process."""


# 502 marks faults behind this function, 503 transient faults, 507 exhausted space.
HTTP_STATUS: dict[type[IsthmusError], int] = {
    SettingsError: 500,
    RequestMalformed: 400,
    ContextTooLong: 400,
    RequestTooLarge: 413,
    MediaUnsupported: 415,
    EncodingUnsupported: 415,
    ImageMalformed: 400,
    ProfilingOff: 403,
    ProfilingRefused: 403,
    CallerUnknown: 401,
    CallerUnauthenticated: 401,
    CallerForbidden: 403,
    FrameTooLarge: 413,
    FrameMalformed: 400,
    UnknownValue: 404,
    UnboundedCut: 400,
    CutError: 400,
    ModelError: 400,
    ProblemMalformed: 400,
    Infeasible: 400,
    ConstraintMalformed: 400,
    # Plans come from the registry, not from the request.
    PlanMalformed: 502,
    PlanMismatch: 409,
    CalibrationError: 400,
    LearningError: 400,
    ProfileMalformed: 400,
    RegistryError: 502,
    Missing: 404,
    Denied: 502,
    # Not 502: the registry gives the content, and whoever may read it has to give this function a key.
    NotGranted: 403,
    Corrupt: 502,
    # Not 502: gateways and callers repeat that, and a second try is refused as well.
    Untrusted: 403,
    RegistryUnavailable: 503,
    ConditionsIgnored: 502,
    AliasMoved: 409,
    # 507 tells callers that a retry is futile until an operator frees space.
    StoreFull: 507,
    CacheFull: 507,
    ShapeMismatch: 400,
    ValueRefused: 400,
    SegmentTooLarge: 507,
    MemoryInUse: 507,
    StateMissing: 409,
    BundleMismatch: 409,
    RunFailed: 500,
    HopTimeout: 504,
    # 503, not Missing's 404: the share may be mounted later, and the model exists.
    RegistryMissing: 503,
    HopUnavailable: 503,
    # Unlike HopUnavailable: a certificate does not mend itself, so callers need not come back soon.
    HopUntrusted: 502,
    # The hop's own status, so that the caller's back-off applies to the whole chain.
    HopBusy: 429,
    HopRejected: 502,
    # A roll of functions under way, which ends: callers and queues come again.
    HopMismatch: 503,
    Overloaded: 429,
    CallerLimited: 429,
    IssuerUnavailable: 503,
    NotReady: 503,
    NotConfigured: 503,
    DeadlineExceeded: 504,
    ConfigurationMalformed: 500,
    BrokerUnavailable: 503,
    BrokerRefused: 502,
    MessageTooLarge: 413,
    EventMalformed: 400,
    BucketRefused: 403,
    ClaimExpired: 410,
    ResultStoreUnavailable: 503,
    StoreDamaged: 500,
    CallUnknown: 404,
    SpoolFull: 507,
    EventError: 500,
    LocalError: 500,
}


def error_code(name: str) -> str:
    """A class's name as OpenAI writes codes: ShapeMismatch is shape_mismatch."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def http_status(error: IsthmusError) -> int:
    """The status for `error`: the row of its class, else of the nearest ancestor, else 500."""
    for cls in type(error).__mro__:
        if cls in HTTP_STATUS:
            return HTTP_STATUS[cls]
    return 500
