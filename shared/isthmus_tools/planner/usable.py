"""Which codecs a candidate may use at a cut: those that are here, and of a calibrated bundle those that it offers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from isthmus.artifacts.choice import KNOWN, NEVER_CHOSEN, RAW_ID, Choice
from isthmus.artifacts.fidelity import Entry, Fidelity, offered
from isthmus.codecs import Codec, find_codec
from isthmus.codecs.choice import is_exact

_LEFT_OUT = NEVER_CHOSEN | {RAW_ID}


def usable_codecs(fidelity: Fidelity | None, cut: str) -> tuple[Choice, ...]:
    """The choices at `cut`, raw first; "" is the cut before everything.

    Without a fidelity, every codec that needs no calibration. Where it knows the cut, each codec comes with the quality
    that takes the fewest bytes of those offered, and with what does after one closer look, two, …; at other cuts of a
    calibrated bundle, only what changes no value.
    """
    if fidelity is not None and cut in fidelity.cuts():
        found = (entry for entry in offered(fidelity, cut) if entry.codec not in _LEFT_OUT)
        return (Choice(RAW_ID), *_worth_their_calls(found))
    here = ((codec, _codec(codec)) for codec in KNOWN if codec not in _LEFT_OUT)
    every = (Choice(RAW_ID), *(Choice(codec) for codec, made in here if made is not None and not made.calibrated))
    return every if fidelity is None else tuple(choice for choice in every if is_exact(choice))


def short_name(choice: Choice) -> str:
    """A choice as candidates' names have it: `int8`, `transform-60` for a quality of 0.6, `transform-20-40` for two."""
    name = choice.codec.partition("/")[0]
    qualities = [choice.quality, *(look.quality for look in choice.looks)]
    return name if qualities == [1.0] else "-".join([name, *(str(round(100 * q)) for q in qualities)])


def _worth_their_calls(entries: Iterable[Entry]) -> Iterator[Choice]:
    """Of each codec the smallest for each number of looks, unless one with fewer takes as few bytes.

    `entries` come with the fewest bytes first.
    """
    least: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda e: len(e.looks)):
        smallest = least.get(entry.codec)
        if smallest is None or (entry.bytes < smallest.bytes and len(entry.looks) > len(smallest.looks)):
            least[entry.codec] = entry
            yield entry.choice


def _codec(codec: str) -> Codec | None:
    try:
        return find_codec(codec)
    except (ImportError, AttributeError):
        return None  # not in this version
