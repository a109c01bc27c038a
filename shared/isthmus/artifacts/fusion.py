"""Fusion of edge and cloud: a weighted sum of the exit's and the model's scores, where both are at hand."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from isthmus.artifacts.constraints import Count, Text
from isthmus.artifacts.cuts import CutName

# Weights of log-probabilities; beyond it a sum says nothing.
_Weight = Annotated[float, Meta(ge=-1e6, le=1e6)]


class Fusion(Struct, frozen=True, forbid_unknown_fields=True):
    """The scores of `output` become `exit_weight` times those of the exit at `cut`, plus `model_weight` times the
    model's own.

    The weights come from `inputs` held-out inputs.
    """

    cut: CutName
    output: Text
    exit_weight: _Weight
    model_weight: _Weight
    inputs: Count
