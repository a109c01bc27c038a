"""Fusion of edge and cloud: a weighted sum of the exit's and the model's scores, where both are at hand."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from isthmus.artifacts.constraints import Count, Share, Text
from isthmus.artifacts.cuts import CutName

ScoreKind = Literal["log_odds", "probabilities"]
"""`log_odds`: log-probabilities less their mean over the classes; `probabilities`: likewise, without the logarithm."""
MAX_CLASSES = 2**20

# Beyond it, one member's rounding errors would outweigh another's scores.
_Number = Annotated[float, Meta(ge=-1e6, le=1e6)]
# A single weight, or a weight for each class.
MemberWeights = Annotated[tuple[_Number, ...], Meta(min_length=1, max_length=MAX_CLASSES)]


class FusionGain(Struct, frozen=True, forbid_unknown_fields=True):
    """Right predictions of a fusion beside those of one member alone, on inputs that had no part in the fusion.

    Of `inputs`, the share `alone` is right by the member, the share `fused` by the fusion: `better` inputs turned
    right and `worse` turned wrong. The gain in the share lies between `low` and `high` with a probability of 95%: by
    the wider one of two intervals for paired shares, McNemar's exact test inverted, and Newcombe's.
    """

    inputs: Count
    alone: Share
    fused: Share
    better: Count
    worse: Count
    low: Annotated[float, Meta(ge=-1, le=1)]
    high: Annotated[float, Meta(ge=-1, le=1)]

    @property
    def gain(self) -> float:
        """The difference of the two shares."""
        return (self.better - self.worse) / self.inputs if self.inputs else 0.0

    def sentence(self) -> str:
        """Both shares and the gain in points, with its interval."""
        gain, low, high = (f"{100 * each:+.2f}" for each in (self.gain, self.low, self.high))
        shares = f"{self.alone:.2%} right alone, {self.fused:.2%} fused"
        return f"{shares}, {gain} points ({low} to {high} at 95%), of {self.inputs:,} inputs"

    @property
    def is_beyond_chance(self) -> bool:
        """Whether even the lower end of the interval is a gain."""
        return self.low > 0


class Fusion(Struct, frozen=True, forbid_unknown_fields=True):
    """Scores of requests that did not take the exit at `cut`: a weighted sum of the exit's and the model's `output`.

    `scale` times the sum of `exit_weights` times the exit's scores and `model_weights` times the model's, both as
    `kind`; each has one weight, or one for each class. `output_kind` is what the model's output holds, and so what the
    fusion gives. `target` says what counted as right: `labels`, or `agreement` with the model's predictions without
    codecs. `codec` is that of the boundary tensors when the weights were fitted. `penalty` is the ridge's, relative to
    the mean square of the scores. Source: docs/how-to/fusion.md.
    """

    cut: CutName
    output: Text
    kind: ScoreKind
    output_kind: Literal["logits", "probabilities"]
    exit_weights: MemberWeights
    model_weights: MemberWeights
    scale: _Number
    target: Literal["agreement", "labels"]
    codec: Text
    penalty: Annotated[float, Meta(ge=0)]
    gain: FusionGain

    def sentence(self) -> str:
        """The fusion and its gain, for people."""
        return f"fuses exit and model where a request does not exit at {self.cut}: {self.gain.sentence()}"

    def check(self, shape: tuple[int | str, ...]) -> None:
        """Rules between fields; `shape` is the output's.

        Raises:
            ValueError: names the broken rule.
        """
        if len(shape) < 2 or any(size != 1 for size in shape[2:]):
            raise ValueError(f"has a fusion of {self.output[:80]!r}, which is no table of scores (batch, classes)")
        lengths = {len(self.exit_weights), len(self.model_weights)}
        if lengths not in ({1}, {shape[1]}):
            raise ValueError(f"has a fusion of {min(lengths)} and {max(lengths)} weights for {shape[1]} classes")
        if self.gain.better + self.gain.worse > self.gain.inputs:
            raise ValueError("has a fusion that turned more predictions than it was measured on")
