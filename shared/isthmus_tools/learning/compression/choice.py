"""Choice among variants: what is dominated, and what meets a target."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.artifacts.bundle import SegmentVariant
from isthmus.errors import CalibrationError, RequestMalformed
from isthmus.units import format_duration, format_size, parse_duration, parse_size
from isthmus_tools.learning.compression.measurement import PlainFigures

# Ratios of times that differ by less are noise of the machine, and those of sizes names in the graph.
_NOISE = 0.03
THE_SEGMENT = "the segment itself"
"""What is better than a variant with no less time and no smaller graph."""
AGREES_MORE = "the segment itself in agreement"
"""What is better than a variant that loses most predictions, unless a target asks for that one."""
# Of predictions: nobody serves a head that changes most of them, however fast.
_LEAST_AGREEMENT = 0.5
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%")


@dataclass(frozen=True)
class CompressionTarget:
    """A bound that a variant must meet. Units: seconds of a run, bytes of its graph, a share of predictions."""

    text: str
    seconds: float | None = None
    size: int | None = None
    agreement: float | None = None

    def shortfall(self, variant: SegmentVariant) -> float:
        """How far a variant is from the target, relative to it; 0 or less where it meets the target."""
        if self.seconds is not None:
            return variant.seconds / self.seconds - 1
        if self.size is not None:
            return variant.segment.graph.size / self.size - 1
        # Of what is lost, not of what is kept: 98% is far from 99%.
        agreement = self.agreement or 0.0
        return (agreement - variant.agreement) / max(1e-3, 1 - agreement)


def parse_target(text: str) -> CompressionTarget:
    """Read `5ms`, `2MB` or `99%`.

    Raises:
        RequestMalformed: none of these, or a bound of nothing.
    """
    if (match := _PERCENT.fullmatch(text.strip())) is not None and 0 < float(match[1]) <= 100:
        return CompressionTarget(text, agreement=float(match[1]) / 100)
    # A number alone would be bytes to the parser of sizes, and says nothing to a reader.
    if text.strip()[-1:].isalpha():
        with contextlib.suppress(ValueError):
            if (seconds := parse_duration(text.strip())) > 0:
                return CompressionTarget(text, seconds=seconds)
        with contextlib.suppress(ValueError):
            if (size := parse_size(text)) > 0:
                return CompressionTarget(text, size=size)
    raise RequestMalformed(
        f"{text[:40]!r} is no target", option="--target", hint="a time such as 5ms, a size such as 2MB, or 99%"
    )


def dominated_by(variant: SegmentVariant, others: Sequence[SegmentVariant], plain: PlainFigures) -> str:
    """The name of a variant, or `the segment itself`, that is no worse in time, size and agreement; empty if none."""
    if variant.agreement < _LEAST_AGREEMENT:
        return AGREES_MORE
    # The segment's own predictions are exact: only less time or a smaller graph speaks for a variant.
    if variant.seconds_ratio > 1 - _NOISE and variant.segment.graph.size >= plain.size:
        return THE_SEGMENT
    for other in others:
        if other.segment.id == variant.segment.id:
            continue
        no_worse = (
            other.seconds_ratio <= variant.seconds_ratio * (1 + _NOISE)
            and other.segment.graph.size <= variant.segment.graph.size
            and other.agreement >= variant.agreement
        )
        better = (
            other.seconds_ratio < variant.seconds_ratio * (1 - _NOISE)
            or other.segment.graph.size < variant.segment.graph.size * (1 - _NOISE)
            or other.agreement > variant.agreement
        )
        if no_worse and better:
            return other.name
    return ""


def choose_variant(variants: Sequence[SegmentVariant], targets: Sequence[CompressionTarget]) -> SegmentVariant:
    """The variant that meets all targets: the fastest where agreement is bounded, else the one that agrees most.

    Raises:
        CalibrationError: none does; the message names the nearest.
    """
    suitable = [v for v in variants if all(target.shortfall(v) <= 0 for target in targets)]
    if suitable:
        if any(target.agreement is not None for target in targets):
            return min(suitable, key=lambda v: (v.seconds, v.segment.graph.size))
        return min(suitable, key=lambda v: (-v.agreement, v.seconds))
    # The nearest tells how far the target is, which a bare refusal would not.
    wanted = ", ".join(target.text for target in targets)
    if not variants:
        raise CalibrationError(f"no variant was made, and {wanted} is the target")
    nearest = min(variants, key=lambda v: max(target.shortfall(v) for target in targets))
    raise CalibrationError(
        f"no variant meets {wanted}; nearest is {nearest.name}: {format_duration(nearest.seconds)},"
        f" {format_size(nearest.segment.graph.size)}, {nearest.agreement:.1%} the same",
        targets=[target.text for target in targets],
        nearest=nearest.name,
        hint="another cut, --keep with a smaller share, or a less strict target",
    )
