"""From a choice to what is safer than it: the steps that the router's guard takes."""

from __future__ import annotations

from dataclasses import replace

from isthmus.artifacts.choice import GRADED, RAW, Choice
from isthmus.artifacts.fidelity import Fidelity

_SAFER = (Choice("int8/1"), Choice("half/1"), RAW)


def ladder(choice: Choice, cut: str, fidelity: Fidelity | None) -> tuple[Choice, ...]:
    """A choice and what is safer than it, step by step: two higher qualities, int8, half, raw.

    The first step from a choice with closer looks is the last one's quality, for every answer.

    Where fidelity was measured at `cut`, a step that kept no more answers than the one before it is left out.
    """
    measured = {e.choice: e.agreement for e in fidelity.entries if e.cut == cut} if fidelity else {}
    steps = [choice]
    once = choice.last
    if once.codec in GRADED and once.quality < 1:
        steps += [once, replace(once, quality=round((1 + once.quality) / 2, 3)), replace(once, quality=1.0)]
    elif once != choice:
        steps.append(once)
    at = _SAFER.index(choice) + 1 if choice in _SAFER else 0
    kept = measured.get(choice, 0.0)
    for each in _SAFER[at:]:
        if each == RAW or measured.get(each, 1.0) >= kept:
            steps.append(each)
            kept = max(kept, measured.get(each, kept))
    return tuple(dict.fromkeys(steps))
