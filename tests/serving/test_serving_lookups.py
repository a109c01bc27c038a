"""Requests that name what is not known here: within their deadline, beside the slots of others, and remembered."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from msgspec.structs import replace

from isthmus.admission import MAX_WAITING, Slots, slot_released
from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, IsthmusError, Missing, Overloaded, RegistryUnavailable
from isthmus.registry import FolderStore
from isthmus.registry.lookups import MAX_REMEMBERED, MAX_UNDER_WAY, Lookups
from isthmus.serving import create_router_app, create_segment_app
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from support.bundles import Published, metrics, photo, ready, router_settings, segment_settings
from support.bundles import photos as photos
from support.paths import ROOT
from support.patience import LONG_S, eventually

SHORT = {"X-Timeout": "400ms"}
UNKNOWN = "sha256:" + "ab" * 32


class Silent:
    """A folder registry that, once told to, answers nothing for what has not been read before."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.gate, self.silent, self.asked = threading.Event(), False, list[str]()
        for name in ("_read", "_list"):
            patched.setattr(FolderStore, name, self._held(getattr(FolderStore, name)))

    def _held(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def held(store: FolderStore, key: str, *how: Any) -> Any:
            self.asked.append(key)
            if self.silent:
                self.gate.wait(LONG_S)
            return method(store, key, *how)

        return held


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silent]:
    silent = Silent(monkeypatch)
    yield silent
    silent.gate.set()
    eventually(lambda: not any(t.name == "registry file" for t in threading.enumerate()))


@pytest.fixture
def router(photos: Published, tmp_path: Path, registry: Silent) -> Flask:
    settings = router_settings(photos, tmp_path / "r", ("local",), max_concurrency=2, registry_timeout_s=LONG_S)
    app = create_router_app(settings)
    assert ready(app.test_client()).post("/", data=photo()).status_code == 200
    return app


@pytest.fixture
def tail(photos: Published, tmp_path: Path, registry: Silent) -> Flask:
    app = create_segment_app(segment_settings(photos, tmp_path / "t", max_concurrency=1, registry_timeout_s=LONG_S))
    assert ready(app.test_client()).post("/", data=framed(photos)).status_code == 200
    return app


def framed(published: Published, **changes: Any) -> bytes:
    return frames.encode(Frame(**{"tensors": published.inputs, "bundle": published.digest, "segment": WHOLE} | changes))


@pytest.mark.parametrize(
    "ask",
    [
        lambda c: c.post("/?model=nobody", data=photo(), headers=SHORT),
        lambda c: c.post("/v2/models/nobody/infer", data=b"{}", headers=SHORT),
        lambda c: c.get("/v2/models/nobody", headers=SHORT),
        lambda c: c.get("/v2/models/photos/versions/7/ready", headers=SHORT),
    ],
    ids=["photo", "infer", "metadata", "ready"],
)
def test_an_unknown_model_is_given_up_at_the_deadline(ask: Any, router: Flask, registry: Silent) -> None:
    registry.silent = True
    answer = ask(router.test_client())
    assert (answer.status_code, answer.json["type"]) == (504, "DeadlineExceeded")
    assert not registry.gate.is_set()


def test_an_unknown_bundle_is_given_up_at_the_deadline(tail: Flask, photos: Published, registry: Silent) -> None:
    registry.silent = True
    answer = tail.test_client().post("/", data=framed(photos, bundle=UNKNOWN), headers=SHORT)
    assert (answer.status_code, answer.json["type"]) == (503, "NotReady")
    assert not registry.gate.is_set()


