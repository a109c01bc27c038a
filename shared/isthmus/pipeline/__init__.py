"""The execution core: a request along its route, for the router, trials, calibration and profiling alike.

`execute(route, inputs, context, encoded=None) -> Result` is the only loop over segments. The hops of the route decide
how tensors travel: `LocalHop` passes arrays unchanged, `LoopbackHop` encodes and decodes every frame without a
socket, and `HttpHop` calls a function. Anything with `name`, `encodes`, `call` and `close` is a hop.

    hop = LoopbackHop(LocalHop(store), tables)            # tables: (digest, tensor, codec id) -> table
    cut = local_route(digest, bundle, head, LocalHop(store))
    boundary = execute(cut, inputs, context).tensors      # inputs, boundary tensors and outputs by name
    trial = local_route(digest, bundle, tail, hop, {"p6": Encoding("transform/4", 0.4, table)})
    result = execute(trial, boundary, context)
    run = result.runs[0]                                  # sent_bytes, payload_bytes, encode_s, decode_s, run_s, codecs

A route from a cut takes all tensors at hand and uses the inputs of its segments, so that outputs of the head reach
`result.outputs`. `LocalHop` takes a `SegmentStore` or any object with its `run`.
"""

from isthmus.http.tls import TlsTrust
from isthmus.pipeline.closer_looks import LookPolicy, LooksTaken
from isthmus.pipeline.execution import Interruption, Result, SegmentRun, encode_tensors, execute, execute_resumably
from isthmus.pipeline.exits import ExitBranch, ExitOutcome, exit_branch
from isthmus.pipeline.hop import (
    Hop,
    HopReply,
    HttpHop,
    LocalHop,
    LoopbackHop,
    ProbedHop,
    ServedTimes,
    SessionHop,
    hops_by_url,
)
from isthmus.pipeline.photos import PhotoInput, photo_input
from isthmus.pipeline.route import Route, local_route, plan_route, planned_route
from isthmus.security.protected_call import CallProtection

__all__ = [
    "CallProtection",
    "ExitBranch",
    "ExitOutcome",
    "Hop",
    "HopReply",
    "HttpHop",
    "Interruption",
    "LocalHop",
    "LookPolicy",
    "LooksTaken",
    "LoopbackHop",
    "PhotoInput",
    "ProbedHop",
    "Result",
    "Route",
    "SegmentRun",
    "ServedTimes",
    "SessionHop",
    "TlsTrust",
    "encode_tensors",
    "execute",
    "execute_resumably",
    "exit_branch",
    "hops_by_url",
    "local_route",
    "photo_input",
    "plan_route",
    "planned_route",
]
