"""A Python client of the router for photos, tensors, conversations and embeddings.

Any client of the Open Inference Protocol or of OpenAI's API works as well.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode
from uuid import uuid4

import numpy as np

from isthmus.arrays import Array
from isthmus.artifacts.tensors import TensorSpec
from isthmus.codecs.raw import RAW
from isthmus.context import EXIT_HEADER, Deadline
from isthmus.errors import (
    HTTP_STATUS,
    CallerUnauthenticated,
    ContextTooLong,
    HopRejected,
    HopTimeout,
    HopUnavailable,
    HopUntrusted,
    IsthmusError,
    Missing,
    Overloaded,
    RequestMalformed,
    SettingsError,
    ShapeMismatch,
    error_code,
)
from isthmus.http.pool import (
    BrokenOff,
    ConnectionPool,
    ErrorStatus,
    Response,
    ResponseTooLong,
    TlsFailed,
    Unreachable,
    is_url,
)
from isthmus.http.tls import TlsTrust
from isthmus.oip import messages as oip
from isthmus.oip.tensor import datatype_of, from_binary, shape_of
from isthmus.settings import is_secret
from isthmus.wire.frame import DTYPES

# Outputs of segmentation models reach hundreds of megabytes; a wrong URL must not fill the memory.
MAX_RESPONSE_BYTES = 2**30
# A router that accepts no connection within seconds is down; inference may take the whole timeout.
_CONNECT_TIMEOUT_S = 5.0
# Of a chunk with the scores of some tokens.
_MAX_EVENT_BYTES = 2**20
# OpenAI's own codes; other errors have the name of their class, as `error_code`.
_OPENAI_CODES: Mapping[str, type[IsthmusError]] = {
    "context_length_exceeded": ContextTooLong,
    "invalid_api_key": CallerUnauthenticated,
    "rate_limit_exceeded": Overloaded,
    "model_not_found": Missing,
}
API_KEY_VARIABLE = "ISTHMUS_API_KEY"
_BOUNDARY = f"isthmus-{uuid4().hex}"
_DTYPE = {datatype_of(dtype): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Prediction:
    """Output tensors, facts about the route, and the response's Server-Timing."""

    outputs: dict[str, Array]
    parameters: Mapping[str, Any]
    server_timing: str


