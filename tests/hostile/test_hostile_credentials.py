"""API keys and tokens, each of whose characters, headers and claims was altered: 401 or 403, and nothing runs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import pytest
from flask.testing import FlaskClient
from joserfc import jwt
from joserfc.jwk import ECKey

from isthmus.security.caller_keys import CallerEntry, key_digest, new_key
from isthmus.security.callers import Role
from isthmus.serving import create_router_app
from support.attacks import MIN_CASES, Attack, Target
from support.bundles import Published, photo, ready, router_settings
from support.bundles import photos as photos
from support.token_keys import EC, ED, RSA, AnyAlgorithm

KEY, PROM = new_key(), new_key()
ISSUER, AUDIENCE = "https://id.example.com", "isthmus"
STRANGER = ECKey.generate_key("P-256", {"kid": "ec"}, private=True)
SIGNERS = {"RS256": RSA, "ES256": EC, "EdDSA": ED}
PHOTO = photo()


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": now + 3600, "nbf": now - 60, "roles": ["infer"]}
    return {name: value for name, value in (good | changes).items() if value is not ...}


def token(key: Any = EC, algorithm: str = "ES256", head: Mapping[str, Any] | None = None, **changes: Any) -> str:
    return jwt.encode(
        {"alg": algorithm, "kid": key.kid, **(head or {})}, claims(**changes), key, registry=AnyAlgorithm()
    )


def text_of(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forged(head: Any, payload: Any, signature: bytes) -> str:
    return ".".join(text_of(part) for part in (json.dumps(head).encode(), json.dumps(payload).encode(), signature))


@pytest.fixture(scope="module")
def target(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("credentials")
    entries = [
        CallerEntry(name="ann", key=key_digest(KEY), roles={Role.INFER: ["photos"]}),
        CallerEntry(name="prom", key=key_digest(PROM), roles={Role.METRICS: ["*"]}),
    ]
    (folder / "callers").write_bytes(b"\n".join(map(msgspec.json.encode, entries)))
    keys = [{**key.as_dict(private=False), "kid": key.kid} for key in SIGNERS.values()]
    (folder / "keys.json").write_text(json.dumps({"keys": keys}))
    issuer = {"jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "jwt_keys": str(folder / "keys.json")}
    app = create_router_app(
        router_settings(photos, folder / "cache", ("local",), secrets_dir=str(folder), jwt_models_claim="", **issuer)
    )

    def good(client: FlaskClient) -> int:
        return client.post("/", data=PHOTO, headers={"X-API-Key": KEY}).status_code

    yield Target(ready(app.test_client()), good, "hop0", {"X-API-Key": PROM})
    app.extensions["isthmus"].close()


def asks(what: str, credential: str, status: int = 401, path: str = "/", method: str = "POST") -> Attack:
    return Attack(what, status, PHOTO, {"Authorization": f"Bearer {credential}"}, path, method)


def keys_altered() -> Iterator[Attack]:
    for place in range(len(KEY)):
        yield asks(f"key at {place}", KEY[:place] + ("x" if KEY[place] != "x" else "y") + KEY[place + 1 :])
    for what, text in {
        "short": KEY[:-1],
        "long": KEY + "A",
        "twice": KEY + KEY,
        "its digest": key_digest(KEY),
        "the hex of its digest": hashlib.sha256(KEY.encode()).hexdigest(),
        "upper": KEY.upper(),
        "without prefix": KEY.removeprefix("isthmus_"),
        "a name": "ann",
        "a wildcard": "*",
        "a path": "../callers",
        "SQL": "' OR 1=1 --",
        "a format": "%s%n{0}",
        "NUL": KEY[:20] + "\0" + KEY[21:],
        "long text": "x" * 100_000,
        "none": "",
        "null": "null",
        "a list": f"{KEY},{KEY}",
    }.items():
        yield asks(f"key: {what}", text)
    for name in ("X-API-Key", "Authorization", "Cookie", "X-Auth", "Proxy-Authorization"):
        for value in ("x", f"Basic {KEY}", f"Digest {KEY}", f"Bearer{KEY}", f"Token {KEY}", f"Bearer {KEY} x"):
            yield Attack(f"{name}: {value[:8]}", 401, PHOTO, {name: value})
    for query in ("api_key", "access_token", "key", "authorization"):
        yield Attack(f"?{query}", 401, PHOTO, {}, f"/?{query}={KEY}")
    # What its role is not for.
    for path, method in {
        "/metrics": "GET",
        "/routes": "GET",
        "/?model=other": "POST",
        "/v2/models/other": "GET",
    }.items():
        yield asks(f"{method} {path}", KEY, 403, path, method)
    yield Attack("a pinned route", 403, PHOTO, {"X-API-Key": KEY, "Isthmus-Route": "raw"})
    yield Attack("metrics' key", 403, PHOTO, {"X-API-Key": PROM})


def tokens_altered() -> Iterator[Attack]:
    now = int(time.time())
    for algorithm, key in SIGNERS.items():
        good, other = token(key, algorithm), token(key, algorithm, sub="bob", roles=["administer"])
        head, payload, signature = good.split(".")
        for part in range(3):
            pieces = good.split(".")
            for place in range(0, len(pieces[part]) - 1, 24):
                changed = pieces[part]
                # Not the last character: its low bits belong to no byte.
                changed = changed[:place] + ("A" if changed[place] != "A" else "B") + changed[place + 1 :]
                yield asks(
                    f"{algorithm} part {part} at {place}", ".".join([*pieces[:part], changed, *pieces[part + 1 :]])
                )
        yield asks(f"{algorithm} claims of another", f"{head}.{other.split('.')[1]}.{signature}")
        yield asks(f"{algorithm} signature of another", f"{head}.{payload}.{other.split('.')[2]}")
        for extra in ("", "=", "\\u0000", "AAAA"):
            yield asks(
                f"{algorithm} signature {extra!r}", f"{head}.{payload}.{signature[: len(signature) // 2]}{extra}"
            )
        for name in ("none", "None", "HS256", "HS384", "HS512", "RS512", "PS256", "ES384", "dir", "", 5, None, []):
            document = {"alg": name, "kid": key.kid}
            yield asks(
                f"alg {name} of {algorithm}", forged(document, claims(), base64.urlsafe_b64decode(signature + "=="))
            )
            yield asks(f"alg {name} of {algorithm}, unsigned", forged(document, claims(), b""))
    public = RSA.as_pem(private=False)
    head = ".".join(forged({"alg": "HS256", "kid": "rsa"}, claims(), b"").split(".")[:2])
    yield asks("a public key as a secret", f"{head}.{text_of(hmac.digest(public, head.encode(), 'sha256'))}")
    for name, value in {
        "kid": "../../../dev/null",
        "jku": "http://127.0.0.1:9/keys",
        "x5u": "http://127.0.0.1:9/cert",
        "jwk": STRANGER.as_dict(private=False),
        "x5c": ["x"],
    }.items():
        yield asks(f"a stranger's token with {name}", token(STRANGER, head={name: value}))
    # Signed by the issuer, and demanding what nobody here knows.
    for critical in (["exp"], ["b64"], [], "exp", ["alg"]):
        document = {"alg": "EdDSA", "kid": "ed", "crit": critical, "exp": 1, "b64": False}
        signed = forged(document, claims(), b"").rstrip(".")
        yield asks(f"crit {critical}", f"{signed}.{text_of(ED.private_key.sign(signed.encode()))}")
    for kid in ("rsa", "ed", "", "EC", "ec ", "*", "x" * 1000, 5, None, ["ec"]):
        if kid not in ("", None):  # without an id every key of the algorithm is tried
            yield asks(
                f"kid {str(kid)[:9]}",
                token(EC, head={"kid": kid})
                if isinstance(kid, str)
                else forged({"alg": "ES256", "kid": kid}, claims(), b"x" * 64),
            )
    for name, values in {
        "iss": (
            ...,
            None,
            "",
            "https://id.example.com/",
            "https://ID.example.com",
            "http://id.example.com",
            5,
            [ISSUER],
            {},
        ),
        "aud": (..., None, "", "Isthmus", "isthmus2", [], ["other"], 5, {"isthmus": 1}),
        "exp": (..., None, 0, -1, now - 3600, now - 100_000, "soon", str(now + 60), [], {}, 1e400),
        "nbf": (now + 3600, now + 10**9, "later", [], {}),
        "iat": (now + 3600, "later", []),
        "sub": (..., None, "", 5, [], {}),
    }.items():
        for value in values:
            yield asks(f"{name}={value}", token(**{name: value}))
    for value in (
        ...,
        None,
        "",
        [],
        ["Infer"],
        ["INFER"],
        ["infer "],
        [["infer"]],
        {"infer": True},
        5,
        "admin",
        ["*"],
        "metrics",
    ):
        yield asks(f"roles={value}", token(roles=value), 403)
    for text in (
        "..",
        "a.b.c",
        "....",
        "eyJhbGciOiJub25lIn0.e30.",
        "e30.e30.e30",
        ".".join(["x" * 5000] * 3),
        "[.].x",
        "\\.\\.\\",
    ):
        yield asks(f"no token: {text[:10]}", text)
    # A bomb: an encrypted token whose content is compressed.
    yield asks("JWE", ".".join([text_of(b'{"alg":"dir","enc":"A128GCM","zip":"DEF"}'), "", "a", "b", "c"]))


def test_an_altered_key_is_refused_and_nothing_runs(target: Target) -> None:
    target.refuses("key", keys_altered())


def test_an_altered_token_is_refused_and_nothing_runs(target: Target) -> None:
    for algorithm, key in SIGNERS.items():
        assert target.client.post("/", data=PHOTO, headers={"X-API-Key": token(key, algorithm)}).status_code == 200
    target.refuses("token", tokens_altered())


def test_there_are_at_least_500_cases() -> None:
    assert sum(MIN_CASES.values()) >= 500
