"""int8 by static quantisation per channel; the first layers, which cost most agreement, stay in float where needed."""

from __future__ import annotations

from pathlib import Path

from isthmus_tools.graph.quantise import Quantiser
from isthmus_tools.learning.compression.subject import HeadSubject
from isthmus_tools.progress import Progress, silent

# With more layers in float than this share, little is left to save.
_MAX_FLOAT_SHARE = 0.5


def int8(
    subject: HeadSubject,
    graph: Path,
    folder: Path,
    limit: float,
    progress: Progress = silent,
    reduce_range: bool | None = None,
) -> tuple[Path, str]:
    """The int8 form of a graph that stands for the subject's segment, and a sentence about how it was made.

    Where it keeps less than the share `limit` of the samples' predictions, the first layers stay in float: 1, 2, 4, …
    until it does, or as many as keep most. They see the widest range of values with the fewest channels, and cost most
    agreement of all.

    Raises:
        ModelError: nothing to quantise, or onnxruntime's tools refuse the graph.
    """
    scratch = folder / "quantiser"
    scratch.mkdir()
    progress("measuring activation ranges")
    quantiser = Quantiser(graph, subject.head_samples(), scratch, reduce_range=reduce_range)
    out = quantiser.write(folder / "int8.onnx")
    best = agreement = subject.agreement(out)
    count, in_float = 1, 0
    while agreement < limit and count <= _MAX_FLOAT_SHARE * len(quantiser.layers):
        progress(f"trying the first {count} layers in float")
        tried = quantiser.write(folder / f"int8-{count}.onnx", count)
        if (agreement := subject.agreement(tried)) > best:
            out, best, in_float = tried, agreement, count
        # Doubled: a layer more or less changes less than the choice of samples does.
        count *= 2
    layers = f", {in_float} of {len(quantiser.layers)} layers in float" if in_float else ""
    return out, f"int8, static, per channel{layers}"
