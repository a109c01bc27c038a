"""ONNX in; cuts, segments and bundles out. The only place that imports onnx and onnx-ir.

`isthmus.graph.picture` draws a model's cuts and `isthmus.graph.torch_export` brings torch models in; both import heavy
libraries, and so are imported by name where they are used.
"""

from isthmus.graph.bundler import add_cuts, build, narrowest, stored_examples
from isthmus.graph.cuts import CutInfo, cut_after, cut_at, cuts, resolve_cut, resolve_partition
from isthmus.graph.extract import Extracted, check_order, extract, partition
from isthmus.graph.model import Model, open_model

__all__ = [
    "CutInfo",
    "Extracted",
    "Model",
    "add_cuts",
    "build",
    "check_order",
    "cut_after",
    "cut_at",
    "cuts",
    "extract",
    "narrowest",
    "open_model",
    "partition",
    "resolve_cut",
    "resolve_partition",
    "stored_examples",
]
