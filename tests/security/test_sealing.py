"""Sealed and signed calls: what was altered, swapped, sent before or at another time is refused."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator

import pytest

from isthmus.errors import CallerUnknown
from isthmus.security import sealing
from isthmus.security.hop_protection import HopProtection
from isthmus.security.keys import HopKeys
from isthmus.security.protected_call import CallFacts
from isthmus.security.replays import MAX_SENDERS, WINDOW, CounterWindow, NonceSet
from isthmus.security.sealing import CallOpener, CallSealer
from isthmus.security.signing import CallSigner
from support.attacks import other_character

OLD, NEW = os.urandom(32), os.urandom(32)
KEYS = HopKeys({"new": NEW, "old": OLD})
FACTS = CallFacts("POST", "/", "application/vnd.isthmus.frame")
BODY = bytes(range(256)) * 4
SKEW_S = 30.0


def reason_of(act: Callable[[], object]) -> str:
    with pytest.raises(CallerUnknown) as caught:
        act()
    return str(caught.value.facts["reason"])


@pytest.fixture(params=["sealed", "signed"])
def protection(request: pytest.FixtureRequest) -> HopProtection:
    return HopProtection(KEYS, seals=request.param == "sealed", skew_s=SKEW_S)


def taken(receiver: HopProtection, sent: object, facts: CallFacts = FACTS, **changed: object) -> object:
    headers = {**sent.headers, **changed.pop("headers", {})}  # type: ignore[attr-defined, dict-item]
    body = changed.pop("body", b"".join(sent.body))  # type: ignore[attr-defined]
    facts = CallFacts(facts.method, facts.path, headers["Content-Type"])
    return receiver.take(headers, body, facts)  # type: ignore[arg-type]


def test_a_call_and_its_reply_arrive_as_they_were_sent(protection: HopProtection) -> None:
    sent = protection.protect([BODY[:100], memoryview(BODY)[100:]], FACTS)
    call = protection.take(sent.headers, b"".join(sent.body), CallFacts("POST", "/", sent.headers["Content-Type"]))
    assert bytes(call.body) == BODY
    parts, headers = call.protect_reply(200, b"answer")
    body = b"".join(parts)
    assert sent.open_reply(200, headers, body) == b"answer"


def test_an_empty_call_and_reply_are_protected_too(protection: HopProtection) -> None:
    sent = protection.protect([], FACTS)
    call = protection.take(sent.headers, b"".join(sent.body), CallFacts("POST", "/", sent.headers["Content-Type"]))
    parts, headers = call.protect_reply(202, b"")
    body = b"".join(parts)
    assert (bytes(call.body), sent.open_reply(202, headers, body)) == (b"", b"")


def test_a_call_that_comes_twice_is_refused(protection: HopProtection) -> None:
    sent = protection.protect([BODY], FACTS)
    taken(protection, sent)
    assert reason_of(lambda: taken(protection, sent)) == "replayed"


@pytest.mark.parametrize("facts", [CallFacts("POST", "/load", ""), CallFacts("GET", "/", "")])
def test_a_call_to_another_path_or_by_another_method_is_refused(protection: HopProtection, facts: CallFacts) -> None:
    sent = protection.protect([BODY], FACTS)
    assert reason_of(lambda: taken(protection, sent, facts)) == "altered"


def test_a_call_under_an_unknown_key_is_refused(protection: HopProtection) -> None:
    stranger = HopProtection(HopKeys({"new": OLD}), seals=protection._seals, skew_s=SKEW_S)
    assert reason_of(lambda: taken(protection, stranger.protect([BODY], FACTS))) == "altered"
    nobody = HopProtection(HopKeys({"other": NEW}), seals=protection._seals, skew_s=SKEW_S)
    assert reason_of(lambda: taken(protection, nobody.protect([BODY], FACTS))) in ("key", "altered")


def test_keys_are_replaced_one_function_at_a_time(protection: HopProtection) -> None:
    seals = protection._seals
    before, after = (HopProtection(HopKeys(keys), seals=seals, skew_s=SKEW_S) for keys in ({"old": OLD}, {"new": NEW}))
    for sender in (before, after):
        assert bytes(taken(protection, sender.protect([BODY], FACTS)).body) == BODY  # type: ignore[attr-defined]
    with pytest.raises(CallerUnknown):
        taken(before, protection.protect([BODY], FACTS))


def test_the_reply_of_another_call_is_refused(protection: HopProtection) -> None:
    first, second = protection.protect([BODY], FACTS), protection.protect([BODY], FACTS)
    parts, headers = taken(protection, first).protect_reply(200, b"answer")  # type: ignore[attr-defined]
    body = b"".join(parts)
    assert reason_of(lambda: second.open_reply(200, headers, body)) == "altered"
    assert first.open_reply(200, headers, body) == b"answer"


def test_a_reply_without_protection_is_refused(protection: HopProtection) -> None:
    sent = protection.protect([BODY], FACTS)
    assert reason_of(lambda: sent.open_reply(200, {}, b"answer")) in ("not_sealed", "not_signed")


def test_a_signed_reply_of_another_status_is_refused() -> None:
    protection = HopProtection(KEYS, seals=False, skew_s=SKEW_S)
    sent = protection.protect([BODY], FACTS)
    parts, headers = taken(protection, sent).protect_reply(202, b"answer")  # type: ignore[attr-defined]
    body = b"".join(parts)
    assert reason_of(lambda: sent.open_reply(200, headers, body)) == "altered"


def test_a_function_that_signs_takes_sealed_calls_and_one_that_seals_no_signed_ones() -> None:
    signs, seals = (HopProtection(KEYS, seals=each, skew_s=SKEW_S) for each in (False, True))
    assert bytes(taken(signs, seals.protect([BODY], FACTS)).body) == BODY  # type: ignore[attr-defined]
    assert reason_of(lambda: taken(seals, signs.protect([BODY], FACTS))) == "not_sealed"


@pytest.mark.parametrize("cipher", [1, 2])
def test_each_cipher_opens_what_it_sealed(cipher: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "fastest_cipher", lambda: cipher)
    parts, reply = CallSealer(KEYS).seal([BODY], FACTS)
    sealed = b"".join(parts)
    body, answer = CallOpener(KEYS, skew_s=SKEW_S).open(sealed, FACTS)
    assert (body, reply.open(b"".join(answer.seal(b"answer")))) == (BODY, b"answer")


def sealed_variants() -> Iterator[bytes]:
    """A sealed call with each byte of its head altered, cut short at each place, and bytes of its body altered."""
    sealed = b"".join(CallSealer(KEYS).seal([BODY], FACTS)[0])
    head = len(sealed) - len(BODY) - 16
    generator = random.Random(0)
    for place in (*range(head), *generator.sample(range(head, len(sealed)), 60), *range(len(sealed) - 16, len(sealed))):
        for flipped in (1, 0x80):
            yield sealed[:place] + bytes([sealed[place] ^ flipped]) + sealed[place + 1 :]
    for length in (*range(head + 17), len(sealed) - 1):
        yield sealed[:length]
    yield sealed + b"\0"


def test_no_altered_byte_of_a_sealed_call_is_taken() -> None:
    opener = CallOpener(KEYS, skew_s=SKEW_S)
    count = 0
    for variant in sealed_variants():
        assert reason_of(lambda data=variant: opener.open(data, FACTS)) in ("altered", "key", "not_sealed")  # type: ignore[misc]
        count += 1
    assert count > 300


def test_no_altered_header_of_a_signed_call_is_taken() -> None:
    signer = CallSigner(KEYS, skew_s=SKEW_S)
    sent = signer.sign_call([BODY], FACTS)
    count = 0
    for name, value in sent.headers.items():
        for place in range(0, len(value), 3):
            other = other_character(value[place])
            changed = {**sent.headers, name: value[:place] + other + value[place + 1 :]}
            facts = CallFacts("POST", "/", changed["Content-Type"])
            assert reason_of(lambda h=changed, f=facts: signer.verify_call(h, BODY, f)) in ("altered", "not_signed")  # type: ignore[misc]
            count += 1
    for missing in ("Signature", "Signature-Input", "Content-Digest"):
        rest = {name: value for name, value in sent.headers.items() if name != missing}
        assert reason_of(lambda h=rest: signer.verify_call(h, BODY, FACTS)) in ("altered", "not_signed")  # type: ignore[misc]
    assert reason_of(lambda: signer.verify_call(sent.headers, BODY + b"x", FACTS)) == "altered"
    assert count > 100
    assert signer.verify_call(sent.headers, BODY, FACTS) is not None


@pytest.mark.parametrize("off_s", [-3600, -SKEW_S - 2, SKEW_S + 2, 3600])
def test_a_clock_that_is_wrong_is_named_with_its_difference(off_s: float) -> None:
    here = 1_800_000_000.0
    sealed = b"".join(CallSealer(KEYS, clock=lambda: here - off_s).seal([BODY], FACTS)[0])
    with pytest.raises(
        CallerUnknown, match=f"{abs(off_s):.0f} s {'before' if off_s > 0 else 'after'} the clock"
    ) as caught:
        CallOpener(KEYS, skew_s=SKEW_S, clock=lambda: here).open(sealed, FACTS)
    assert caught.value.facts["off_s"] == pytest.approx(off_s, abs=0.01)


def test_a_signed_call_of_another_time_is_refused() -> None:
    sent = CallSigner(KEYS, skew_s=SKEW_S).sign_call([BODY], FACTS)
    late = CallSigner(KEYS, skew_s=SKEW_S, clock=lambda: 4_000_000_000.0)
    assert reason_of(lambda: late.verify_call(sent.headers, BODY, FACTS)) == "time"


def test_a_window_takes_each_counter_once_in_any_order() -> None:
    window, counters = CounterWindow(), list(range(3 * WINDOW))
    shuffled = [
        c for start in range(0, len(counters), 64) for c in random.Random(start).sample(counters[start:][:64], 64)
    ]
    assert all(window.take("s", c) for c in shuffled)
    assert not any(window.take("s", c) for c in shuffled)
    assert window.take("s", 10**18)
    assert not window.take("s", 10**18 - WINDOW)
    assert window.take("s", 10**18 - WINDOW + 1)


def test_windows_and_numbers_used_once_are_bounded_in_memory() -> None:
    window = CounterWindow()
    assert all(window.take(sender, 0) for sender in range(2 * MAX_SENDERS))
    assert len(window._senders) == MAX_SENDERS
    clock = itertools.count()
    nonces = NonceSet(10.0, clock=lambda: next(clock) / 100)
    assert nonces.take("a")
    assert not nonces.take("a")
    assert all(nonces.take(n) for n in range(5000))
    assert nonces.take("a")
    assert len(nonces._nonces) < 2000
