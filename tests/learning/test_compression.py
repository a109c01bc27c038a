"""Compression: variants keep the head's tensors, are measured, published and served; what cannot be is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.artifacts.bundle import Segment, SegmentVariant
from isthmus.artifacts.constraints import Blob
from isthmus.artifacts.segment_id import SegmentId
from isthmus.errors import CalibrationError, RequestMalformed
from isthmus.registry import FolderStore, Registry
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.serving import create_segment_app
from isthmus.wire import frame as frames
from isthmus_tools.graph.quantise import saturates
from isthmus_tools.learning.compression.choice import choose_variant, dominated_by, parse_target
from isthmus_tools.learning.compression.measurement import PlainFigures
from support.bundles import Published, framed, segment_settings
from support.cli import document, isthmus, refusal
from support.redundant_networks import CUT, publish_redundant, write_inputs

INT8 = f"..{CUT}~int8"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_redundant(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def compressed(original: Published, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Published, Any]:
    """A copy of the registry in which the head has every variant that applies, and what the command printed."""
    folder = tmp_path_factory.mktemp("compressed") / "registry"
    shutil.copytree(original.folder, folder)
    printed = document(compress(folder, data, "--dominated"))
    registry = Registry(FolderStore(folder))
    version = registry.resolve("network")
    published = replace(
        original,
        folder=folder,
        registry=registry,
        bundle=version.bundle,
        version=version.version,
        digest=version.digest,
    )
    return published, printed


def compress(registry: Path, data: Path, *options: object) -> Any:
    return isthmus(
        *("compress", "network", "--data", data, "--registry", registry, "--classes", "scores", "--inputs", 64),
        *("--json", *options),
    )


def variant(
    name: str, seconds: float = 0.01, size: int = 1000, agreement: float = 1.0, ratio: float = 0.5
) -> SegmentVariant:
    segment = Segment(SegmentId("", CUT, name), Blob("sha256:" + "0" * 64, size), (), (), ())
    return SegmentVariant(segment, "test", agreement, 100, seconds_ratio=ratio, seconds=seconds)


def test_a_variant_is_published_with_its_figures_and_passes_verification(compressed: tuple[Published, Any]) -> None:
    published, printed = compressed
    row = next(each for each in printed["variants"] if each["name"] == "int8")
    stored = next(each for each in published.bundle.variants if each.name == "int8")
    assert row["published"]
    assert stored.segment.weights == ()
    assert (stored.agreement, stored.inputs) == (row["agreement"], 32)
    assert stored.low <= stored.agreement <= stored.high
    assert 0 < stored.error < 0.1
    assert stored.memory_bytes > stored.segment.graph.size
    assert stored.seconds > 0
    assert isthmus("verify", "network", "--registry", published.folder).exit_code == 0
    assert (
        INT8
        in document(isthmus("diff", "network:1", "network:2", "--registry", published.folder, "--json"))["segments"][
            "added"
        ]
    )


def test_a_function_serves_a_variant_as_its_own_graph_computes(
    compressed: tuple[Published, Any], tmp_path: Path
) -> None:
    published, _ = compressed
    with create_segment_app(segment_settings(published, tmp_path / "cache")).test_client() as client:
        reply = client.post("/", data=framed(published, INT8))
        plain = client.post("/", data=framed(published, f"..{CUT}"))
    assert reply.status_code == 200, reply.get_data(as_text=True)
    segment = published.bundle.segment(INT8)
    graph = published.registry.blob(segment.graph)
    own = OrtRunner(graph, segment, providers=("CPUExecutionProvider",), threads=1).run(published.inputs)
    served = frames.decode(reply.data, max_bytes=2**20).tensors
    assert {n: a.tobytes() for n, a in served.items()} == {n: a.tobytes() for n, a in own.items()}
    boundary = frames.decode(plain.data, max_bytes=2**20).tensors
    assert {n: a.shape for n, a in served.items()} == {n: a.shape for n, a in boundary.items()}
    assert any(served[n].tobytes() != boundary[n].tobytes() for n in served)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "zip"], "'zip' is no method of compression"),
        (["--target", "fast"], "'fast' is no target"),
        (["--target", "5"], "'5' is no target"),
        (["--keep", "1.5"], "between 5% and 100%"),
        (["--method", "weights-int8"], "no linear layers"),
        (["--cut", CUT, "--whole"], "--whole compresses the whole model"),
        (["--inputs", "16", "--method", "int8", "--target", "1B"], "no variant meets 1B; nearest is int8"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(
    original: Published, data: Path, options: list[str], message: str
) -> None:
    assert message in refusal(compress(original.folder, data, *options))["error"]


def test_inputs_that_are_not_finite_are_refused_by_the_name_of_their_file(original: Published, tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "data")
    broken = np.full((8, 1, 3, 12, 12), np.nan, np.float32)
    for file in folder.iterdir():
        np.savez(file, x=broken)
    error = refusal(compress(original.folder, folder))
    assert "holds NaN or infinite values in x" in error["error"]
    assert error["facts"]["file"].endswith(".npz")


def test_too_few_inputs_are_refused(original: Published, tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "data", files=2, rows=3)
    assert "3 inputs to calibrate with; 8 are the least" in refusal(compress(original.folder, folder))["error"]


def test_targets_choose_the_fastest_that_agrees_or_the_one_that_agrees_most_in_time() -> None:
    exact, quick = variant("exact", 0.008, 3000, 0.995), variant("quick", 0.002, 1000, 0.90)
    assert choose_variant([exact, quick], [parse_target("99%")]) is exact
    assert choose_variant([exact, quick], [parse_target("10ms")]) is exact
    assert choose_variant([exact, quick], [parse_target("5ms")]) is quick
    assert choose_variant([exact, quick], [parse_target("1kB"), parse_target("80%")]) is quick
    with pytest.raises(CalibrationError, match="no variant meets 5ms, 99%; nearest is exact"):
        choose_variant([exact, quick], [parse_target("5ms"), parse_target("99%")])


@pytest.mark.parametrize("text", ["0%", "101%", "0ms", "-1MB", "", "fast", "2"])
def test_a_target_is_a_time_a_size_or_a_share(text: str) -> None:
    with pytest.raises(RequestMalformed):
        parse_target(text)


def test_a_variant_that_another_or_the_segment_beats_in_everything_is_dominated() -> None:
    plain = PlainFigures(2000, 0.01, 0)
    best, worse = variant("best", size=900), variant("worse", agreement=0.9, size=1000)
    assert dominated_by(worse, [best, worse], plain) == "best"
    assert dominated_by(best, [best, worse], plain) == ""
    assert dominated_by(variant("slow", ratio=1.1, size=2000), [], plain) == "the segment itself"
    assert dominated_by(variant("slow", ratio=1.1, size=1000), [], plain) == ""


def test_sums_of_products_saturate_on_x86_without_vnni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo.write_text("flags : avx2 avx512f")
    assert saturates(cpuinfo)
    cpuinfo.write_text("flags : avx2 avx512f avx512_vnni")
    assert not saturates(cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not saturates(cpuinfo)
