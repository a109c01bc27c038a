"""Calls between functions that were altered, sent again, cut, moved or sealed by a stranger: 401, and nothing runs."""

from __future__ import annotations

import base64
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from isthmus.errors import CallerUnknown
from isthmus.security import protected_call
from isthmus.security.hop_protection import HopProtection
from isthmus.security.keys import HopKeys
from isthmus.security.protected_call import CallFacts
from isthmus.security.sealing import CALL, REPLY, CallSealer
from isthmus.security.signing import CallSigner
from isthmus.serving import create_segment_app
from isthmus.wire import frame as frames
from support.attacks import Attack, Target, flips, other_character
from support.bundles import Published, framed, publish_photos, ready, segment_settings
from support.bundles import photos as photos

KEY, OTHER = os.urandom(32), os.urandom(32)
KEYS = HopKeys({"k1": KEY})
SKEW_S = 30.0
FACTS = CallFacts("POST", "/", frames.CONTENT_TYPE)


def protection(seals: bool, keys: HopKeys = KEYS) -> HopProtection:
    return HopProtection(keys, seals=seals, skew_s=SKEW_S)


def target_of(photos: Published, folder: Path, mode: str) -> Target:
    (folder / "secrets").mkdir()
    (folder / "secrets" / "hop-keys").write_text(f"k1:{base64.b64encode(KEY).decode()}")
    settings = segment_settings(photos, folder / "cache", secrets_dir=str(folder / "secrets"), hop_security=mode)
    app = create_segment_app(settings)

    def good(client: FlaskClient) -> int:
        sent = protection(mode == "sealed").protect([framed(photos)], FACTS)
        return client.post("/", data=b"".join(sent.body), headers=dict(sent.headers)).status_code

    return Target(ready(app.test_client()), good)


