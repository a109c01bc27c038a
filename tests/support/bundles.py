"""Small real models, cut and published: what the serving tests run."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
from flask.testing import FlaskClient
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.serving import make_server

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.segment_id import WHOLE
from isthmus.registry import FolderStore, Registry, SegmentCache
from isthmus.settings import RouterSettings, SegmentSettings
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from isthmus_tools.graph import build
from support.patience import LONG_S, until
from support.segments import run_whole

LABELS = ["ape", "bee", "cat", "dog", "elk"]
PREPROCESS = {
    "kind": "image",
    "input": "x",
    "dtype": "float32",
    "steps": [
        {"op": "resize", "size": [8, 8], "interpolation": "bilinear"},
        {"op": "normalize", "mean": [127.0] * 3, "std": [128.0] * 3},
        {"op": "layout", "to": "NCHW"},
    ],
}
POSTPROCESS = {"kind": "classify", "output": "logits", "softmax": True, "top_k": 3}
SKIP_CUTS = ("3", "4")
"""Two cuts of `photos` that its residual crosses: the middle segment neither takes nor gives it."""
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Published:
    """A published version of a model, its ONNX file, and one input for it."""

    registry: Registry
    folder: Path
    bundle: Bundle
    version: str
    digest: str
    onnx: Path
    inputs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.bundle.name

    @cached_property
    def whole(self) -> dict[str, Any]:
        """The uncut model's answer to `inputs`."""
        return run_whole(self.onnx, [self.inputs])[0]


def weight(name: str, *shape: int, seed: int = 0) -> onnx.TensorProto:
    rng = np.random.default_rng([seed, *name.encode()])
    return numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32), name)


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any]) -> Path:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def value(name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def photos_model(path: Path, seed: int = 0) -> Path:
    """A conv net of 1x3x8x8 pixels and 5 classes; the residual skips three nodes, and nine nodes follow each other."""

    def conv(index: int, source: str, to: str) -> Any:
        return helper.make_node("Conv", [source, f"w{index}", f"b{index}"], [to], pads=[1, 1, 1, 1])

    nodes = [
        conv(0, "x", "c0"),
        helper.make_node("Relu", ["c0"], ["r1"]),
        conv(2, "r1", "c2"),
        helper.make_node("Relu", ["c2"], ["r3"]),
        conv(4, "r3", "c4"),
        helper.make_node("Add", ["c4", "r1"], ["a5"]),
        helper.make_node("AveragePool", ["a5"], ["p6"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p6"], ["f7"]),
        helper.make_node("Gemm", ["f7", "w8", "b8"], ["logits"]),
    ]
    shapes = {"w0": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "w4": (16, 16, 3, 3), "w8": (256, 5)}
    biases = {"b0": 16, "b2": 16, "b4": 16, "b8": 5}
    weights = [weight(n, *s, seed=seed) for n, s in shapes.items()] + [
        weight(n, s, seed=seed) for n, s in biases.items()
    ]
    return save(path, nodes, [value("x", 1, 3, 8, 8)], [value("logits", 1, 5)], weights)


def pair_model(path: Path) -> Path:
    """Two inputs, of which `mask` is taken at the end only, and two outputs, of which `early` is given at the start."""
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["early"]),
        helper.make_node("Relu", ["early"], ["r1"]),
        helper.make_node("MatMul", ["r1", "w2"], ["m2"]),
        helper.make_node("Mul", ["m2", "mask"], ["late"]),
    ]
    weights = [weight("w0", 32, 32), weight("w2", 32, 32)]
    ends = [value("early", 1, 32), value("late", 1, 32)]
    return save(path, nodes, [value("x", 1, 32), value("mask", 1, 32)], ends, weights)


def free_model(path: Path) -> Path:
    """Any number of rows in `a` and in `b`; only running it shows whether the two can be added."""
    nodes = [
        helper.make_node("MatMul", ["a", "w0"], ["m0"]),
        helper.make_node("Relu", ["m0"], ["r1"]),
        helper.make_node("Add", ["r1", "b"], ["y"]),
    ]
    return save(path, nodes, [value("a", "n", 32), value("b", "m", 32)], [value("y", "k", 32)], [weight("w0", 32, 32)])


def bfloat16_model(path: Path) -> Path:
    """Takes and gives bfloat16, and a float32 scalar: y = 2x, scaled."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f0"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f0", "scale"], ["m1"]),
        helper.make_node("Cast", ["m1"], ["y"], to=TensorProto.BFLOAT16),
    ]
    return save(
        path,
        nodes,
        [value("x", "n", 4, dtype=TensorProto.BFLOAT16), value("scale")],
        [value("y", "n", 4, dtype=TensorProto.BFLOAT16)],
        [],
    )


def publish(
    folder: Path,
    model: Path,
    inputs: dict[str, Any],
    *,
    partitions: Sequence[Sequence[str]] = (),
    registry: Path | None = None,
    **arguments: Any,
) -> Published:
    """Cut the ONNX file `model` and publish it in `registry` (default: a new one in `folder`)."""
    where = registry or folder / "registry"
    target = Registry(FolderStore(where))
    bundle, files = build(model, model.stem, folder / f"built-{model.stem}", partitions=partitions, **arguments)
    version = target.publish(bundle, files)
    return Published(target, where, bundle, version.version, version.digest, model, inputs)


@cache
def _built_photos(seed: int) -> tuple[Bundle, Mapping[str, str], Mapping[str, bytes]]:
    """The model for photos, cut once in a process: bundle, paths by digest, and the files with their paths."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        bundle, files = build(
            photos_model(folder / "photos.onnx", seed),
            "photos",
            folder / "built-photos",
            partitions=[["6"], ["1"], ["3"], list(SKIP_CUTS), ["1", "6"]],
            preprocess=PREPROCESS,
            postprocess=POSTPROCESS,
            labels=LABELS,
        )
        paths = {digest: str(path.relative_to(folder)) for digest, path in files.items()}
        contents = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return bundle, paths, contents


