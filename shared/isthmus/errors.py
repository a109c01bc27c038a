"""One tree of errors, and one table of the HTTP status each leaf answers with.

An error carries its facts as attributes and in `facts`, so that a JSON body can name them and a caller can act on
them without parsing a sentence. `hint` says what to do about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class IsthmusError(Exception):
    """Any failure that Isthmus understood; `facts` holds what is known about it, JSON-ready."""

    hint: str = ""
    told: str = "the request cannot be served; the function's log says why"
    """What callers are told whom a function shows no details, which are in its log. Empty where the message and the
    facts are about the request itself, so that the caller needs them to mend it."""

    def __init__(self, message: str, *, hint: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.facts: Mapping[str, Any] = facts
        if hint:
            self.hint = hint

    @property
    def message(self) -> str:
        """The sentence, without its facts."""
        return str(self.args[0])


class SettingsError(IsthmusError):
    """A setting is missing or malformed; facts: `variable`, `value`. Stops the start."""


class RequestError(IsthmusError):
    """What the caller sent cannot be served as it is."""

    told = ""


class RequestMalformed(RequestError):
    """The body or a parameter does not follow its format."""


class RequestTooLarge(RequestError):
    """The body, or what it would unpack to, exceeds a stated bound; facts: `limit`."""


class MediaUnsupported(RequestError):
    """The body is of no kind that this model declares; facts: `accepted`."""


class EncodingUnsupported(MediaUnsupported):
    """The body's Content-Encoding is not offered; facts: `accepted`. The response's Accept-Encoding names those."""


class ImageMalformed(RequestError):
    """The bytes claim to be an image and cannot be decoded as one."""


class ProfilingOff(RequestError):
    """This function has no secret `profile-token`, so nobody may measure it; facts: `secret`."""


class ProfilingRefused(RequestError):
    """The bearer token is missing, or not this function's `profile-token`."""


class FrameError(RequestError):
    """A frame cannot be read; facts: `rule`, the name of the rule in docs/reference/frame.md."""


class FrameTooLarge(FrameError):
    """Longer than a bound (bytes, header, tensors, decoded bytes); nothing beyond it was parsed or allocated."""


class FrameMalformed(FrameError):
    """Lengths, offsets, names or dtypes disagree."""


class CutError(IsthmusError):
    """A cut cannot be made."""


class UnknownValue(CutError):
    """A cut names a tensor or position that the graph does not have; facts: `unknown`, `similar`."""


class UnboundedCut(CutError):
    """A cut does not separate the graph's inputs from its outputs; facts: `leaks`, the values that pass around it."""


class ModelError(IsthmusError):
    """A model cannot be imported: unreadable, of an unsupported opset, or with shapes that nothing binds."""


class PlanError(IsthmusError):
    """A model cannot be divided among tiers as asked."""


class ProblemMalformed(PlanError):
    """The times, tensors, links or labels given to the planner contradict each other; facts: what is at fault."""


class Infeasible(PlanError):
    """Pins and forbidden tiers leave a node no tier; facts: `node`, `name`, `because` (the node that drives it out).

    Or no candidate of a plan meets its constraints; facts: `constraint`, `limit`, `nearest`, `value`, `by`.
    """


class ConstraintMalformed(PlanError):
    """What a plan is to keep to contradicts itself, is negative, or needs prices that are not given; facts: `what`."""


class PlanMalformed(PlanError):
    """A plan's document does not follow its format."""


class PlanMismatch(PlanError):
    """A plan or a profile was made for another bundle than this one; facts: `subject`, `expected`."""


class ProfileMalformed(PlanError):
    """A profile, or a measurement that a function answered with, does not follow its format; facts: `path`, `model`."""


class CalibrationError(IsthmusError):
    """Codecs cannot be calibrated, or their measured fidelity not be used; facts: what of the data does not fit."""


class RegistryError(IsthmusError):
    """The registry cannot give what was asked for."""

    told = "the registry does not give what the request needs; the function's log says why"


class Missing(RegistryError):
    """No such model, version, alias, cut, segment or blob; facts: `kind`, `name`, `exists` (what there is instead)."""

    told = "there is no model, version or segment of that name"


