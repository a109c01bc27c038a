"""The leak document: what it says of codecs that were not measured, of other models and of tables learned since."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from isthmus.artifacts.bundle import Blob, Bundle, digest_of
from isthmus.artifacts.bundle import to_json as bundle_json
from isthmus.artifacts.choice import Choice
from isthmus.artifacts.fidelity import model_digest
from isthmus.artifacts.json_documents import schema
from isthmus.artifacts.leak import (
    LEAK,
    Leak,
    LeakEntry,
    LeakInputs,
    Likeness,
    private_cuts,
    read_leak,
    revealed,
    table_digests,
    to_json,
)
from isthmus.errors import LearningError
from support.bundles import Published
from support.bundles import photos as photos
from support.paths import ROOT


def likeness(similarity: float) -> Likeness:
    return Likeness(similarity, similarity, 20.0, 0.5)


def entry(cut: str, codec: str, similarity: float, quality: float = 1.0) -> LeakEntry:
    return LeakEntry(cut, codec, quality, "network", likeness(similarity), likeness(0.1), 100)


def leak_of(bundle: Bundle, *entries: LeakEntry) -> Leak:
    inputs = LeakInputs("photos", 10, 100, 100)
    tables = table_digests(bundle)
    return Leak(model_digest(bundle), "ssim", "x", (3, 8, 8), inputs, likeness(0.1), likeness(1.0), entries, tables)


@pytest.fixture
def leak(photos: Published) -> Leak:
    return leak_of(
        photos.bundle,
        entry("1", "raw", 0.8),
        entry("1", "int4/1", 0.25),
        entry("3", "raw", 0.3),
        entry("3", "transform/4", 0.1, 0.2),
        entry("3", "transform/4", 0.2, 0.6),
    )


def test_a_codec_that_was_not_measured_reveals_as_much_as_raw_tensors(leak: Leak) -> None:
    assert revealed(leak, "1", Choice("int4/1")) == 0.25
    assert revealed(leak, "1", Choice("int8/1")) == 0.8
    assert revealed(leak, "6", Choice("raw")) is None


def test_of_closer_looks_the_finest_transmission_counts(leak: Leak) -> None:
    assert revealed(leak, "3", Choice.parse("transform/4@0.2+0.6:1.5")) == 0.2
    assert revealed(leak, "3", Choice.parse("transform/4@0.2+0.8:1.5")) == 0.3


@pytest.mark.parametrize(("limit", "cuts"), [(0.9, ["1", "3"]), (0.3, ["3"]), (0.29, [])])
def test_a_cut_is_private_where_raw_tensors_reveal_no_more_than_the_limit(
    leak: Leak, limit: float, cuts: list[str]
) -> None:
    assert private_cuts(leak, limit) == cuts


def test_a_bundle_names_its_leak_document_as_content(photos: Published, leak: Leak) -> None:
    data = to_json(leak)
    bundle = replace(photos.bundle, leak=Blob(digest_of(data), len(data)))
    assert digest_of(data) in bundle.blobs()
    assert read_leak(bundle, lambda _: data) == leak
    assert read_leak(photos.bundle, lambda _: data) is None
    assert b'"leak"' not in bundle_json(photos.bundle), "digests of earlier bundles must stay"


def test_measurements_under_tables_learned_again_are_left_out(photos: Published, leak: Leak) -> None:
    data = to_json(leak)
    calibrated = replace(
        photos.bundle, leak=Blob(digest_of(data), len(data)), tables={"r1": Blob("sha256:" + "1" * 64, 1)}
    )
    read = read_leak(calibrated, lambda _: data)
    assert read is not None
    assert {each.codec for each in read.entries} == {"raw", "int4/1"}
    assert revealed(read, "3", Choice("transform/4", 0.6)) == 0.3


def test_a_document_of_another_model_is_refused(photos: Published, leak: Leak) -> None:
    data = to_json(replace(leak, subject="sha256:" + "0" * 64))
    bundle = replace(photos.bundle, leak=Blob(digest_of(data), len(data)))
    with pytest.raises(LearningError, match="measured of another model") as refused:
        read_leak(bundle, lambda _: data)
    assert refused.value.hint == "measure it: isthmus leak photos --data FOLDER"


def test_a_similarity_beyond_1_is_refused_and_the_schema_is_that_of_the_struct(leak: Leak) -> None:
    doc = json.loads(to_json(leak))
    doc["entries"][0]["likeness"]["similarity"] = 1.5
    with pytest.raises(LearningError, match=r"leak.entries\[0\].likeness.similarity is 1.5; it is at most 1"):
        LEAK.decode(json.dumps(doc).encode())
    written = json.loads((ROOT / "docs" / "schemas" / "leak.schema.json").read_text())
    assert written == json.loads(json.dumps(schema(LEAK))), "write them: make schemas"
