"""A registry that someone else can write to: whatever lies there is served, or refused by a typed error in time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st

from isthmus.artifacts import fidelity as fidelities
from isthmus.artifacts import plan as plans
from isthmus.artifacts import profile as profile_document
from isthmus.artifacts.bundle import MAX_MANIFEST_BYTES, Bundle, digest_of, from_json, subject_digest, to_json
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import CacheFull, Corrupt, IsthmusError, RegistryError
from isthmus.processing.image_spec import validate_spec
from isthmus.registry import FolderStore, Registry, SegmentCache
from isthmus.registry.content import read_manifest
from isthmus.runtime.tables import Tables
from isthmus.serving import create_router_app, create_segment_app
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from support.altered_documents import altered, encoded, paths
from support.bundles import Published, photo, publish_photos, ready, router_settings, segment_settings
from support.fake_bundles import make_bundle
from support.fidelities import fidelity
from support.plans import full_plan
from support.profiles import PROFILE
from support.s3_server import PATIENCE

DIGEST = "sha256:" + "a" * 64


def refusal(read: Callable[[bytes], Any], data: bytes, what: str) -> IsthmusError | None:
    """The typed and short error with which `data` is refused, if it is."""
    try:
        read(data)
    except IsthmusError as e:
        error = e
    except Exception as e:
        pytest.fail(f"{what}: {type(e).__name__}: {e}")
    else:
        return None
    assert len(error.message) < 1000, what
    return error


def use(bundle: Bundle) -> None:
    """What a function asks of a bundle before it runs it."""
    assert bundle.blobs()
    assert bundle.partition()
    assert bundle.labels is None or bundle.labels.size >= 0
    for segment in bundle.segments.values():
        bundle.weight_ranges(segment)
    assert from_json(to_json(bundle)) == bundle
    subject_digest(bundle)
    fidelities.model_digest(bundle)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("altered"))


@pytest.fixture(scope="module")
def manifest(published: Published) -> dict[str, Any]:
    doc: dict[str, Any] = json.loads(to_json(published.bundle))
    blob = {"digest": DIGEST, "size": 1}
    # One segment and cut of each kind is enough.
    kept = [s for s in doc["segments"] if s["id"] in ("..", "..6", "6..")]
    return doc | {
        "segments": kept,
        "cuts": [c for c in doc["cuts"] if c["name"] == "6"],
        "default_cuts": ["6"],
        "tables": {"x": blob},
        "fidelity": blob,
        "plan": blob,
    }


def test_a_manifest_altered_anywhere_is_usable_or_refused_in_short(manifest: dict[str, Any]) -> None:
    use(read_manifest(encoded(manifest)))
    refused = 0
    for what, data in altered(manifest):
        refused += refusal(lambda data: use(read_manifest(data)), data, what) is not None
    assert refused > 1500


@pytest.mark.parametrize(
    ("read", "doc"),
    [
        (plans.from_json, json.loads(plans.to_json(full_plan()))),
        (fidelities.from_json, json.loads(fidelities.to_json(fidelity(DIGEST)))),
        (profile_document.from_json, json.loads(profile_document.to_json(PROFILE))),
    ],
    ids=["plan", "fidelity", "profile"],
)
def test_a_document_altered_anywhere_is_read_or_refused_in_short(read: Callable[[bytes], Any], doc: Any) -> None:
    for what, data in altered(doc):
        refusal(read, data, what)


def test_a_number_that_no_float_holds_is_refused_anywhere_in_a_fidelity() -> None:
    """A command that shows it would end in a traceback."""
    doc = json.loads(fidelities.to_json(fidelity(DIGEST)))
    for path in paths(doc):
        changed = copy.deepcopy(doc)
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        if isinstance(parent[path[-1]], str):
            continue
        parent[path[-1]] = 10**400
        assert refusal(fidelities.from_json, encoded(changed), str(path)) is not None, path


@given(data=st.binary(max_size=300))
def test_bytes_that_are_no_document_are_refused(data: bytes) -> None:
    for read in (read_manifest, plans.from_json, fidelities.from_json):
        with pytest.raises(IsthmusError):
            read(data)


@pytest.mark.parametrize("text", [b"[" * 10**5, b"1" * 10**5, b'{"format":"' + b"x" * 10**6 + b'"}', b"", b"NaN"])
def test_documents_that_are_deep_or_long_are_refused_in_short(text: bytes) -> None:
    for read in (read_manifest, plans.from_json, fidelities.from_json):
        with pytest.raises(IsthmusError) as caught:
            read(text)
        assert len(caught.value.message) < 500


def test_weights_that_a_segment_names_twice_are_refused(manifest: dict[str, Any]) -> None:
    """Each of many ranges might name all of the weights."""
    doc = copy.deepcopy(manifest)
    count = len(doc["weights"]["tensors"])
    doc["segments"][0]["weights"] = [[0, count]] * 50_000
    data = encoded(doc)
    assert len(data) < MAX_MANIFEST_BYTES
    with pytest.raises(RegistryError, match="some twice"):
        read_manifest(data)


def test_a_weights_file_that_no_disk_holds_is_not_blamed_on_the_setting(tmp_path: Path) -> None:
    fake = make_bundle(tmp_path / "fake")
    doc = json.loads(to_json(fake.bundle))
    doc["weights"]["blob"]["size"] = 2**62
    with pytest.raises(RegistryError, match="its last weight ends at"):
        read_manifest(encoded(doc))
    doc["weights"]["tensors"][-1][1:3] = [2**62 - 5, 5]
    store = FolderStore(tmp_path / "r", PATIENCE)
    data = encoded(doc)
    store.put(f"blobs/sha256/{digest_of(data)[7:]}", data)
    cache = SegmentCache(Registry(store, PATIENCE), tmp_path / "cache", 2**30)
    with pytest.raises(CacheFull, match="longer than one may be") as caught:
        cache.locate(digest_of(data), "..1")
    assert "publish the model again" in caught.value.hint


def test_numbers_of_a_preprocess_are_finite_and_bounded(published: Published) -> None:
    assert published.bundle.preprocess is not None
    spec = json.loads(json.dumps(published.bundle.preprocess))
    step = next(s for s in spec["steps"] if s["op"] == "normalize")
    step["mean"] = [10**400, 0, 0]
    with pytest.raises(IsthmusError, match="normalize mean"):
        validate_spec(spec)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"x" * 257, b"../../x", b"0", b"-1", b"9" * 200, b"2\n3", b"{}"],
)
def test_an_altered_alias_or_version_is_corrupt_or_names_what_is_missing(content: bytes, tmp_path: Path) -> None:
    fake = make_bundle(tmp_path / "fake")
    registry = Registry(FolderStore(tmp_path / "r", PATIENCE), PATIENCE)
    registry.publish(fake.bundle, fake.files)
    models = tmp_path / "r/models/fake"
    (models / "aliases/prod").write_bytes(content)
    with pytest.raises(RegistryError) as caught:
        registry.resolve("fake")
    assert type(caught.value) in (Corrupt, RegistryError)
    (models / "versions/1").write_bytes(content)
    with pytest.raises((Corrupt, RegistryError)):
        registry.resolve("fake:1")
    with pytest.raises((Corrupt, RegistryError)):
        registry.versions("fake")
    with pytest.raises(Corrupt):
        registry.aliases("fake")


def test_an_altered_table_is_refused_by_its_reader(published: Published) -> None:
    good = {"rows": np.zeros(3, np.int32), "means": np.zeros((1, 1), np.float32)}
    chance = np.random.default_rng(0)
    for arrays in (
        {},
        good,
        {"layout": np.array([2**31 - 1, -1], np.int32)},
        {name: np.asarray(chance.integers(-9, 9, (3, 3))) for name in "abc"},
        {"rows": np.array([4, 3, 2**31 - 1], np.int32), **{n: np.zeros(0, np.float32) for n in ("means", "weights")}},
    ):
        blob_data = frames.encode(Frame(arrays))
        bundle = from_json(
            encoded(
                json.loads(to_json(published.bundle)) | {"tables": {"x": {"digest": DIGEST, "size": len(blob_data)}}}
            )
        )
        tables = Tables(lambda _, b=bundle: b, lambda _, d=blob_data: d, 10**6)  # type: ignore[misc]
        with pytest.raises(RegistryError, match="is no codec's table"):
            tables(DIGEST, "x", "transform/3")


# Through the functions


@pytest.fixture(scope="module")
def functions(published: Published, tmp_path_factory: pytest.TempPathFactory) -> tuple[FlaskClient, FlaskClient]:
    folder = tmp_path_factory.mktemp("functions")
    router = create_router_app(router_settings(published, folder / "r", ("local",)))
    tail = create_segment_app(segment_settings(published, folder / "t"))
    return ready(router.test_client()), ready(tail.test_client())


def test_functions_answer_for_altered_manifests_without_an_unexpected_error(
    functions: tuple[FlaskClient, FlaskClient], published: Published, manifest: dict[str, Any]
) -> None:
    router, tail = functions
    doc = {key: value for key, value in manifest.items() if key not in ("tables", "fidelity", "plan")}
    some = altered(doc, 60)
    no_outputs = copy.deepcopy(doc)
    no_outputs["segments"][0]["outputs"] = []
    for number, (what, data) in enumerate([*some, ("no outputs", encoded(no_outputs))], 100):
        digest = digest_of(data)
        (published.folder / "blobs/sha256" / digest[7:]).write_bytes(data)
        (published.folder / f"models/photos/versions/{number}").write_text(digest)
        for answer in (
            router.post(f"/?model=photos:{number}", data=photo()),
            router.get(f"/v2/models/photos/versions/{number}"),
            tail.post("/", data=frames.encode(Frame(published.inputs, digest, WHOLE))),
        ):
            if answer.status_code != 200:
                assert answer.json["type"] not in ("InternalError", "SettingsError"), (what, answer.json)
                assert b"cache_dir" not in answer.data, what


@pytest.mark.parametrize("labels", [b"[1]", b'["\\ud800", "b", "c", "d", "e"]'])
def test_a_label_file_that_is_none_leaves_the_known_version_serving(labels: bytes, tmp_path: Path) -> None:
    mine = publish_photos(tmp_path / "mine")
    client = ready(create_router_app(router_settings(mine, tmp_path / "r", ("local",), refresh_s=0.0)).test_client())
    doc = json.loads(to_json(mine.bundle))
    doc["postprocess"]["labels"] = {"digest": digest_of(labels), "size": len(labels)}
    for data in (labels, encoded(doc)):
        (mine.folder / "blobs/sha256" / digest_of(data)[7:]).write_bytes(data)
    (mine.folder / "models/photos/versions/2").write_text(digest_of(encoded(doc)))
    (mine.folder / "models/photos/aliases/prod").write_text("2")
    for _ in range(2):
        assert client.post("/", data=photo()).json["model_version"] == "1"
    answer = client.post("/?model=photos:2", data=photo())
    assert (answer.status_code, answer.json["type"]) == (502, "RegistryError")
