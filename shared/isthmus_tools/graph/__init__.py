"""ONNX in; cuts, segments and bundles out. The only place that imports onnx and onnx-ir.

`graph.picture` draws cuts and `graph.torch_export` brings torch models in; both import heavy libraries, and are
imported by name where they are used.
"""

from isthmus_tools.graph.bundler import add_cuts, build, narrowest, stored_examples
from isthmus_tools.graph.cuts import CutInfo, cut_after, cut_at, cuts, resolve_cut, resolve_partition
from isthmus_tools.graph.extract import Extracted, check_order, extract, partition
from isthmus_tools.graph.model import Model, open_model

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
