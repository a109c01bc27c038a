"""The only importer of onnx and onnx-ir: models in; cuts, segments and bundles out.

`graph.torch_export` and `graph.quantise` import heavy libraries, and are imported by name where needed.
"""

from isthmus_tools.graph.bundler import add_cuts, build, open_whole, stored_examples
from isthmus_tools.graph.cuts import CutInfo, cut_after, cut_at, cuts, narrowest, resolve_cut, resolve_partition
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
    "open_whole",
    "partition",
    "resolve_cut",
    "resolve_partition",
    "stored_examples",
]
