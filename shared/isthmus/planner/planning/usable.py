"""Which codecs a candidate may use at a cut: those that are here, and of a calibrated bundle those that it offers."""

from __future__ import annotations

from isthmus.calibration.choice import Choice, is_exact
from isthmus.calibration.fidelity import Fidelity, offered
from isthmus.codecs import KNOWN, RAW, Codec, find

_NO_CHOICE = (RAW, "photo/1")


def usable_codecs(fidelity: Fidelity | None, cut: str) -> tuple[Choice, ...]:
    """The choices at `cut`, raw first; "" is the cut before everything.

    Without a fidelity, every codec that needs no calibration. Where it knows the cut, each codec comes with the quality
    that takes the fewest bytes of those offered, and with the second look that does; at other cuts of a calibrated
    bundle, only what changes no value.
    """
    if fidelity is not None and cut in fidelity.cuts():
        best: dict[tuple[str, bool], Choice] = {}
        for entry in offered(fidelity, cut):
            best.setdefault((entry.codec, entry.choice.again is None), entry.choice)
        return (Choice(RAW), *(choice for choice in best.values() if choice.codec not in _NO_CHOICE))
    here = ((codec, _codec(codec)) for codec in KNOWN if codec not in _NO_CHOICE)
    every = (Choice(RAW), *(Choice(codec) for codec, made in here if made is not None and not made.calibrated))
    return every if fidelity is None else tuple(choice for choice in every if is_exact(choice))


def short_name(choice: Choice) -> str:
    """A choice as candidates' names have it: `int8`, `transform-60` for a quality of 0.6, `transform-30-80` for two."""
    name = choice.codec.partition("/")[0]
    qualities = [choice.quality] if choice.again is None else [choice.quality, choice.again.quality]
    return name if qualities == [1.0] else "-".join([name, *(str(round(100 * q)) for q in qualities)])


def _codec(codec: str) -> Codec | None:
    try:
        return find(codec)
    except (ImportError, AttributeError):
        return None  # not in this version
