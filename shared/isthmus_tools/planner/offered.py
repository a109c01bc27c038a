"""The codecs on offer at a cut: without calibration all that need none, else those that calibration approved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from isthmus.artifacts.choice import CODEC_IDS, INPUT_CODECS, RAW, RAW_ID, Choice
from isthmus.artifacts.fidelity import Entry, Fidelity, offered
from isthmus.codecs import Codec, find_codec, is_exact

_NEVER_OFFERED = INPUT_CODECS | {RAW_ID}


def offered_codecs(fidelity: Fidelity | None, cut: str) -> tuple[Choice, ...]:
    """The codecs that candidates may use at `cut`, raw first; "" is the cut before the whole model.

    Without a fidelity document: every codec without calibration. At a cut with fidelity entries: each codec at the
    quality of fewest bytes offered, and the same for each number of closer looks. At other cuts of a calibrated bundle:
    exact codecs only.
    """
    if fidelity is not None and cut in fidelity.cuts():
        entries = (entry for entry in offered(fidelity, cut) if entry.codec not in _NEVER_OFFERED)
        return (RAW, *_fewest_bytes(entries))
    codecs = {name: _installed_codec(name) for name in CODEC_IDS if name not in _NEVER_OFFERED}
    choices = (RAW, *(Choice(name) for name, codec in codecs.items() if codec is not None and not codec.calibrated))
    return choices if fidelity is None else tuple(choice for choice in choices if is_exact(choice))


def short_name(choice: Choice) -> str:
    """A choice in a candidate's name: `int8`, `transform-60` for quality 0.6, `transform-20-40` with a closer look."""
    name = choice.codec.partition("/")[0]
    qualities = [choice.quality, *(look.quality for look in choice.looks)]
    return name if qualities == [1.0] else "-".join([name, *(str(round(100 * q)) for q in qualities)])


def split_name(cut: str, choice: Choice, *, head: str = "", has_exit: bool = False) -> str:
    """The name of a split at one cut: `split-65-int8`, `split-65-int8-exit`, `split-65~pruned-int8`."""
    return f"split-{cut}{'~' * bool(head)}{head}-{short_name(choice)}{'-exit' * has_exit}"


def _fewest_bytes(entries: Iterable[Entry]) -> Iterator[Choice]:
    """Of each codec the smallest entry per number of looks, unless fewer looks take as few bytes.

    `entries` are sorted by bytes.
    """
    smallest: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda e: len(e.looks)):
        best = smallest.get(entry.codec)
        if best is None or (entry.bytes < best.bytes and len(entry.looks) > len(best.looks)):
            smallest[entry.codec] = entry
            yield entry.choice


def _installed_codec(name: str) -> Codec | None:
    try:
        return find_codec(name)
    except (ImportError, AttributeError):
        return None  # a known id without an implementation in this version