class RegistryMissing(Missing):
    """The folder or bucket itself is not there: a share that is not mounted, a wrong setting; facts as of Missing."""

    told = RegistryError.told


class Denied(RegistryError):
    """The registry refused our credentials."""


class Corrupt(RegistryError):
    """Bytes do not hash to their digest; facts: `blob`. They were never used."""


class RegistryUnavailable(RegistryError):
    """The registry did not answer, after retries; facts: `registry`, `blob`."""


class CacheFull(RegistryError):
    """A segment does not fit the local cache, or its disk; facts: `cache_dir`, `bytes`, `limit`."""


class SegmentError(IsthmusError):
    """A segment cannot run."""

    told = "the model does not run on this request; the function's log says why"


class ShapeMismatch(SegmentError):
    """A tensor of the wrong name, dtype or shape; facts: `tensor`, `expected`, `got`."""

    told = ""


class ValueRefused(SegmentError):
    """A tensor's values are none that the graph runs with, such as an index beyond a table.

    Facts: `segment`, and where they are known `tensor`, `value` and `expected`, the range.
    """

    told = ""


class SegmentTooLarge(SegmentError):
    """A segment alone exceeds the memory bound; facts: `segment`, `bytes`, `limit`."""


class RunFailed(SegmentError):
    """The runtime failed while it loaded or ran a segment; facts: `segment`."""


class HopError(IsthmusError):
    """A call to the next segment failed; facts: `hop`."""

    told = "a function that the model needs failed; the function's log says why"


class HopTimeout(HopError):
    """The deadline passed while the hop was under way."""

    told = "a function that the model needs did not answer in time"


class HopUnavailable(HopError):
    """The hop could not be reached, or is not ready, until retries were spent."""

    told = "a function that the model needs cannot be reached; try again"


class HopBusy(HopError):
    """The hop is at its concurrency limit, until retries were spent."""

    told = "a function that the model needs is at its limit; try again"


class HopRejected(HopError):
    """The hop refused the frame; facts: `status` and the hop's own error. Never retried."""


class Overloaded(IsthmusError):
    """This function is at its own concurrency limit; try again after `retry_after_s`."""

    told = ""


class NotReady(IsthmusError):
    """This function is still loading; try again after `retry_after_s`."""

    told = "not ready: still loading; try again"


class DeadlineExceeded(IsthmusError):
    """The request's deadline passed inside this function."""

    told = ""


class LocalError(IsthmusError):
    """The local engine cannot do what was asked: stack.yml, a port, a process."""


HTTP_STATUS: dict[type[IsthmusError], int] = {
    SettingsError: 500,
    RequestMalformed: 400,
    RequestTooLarge: 413,
    MediaUnsupported: 415,
    EncodingUnsupported: 415,
    ImageMalformed: 400,
    ProfilingOff: 403,
    ProfilingRefused: 403,
    FrameTooLarge: 413,
    FrameMalformed: 400,
    UnknownValue: 404,
    UnboundedCut: 400,
    CutError: 400,
    ModelError: 400,
    ProblemMalformed: 400,
    Infeasible: 400,
    ConstraintMalformed: 400,
    PlanMalformed: 502,
    PlanMismatch: 409,
    CalibrationError: 400,
    ProfileMalformed: 400,
    RegistryError: 502,
    Missing: 404,
    Denied: 502,
    Corrupt: 502,
    RegistryUnavailable: 503,
    CacheFull: 507,
    ShapeMismatch: 400,
    ValueRefused: 400,
    SegmentTooLarge: 507,
    RunFailed: 500,
    HopTimeout: 504,
    RegistryMissing: 503,
    HopUnavailable: 503,
    HopBusy: 429,
    HopRejected: 502,
    Overloaded: 429,
    NotReady: 503,
    DeadlineExceeded: 504,
    LocalError: 500,
}


def http_status(error: IsthmusError) -> int:
    """The status that `error` answers with: its class's row, or the nearest ancestor's; 500 if there is none."""
    for cls in type(error).__mro__:
        if cls in HTTP_STATUS:
            return HTTP_STATUS[cls]
    return 500
