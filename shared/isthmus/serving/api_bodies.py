"""JSON bodies of the router's and the trigger's APIs as typed structures: the source of the schemas in /openapi.json.

Units: `_bytes` are bytes, `ms` and `timings_ms` milliseconds. Source: docs/reference/api.md, docs/reference/calls.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from isthmus.processing.media import MAX_PHOTOS

# Names end in Body: the document has them as schemas, beside the structures of the same things within.
Bytes = Annotated[int, Meta(ge=0)]
Milliseconds = Annotated[float, Meta(ge=0)]


class ErrorBody(Struct, omit_defaults=True):
    """An error: `error` is a sentence, `type` a class of the table in docs/reference/api.md, `facts` are for programs.

    `hint` says what to do, where something can be done.
    """

    error: str
    type: str
    facts: dict[str, Any]
    hint: str = ""


class ServerBody(Struct):
    """Name, version and extensions of this server."""

    name: str
    version: str
    extensions: list[str]


class LiveBody(Struct):
    """The process answers."""

    live: bool


class ReadyBody(Struct):
    """Everything that the settings preload is loaded."""

    ready: bool


class TensorBody(Struct):
    """A model's input or output; a free dimension is -1."""

    name: str
    datatype: str
    shape: list[int]


class ModelBody(Struct):
    """A model's versions, inputs and outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorBody]
    outputs: list[TensorBody]


class ModelReadyBody(Struct):
    """A version whose route is known."""

    name: str
    version: str
    ready: bool


class LoadedVersionBody(Struct, omit_defaults=True):
    """A version whose route is known: `segments` in order, and `plan`, the plan's candidate, where a plan decides."""

    version: str
    segments: list[str]
    plan: str = ""


class ListedModelBody(Struct):
    """A published model: its versions, oldest first, and its aliases with the version of each.

    `default`: the model of `POST /` without `?model=`.
    """

    name: str
    versions: list[str]
    aliases: dict[str, str]
    loaded: list[LoadedVersionBody]
    default: bool


class ModelListBody(Struct):
    """The models that callers may be told of."""

    models: list[ListedModelBody]


class IndexEntryBody(Struct, omit_defaults=True):
    """A version in the repository index; `reason` says why its state is not READY."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = ""


class IndexRequestBody(Struct):
    """`ready`: only the versions whose state is READY."""

    ready: bool = False


class ClassBody(Struct):
    """A class of a prediction; `label` is null where the model has no labels."""

    label: str | None
    index: int
    probability: float


class SegmentRunBody(Struct, omit_defaults=True):
    """A hop's call for a segment; `ms` is the whole call, `run_ms` the segment's own computation."""

    segment: str
    hop: str
    ms: Milliseconds
    run_ms: Milliseconds
    sent_bytes: Bytes
    received_bytes: Bytes
    input_bytes: Bytes
    # Both only where a codec encoded an input.
    pack_ms: Milliseconds = 0.0
    codecs: dict[str, str] = {}


class RouteBody(Struct, omit_defaults=True):
    """The route of a prediction and its bytes over the link; `name` is the plan's candidate, `looks` closer looks.

    `exit` is the cut where the request ended early, `exit_confidence` how sure the exit was, `exit_closed` the cut of
    an exit that the guard closed. `guard_…` are there while the guard has a safer codec in force.
    """

    link_bytes: Bytes
    link_raw_bytes: Bytes
    photo_bytes: Bytes
    input_bytes: Bytes
    segments: list[SegmentRunBody]
    # Only of routes with an exit.
    exit: str = ""
    exit_confidence: float = 0.0
    exit_closed: str = ""
    # Only of routes with closer looks.
    looks: int = 0
    looks_ended: str = ""
    # Only of requests whose scores are those of exit and model together.
    fused: bool = False
    name: str = ""
    degraded: str = ""
    guard_step: int = 0
    guard_codec: str = ""
    guard_instead_of: str = ""


class PredictionBody(Struct):
    """The prediction for a photo: classes, likeliest first."""

    id: str
    model_name: str
    model_version: str
    classes: list[ClassBody]
    route: RouteBody
    timings_ms: dict[str, Milliseconds]


class AreaBody(Struct):
    """An area of a picture, and its share of the cells' drops."""

    where: str
    share: float


