"""Profiles as documents: their format, what they are of, where they are kept, and when a device was unsteady."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from isthmus.artifacts.device import Device
from isthmus.artifacts.profile import (
    FORMAT,
    MAX_PROFILE_BYTES,
    CodecSpeed,
    HopCost,
    Profile,
    SegmentCost,
    Timing,
    content_of,
    from_json,
    to_json,
)
from isthmus.errors import Missing, ProfileMalformed, RegistryError
from isthmus.registry import FolderStore, Registry
from isthmus.serving import profiling
from isthmus_tools.graph import add_cuts
from isthmus_tools.profiling import measure, profiles
from isthmus_tools.profiling.cuts import MAX_CUTS
from isthmus_tools.profiling.measure import timing
from support.bundles import Published, publish_photos
from support.bundles import photos as photos
from support.paths import ROOT
from support.profiles import DEVICE, DIGEST, PROFILE
from support.s3_server import store_at, unique_prefix

seconds = st.floats(0, 1e6, allow_nan=False)
counts = st.integers(0, 2**50)


@pytest.fixture(params=["folder", "s3"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "folder":
        (tmp_path / "registry").mkdir()
        return Registry(FolderStore(tmp_path / "registry"))
    return Registry(store_at(request.getfixturevalue("s3_server").endpoint, unique_prefix()))


@given(st.lists(seconds), seconds, counts, st.booleans())
def test_a_profile_is_read_as_it_was_written(nodes: list[float], s: float, n: int, is_steady: bool) -> None:
    cost = SegmentCost(Timing(s, s, s, n, is_steady), s, s, n, n, n, n, n)
    profile = replace(PROFILE, nodes=tuple(nodes), segments={"..": cost}, steady=is_steady, hop=None, codecs={})
    assert from_json(to_json(profile)) == profile
    assert from_json(to_json(PROFILE)) == PROFILE


def edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    doc = json.loads(to_json(PROFILE))
    edit(doc)
    return json.dumps(doc).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'"' + b"x" * MAX_PROFILE_BYTES,
        edited(lambda d: d.update(format="isthmus.profile/2")),
        edited(lambda d: d.update(nodes=[0.1, -0.1])),
        edited(lambda d: d.update(nodes=[float("nan")])),
        edited(lambda d: d.update(nodes=[float("inf")])),
        edited(lambda d: d.update(nodes=["1"])),
        edited(lambda d: d.update(nodes=[True])),
        edited(lambda d: d.update(content="sha256:1")),
        edited(lambda d: d.update(bundle="../../etc")),
        edited(lambda d: d.update(model="x" * 1000)),
        edited(lambda d: d.update(steady="yes")),
        edited(lambda d: d.update(segments={})),
        edited(lambda d: d["segments"].pop("..")),
        edited(lambda d: d["segments"][".."].pop("decode_s")),
        edited(lambda d: d["segments"][".."]["run"].update(runs=1.5)),
        edited(lambda d: d["segments"].update({f"..{i}": d["segments"][".."] for i in range(2000)})),
        edited(lambda d: d["device"].update(cpus=8)),
        edited(lambda d: d["device"].update(cpu=7)),
        edited(lambda d: d["hop"].update(fixed_s=None)),
        edited(lambda d: d["hop"].update(more=1.0)),
        edited(lambda d: d["codecs"].update(raw={"pack_s": 1.0})),
        edited(lambda d: d.update(warnings=[7])),
    ],
)
def test_what_is_no_profile_is_refused(data: bytes) -> None:
    with pytest.raises(ProfileMalformed):
        from_json(data)


def test_content_stays_when_cuts_are_added_and_not_when_the_model_changes(photos: Published, tmp_path: Path) -> None:
    other = publish_photos(tmp_path / "other", seed=1)
    whole = photos.folder.parent / "built-photos" / "inputs-to-outputs.onnx"
    more, _ = add_cuts(photos.bundle, whole, [["7"]], tmp_path)
    assert len(more.segments) > len(photos.bundle.segments)
    assert content_of(more) == content_of(photos.bundle)
    assert content_of(other.bundle) != content_of(photos.bundle)


@pytest.mark.parametrize(
    "changes",
    [{"cpu": "Other CPU"}, {"cpus": 2}, {"threads": 1}, {"runtime": "onnxruntime 2"}, {"isthmus": "0.2"}],
)
def test_another_device_or_runtime_has_another_id(changes: dict[str, Any]) -> None:
    assert replace(DEVICE, id="", **changes).id != DEVICE.id
    assert replace(DEVICE).id == DEVICE.id


def test_profiles_are_found_by_content_tier_and_device(registry: Registry, photos: Published) -> None:
    bundle = photos.bundle
    mine = replace(PROFILE, content=content_of(bundle))
    assert profiles.find(registry, bundle, "edge", DEVICE.id) is None
    with pytest.raises(Missing, match="for the tier edge or cloud"):
        profiles.newest(registry, bundle, ("edge", "cloud"))
    profiles.put(registry, mine)
    cloud = replace(mine, tier="cloud", device=replace(DEVICE, id="", cpus=64), measured_at="2026-01-02T00:00:00+00:00")
    newer = replace(mine, device=replace(DEVICE, id="", cpus=8), measured_at="2026-01-03T00:00:00+00:00")
    profiles.put(registry, cloud)
    profiles.put(registry, newer)
    profiles.put(registry, replace(mine, model="photos", content=DIGEST))
    assert profiles.find(registry, bundle, "edge", DEVICE.id) == mine
    assert profiles.find(registry, bundle, "cloud", DEVICE.id) is None
    assert profiles.every(registry, bundle) == [newer, cloud, mine]
    assert profiles.newest(registry, bundle, ("edge", "cloud")) == {"edge": newer, "cloud": cloud}


def test_a_later_profile_takes_the_earlier_ones_place(registry: Registry, photos: Published) -> None:
    mine = replace(PROFILE, content=content_of(photos.bundle))
    profiles.put(registry, mine)
    profiles.put(registry, replace(mine, steady=True))
    assert [p.steady for p in profiles.every(registry, photos.bundle)] == [True]


def test_a_profile_of_something_else_is_not_taken(registry: Registry, photos: Published) -> None:
    content = content_of(photos.bundle)
    registry.documents.put_profile("photos", content, "edge", DEVICE.id, to_json(PROFILE))
    with pytest.raises(ProfileMalformed, match="is of something else") as caught:
        profiles.find(registry, photos.bundle, "edge", DEVICE.id)
    assert caught.value.facts["got"]["content"] == DIGEST
    assert "--again" in caught.value.hint


def test_a_profile_too_long_to_read_is_not_read(registry: Registry, photos: Published) -> None:
    content = content_of(photos.bundle)
    registry.documents.put_profile("photos", content, "edge", DEVICE.id, b" " * (MAX_PROFILE_BYTES + 1))
    with pytest.raises(RegistryError, match="exceeds"):
        profiles.find(registry, photos.bundle, "edge", DEVICE.id)


@pytest.mark.parametrize(
    ("model", "content", "tier", "device"),
    [
        ("../up", DIGEST, "edge", DEVICE.id),
        ("photos", "sha256:..", "edge", DEVICE.id),
        ("photos", DIGEST, "../edge", DEVICE.id),
        ("photos", DIGEST, "Edge", DEVICE.id),
        ("photos", DIGEST, "edge", "../../etc"),
    ],
)
def test_names_that_could_leave_their_folder_are_refused(
    tmp_path: Path, model: str, content: str, tier: str, device: str
) -> None:
    documents = Registry(FolderStore(tmp_path)).documents
    with pytest.raises(RegistryError, match="cannot be stored"):
        documents.put_profile(model, content, tier, device, b"{}")
    assert list(tmp_path.iterdir()) == []


def test_a_models_profiles_are_none_of_its_versions(photos: Published) -> None:
    profiles.put(photos.registry, replace(PROFILE, content=content_of(photos.bundle)))
    assert [v.version for v in photos.registry.versions("photos")] == ["1"]
    assert photos.registry.models() == ["photos"]


STEADY = [[0.010, 0.0101, 0.0102]] * 5


@pytest.mark.parametrize(
    ("series", "median", "is_steady"),
    [
        (STEADY, 0.0101, True),
        # Others used the device during two rounds: the three that agree are its own.
        ([*STEADY[:2], [0.02] * 3, [0.03] * 3, STEADY[0]], 0.0101, True),
        # It became slower and stayed so.
        ([*STEADY[:3], [0.02] * 3, [0.02] * 3], 0.0101, False),
        # No three agree.
        ([[0.01], [0.012], [0.02], [0.03], [0.05]], 0.012, False),
        # Three agree, and their runs do not.
        ([[0.005, 0.01, 0.02]] * 5, 0.01, False),
        # What lasts microseconds is allowed the clock's and the scheduler's differences.
        ([[10e-6], [30e-6], [15e-6], [40e-6], [20e-6]], 15e-6, True),
        ([[0.5]], 0.5, True),
    ],
)
def test_a_device_that_changed_its_speed_is_said_to_be_unsteady(
    series: list[list[float]], median: float, is_steady: bool
) -> None:
    found = timing(series)
    assert (found.median, found.steady) == (pytest.approx(median), is_steady)
    assert found.low <= found.median <= found.high


PAGE = (ROOT / "docs" / "reference" / "profile.md").read_text()


@pytest.mark.parametrize("part", [Profile, SegmentCost, Timing, HopCost, CodecSpeed, Device])
def test_every_field_of_a_profile_is_documented(part: type[Any]) -> None:
    names = set(part.__struct_fields__)
    assert names <= set(re.findall(r"`(\w+)`", PAGE))


def test_the_bounds_in_the_docs_are_the_codes() -> None:
    for text in (
        f"| `runs` | {profiling.RUNS} | timed runs, 1 to {profiling.MAX_RUNS} |",
        f"| `warmup` | {profiling.WARMUP} | runs before them, 0 to {profiling.MAX_WARMUP} |",
        f"`{FORMAT}`: JSON of at most {MAX_PROFILE_BYTES // 2**20} MiB",
        f"to {measure.MAX_DRIFT:.0%} between their medians",
        f'"format": "{profiling.FORMAT}"',
        f"there are {MAX_CUTS} at most",
        f"the secret `{profiling.SECRET}`",
    ):
        assert text in PAGE, text


def test_a_slowed_device_has_a_profile_of_its_own_that_stands_for_no_real_edge(tmp_path: Path) -> None:
    published = publish_photos(tmp_path)
    registry, bundle = published.registry, published.bundle
    plain = replace(PROFILE, content=content_of(bundle))
    assert plain.hop is not None
    slowed = replace(
        profiles.slowed(plain, 8.0, plain.hop, plain.whole.run.median), measured_at="2027-01-01T00:00:00+00:00"
    )
    assert slowed.device.cpu == f"1/8 of a CPU: {plain.device.cpu}"
    assert slowed.device.id != plain.device.id
    for profile in (plain, slowed):
        profiles.put(registry, profile)
    assert profiles.find(registry, bundle, "edge", slowed.device.id) == slowed
    assert profiles.newest(registry, bundle, ("edge",)) == {"edge": plain}
