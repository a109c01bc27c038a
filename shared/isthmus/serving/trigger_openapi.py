"""The OpenAPI description of the trigger's operations; see `isthmus.serving.openapi`."""

from __future__ import annotations

from isthmus import errors
from isthmus.serving import api_bodies as bodies
from isthmus.serving.openapi import ADMISSION, ApiDescription, Operation

_STORE = (errors.ResultStoreUnavailable, errors.NotReady, errors.NotConfigured)
_CALL = {"application/json": bodies.CallBody}
_ANY = {"*/*": {"type": "string", "format": "binary"}}
_QUEUE = Operation(
    "Queue the body, of any kind that the router takes; the call of its id, where there is one",
    _CALL,
    (
        *ADMISSION,
        *_STORE,
        errors.MessageTooLarge,
        errors.EventMalformed,
        errors.BrokerUnavailable,
        errors.BrokerRefused,
    ),
    _ANY,
    headers=("Idempotency-Key", "X-Timeout"),
    status=202,
)
_LOOK = (*_STORE, errors.CallUnknown, errors.Overloaded, errors.RequestMalformed)
TRIGGER = ApiDescription(
    "Isthmus trigger",
    "Calls into the trigger's queue, their state and results.",
    {
        "queue": _QUEUE,
        "queue_call": _QUEUE,
        "call": Operation(
            "The state of a call: at once, once it is over, or as server-sent events",
            {**_CALL, "text/event-stream": {"type": "string"}},
            _LOOK,
            query=("wait",),
            headers=("X-Timeout", "Last-Event-ID"),
        ),
        "result": Operation(
            "The result's body, with its own status; 202 with the call before",
            _ANY,
            (*_LOOK, errors.ClaimExpired),
            query=("wait",),
            headers=("X-Timeout",),
        ),
        "ready": Operation(
            "200 while source, records and places answer",
            {"application/json": bodies.ReadyBody},
            (errors.NotReady, errors.NotConfigured, errors.BrokerUnavailable, errors.BrokerRefused),
        ),
        "openapi": Operation("This description", {"application/json": {"type": "object"}}),
        "metrics": Operation(
            "Metrics in Prometheus's text format, or in OpenMetrics", {"text/plain": {"type": "string"}}
        ),
    },
)
