"""Trust in manifests and aliases: whose signature counts, until when, and for what."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from isthmus.artifacts import alias as alias_documents
from isthmus.artifacts.alias import ALIAS_TYPE, Alias
from isthmus.artifacts.json_documents import canonical
from isthmus.errors import RequestMalformed, SettingsError, Untrusted
from isthmus.security.alias_counters import FILE, AliasCounters
from isthmus.security.dsse import sign
from isthmus.security.ed25519 import SigningKey, new_signing_key, parse_public_keys, read_signing_key
from isthmus.security.keyring import KeyringFile, parse_keyring
from isthmus.security.trust import Trust
from support.signing import NOW, Clock, TrustSetup, new_key, signed_statement, trusted

DIGEST, OTHER_DIGEST = ("sha256:" + digit * 64 for digit in "ab")
DAY = timedelta(days=1)
PLACE = "registry"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[SigningKey, SigningKey]:
    folder = tmp_path_factory.mktemp("keys")
    return new_key(folder, "first"), new_key(folder, "second")


@pytest.fixture
def setup(tmp_path: Path, keys: tuple[SigningKey, SigningKey]) -> TrustSetup:
    return TrustSetup(tmp_path / "cache", [trusted(keys[0], "first")])


def reason_of(check: Callable[[], object]) -> str:
    with pytest.raises(Untrusted) as e:
        check()
    assert e.value.hint
    return str(e.value.facts["reason"])


def alias_of(counter: int = 1, **fields: Any) -> Alias:
    document = {"name": "m", "alias": "prod", "version": 1, "digest": DIGEST, "counter": counter, "moved_by": "me"}
    return Alias(**document | {"moved_at": NOW, "expires": NOW + 30 * DAY} | fields)


def signed_alias(*signers: SigningKey, document: Alias | None = None, payload_type: str = ALIAS_TYPE) -> bytes:
    return sign(alias_documents.to_json(document or alias_of()), payload_type, signers)


def check_alias(trust: Trust, data: bytes, alias: str = "prod") -> Alias:
    return trust.check_alias(PLACE, "m", alias, data)


def test_a_signed_manifest_is_verified_once(setup: TrustSetup, keys: tuple[SigningKey, SigningKey]) -> None:
    asked: list[int] = []

    def envelopes() -> Iterator[bytes]:
        asked.append(1)
        yield signed_statement(keys[0], digest=DIGEST)

    trust = setup.trust()
    for _ in range(3):
        trust.check_manifest(DIGEST, envelopes)
        trust.check_version("m", "1", DIGEST, envelopes)
        assert trust.trusts(DIGEST)
    assert asked == [1]


def test_each_refusal_of_a_manifest_says_its_reason(setup: TrustSetup, keys: tuple[SigningKey, SigningKey]) -> None:
    first, second = keys
    good = signed_statement(first, digest=DIGEST)
    cases: list[tuple[list[bytes], str]] = [
        ([], "not_signed"),
        ([sign(b"{}", "text", [])], "not_signed"),
        ([signed_statement(second, digest=DIGEST)], "unknown_key"),
        ([signed_statement(first, digest=OTHER_DIGEST)], "altered"),
        ([good.replace(b'"sig":"', b'"sig":"AAAA')], "altered"),
        ([b"{}"], "altered"),
        ([signed_alias(first)], "altered"),
        ([sign(b"{}", "application/vnd.isthmus.version+json", [first])], "altered"),
        ([signed_statement(second, digest=DIGEST), b"junk"], "altered"),
    ]
    for envelopes, reason in cases:
        assert reason_of(lambda e=envelopes: setup.trust().check_manifest(DIGEST, lambda: e)) == reason  # type: ignore[misc]
    # One good signature is enough, whatever stands beside it.
    setup.trust().check_manifest(DIGEST, lambda: [b"junk", signed_statement(second, digest=DIGEST), good])


def test_a_number_is_trusted_as_signed_and_no_other(setup: TrustSetup, keys: tuple[SigningKey, SigningKey]) -> None:
    trust = setup.trust()

    def envelopes() -> list[bytes]:
        return [signed_statement(keys[0], digest=DIGEST, version=2)]

    trust.check_version("m", "2", DIGEST, envelopes)
    assert reason_of(lambda: trust.check_version("m", "3", DIGEST, envelopes)) == "altered"
    assert reason_of(lambda: trust.check_version("n", "2", DIGEST, envelopes)) == "altered"
    unnumbered = [signed_statement(keys[0], digest=OTHER_DIGEST, version=None)]
    trust.check_manifest(OTHER_DIGEST, lambda: unnumbered)
    assert reason_of(lambda: trust.check_version("m", "1", OTHER_DIGEST, lambda: unnumbered)) == "altered"


def test_a_revoked_key_counts_for_nothing_at_once(setup: TrustSetup, keys: tuple[SigningKey, SigningKey]) -> None:
    first, second = keys
    trust = setup.trust()
    envelopes = [signed_statement(first, digest=DIGEST)]
    trust.check_manifest(DIGEST, lambda: envelopes)
    setup.revoked = [first.id]
    assert reason_of(lambda: trust.check_manifest(DIGEST, lambda: envelopes)) == "revoked"
    assert not trust.trusts(DIGEST)
    assert reason_of(lambda: check_alias(trust, signed_alias(first))) == "revoked"
    # Rotation: the version is signed anew by the next key.
    setup.keys = [*setup.keys, trusted(second)]
    envelopes.append(signed_statement(second, digest=DIGEST))
    trust.check_manifest(DIGEST, lambda: envelopes)
    assert trust.trusts(DIGEST)


def test_a_key_counts_within_its_window_alone(setup: TrustSetup, keys: tuple[SigningKey, SigningKey]) -> None:
    setup.keys = [trusted(keys[0], not_before=NOW, not_after=NOW + DAY)]
    envelopes = [signed_statement(keys[0], digest=DIGEST)]
    trust = setup.trust()
    setup.clock.now -= 1
    assert reason_of(lambda: trust.check_manifest(DIGEST, lambda: envelopes)) == "expired"
    setup.clock.now += 1
    trust.check_manifest(DIGEST, lambda: envelopes)
    setup.clock.now += DAY.total_seconds()
    assert reason_of(lambda: trust.check_manifest(DIGEST, lambda: envelopes)) == "expired"
    assert not trust.trusts(DIGEST)


def test_each_refusal_of_an_alias_says_its_reason(setup: TrustSetup, keys: tuple[SigningKey, SigningKey]) -> None:
    first, second = keys
    trust = setup.trust()
    assert check_alias(trust, signed_alias(first)).version == 1
    cases = {
        b"7": "not_signed",
        alias_documents.to_json(alias_of(9)): "not_signed",
        signed_alias(document=alias_of(9)): "not_signed",
        signed_alias(second, document=alias_of(9)): "unknown_key",
        signed_alias(first, document=alias_of(9), payload_type="application/vnd.isthmus.version+json"): "altered",
        signed_alias(first, document=alias_of(9, alias="dev")): "altered",
        signed_alias(first, document=alias_of(9, name="n")): "altered",
        signed_alias(first, document=alias_of(9, expires=NOW)): "expired",
        signed_statement(first, digest=DIGEST): "altered",
    }
    for data, reason in cases.items():
        assert reason_of(lambda d=data: check_alias(trust, d)) == reason  # type: ignore[misc]
    # None of them was remembered: the next move has the counter 2.
    assert check_alias(trust, signed_alias(first, document=alias_of(2))).counter == 2


def test_an_older_alias_is_refused_also_after_a_restart(setup: TrustSetup, keys: tuple[SigningKey, SigningKey]) -> None:
    old, new = (signed_alias(keys[0], document=alias_of(counter)) for counter in (4, 5))
    running = setup.trust()
    check_alias(running, old)
    check_alias(setup.trust(), new)  # another process of the same cache folder
    for trust in (running, setup.trust()):
        assert check_alias(trust, new).counter == 5
        assert reason_of(lambda t=trust: check_alias(t, old)) == "rolled_back"  # type: ignore[misc]
    forked = signed_alias(keys[0], document=alias_of(5, version=2, digest=OTHER_DIGEST))
    assert reason_of(lambda: check_alias(running, forked)) == "rolled_back"
    # Another alias, and the same one of another registry, have counters of their own.
    check_alias(running, signed_alias(keys[0], document=alias_of(1, alias="dev")), "dev")
    assert running.check_alias("elsewhere", "m", "prod", old).counter == 4


def test_an_alias_expires_while_nobody_moves_it(setup: TrustSetup, keys: tuple[SigningKey, SigningKey]) -> None:
    trust, data = setup.trust(), signed_alias(keys[0])
    check_alias(trust, data)
    setup.clock.now += 30 * DAY.total_seconds()
    assert reason_of(lambda: check_alias(trust, data)) == "expired"


def test_the_memory_of_aliases_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.security.alias_counters.MAX_ALIASES", 3)
    counters = AliasCounters(tmp_path)
    for place in "abacd":
        counters.accept(place, 1 + "abacd".index(place), DIGEST)
    assert list(json.loads((tmp_path / FILE).read_bytes())["aliases"]) == ["b", "c", "d"]


def test_a_damaged_or_unwritable_memory_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with pytest.raises(SettingsError, match="damaged") as e:
        AliasCounters(tmp_path)
    assert e.value.facts["variable"] == "cache_dir"
    with pytest.raises(SettingsError, match="cannot be kept"):
        AliasCounters(tmp_path / FILE)


@settings(deadline=None)
@given(st.data())
def test_no_altered_field_of_a_signed_alias_is_trusted(
    tmp_path_factory: pytest.TempPathFactory, keys: tuple[SigningKey, SigningKey], data: st.DataObject
) -> None:
    """Every field of the document, changed without a key, and put under the old signature."""
    document = json.loads(alias_documents.to_json(alias_of(canary=None)))
    field = data.draw(st.sampled_from(sorted(document)))
    changed = data.draw(st.sampled_from([None, 0, 2, "2", "x", "2027-01-01T00:00:00Z", OTHER_DIGEST, {}, []]))
    altered = document | {field: changed}
    assume(altered != document)
    envelope = json.loads(signed_alias(keys[0]))
    envelope["payload"] = json.loads(sign(canonical(altered), ALIAS_TYPE, []))["payload"]
    trust = TrustSetup(tmp_path_factory.getbasetemp() / "altered", [trusted(keys[0])]).trust()
    assert reason_of(lambda: check_alias(trust, json.dumps(envelope).encode())) == "altered"


@settings(deadline=None)
@given(st.sampled_from(["name", "version", "digest", "signed_at", "format", "more"]), st.data())
def test_no_altered_field_of_a_statement_is_trusted(
    tmp_path_factory: pytest.TempPathFactory,
    keys: tuple[SigningKey, SigningKey],
    field: str,
    data: st.DataObject,
) -> None:
    """Signed with a good key: a statement that breaks its format, or is of something else, proves nothing."""
    changed = data.draw(st.sampled_from([None, -1, "", "../m", "2027-01-01", OTHER_DIGEST, {}, []]))
    document = {"format": "isthmus.version-statement/1", "name": "m", "version": 1, "digest": DIGEST}
    altered = {**document, "signed_at": NOW.isoformat(), field: changed}
    envelope = sign(json.dumps(altered).encode(), "application/vnd.isthmus.version+json", [keys[0]])
    trust = TrustSetup(tmp_path_factory.getbasetemp() / "altered", [trusted(keys[0])]).trust()
    assert reason_of(lambda: trust.check_version("m", "1", DIGEST, lambda: [envelope])) == "altered"


def test_a_private_key_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    key = new_signing_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_signing_key(path).id == key.id
    assert [public.id for public in parse_public_keys(key.public.pem().encode())] == [key.id]
    with pytest.raises(RequestMalformed, match="File exists"):
        new_signing_key(path)
    assert path.read_text() not in repr(key)


@pytest.mark.parametrize("content", ["", "junk", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_file_without_a_key_is_refused_and_not_quoted(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key.pem"
    path.write_text(content)
    with pytest.raises(RequestMalformed, match="holds no Ed25519 private key") as e:
        read_signing_key(path)
    assert "AAAA" not in e.value.message


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no PEM of a public key"),
        (b"{", "is not JSON"),
        (b'{"format": "isthmus.keyring/1", "keys": [{"public_key": "x"}]}', "no PEM of a public key"),
        (b'{"format": "isthmus.keyring/1", "revoked": ["abc"]}', "revoked"),
        (b'{"format": "isthmus.keyring/9"}', "another version"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "the keyring"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_malformed_keyring_says_why(data: bytes, why: str) -> None:
    with pytest.raises(SettingsError, match=why) as e:
        parse_keyring(data, "the keyring")
    assert e.value.facts["variable"] == "trusted_keys"


def test_a_changed_keyring_takes_effect_and_a_broken_one_does_not(
    tmp_path: Path,
    keys: tuple[SigningKey, SigningKey],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = keys
    # A function's log, once one was created in this process, passes nothing on to the root.
    monkeypatch.setattr(logging.getLogger("isthmus"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="isthmus.security.keyring")
    path, clock = tmp_path / "trusted.pem", Clock(0.0)
    path.write_text(first.public.pem())
    keyring = KeyringFile(path, clock)
    path.write_text(first.public.pem() + second.public.pem())
    assert set(keyring.current().keys) == {first.id}  # not asked at each request
    clock.now += 10
    assert set(keyring.current().keys) == {first.id, second.id}
    for content in ("", "junk"):
        path.write_text(content)
        clock.now += 10
        assert set(keyring.current().keys) == {first.id, second.id}
    path.unlink()
    clock.now += 10
    assert set(keyring.current().keys) == {first.id, second.id}
    assert caplog.text.count("the earlier keyring stays in force") == 3
    with pytest.raises(SettingsError, match="cannot be read"):
        KeyringFile(path)
