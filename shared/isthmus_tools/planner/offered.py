"""The codecs on offer at a cut: without calibration all that need none, else those that calibration approved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from isthmus.artifacts.bundle import Blob, Bundle
from isthmus.artifacts.choice import CODEC_IDS, INPUT_CODECS, RAW, RAW_ID, Choice
from isthmus.artifacts.fidelity import Entry, Fidelity, offered, read_fidelity
from isthmus.artifacts.leak import Leak, private_cuts, read_leak, revealed
from isthmus.codecs import Codec, find_codec, is_exact
from isthmus.errors import Missing

_NEVER_OFFERED = INPUT_CODECS | {RAW_ID}


@dataclass(frozen=True)
class Offer:
    """The codecs on offer at the cuts of a bundle, by its calibration and by what boundary tensors may reveal.

    With a `leak`, only cuts are on offer where reconstructions from raw tensors are at most `limit` similar to their
    inputs: the guard compares with raw tensors, and so does a fallback end there.
    """

    fidelity: Fidelity | None
    leak: Leak | None = None
    limit: float = 1.0

    @classmethod
    def read(cls, bundle: Bundle, blob: Callable[[Blob], bytes], private_ssim: float | None = None) -> Self:
        """The offer by the bundle's documents; the leak document is for `private_ssim` alone.

        Raises:
            Missing: a bound, and no leak document.
            CalibrationError: a document is unreadable, or of another model.
        """
        fidelity = read_fidelity(bundle, blob)
        if private_ssim is None:
            return cls(fidelity)
        if (leak := read_leak(bundle, blob)) is None:
            raise Missing(
                f"{bundle.name} has no leak document, and --private-ssim chooses cuts by it",
                kind="leak",
                name=bundle.name,
                exists=[],
                hint=f"measure first what its cuts reveal: isthmus leak {bundle.name} --data FOLDER",
            )
        return cls(fidelity, leak, private_ssim)

    @property
    def private_cuts(self) -> list[str]:
        """The cuts that the bound allows, where there is one."""
        return [] if self.leak is None else private_cuts(self.leak, self.limit)

    def allows(self, cut: str) -> bool:
        """Whether tensors of `cut` may be sent."""
        return self.leak is None or cut in self.private_cuts

    def codecs(self, cut: str) -> tuple[Choice, ...]:
        """The codecs of `offered_codecs` that the bound allows; none at a cut that it does not allow."""
        choices = offered_codecs(self.fidelity, cut)
        if (leak := self.leak) is None:
            return choices
        # Chance in an attacker's training may put a codec above raw tensors, so that its own figure counts too.
        shown = ((choice, revealed(leak, cut, choice)) for choice in (choices if self.allows(cut) else ()))
        return tuple(choice for choice, similarity in shown if similarity is not None and similarity <= self.limit)

    def notes(self, cuts: Iterable[str]) -> list[str]:
        """Sentences on the cuts that the bound does not allow."""
        if (leak := self.leak) is None:
            return []
        refused = {cut: revealed(leak, cut, RAW) for cut in (*cuts, *leak.cuts()) if not self.allows(cut)}
        shown = [f"{cut} ({similarity:.2f})" for cut, similarity in refused.items() if similarity is not None]
        unknown = [cut for cut, similarity in refused.items() if similarity is None]
        rest = [f"the leak document has no cut {', '.join(unknown)}"] if unknown else []
        above = [f"reconstructions are above {self.limit:g} at {', '.join(shown)}"] if shown else []
        if (least := leak.baseline.similarity) > self.limit:
            # Inputs that resemble each other, as digits do, are alike without any activations.
            rest.append(f"the mean input alone is {least:.2f} similar to an input: no cut can be below that")
        return [f"inputs stay at the edge by {leak.measure}, so cloud-only is no candidate", *above, *rest]


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
