"""What trust costs: sealing and signing a call between functions, by size, beside the call without protection."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

from harness import Row, arguments, at_most

from isthmus.security import sealing
from isthmus.security.hop_protection import HopProtection
from isthmus.security.keys import HopKeys
from isthmus.security.protected_call import CallFacts

Result = TypeVar("Result")
# Of a frame: an int8 activation of a small cut, a photo's pixels as int8, a large float32 activation.
SIZES = {"4 kB": 4_000, "150 kB": 150_000, "1.2 MB": 1_200_000}
# A call and its reply of the same size, both ends together.
SEALED_MS = {"4 kB": 0.15, "1.2 MB": 1.0}
FACTS = CallFacts("POST", "/", "application/vnd.isthmus.frame")


def main() -> None:
    report = arguments("trust", __doc__, ["cryptography", "http-message-signatures"])
    keys = HopKeys({"k": os.urandom(32)})
    ways = {name: HopProtection(keys, seals=name == "sealed", skew_s=30) for name in ("sealed", "signed")}
    rows: list[Row] = []
    for size, count in SIZES.items():
        body = os.urandom(count)
        turns = 20 if report.quick else 200
        times = {name: statistics.median(exchange(way, body) for _ in range(turns)) for name, way in ways.items()}
        rows.append({"size": size, **{f"{name} ms": round(s * 1e3, 3) for name, s in times.items()}})
        if size in SEALED_MS:
            name = f"sealing a call and its reply of {size}"
            report.goals.append(at_most(name, times["sealed"] * 1e3, SEALED_MS[size], "ms"))
    cipher = {1: "AES-256-GCM", 2: "ChaCha20-Poly1305"}[sealing.fastest_cipher()]
    report.add(f"added to a call and its reply, both ends, replay check included ({cipher})", rows)
    report.emit()


def exchange(way: HopProtection, body: bytes) -> float:
    """Seconds that the protection of a call and of a reply of the same size takes, at both ends."""
    watch = Stopwatch()
    sent = watch.timed(lambda: way.protect([body], FACTS))
    arrived, facts = b"".join(sent.body), CallFacts("POST", "/", sent.headers["Content-Type"])
    call = watch.timed(lambda: way.take(sent.headers, arrived, facts))
    parts, headers = watch.timed(lambda: call.protect_reply(200, body))
    returned = b"".join(parts)
    watch.timed(lambda: sent.open_reply(200, headers, returned))
    return watch.seconds


class Stopwatch:
    """The sum of the seconds of some calls; sockets, which every call has, lie between."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[[], Result]) -> Result:
        began = time.perf_counter()
        result = call()
        self.seconds += time.perf_counter() - began
        return result


if __name__ == "__main__":
    main()