def publish_photos(folder: Path, seed: int = 0, registry: Path | None = None) -> Published:
    """The model for photos, parted at its pooled features by default, and at four other places."""
    bundle, paths, contents = _built_photos(seed)
    for path, data in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    where = registry or folder / "registry"
    target = Registry(FolderStore(where))
    version = target.publish(bundle, {digest: folder / path for digest, path in paths.items()})
    inputs = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    return Published(target, where, bundle, version.version, version.digest, folder / "photos.onnx", inputs)


def publish_two_versions(folder: Path) -> Published:
    """Two versions of the model for photos in one registry; the first is described."""
    first = publish_photos(folder / "1")
    publish_photos(folder / "2", seed=7, registry=first.folder)
    return first


def copied(template: Published, folder: Path) -> Published:
    """The registry of `template` once more in `folder`, for a test that changes it."""
    shutil.copytree(template.folder, folder)
    return replace(template, folder=folder, registry=Registry(FolderStore(folder)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("photos"))


def framed(published: Published, segment: str = WHOLE, **changes: Any) -> bytes:
    """A frame for that segment with the model's inputs."""
    return frames.encode(
        Frame(**{"tensors": published.inputs, "bundle": published.digest, "segment": segment} | changes)
    )


def photo(size: tuple[int, int] = (8, 8), seed: int = 0, format: str = "PNG") -> bytes:
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def photo_array(data: bytes) -> Any:
    """What PREPROCESS makes of an image of 8x8 pixels, written out."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32)
    return ((pixels - 127) / 128).transpose(2, 0, 1)[None]


def segment_settings(published: Published, cache: Path, **given: Any) -> SegmentSettings:
    return SegmentSettings(**_common(published, cache) | given)


def router_settings(published: Published, cache: Path, hops: Sequence[str], **given: Any) -> RouterSettings:
    return RouterSettings(**_common(published, cache) | {"model": published.name, "hops": tuple(hops)} | given)


def cache_of(published: Published, cache: Path) -> SegmentCache:
    return SegmentCache(published.registry, cache, 2**30)


def _common(published: Published, cache: Path) -> dict[str, Any]:
    return {
        "registry": str(published.folder),
        "cache_dir": str(cache),
        "threads": 1,
        "log_level": "error",
        "expose_details": True,
        "registry_attempts": 1,
        "deadline_s": LONG_S,
        "exec_timeout": 0.0,
    }


@contextmanager
def served(app: Callable[..., Any]) -> Iterator[str]:
    """The app on a real socket; its URL, without a slash at the end."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ready(client: FlaskClient) -> FlaskClient:
    assert until(lambda: client.get("/ready").status_code == 200)
    return client


def metrics(
    client: FlaskClient, headers: Mapping[str, str] | None = None
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = client.get("/metrics", headers=dict(headers or {})).get_data(as_text=True)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
