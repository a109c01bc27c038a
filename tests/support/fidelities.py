"""Fidelity documents with invented measurements."""

from __future__ import annotations

from isthmus.artifacts.fidelity import Entry, Fidelity, Inputs, Measure


def entry(codec: str, quality: float, size: int, *, agreement: float = 1.0, offered: bool = True) -> Entry:
    return Entry("3", codec, quality, agreement, 0.9, 1.0, 0.02, size, size, 4.0, 0.1, 0.1, 0.0, offered, agreement)


def fidelity(subject: str) -> Fidelity:
    entries = (
        entry("raw", 1.0, 4000),
        entry("int8/1", 1.0, 1000, agreement=0.995),
        entry("int4/1", 1.0, 500, agreement=0.6, offered=False),
        entry("half/1", 1.0, 2000),
    )
    return Fidelity(subject, 0.99, Measure("top1", "logits"), Inputs("photos", 10, 5, 200), entries)