class OcclusionBody(Struct, omit_defaults=True):
    """How far the probability falls with each cell hidden: `drops`, rows of cells; a sequence is one row.

    `grid` is the number of rows and of columns. `runs` of the segments behind the cut were made, in `batches`. `at` is
    the cut, or `input`; `tensors` are hidden there. `areas` hold most of a picture's drops. `part` is the part of a
    photo that the model sees: left, top, width and height as shares of the photo's sides.
    """

    of: Literal["picture", "sequence"]
    at: str
    tensors: list[str]
    grid: list[int]
    drops: list[list[float]]
    runs: int
    batches: int
    areas: list[AreaBody] = []
    part: list[float] = []


class ExplainedRouteBody(Struct):
    """Bytes over the link of the prediction and of all copies with a part hidden, and the prediction's segments."""

    link_bytes: Bytes
    segments: list[SegmentRunBody]


class ExplanationBody(Struct):
    """The explanation of a class's probability."""

    id: str
    model_name: str
    model_version: str
    # Named class_ in the code alone: class is a keyword.
    class_: ClassBody = field(name="class")
    explanation: OcclusionBody
    route: ExplainedRouteBody
    timings_ms: dict[str, Milliseconds]


class PhotoBody(Struct, omit_defaults=True):
    """A photo in base64."""

    image: str
    # Five digits, as parse_top_k takes at most.
    top_k: Annotated[int, Meta(ge=1, le=99_999)] | None = None


class BatchEntryBody(Struct, omit_defaults=True):
    """The prediction for a photo of a batch (`classes`, `route`, `timings_ms`), or its error (`error`, `type`…).

    `object` is the URL of the photo's object where a notification named it.
    """

    object: str = ""
    classes: list[ClassBody] = []
    route: RouteBody | None = None
    timings_ms: dict[str, Milliseconds] = {}
    error: str = ""
    type: str = ""
    facts: dict[str, Any] = {}
    hint: str = ""


class BatchPredictionBody(Struct, omit_defaults=True):
    """The predictions for a batch of photos, in their order; `ignored`: what else a notification told of."""

    id: str
    model_name: str
    model_version: str
    predictions: list[BatchEntryBody]
    ignored: list[str] = []


class PhotoBatchBody(Struct, omit_defaults=True):
    """Photos in base64."""

    images: Annotated[list[str], Meta(min_length=1, max_length=MAX_PHOTOS)]
    top_k: Annotated[int, Meta(ge=1, le=99_999)] | None = None


class InputTensorBody(Struct, omit_defaults=True):
    """An input: `data` in row-major order, or `parameters.binary_data_size` where its bytes follow the JSON."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class OutputRequestBody(Struct, omit_defaults=True):
    """An output that the response holds."""

    name: str
    parameters: dict[str, Any] | None = None


class InferRequestBody(Struct, omit_defaults=True):
    """An Open Inference Protocol request; binary tensors may follow its JSON."""

    inputs: list[InputTensorBody]
    outputs: list[OutputRequestBody] | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None


class OutputTensorBody(Struct, omit_defaults=True):
    """An output: `data` in row-major order, or `parameters.binary_data_size`."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class InferResponseBody(Struct, omit_defaults=True):
    """An Open Inference Protocol response; `parameters` state the route and its bytes over the link."""

    model_name: str
    model_version: str
    outputs: list[OutputTensorBody]
    id: str = ""
    parameters: dict[str, Any] = {}


class CallResultBody(Struct):
    """The result of a call without its body: the router's status; `reference` is a claim check where it is large."""

    status: int
    content_type: str
    size: Bytes
    reference: str


class CallBody(Struct):
    """A call. Moments are seconds since the epoch; `published` are the places that have the result."""

    id: str
    state: Literal["queued", "running", "done", "failed"]
    source: str
    attempts: Annotated[int, Meta(ge=0)]
    created: float
    updated: float
    expires: float
    reason: str
    result: CallResultBody | None
    published: list[str]
