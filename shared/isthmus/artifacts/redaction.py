"""What a router redacts in a bundle's inputs before anything leaves: faces and regions of photos, patterns of texts.

Source: docs/how-to/redaction.md.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from msgspec import Meta, Struct

from isthmus.artifacts.constraints import Blob, Share, matching

# Each pattern is one more pass over every text.
MAX_PATTERNS, MAX_EXPRESSION_LENGTH = 16, 256
MAX_REGIONS = 64
# Parsed at each load; published detectors of faces have 0.2 to 30 MB.
MAX_DETECTOR_BYTES = 64 * 2**20

BuiltinPattern = Literal["card", "email", "iban", "phone"]
BUILTIN_PATTERNS: tuple[BuiltinPattern, ...] = ("card", "email", "iban", "phone")

PatternName = Annotated[str, matching("[a-z][a-z0-9_]{0,31}")]


class FaceBlur(Struct, frozen=True, forbid_unknown_fields=True):
    """Faces are blurred where a detector scores a box `threshold` or more.

    `detector` is the blob of an ONNX graph: `image` (1, 3, side, side), float32, RGB of 0 to 255, to `boxes` (n, 4),
    left, top, right and bottom in its pixels, and `scores` (n,). `margin` widens a box on each side, as a share of the
    box: a face's outline, ears and hair tell who it is too.
    """

    detector: Blob
    threshold: Share = 0.3
    margin: Share = 0.2


class Region(Struct, frozen=True, forbid_unknown_fields=True):
    """A rectangle of every photo that is filled with grey, as shares of the upright photo's width and height."""

    x: Share
    y: Share
    width: Share
    height: Share


class TextPattern(Struct, frozen=True, forbid_unknown_fields=True):
    """An expression of RE2's syntax, whose matches a text has replaced by its name in capitals: [TICKET]."""

    name: PatternName
    expression: Annotated[str, Meta(min_length=1, max_length=MAX_EXPRESSION_LENGTH)]


class Redaction(Struct, frozen=True, forbid_unknown_fields=True):
    """The redaction of a bundle's inputs. `patterns` are names of built-in ones, or a bundle's own."""

    faces: FaceBlur | None = None
    regions: Annotated[tuple[Region, ...], Meta(max_length=MAX_REGIONS)] = ()
    patterns: Annotated[tuple[BuiltinPattern | TextPattern, ...], Meta(max_length=MAX_PATTERNS)] = ()

    @property
    def of_photos(self) -> bool:
        """Whether photos are redacted."""
        return self.faces is not None or bool(self.regions)

    def check(self) -> None:
        """Rules between fields.

        Raises:
            ValueError: names the broken rule.
        """
        if not self.of_photos and not self.patterns:
            raise ValueError("has a redaction of nothing")
        names = [pattern if isinstance(pattern, str) else pattern.name for pattern in self.patterns]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"has two patterns of the name {repeated[0]!r}")
        if own := {p.name for p in self.patterns if isinstance(p, TextPattern)} & {*BUILTIN_PATTERNS}:
            raise ValueError(f"has a pattern of its own with the name of a built-in one, {min(own)!r}")
        if self.faces is not None and not 0 < self.faces.detector.size <= MAX_DETECTOR_BYTES:
            raise ValueError(f"has a face detector of {self.faces.detector.size} bytes")
        for region in self.regions:
            # Sums of decimal shares may round up.
            ends = region.x + region.width, region.y + region.height
            if not region.width or not region.height or max(ends) > 1 + 1e-9:
                raise ValueError(f"has the region {describe_region(region)}, which is not within the photo")

    def sentence(self) -> str:
        """What is redacted, for people."""
        parts = []
        if self.faces is not None:
            parts.append(f"blurs faces (score {self.faces.threshold:g} and more)")
        if self.regions:
            parts.append(f"fills {', '.join(map(describe_region, self.regions))} of photos")
        if self.patterns:
            names = [p if isinstance(p, str) else f"{p.name} ({p.expression})" for p in self.patterns]
            parts.append(f"masks {', '.join(names)} in texts")
        return " and ".join(parts)


def describe_region(region: Region) -> str:
    """The region as `isthmus redact --region` takes it."""
    return f"{region.x:g},{region.y:g},{region.width:g},{region.height:g}"
