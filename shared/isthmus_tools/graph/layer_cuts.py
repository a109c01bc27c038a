"""Cuts of transformers between two layers: named by the number of layers before."""

from __future__ import annotations

from isthmus.errors import CutError

BOUNDARY = "layer_"
# Far more digits than any model's layers have.
_MAX_DIGITS = 8


def boundary(layer: int) -> str:
    """The name of the residual stream behind the first `layer` layers, and so of the cut there."""
    return f"{BOUNDARY}{layer}"


def layer_numbers(text: str, layers: int) -> list[int]:
    """The numbers of layers in a partition's text, such as `10/20` or `layer_10/layer_20`, in its order.

    Raises:
        CutError: a part is no number from 1 to `layers` - 1.
    """
    numbers = []
    for part in text.split("/"):
        number = part.strip().removeprefix(BOUNDARY)
        if not (number.isdecimal() and len(number) <= _MAX_DIGITS and 0 < int(number) < layers):
            raise CutError(
                f"{part[:80]!r} is no cut of this model; its cuts are 1 to {layers - 1}, the number of layers before",
                cut=part[:80],
            )
        numbers.append(int(number))
    return numbers
