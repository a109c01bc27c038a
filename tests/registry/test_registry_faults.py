"""A registry over a bad network: what is tried again, what is not, and how long it takes to give up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from isthmus.artifacts.bundle import Bundle
from isthmus.errors import Corrupt, Denied, IsthmusError, RegistryError, RegistryUnavailable
from isthmus.registry import Registry, RetryPolicy, SegmentCache
from support.fake_bundles import Fake, make_bundle, weights_here
from support.faulty_relay import Fault, Relay, relaying
from support.moto_server import Moto, moto
from support.patience import least
from support.s3_server import PATIENCE, S3Server, store_at, unique_prefix

HASTY = RetryPolicy(attempts=3, timeout_s=2.0)
"""For what never answers: a pause of the machine may use it up before a second try."""
OFTEN = RetryPolicy(attempts=60, timeout_s=30.0)
"""For what stalls once: it hears of that as soon as HASTY does, and outlasts pauses."""
FAR_TOO_LONG_S = 20.0
"""Ten times HASTY, a third of the time that a stall lasts."""


@dataclass
class Bad:
    """A published bundle behind a relay that can spoil it, and a registry that has read nothing yet."""

    relay: Relay
    prefix: str
    fake: Fake
    registry: Registry

    def asked_with(self, retry_policy: RetryPolicy) -> Registry:
        return Registry(store_at(self.relay.endpoint, self.prefix, retry_policy=retry_policy), retry_policy)

    @property
    def bundle(self) -> Bundle:
        return self.fake.bundle


@pytest.fixture
def bad(moto_s3: Moto, tmp_path: Path) -> Iterator[Bad]:
    prefix, fake = unique_prefix(), make_bundle(tmp_path / "fake")
    Registry(store_at(moto_s3.endpoint, prefix), PATIENCE).publish(fake.bundle, fake.files)
    with relaying(moto_s3.port) as relay:
        yield Bad(relay, prefix, fake, Registry(store_at(relay.endpoint, prefix), PATIENCE))


@pytest.mark.parametrize("fault", ["flip", "truncate", "drop", "500", "stall"])
def test_a_passing_fault_is_not_seen(bad: Bad, tmp_path: Path, fault: Fault) -> None:
    cache = SegmentCache(bad.asked_with(OFTEN if fault == "stall" else PATIENCE), tmp_path / "cache", 2**30)
    for spoilt in (lambda: cache.bundle(bad.fake.digest), lambda: cache.locate(bad.fake.digest, "..")):
        bad.relay.spoil(fault, times=1)
        spoilt()
    assert bad.relay.times == 0
    assert weights_here(bad.fake, cache.locate(bad.fake.digest, "..").path, "..")


@pytest.mark.parametrize(
    ("what", "fault", "error"),
    [
        ("manifest", "flip", Corrupt),
        ("manifest", "drop", RegistryUnavailable),
        ("weights", "flip", Corrupt),
        ("weights", "truncate", RegistryUnavailable),
        ("weights", "drop", RegistryUnavailable),
        ("weights", "500", RegistryUnavailable),
        ("weights", "stall", RegistryUnavailable),
        ("weights", "trickle", RegistryUnavailable),
    ],
)
def test_a_lasting_fault_names_the_blob_in_bounded_time(
    bad: Bad, tmp_path: Path, what: str, fault: Fault, error: type[IsthmusError]
) -> None:
    cache = SegmentCache(bad.registry, tmp_path / "cache", 2**30)
    retry_policy = HASTY if fault in ("stall", "trickle") else PATIENCE
    asking = SegmentCache(bad.asked_with(retry_policy), tmp_path / "cache", 2**30)
    blob = bad.fake.digest
    if what == "weights":
        blob = bad.bundle.weights.blob.digest
        forget_weights(cache.locate(bad.fake.digest, "..").path)
    bad.relay.spoil(fault)
    before, start = bad.relay.hits, time.monotonic()
    with pytest.raises(error) as caught:
        asking.locate(bad.fake.digest, "..")
    took = time.monotonic() - start
    assert took < FAR_TOO_LONG_S
    assert blob[7:] in str(caught.value)
    assert blob[7:] in caught.value.facts["blob"]
    assert caught.value.facts["registry"] == bad.registry.url
    assert bad.relay.hits - before <= retry_policy.attempts
    assert bad.relay.hits - before > 1 or took > retry_policy.timeout_s
    bad.relay.fault = None
    assert weights_here(bad.fake, cache.locate(bad.fake.digest, "..").path, "..")


def test_a_long_tensor_is_hashed_as_a_whole_and_fetched_again(moto_s3: Moto, tmp_path: Path) -> None:
    prefix, fake = unique_prefix(), make_bundle(tmp_path / "fake", lengths=[17 * 2**20], cut=0)
    Registry(store_at(moto_s3.endpoint, prefix), PATIENCE).publish(fake.bundle, fake.files)
    with relaying(moto_s3.port) as relay:
        cache = SegmentCache(Registry(store_at(relay.endpoint, prefix), PATIENCE), tmp_path / "cache", 2**30)
        forget_weights(cache.locate(fake.digest, "..").path)
        relay.spoil("flip")
        before = relay.hits
        with pytest.raises(Corrupt) as caught:
            cache.locate(fake.digest, "..")
        assert caught.value.facts["tensor"] == "w0"
        assert caught.value.facts["blob"] == fake.bundle.weights.blob.digest
        assert relay.hits - before == 5 * PATIENCE.attempts
        relay.spoil("flip", times=1)
        assert weights_here(fake, cache.locate(fake.digest, "..").path, "..")


def forget_weights(graph: Path) -> None:
    """Let every weight in a cache have to be fetched again, and nothing else."""
    weights = graph.parent / "weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))


def test_a_server_that_died_is_unavailable_within_the_bound(tmp_path: Path) -> None:
    fake = make_bundle(tmp_path / "fake")
    with moto() as server:
        registry = Registry(store_at(server.endpoint, "p"), PATIENCE)
        registry.publish(fake.bundle, fake.files)
        SegmentCache(registry, tmp_path / "cache", 2**30).locate(fake.digest, "..1")
    hasty = Registry(store_at(server.endpoint, "p", retry_policy=HASTY), HASTY)
    cache = SegmentCache(hasty, tmp_path / "cache", 2**30)

    def given_up() -> float:
        start = time.monotonic()
        with pytest.raises(RegistryUnavailable) as caught:
            cache.locate(fake.digest, "..")
        assert fake.bundle.segments[".."].graph.digest[7:] in str(caught.value)
        return time.monotonic() - start

    assert least(given_up, HASTY.timeout_s) < HASTY.timeout_s
    assert cache.locate(fake.digest, "..1").path.exists()
    with pytest.raises(RegistryUnavailable):
        hasty.resolve("fake")


def test_a_wrong_key_is_denied_at_once(bad: Bad, s3_server: S3Server) -> None:
    with relaying(s3_server.port) as relay:
        check_denied(replace(bad, relay=relay))


def check_denied(bad: Bad) -> None:
    registry = Registry(store_at(bad.relay.endpoint, bad.prefix, secret="wrong"), PATIENCE)
    for ask in (lambda: registry.resolve("fake"), lambda: registry.blob(bad.bundle.weights.blob)):
        before = bad.relay.hits
        with pytest.raises(Denied):
            ask()
        assert bad.relay.hits - before == 1


def test_what_is_missing_is_asked_for_once(bad: Bad) -> None:
    before = bad.relay.hits
    with pytest.raises(RegistryError):
        bad.registry.read("sha256:" + "0" * 64, 0, 5)
    assert bad.relay.hits - before == 1


@pytest.mark.parametrize("times", [1, 2])
def test_a_bit_flipped_on_the_way_up_is_noticed_and_sent_again(bad: Bad, tmp_path: Path, times: int) -> None:
    fake = make_bundle(tmp_path / "second", name="second", seed=2)
    bad.relay.spoil("flip-upload", times=times)
    bad.registry.publish(fake.bundle, fake.files)
    assert bad.relay.times == 0
    cache = SegmentCache(bad.registry, tmp_path / "cache", 2**30)
    for segment in fake.bundle.segments:
        assert weights_here(fake, cache.locate(fake.digest, segment).path, segment)


def test_an_upload_that_never_arrives_right_is_corrupt_and_leaves_no_version(bad: Bad, tmp_path: Path) -> None:
    fake = make_bundle(tmp_path / "second", name="second", seed=2)
    bad.relay.spoil("flip-upload")
    with pytest.raises((Corrupt, RegistryUnavailable)):
        bad.registry.publish(fake.bundle, fake.files)
    bad.relay.fault = None
    assert bad.registry.models() == ["fake"]
    bad.registry.publish(fake.bundle, fake.files)
    SegmentCache(bad.registry, tmp_path / "cache", 2**30).locate(fake.digest, "..")