class Client:
    """Calls the router at `url`, e.g. http://127.0.0.1:8080/function/router.

    Units: timeout_s, in seconds, bounds each call and is sent as X-Timeout. Of an https URL `trust` says which CAs
    vouch for it, and which certificate it is shown; by default the system's, and none. `api_key` is the caller's key or
    token, by default that of the environment variable ISTHMUS_API_KEY; an empty one sends none. Without `exits`
    predictions are the full model's.

    Raises:
        RequestMalformed: not an http or https URL.
        SettingsError: a key with a space or a line break; it is never quoted.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        trust: TlsTrust | None = None,
        api_key: str | None = None,
        exits: bool = True,
    ) -> None:
        if not is_url(url):
            raise RequestMalformed(
                f"{url!r} is no URL of a function", hint="a URL is such as http://127.0.0.1:8080/function/router"
            )
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._exit_header = {} if exits else {EXIT_HEADER: "off"}
        self._key_header = _key_header(os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key)
        self._pool = ConnectionPool(self.url, connect_timeout_s=min(_CONNECT_TIMEOUT_S, timeout_s), trust=trust)

    def photo(self, data: bytes, *, model: str = "", top_k: int | None = None) -> dict[str, Any]:
        """Classify a photo: the router's response with classes, route and timings.

        Raises:
            HopRejected: the server at the URL is not a router.
            Errors of the router, by `error_of`.
        """
        fields = {k: str(v) for k, v in (("model", model), ("top_k", top_k)) if v}
        response = self.post("/", [data], {}, fields)
        with self._reading():
            document: dict[str, Any] = json.loads(response.body)
            for key, kind in (("classes", list), ("route", dict), ("model_name", str), ("model_version", str)):
                if not isinstance(document[key], kind):
                    raise ValueError(f"{key} is no {kind.__name__}")
        return document

    def photos(self, photos: Sequence[bytes], *, model: str = "", top_k: int | None = None) -> list[dict[str, Any]]:
        """The router's predictions for a batch of photos, up to its bound on the number, in their order.

        Each has `classes`, `route` and `timings_ms` as `photo` gives them, with `model_name` and `model_version`. For a
        photo that cannot be read it has the error's document instead: `error`, `type` and `facts`.

        Raises:
            As `photo`; an error of the request, the model or a hop is the whole batch's.
        """
        if not photos:
            return []
        fields = {k: str(v) for k, v in (("model", model), ("top_k", top_k)) if v}
        response = self.post("/", _form(photos), {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}, fields)
        with self._reading():
            document = json.loads(response.body)
            predictions: list[dict[str, Any]] = document["predictions"]
            facts = {"model_name": document["model_name"], "model_version": document["model_version"]}
            if len(predictions) != len(photos) or not all("error" in p or p["classes"] for p in predictions):
                raise ValueError("another number of predictions than photos")
        return [prediction | facts for prediction in predictions]

    def infer(self, arrays: Mapping[str, Array], *, model: str, version: str = "") -> Prediction:
        """The model's outputs for `arrays`, with binary tensors in both directions.

        Raises:
            HopRejected: the server at the URL is not a router.
            Errors of the router, by `error_of`.
        """
        body, headers = _tensor_body(arrays)
        version_part = f"/versions/{quote(version, safe='')}" if version else ""
        path = f"/v2/models/{quote(model, safe='')}{version_part}/infer"
        response = self.post(path, body, headers, {})
        with self._reading():
            # Without the header the whole body is JSON, from a server without binary tensors.
            split = int(response.headers.get(oip.HEADER_LENGTH.lower(), len(response.body)))
            doc, binary = json.loads(response.body[:split]), memoryview(response.body)[split:]
            outputs: dict[str, Array] = {}
            for output in doc["outputs"]:
                spec = TensorSpec(output["name"], _DTYPE[output["datatype"]], tuple(output["shape"]))
                size = output["parameters"]["binary_data_size"]
                outputs[spec.name] = from_binary(binary, size, spec, shape_of(output, spec))
                binary = binary[size:]
            return Prediction(outputs, dict(doc.get("parameters", {})), response.headers.get("server-timing", ""))

    def explain(
        self,
        inputs: bytes | Mapping[str, Array],
        *,
        model: str = "",
        class_name: str = "",
        grid: int = 0,
        output: str = "",
        hidden_id: int = 0,
    ) -> dict[str, Any]:
        """Which parts of a photo's file, or of tensors, decided for a class (its label or index; else the likeliest).

        The router's response; the arguments are its parameters. Source: docs/reference/api.md, "Explanations".

        Raises:
            HopRejected: the server at the URL is not a router.
            Errors of the router, by `error_of`.
        """
        parameters = {"model": model, "class": class_name, "grid": grid, "output": output, "hidden_id": hidden_id}
        fields = {name: str(value) for name, value in parameters.items() if value}
        body, headers = ([inputs], {}) if isinstance(inputs, bytes) else _tensor_body(inputs)
        response = self.post("/explain", body, headers, fields)
        with self._reading():
            document: dict[str, Any] = json.loads(response.body)
            if not (document["explanation"]["drops"] and document["class"] and document["model_name"]):
                raise ValueError("no explanation")
        return document

    def embed(self, texts: Sequence[str], *, model: str = "") -> Array:
        """A vector for each text by a sentence encoder. Shapes: (texts, width), float32.

        Raises:
            HopRejected: the server at the URL is not a router.
            Errors of the router, by `error_of`.
        """
        body = {"input": list(texts), "model": model or None, "encoding_format": "base64"}
        response = self.post("/v1/embeddings", [json.dumps(body).encode()], {"Content-Type": "application/json"}, {})
        with self._reading():
            entries = json.loads(response.body)["data"]
            vectors = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in entries]
            if len(vectors) != len(texts):
                raise ValueError("another number of vectors than texts")
            return np.stack(vectors).astype(np.float32)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, model: str = "", options: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """The chunks of a chat completion as they come: OpenAI's documents, the last ones with usage and facts.

        `options` are further fields of the request, such as max_tokens. Leaving the iterator ends the generation.
        Source: docs/reference/openai.md.

        Raises:
            HopRejected: the server at the URL is not a router.
            Errors of the router, by `error_of`.
        """
        body = {
            "messages": list(messages),
            **({"model": model} if model else {}),
            **(options or {}),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with self._transport():
            try:
                yield from self._events("/v1/chat/completions", json.dumps(body).encode())
            except ErrorStatus as e:
                raise error_of(self.url, e.response) from e

    def _events(self, path: str, body: bytes) -> Iterator[dict[str, Any]]:
        """The documents of a stream of server-sent events, to `[DONE]`.

        Source: HTML Living Standard, 9.2 "Server-sent events".
        """
        # OpenFaaS's watchdog and gateway pass a body on as it comes only with this header.
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **self._own_headers}
        deadline = Deadline.after(self._timeout_s + 1.0)
        bounds = {"max_line_bytes": _MAX_EVENT_BYTES, "max_error_bytes": MAX_RESPONSE_BYTES}
        for line in self._pool.lines(body, headers, deadline, path=path, **bounds):
            field, _, data = line.decode("utf-8", "replace").strip().partition(":")
            if field != "data":  # comments keep the connection alive
                continue
            if (data := data.strip()) == "[DONE]":
                return
            with self._reading():
                document = json.loads(data)
                if not isinstance(document, dict):
                    raise ValueError("an event that is no object")
            if "error" in document:
                raise error_of(self.url, Response(502, {}, data.encode()))
            yield document
        raise BrokenOff("the stream ended early")

    @property
    def _own_headers(self) -> dict[str, str]:
        return {"X-Timeout": f"{int(self._timeout_s * 1000)}ms", **self._key_header, **self._exit_header}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Translate parse errors of a 200 response: the URL may be that of any server.

        Raises:
            HopRejected: the body is not a router's.
        """
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RequestMalformed, ShapeMismatch) as e:
            raise HopRejected(
                f"{self.url} answered 200, but not as a router does",
                hop=self.url,
                hint="give the router's URL: --url http://127.0.0.1:8080/function/router",
            ) from e

    def post(
        self, path: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str], fields: Mapping[str, str]
    ) -> Response:
        """POST `body`, in parts, to `path` below the URL, with the query `fields`.

        Raises:
            HopTimeout, HopUnavailable, HopRejected: no response.
            Errors of the function, by `error_of`.
        """
        return self._exchange("POST", path, body, headers, fields)

    def get(self, path: str) -> Response:
        """GET `path` below the URL.

        Raises:
            As `post`.
        """
        return self._exchange("GET", path, (), {}, {})

    def _exchange(
        self,
        method: str,
        path: str,
        body: Sequence[bytes | memoryview],
        headers: Mapping[str, str],
        fields: Mapping[str, str],
    ) -> Response:
        with self._transport():
            response = self._pool.post(
                body,
                {**self._own_headers, **headers},
                # The router answers at its own deadline; a second later no answer is to be expected.
                Deadline.after(self._timeout_s + 1.0),
                max_bytes=MAX_RESPONSE_BYTES,
                max_error_bytes=MAX_RESPONSE_BYTES,
                path=path,
                query=urlencode(fields),
                method=method,
            )
        if response.status != 200:
            raise error_of(self.url, response)
        return response

    @contextmanager
    def _transport(self) -> Iterator[None]:
        """Translate errors of the connection.

        Raises:
            HopTimeout, HopUnavailable, HopRejected: no response.
        """
        try:
            yield
        except TimeoutError as e:
            raise HopTimeout(f"{self.url} did not answer within {self._timeout_s:g} s", hop=self.url) from e
        except TlsFailed as e:
            problem = e.problem
            raise HopUntrusted(
                f"{self.url} is not called: {problem.text}", hint=problem.hint, hop=self.url, reason=problem.reason
            ) from e
        except Unreachable as e:
            raise HopUnavailable(
                f"{self.url} cannot be reached: {e}",
                hop=self.url,
                hint="start the functions on this machine with `isthmus up`, or name another router with --url",
            ) from e
        except BrokenOff as e:
            raise HopUnavailable(f"{self.url} broke off: {e}", hop=self.url) from e
        except ResponseTooLong as e:
            raise HopRejected(f"{self.url} answered with more than {MAX_RESPONSE_BYTES} bytes", hop=self.url) from e


