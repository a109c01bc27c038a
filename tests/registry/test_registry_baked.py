"""A segment baked into an image: verified at start, and no other is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from isthmus.artifacts.bundle import Blob, digest_of, to_json
from isthmus.errors import BundleMismatch, Corrupt, Missing, RegistryError, SettingsError
from isthmus.registry import BakedSegment, SegmentCache, SegmentSource, open_source
from isthmus.settings import SegmentSettings
from isthmus_tools.graph.extract import bake_tables
from support.fake_bundles import Fake
from support.faulty_relay import flipped


@pytest.fixture
def folder(fake: Fake, tmp_path: Path) -> Path:
    folder = tmp_path / "baked"
    folder.mkdir()
    graph, weights = b"a graph with compact offsets", fake.weights[:3050]
    (folder / "manifest.json").write_bytes(to_json(fake.bundle))
    (folder / "segment.onnx").write_bytes(graph)
    (folder / "weights.bin").write_bytes(weights)
    named = {n: {"digest": digest_of(d), "size": len(d)} for n, d in (("graph", graph), ("weights", weights))}
    (folder / "segment.json").write_text(json.dumps({"segment": "..1", **named}))
    return folder


def test_a_baked_segment_is_located_under_its_bundles_digest(fake: Fake, folder: Path) -> None:
    source: SegmentSource = BakedSegment(folder)
    assert source.bundle(fake.digest) == fake.bundle
    with source.locate(fake.digest, "..1") as located:
        assert located.path == folder / "segment.onnx"
        assert located.segment == fake.bundle.segments["..1"]
        assert located.bundle == fake.bundle


def test_another_bundle_or_segment_is_missing_and_names_what_is_held(fake: Fake, folder: Path) -> None:
    baked = BakedSegment(folder)
    with pytest.raises(Missing, match=f"holds segment ..1 of fake .{fake.digest}") as caught:
        baked.locate(fake.digest, "1..")
    assert caught.value.facts == {"kind": "segment", "name": "1..", "exists": ["..1"]}
    with pytest.raises(BundleMismatch) as mismatch:
        baked.bundle("sha256:" + "0" * 64)
    assert mismatch.value.facts == {"has": [fake.digest], "wanted": "sha256:" + "0" * 64}


@pytest.mark.parametrize("name", ["segment.onnx", "weights.bin"])
def test_a_changed_file_stops_the_start(folder: Path, name: str) -> None:
    (folder / name).write_bytes(flipped((folder / name).read_bytes()))
    with pytest.raises(Corrupt, match=name):
        BakedSegment(folder)


@pytest.mark.parametrize("name", ["manifest.json", "segment.json", "segment.onnx", "weights.bin"])
def test_a_missing_file_stops_the_start_and_names_the_setting(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(SettingsError, match=name) as caught:
        BakedSegment(folder)
    assert caught.value.facts["variable"] == "segment_dir"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"segment": "..1", "graph": {"digest": "x", "size": 1}, "weights": {"digest": "x"}}']
)
def test_a_segment_json_of_another_format_is_refused(folder: Path, text: str) -> None:
    (folder / "segment.json").write_text(text)
    with pytest.raises(RegistryError, match=r"not a segment\.json"):
        BakedSegment(folder)


def test_what_codecs_need_for_the_segments_inputs_is_baked_beside_it(fake: Fake, folder: Path) -> None:
    content = {digest_of(data): data for data in (b"table of x", b"table of another tensor")}
    blobs = [Blob(digest, len(data)) for digest, data in content.items()]
    bundle = replace(fake.bundle, tables={"x": blobs[0], "y": blobs[1]})
    assert bake_tables(bundle, bundle.segment("..1"), lambda b: content[b.digest], folder) == blobs[0].size
    baked = BakedSegment(folder)
    assert baked.blob(blobs[0]) == b"table of x"
    with pytest.raises(Missing, match=r"holds segment \.\.1"):
        baked.blob(blobs[1])
    path = folder / "blobs" / blobs[0].digest[7:]
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(Corrupt):
        baked.blob(blobs[0])


def test_open_source_takes_the_baked_segment_if_there_is_one(folder: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "registry")
    baked = open_source(SegmentSettings(registry=nowhere, segment_dir=str(folder)))
    assert isinstance(baked, BakedSegment)
    cached = open_source(SegmentSettings(registry=nowhere, cache_dir=str(tmp_path / "cache")))
    assert isinstance(cached, SegmentCache)