@pytest.fixture(scope="module", params=["sealed", "signed"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def target(photos: Published, mode: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = target_of(photos, tmp_path_factory.mktemp(mode), mode)
    yield made
    made.client.application.extensions["isthmus"].close()


def call(what: str, body: bytes, headers: Mapping[str, str], path: str = "/") -> Attack:
    return Attack(what, 401, body, dict(headers), path)


def sealed_attacks(frame: bytes) -> Iterator[Attack]:
    """A sealed call with each byte of its head and some of its body altered, cut, spliced and sealed by others."""
    kind = {"Content-Type": protected_call.SEALED_TYPE}
    facts = CallFacts("POST", "/", protected_call.SEALED_TYPE)
    head, sealed = CallSealer(KEYS).seal([frame], facts)[0]
    whole = bytes(head) + bytes(sealed)
    body_places = random.Random(0).sample(range(len(head), len(whole)), 40)
    for place, data in flips(whole, [*range(len(head)), *body_places, *range(len(whole) - 16, len(whole))]):
        yield call(f"byte {place}", data, kind)
    for size in (*range(0, len(head) + 17, 3), len(whole) - 1):
        yield call(f"cut after {size}", whole[:size], kind)
    again, resealed = CallSealer(KEYS).seal([frame], facts)[0]
    yield call("a byte more", whole + b"\0", kind)
    yield call("the head of another call", bytes(again) + bytes(sealed), kind)
    yield call("the body of another call", bytes(head) + bytes(resealed), kind)
    yield call("twice in one", whole + whole, kind)
    yield call("a reply as a call", whole.replace(CALL, REPLY), kind)
    for length in (0, 1, 200, 255):
        yield call(f"an id of {length}", whole[:9] + bytes([length]) + whole[10:], kind)
    for path in ("/load", "/sessions/end"):
        yield call(f"at {path}", whole, kind, path)


def signed_attacks(frame: bytes) -> Iterator[Attack]:
    """A signed call with its headers altered or absent, and with another body."""
    sent = CallSigner(KEYS, skew_s=SKEW_S).sign_call([frame], FACTS)
    headers = dict(sent.headers)
    for name, value in headers.items():
        for place in range(0, len(value), 4 if name != "Content-Type" else 7):
            changed = value[:place] + other_character(value[place]) + value[place + 1 :]
            yield call(f"{name} at {place}", frame, {**headers, name: changed})
        if name != "Content-Type":
            for text in (
                "",
                "isthmus=",
                "isthmus=::",
                "()",
                ";;;",
                "a" * 5000,
                '("@method");keyid="k1"',
                value + ", " + value,
            ):
                yield call(f"{name}={text[:20]}", frame, {**headers, name: text})
            yield call(f"without {name}", frame, {n: v for n, v in headers.items() if n != name})
    for place, data in flips(frame, random.Random(1).sample(range(len(frame)), 40)):
        yield call(f"body at {place}", data, headers)
    yield call("a byte more", frame + b"\0", headers)
    yield call("a byte less", frame[:-1], headers)
    yield call("no body", b"", headers)
    for path in ("/load", "/sessions/end"):
        yield call(f"at {path}", frame, headers, path)
    fields = headers["Signature-Input"]
    for what, changed in {
        "fewer components": fields.replace('"content-digest" ', "").replace(' "content-digest"', ""),
        "another algorithm": fields.replace("hmac-sha256", "none"),
        "another key": fields.replace('"k1"', '"k2"'),
        "a key by a path": fields.replace('"k1"', '"../hop-keys"'),
        "of a reply": fields.replace("isthmus-call", "isthmus-reply"),
        "of another label": fields.replace("isthmus=", "other="),
    }.items():
        assert changed != fields, what
        yield call(what, frame, {**headers, "Signature-Input": changed})


def strangers(frame: bytes, seals: bool) -> Iterator[Attack]:
    """Calls by other keys, of other times, and without protection, to every route."""

    def sent(keys: HopKeys, clock: Callable[[], float] = time.time) -> tuple[bytes, dict[str, str]]:
        if seals:
            facts = CallFacts("POST", "/", protected_call.SEALED_TYPE)
            parts = CallSealer(keys, clock).seal([frame], facts)[0]
            return b"".join(map(bytes, parts)), {"Content-Type": protected_call.SEALED_TYPE}
        return frame, dict(CallSigner(keys, skew_s=SKEW_S).sign_call([frame], FACTS).headers)

    for what, keys in {
        "another key of the id": HopKeys({"k1": OTHER}),
        "a key of another id": HopKeys({"k2": KEY}),
        "a key of zeros": HopKeys({"k1": bytes(32)}),
        "a longer key": HopKeys({"k1": KEY + b"\1"}),
        "an id of one letter": HopKeys({"k": KEY}),
    }.items():
        yield call(what, *sent(keys))
    if seals:
        for off_s in (-86_400, -3600, -60, -SKEW_S - 5, SKEW_S + 5, 60, 3600, 86_400, 10**9):
            yield call(f"{off_s} s off", *sent(KEYS, lambda off_s=off_s: time.time() + off_s))  # type: ignore[misc]
    for path in ("/", "/load", "/sessions/end"):
        for kind in (frames.CONTENT_TYPE, "application/json", "", protected_call.SEALED_TYPE):
            yield call(f"unprotected {kind} at {path}", frame, {"Content-Type": kind}, path)
        yield call(f"a bearer at {path}", frame, {"Authorization": f"Bearer {base64.b64encode(KEY).decode()}"}, path)


def test_an_altered_or_foreign_call_is_refused_and_nothing_runs(target: Target, photos: Published, mode: str) -> None:
    frame = framed(photos)
    attacks = sealed_attacks(frame) if mode == "sealed" else signed_attacks(frame)
    target.refuses(mode, [*attacks, *strangers(frame, seals=mode == "sealed")])


def test_a_recorded_call_runs_once_and_its_reply_opens_for_it_alone(
    target: Target, photos: Published, mode: str
) -> None:
    way = protection(mode == "sealed")
    sent, other = (way.protect([framed(photos)], FACTS) for _ in range(2))
    body = b"".join(map(bytes, sent.body))
    first = target.client.post("/", data=body, headers=dict(sent.headers))
    assert first.status_code == 200
    assert sent.open_reply(200, first.headers, first.data)
    before = target.runs()
    for _ in range(10):
        assert target.client.post("/", data=body, headers=dict(sent.headers)).status_code == 401
    assert target.runs() == before
    for _, data in flips(first.data, range(0, len(first.data), 7)):
        with pytest.raises(CallerUnknown):
            sent.open_reply(200, first.headers, data)
    with pytest.raises(CallerUnknown):
        other.open_reply(200, first.headers, first.data)


def test_a_head_of_one_bundle_and_a_tail_of_another_do_not_run_together(photos: Published, tmp_path: Path) -> None:
    """The tail's frame is sealed by a router that holds another bundle: 409, or 404 where no registry has it."""
    other = publish_photos(tmp_path / "other", seed=5)
    target = target_of(photos, tmp_path, "sealed")
    before = target.runs()
    for segment in ("..", "6..", "..6"):
        sent = protection(seals=True).protect([framed(other, segment)], FACTS)
        response = target.client.post("/", data=b"".join(map(bytes, sent.body)), headers=dict(sent.headers))
        assert response.status_code == 404
    assert target.runs() == before