def test_those_who_wait_for_the_registry_hold_no_slot_of_others(
    router: Flask, tail: Flask, photos: Published, registry: Silent
) -> None:
    registry.silent = True
    asked = len(registry.asked)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(router.test_client().post, f"/?model=m{i}", data=photo()) for i in range(2)]
        waiting += [pool.submit(tail.test_client().post, "/", data=framed(photos, bundle=UNKNOWN))]
        eventually(lambda: len(registry.asked) >= asked + 3)
        eventually(lambda: in_flight(router) == in_flight(tail) == 0)
        # As many wait as may; one more is told to come back, and those who name what is known are served.
        assert router.test_client().post("/?model=m2", data=photo()).status_code == 429
        assert tail.test_client().post("/", data=framed(photos, bundle="sha256:" + "0" * 64)).status_code == 429
        for _ in range(3):
            assert router.test_client().post("/", data=photo()).status_code == 200
            assert tail.test_client().post("/", data=framed(photos)).status_code == 200
            assert router.test_client().get("/v2/models/photos/ready").status_code == 200
            assert router.test_client().get("/v2/models/photos").json["versions"] == ["1"]
            # The version that a known name means is known by its number, too.
            assert router.test_client().post("/?model=photos:1", data=photo()).status_code == 200
        registry.gate.set()
        assert [answer.result(LONG_S).status_code for answer in waiting] == [404] * 3
    assert in_flight(router) == in_flight(tail) == 0


def test_unknown_names_are_remembered(router: Flask, tail: Flask, photos: Published, registry: Silent) -> None:
    client: FlaskClient = router.test_client()
    for ask in (
        lambda: client.post("/?model=nobody", data=photo()),
        lambda: client.post("/?model=photos:77", data=photo()),
        lambda: client.get("/v2/models/photos/versions/78"),
        lambda: tail.test_client().post("/", data=framed(photos, bundle=UNKNOWN)),
    ):
        first = ask()
        asked = len(registry.asked)
        again = ask()
        assert (first.status_code, again.status_code) == (404, 404)
        assert again.json == first.json
        assert len(registry.asked) == asked


