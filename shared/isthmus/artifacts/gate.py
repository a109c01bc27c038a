"""The gate of a classifier's exit: when the early answer stands, and what was measured of that."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from isthmus.artifacts.constraints import Count, Share, Text

# What the branch of a classifier gives: scores in place of the model's, and how sure it is of each row.
EXIT_SCORES, EXIT_CONFIDENCE = "exit_scores", "exit_confidence"


class Gate(Struct, frozen=True, forbid_unknown_fields=True):
    """An exit's answer stands where `exit_confidence` is at least `threshold`, for every row of the request.

    `output` is the model's output that `exit_scores` stand for. `risk` says what is bounded: `disagreement`, requests
    that exit with another prediction than the model's, or `accuracy`, requests that exit wrongly where the model is
    right. The share of such requests among all is at most `limit`, with the probability `confidence` over the choice
    of the held-out inputs: of `inputs` such, `exiting` exited, `failing` of these count against the limit, and
    `bound` is the upper bound of Clopper and Pearson at the threshold. `differing` of the exiting inputs had another
    prediction than the model's, right or wrong; None where that is `failing`.
    """

    output: Text
    threshold: Annotated[float, Meta(ge=-1e30, le=1e30)]
    risk: Literal["accuracy", "disagreement"]
    limit: Share
    confidence: Share
    inputs: Count
    exiting: Count
    failing: Count
    bound: Share
    differing: Count | None = None

    @property
    def share(self) -> float:
        """The share of held-out inputs that exited."""
        return self.exiting / self.inputs if self.inputs else 0.0
