"""Claim check: bodies of any size by reference, verified when they are redeemed, gone after their time."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from isthmus.errors import ClaimExpired, EventMalformed, MessageTooLarge, ResultStoreUnavailable
from isthmus.events.claims import Claim, ClaimStore, looks_like_claim, parse_claim
from isthmus.registry import BlobStore, FolderStore, RetryPolicy
from support.ports import free_port
from support.s3_server import s3_server as s3_server
from support.s3_server import store_at
from support.stores import STORES, make_store

HOUR_S = 3600


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return make_store(request.param, request, tmp_path)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def claims(store: BlobStore, clock: Clock, *, max_bytes: int = 32 * 2**20, keep_s: float = 2 * HOUR_S) -> ClaimStore:
    return ClaimStore(store, max_bytes=max_bytes, keep_s=keep_s, clock=clock)


@pytest.mark.parametrize("size", [0, 1, 3_200_000, 20 * 10**6])
def test_a_body_comes_back_from_a_claim_of_a_few_hundred_bytes(store: BlobStore, size: int) -> None:
    body = b"%d" % size * (size // len(b"%d" % size)) if size else b""
    claim = claims(store, Clock()).deposit(body, "image/jpeg")
    document = claim.encode()
    assert len(document) < 300
    assert looks_like_claim(document)
    assert claims(store, Clock()).redeem(parse_claim(document)) == body
    assert (claim.size, claim.content_type) == (len(body), "image/jpeg")


def test_a_body_over_the_bound_is_refused_with_both_numbers(store: BlobStore) -> None:
    with pytest.raises(MessageTooLarge) as e:
        claims(store, Clock(), max_bytes=9).deposit(bytes(10))
    assert (e.value.facts["bytes"], e.value.facts["limit"]) == (10, 9)
    claim = claims(store, Clock()).deposit(bytes(10))
    with pytest.raises(MessageTooLarge) as e:
        claims(store, Clock(), max_bytes=9).redeem(claim)
    assert (e.value.facts["bytes"], e.value.facts["limit"]) == (10, 9)


def test_a_claim_expires_and_its_object_is_removed(store: BlobStore) -> None:
    clock = Clock()
    old = claims(store, clock).deposit(b"old")
    clock.now += 2 * HOUR_S
    young = claims(store, clock).deposit(b"young")
    same = claims(store, clock).deposit(b"old")
    clock.now = float(old.expires)
    with pytest.raises(ClaimExpired):
        claims(store, clock).redeem(old)
    assert claims(store, clock).sweep() == 1
    assert claims(store, clock).sweep() == 0
    # The sweep left what a later claim of the same body refers to.
    assert claims(store, clock).redeem(young) == b"young"
    assert claims(store, clock).redeem(same) == b"old"


def test_an_object_that_is_gone_or_another_is_not_taken_for_the_body(store: BlobStore) -> None:
    clock = Clock()
    claim = claims(store, clock).deposit(b"body")
    store.put(claim.key, b"fake")
    with pytest.raises(ClaimExpired, match="another"):
        claims(store, clock).redeem(claim)
    store.put(claim.key, b"bo")
    with pytest.raises(ClaimExpired, match="gone"):
        claims(store, clock).redeem(claim)
    store.delete(claim.key)
    with pytest.raises(ClaimExpired, match="gone"):
        claims(store, clock).redeem(claim)


def test_a_sweep_of_an_empty_store_removes_nothing(tmp_path: Path) -> None:
    assert claims(FolderStore(str(tmp_path)), Clock()).sweep() == 0


def test_a_store_that_is_away_is_unavailable() -> None:
    haste = RetryPolicy(attempts=2, timeout_s=1)
    store = store_at(f"http://127.0.0.1:{free_port()}", retry_policy=haste)
    away = ClaimStore(store, max_bytes=10, keep_s=10, retry_policy=haste)
    with pytest.raises(ResultStoreUnavailable):
        away.deposit(b"1")
    with pytest.raises(ResultStoreUnavailable):
        away.redeem(Claim("a" * 64, 1, 2**40))
    with pytest.raises(ResultStoreUnavailable):
        away.sweep()


@pytest.mark.parametrize(
    "field",
    [
        {"digest": "../../etc/passwd"},
        {"digest": "A" * 64},
        {"size": -1},
        {"expires": 2**50},
        {"format": "isthmus.claim/2"},
        {"content_type": "x" * 300},
        {"more": 1},
    ],
)
def test_a_malformed_claim_is_refused(field: dict[str, object]) -> None:
    document = msgspec.to_builtins(Claim("a" * 64, 1, 1))
    with pytest.raises(EventMalformed):
        parse_claim(json.dumps(document | field).encode())


def test_other_json_is_no_claim() -> None:
    assert not looks_like_claim(b'{"image": "x"}')
    assert not looks_like_claim(b'{"format"')
    assert not looks_like_claim(b"[" * 2000)
    assert not looks_like_claim(b'{"format": "isthmus.claim/1", "x": "' + b"x" * 4000 + b'"}')
