"""What is tried again is one step; a sequence of steps has a budget of retries."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.errors import Corrupt, RegistryUnavailable
from isthmus.registry import FolderStore, Registry, RetryPolicy, SegmentCache
from support.fake_bundles import Fake, make_bundle, weights_here
from support.fake_s3 import QUICK, FakeS3, Request, Response, error, serving

BIG = (17 * 2**20, 9 * 2**20, 100)
"""26 MB: two parts up, four ranges back."""


@pytest.fixture
def s3() -> Iterator[FakeS3]:
    with serving(FakeS3()) as server:
        yield server


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Fake:
    return make_bundle(tmp_path_factory.mktemp("big"), lengths=BIG, cut=1)


def registry_of(s3: FakeS3, retry_policy: RetryPolicy = QUICK) -> Registry:
    return Registry(s3.store(retry_policy=retry_policy), retry_policy)


def once_for_each(request: Request, seen: set[object]) -> Response | None:
    """The first of each request for a key is refused."""
    step = (request.method, request.key, tuple(sorted(request.query.items())), request.headers.get("range"))
    if not request.key or step in seen:
        return None
    seen.add(step)
    return error(503, "SlowDown")


def test_a_throttled_range_of_the_reading_back_sends_nothing_again(s3: FakeS3, big: Fake, tmp_path: Path) -> None:
    refused = iter([error(503, "SlowDown")] * 3)
    s3.refuse = lambda request: next(refused, None) if "range" in request.headers else None
    registry_of(s3).publish(big.bundle, big.files)
    assert next(refused, None) is None
    whole = sum(path.stat().st_size for path in big.files.values())
    assert whole < s3.received_bytes < whole + 2**16
    cache = SegmentCache(registry_of(s3), tmp_path / "cache", 2**30)
    assert weights_here(big, cache.locate(big.digest, "..").path, "..")


def test_a_tenth_of_all_requests_refused_costs_their_parts_alone(s3: FakeS3, big: Fake, tmp_path: Path) -> None:
    chance = random.Random(5)
    s3.refuse = lambda request: error(503, "SlowDown") if chance.random() < 0.1 else None
    registry = registry_of(s3)
    registry.publish(big.bundle, big.files)
    whole = sum(path.stat().st_size for path in big.files.values())
    refused_parts = s3.received_bytes - whole
    assert refused_parts <= 2 * 16 * 2**20
    cache = SegmentCache(registry, tmp_path / "cache", 2**30)
    assert weights_here(big, cache.locate(big.digest, "..").path, "..")


def test_every_step_may_fail_once(s3: FakeS3, tmp_path: Path) -> None:
    seen: set[object] = set()
    s3.refuse = lambda request: once_for_each(request, seen)
    fake = make_bundle(tmp_path / "fake")
    assert registry_of(s3).publish(fake.bundle, fake.files).version == "1"
    assert registry_of(s3).resolve("fake").digest == fake.digest


def test_a_store_that_refuses_most_requests_ends_a_publish_after_a_few(s3: FakeS3, big: Fake) -> None:
    often = RetryPolicy(attempts=3, timeout_s=5.0)
    s3.refuse = lambda request: error(503, "SlowDown") if request.method == "PUT" else None
    with pytest.raises(RegistryUnavailable):
        registry_of(s3, often).publish(big.bundle, big.files)
    assert sum(request.method == "PUT" for request in s3.requests) <= 8 * often.attempts
    assert not s3.uploads


def test_a_part_that_was_spoilt_on_the_way_is_sent_again_alone(s3: FakeS3, big: Fake) -> None:
    refused = iter([error(400, "BadDigest")])
    s3.refuse = lambda request: next(refused, None) if request.query.get("partNumber") == "2" else None
    registry_of(s3).publish(big.bundle, big.files)
    parts = [request.query["partNumber"] for request in s3.requests if "partNumber" in request.query]
    assert sorted(parts) == ["1", "2", "2"]


def test_a_file_that_arrived_wrong_is_sent_again_as_a_whole_and_not_for_ever(
    s3: FakeS3, big: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = big.bundle.weights.blob.digest
    weights = f"p/blobs/sha256/{digest[7:]}"

    def rot(request: Request) -> Response | None:
        if request.key == weights and request.method == "GET" and times:
            times.pop()
            s3.objects[weights] = b"\0" + s3.objects[weights][1:]
        return None

    times = [1]
    s3.refuse = rot
    registry_of(s3).publish(big.bundle, big.files)
    assert s3.objects[weights] == big.weights
    completed = [r for r in s3.requests if r.method == "POST" and r.key == weights and "uploadId" in r.query]
    assert len(completed) == 2

    s3.objects.clear()
    times = [1] * 1000
    few = RetryPolicy(attempts=2, timeout_s=5.0)
    with pytest.raises(Corrupt):
        registry_of(s3, few).publish(big.bundle, big.files)
    assert weights not in s3.objects


def test_each_page_of_a_listing_is_tried_again_by_itself(s3: FakeS3) -> None:
    s3.page_size = 2
    s3.objects = {f"p/k{i:02}": b"" for i in range(7)}
    refused = set[str]()

    def once_for_each_page(request: Request) -> Response | None:
        if (token := request.query.get("continuation-token", "")) in refused:
            return None
        refused.add(token)
        return error(503, "SlowDown")

    s3.refuse = once_for_each_page
    assert s3.store().list("") == [f"k{i:02}" for i in range(7)]
    assert len(s3.requests) == 8


def test_a_listing_that_goes_round_in_circles_ends(s3: FakeS3) -> None:
    page = "<IsTruncated>true</IsTruncated><NextContinuationToken>a</NextContinuationToken>"
    s3.refuse = lambda request: (200, {}, f"<ListBucketResult>{page}</ListBucketResult>".encode())
    assert s3.store().list("") == []


def test_a_folder_that_fails_in_passing_is_tried_again_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, seen = make_bundle(tmp_path / "fake"), set[str]()
    place = FolderStore._place

    def fail_once(self: FolderStore, key: str, *how: object) -> bool:
        if key not in seen:
            seen.add(key)
            raise RegistryUnavailable("stale file handle", registry=self.url, blob=key)
        return place(self, key, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(FolderStore, "_place", fail_once)
    registry = Registry(FolderStore(tmp_path / "r", QUICK), QUICK)
    assert registry.publish(fake.bundle, fake.files).version == "1"