def _key_header(key: str) -> dict[str, str]:
    """The header of an API key or token; none for an empty one.

    Raises:
        SettingsError: no header can hold it. The error of an HTTP library would quote it.
    """
    key = key.strip()
    if key and not is_secret(key):
        raise SettingsError(
            "the API key holds a space, a line break or another character that no key has",
            variable=API_KEY_VARIABLE,
            hint=f"set {API_KEY_VARIABLE} to one line: the key that isthmus caller new printed, or a token",
        )
    return {"Authorization": f"Bearer {key}"} if key else {}


def _tensor_body(arrays: Mapping[str, Array]) -> tuple[list[bytes | memoryview], dict[str, str]]:
    """An Open Inference Protocol request with binary tensors, in parts, and its headers."""
    chunks = {name: RAW.encode(np.asarray(array)) for name, array in arrays.items()}
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": datatype_of(array.dtype.name),
                    "parameters": {"binary_data_size": len(chunks[name])},
                }
                for name, array in arrays.items()
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    headers = {"Content-Type": "application/octet-stream", oip.HEADER_LENGTH: str(len(head))}
    return [head, *chunks.values()], headers


def _form(photos: Sequence[bytes]) -> list[bytes]:
    """A multipart/form-data body, in parts: base64 in JSON would send a third more. Source: RFC 7578."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="photo"\r\n\r\n'.encode()
    return [part for photo in photos for part in (head, photo, b"\r\n")] + [f"--{_BOUNDARY}--\r\n".encode()]


def error_of(url: str, response: Response) -> IsthmusError:
    """The router's JSON error, of its own form or OpenAI's, as the original exception; else HopRejected."""
    try:
        doc = json.loads(response.body)
        if isinstance(doc["error"], dict):
            return _openai_error(doc["error"])
        kind = next(c for c in HTTP_STATUS if c.__name__ == doc["type"])
        return kind(str(doc["error"]), hint=str(doc.get("hint", "")), **doc["facts"])
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
        text = response.body[:200].decode("utf-8", "replace").strip() or "an empty body"
        return HopRejected(f"{url} answered {response.status}: {text}", hop=url, status=response.status)


def _openai_error(error: Mapping[str, Any]) -> IsthmusError:
    """The exception of an error in OpenAI's form, by its code."""
    code = str(error["code"])
    kind = _OPENAI_CODES.get(code) or next(c for c in HTTP_STATUS if error_code(c.__name__) == code)
    return kind(str(error["message"]), **error["facts"])