def test_names_and_routes_that_are_in_use_are_not_driven_out_by_others(
    photos: Published, tmp_path: Path, registry: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.routing.catalog.MAX_CACHED", 4)
    client = ready(create_router_app(router_settings(photos, tmp_path / "r", ("local",))).test_client())
    for i in range(4):
        other = replace(photos.bundle, source={"number": i})
        version = photos.registry.publish(other, {}).version
        assert client.post("/", data=photo()).status_code == 200
        assert client.get(f"/v2/models/photos/versions/{version}/ready").status_code == 200
    registry.silent = True
    assert client.post("/", data=photo(), headers=SHORT).status_code == 200


def test_a_registry_that_is_gone_is_no_fault_of_who_asks_for_an_unknown_name(
    photos: Published, tmp_path: Path, router: Flask, tail: Flask
) -> None:
    photos.folder.rename(tmp_path / "not-mounted")
    try:
        answer = router.test_client().post("/?model=nobody", data=photo())
        assert (answer.status_code, answer.json["type"]) == (503, "RegistryMissing")
        assert answer.headers["Retry-After"]
        answer = tail.test_client().post("/", data=framed(photos, bundle=UNKNOWN))
        assert (answer.status_code, answer.json["type"]) == (409, "BundleMismatch")
        assert router.test_client().post("/", data=photo()).status_code == 200
    finally:
        (tmp_path / "not-mounted").rename(photos.folder)


def test_a_name_that_is_published_is_found_once_it_is_forgotten(photos: Published, tmp_path: Path) -> None:
    settings = router_settings(photos, tmp_path / "r", ("local",), refresh_s=0.05)
    client = ready(create_router_app(settings).test_client())
    assert client.post("/?model=photos:later", data=photo()).status_code == 404
    photos.registry.move_alias("photos", "later", "1")
    eventually(lambda: client.post("/?model=photos:later", data=photo()).status_code == 200)


def in_flight(app: Flask) -> float:
    return metrics(app.test_client())["isthmus_requests_in_flight", ()]


# Look-ups by themselves


def test_callers_of_one_key_share_one_look_up() -> None:
    lookups, gate, times = Lookups(0.0), threading.Event(), list[int]()

    def slow() -> int:
        times.append(1)
        gate.wait(LONG_S)
        return 7

    with ThreadPoolExecutor(4) as pool:
        found: list[Future[int]] = [pool.submit(lookups.find, "k", slow, Deadline.after(LONG_S)) for _ in range(4)]
        eventually(lambda: bool(times))
        with pytest.raises(DeadlineExceeded):
            lookups.find("k", slow, Deadline.after(0.001))
        gate.set()
        assert [f.result() for f in found] == [7] * 4
    assert len(times) == 1


@pytest.mark.parametrize("error", [Missing("no", kind="model"), RegistryUnavailable("no", registry="r")])
def test_a_failure_is_told_again_with_its_facts_and_then_forgotten(error: IsthmusError) -> None:
    lookups, times = Lookups(3600.0), list[int]()

    def fail() -> None:
        times.append(1)
        raise error

    for _ in range(3):
        with pytest.raises(type(error)) as caught:
            lookups.find("k", fail, Deadline.after(LONG_S))
        assert (caught.value.message, caught.value.facts) == (error.message, error.facts)
    assert len(times) == 1
    lookups.forget("k")
    with pytest.raises(type(error)):
        lookups.find("k", fail, Deadline.after(LONG_S))
    assert len(times) == 2


def test_look_ups_and_what_is_remembered_of_them_are_bounded() -> None:
    lookups, gate = Lookups(3600.0), threading.Event()

    def fail() -> None:
        raise Missing("no")

    for i in range(MAX_REMEMBERED + 10):
        with pytest.raises(Missing):
            lookups.find(i, fail, Deadline.after(LONG_S))
    assert len(lookups._failures) == MAX_REMEMBERED
    for i in range(MAX_UNDER_WAY):
        with pytest.raises(DeadlineExceeded):
            lookups.find(f"slow {i}", lambda: gate.wait(LONG_S), Deadline.after(0.0))
    with pytest.raises(Overloaded):
        lookups.find("one more", lambda: gate.wait(LONG_S), Deadline.after(0.0))
    gate.set()
    eventually(lambda: not lookups._under_way)


def test_the_template_starts_threads_for_those_who_wait() -> None:
    index = ROOT / "template" / "python3-isthmus" / "index.py"
    assert f"MAX_WAITING = {MAX_WAITING} " in index.read_text()


def test_a_slot_is_given_back_however_the_waiting_ends() -> None:
    slots, later = Slots(1), Deadline.after(LONG_S)
    with slots.admitted(later):
        with slot_released():
            assert slots.working == 0
        assert slots.working == 1
        with pytest.raises(Missing), slot_released():
            raise Missing("no")
    assert slots.working == 0
    begun, leave = threading.Event(), threading.Event()

    def other() -> None:
        with slots.admitted(later):
            begun.set()
            leave.wait(LONG_S)

    with ThreadPoolExecutor(1) as pool:
        with contextlib.ExitStack() as stack:
            stack.enter_context(slots.admitted(later))
            released = stack.enter_context(contextlib.ExitStack())
            released.enter_context(slot_released())
            pool.submit(other)  # another request came meanwhile
            assert begun.wait(LONG_S)
            with pytest.raises(Overloaded):
                released.close()
        assert slots.working == 1
        leave.set()
    with (
        slots.unadmitted(later),
        slot_released(),
        slot_released(refuse=False),
        pytest.raises(Overloaded),
        slot_released(),
    ):
        pass
    assert slots.working == 0
    assert Slots(100).waiting.limit == MAX_WAITING


def test_those_who_wait_with_a_slot_leave_half_of_the_slots_to_others() -> None:
    """A burst may wait for a segment that is loading, and callers of what is loaded are served beside it."""
    slots, later = Slots(4), Deadline.after(LONG_S)
    with contextlib.ExitStack() as waiting:
        for _ in range(slots.waiting.limit + 2):
            waiting.enter_context(slots.admitted(later))
            waiting.enter_context(slot_released(refuse=False))
        assert slots.working == 2
        with slots.admitted(later), pytest.raises(Overloaded), slot_released(refuse=False):
            pass
        with slots.admitted(later):
            assert slots.working == 3
    assert slots.working == 0
