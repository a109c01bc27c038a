"""A graph computed by torch, so that its layers' weights can be trained: operators that heads of networks have.

Every other operator is refused by its name. Weights of convolutions and matrix products are parameters; all other
constants stay. Source: onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus_tools.graph.channel_groups import automatic_padding, constant_of

Attributes: TypeAlias = Mapping[str, Any]
_LAYERS = ("Conv", "Gemm", "MatMul")


def torch_module() -> Any:
    """The package torch.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import torch
    except ImportError as e:
        raise ModelError("distillation needs torch", hint="pip install 'isthmus_tools[torch]'") from e
    return torch


class TorchGraph:
    """The graph of `model` as a function of torch's tensors; `parameters` are its layers' weights by node and input."""

    def __init__(self, model: ir.Model) -> None:
        """Read the graph.

        Raises:
            ModelError: torch is missing, or an operator has no counterpart here; the message names all of them.
        """
        self._torch = torch_module()
        self._operators = _operators(self._torch)
        nodes = list(model.graph)
        foreign = [node for node in nodes if node.domain or node.op_type not in {*self._operators, "Conv"}]
        if unknown := sorted({f"{node.domain}.{node.op_type}".strip(".") for node in foreign}):
            raise ModelError(f"distillation does not know the operators {', '.join(unknown)[:300]}")
        self._inputs = [str(v.name) for v in model.graph.inputs]
        self._outputs = [str(v.name) for v in model.graph.outputs]
        self.parameters: dict[tuple[str, int], Any] = {}
        self._steps = [self._step(node) for node in nodes]

    def _step(self, node: ir.Node) -> tuple[Callable[..., Any], list[Any], list[str]]:
        arguments: list[Any] = []
        for index, value in enumerate(node.inputs):
            array = constant_of(node, index)
            if value is None:
                arguments.append(None)
            elif array is None:
                arguments.append(str(value.name))
            elif node.op_type in _LAYERS and index in (1, 2) and array.dtype == np.float32:
                # A parameter of the layer's own, where two share a constant.
                tensor = self._torch.nn.Parameter(self._torch.from_numpy(array.copy()))
                self.parameters[str(node.name), index] = tensor
                arguments.append(tensor)
            else:
                arguments.append(self._torch.from_numpy(array.copy()))
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        convolution = _convolution(self._torch, node) if node.op_type == "Conv" else self._operators[node.op_type]
        return (lambda *a: convolution(attributes, *a)), arguments, [str(v.name) for v in node.outputs]

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """The graph's outputs for these inputs, as tensors that know their gradients."""
        values: dict[str, Any] = {name: self._torch.from_numpy(np.array(arrays[name])) for name in self._inputs}
        for function, arguments, outputs in self._steps:
            values[outputs[0]] = function(*(values[a] if isinstance(a, str) else a for a in arguments))
        return {name: values[name] for name in self._outputs}


def _convolution(torch: Any, node: ir.Node) -> Callable[..., Any]:
    weight = constant_of(node, 1)
    if weight is None or automatic_padding(node) is not None:
        raise ModelError(f"distillation does not know the padding or weights of {node.name}")
    rank = weight.ndim - 2
    function = getattr(torch.nn.functional, f"conv{rank}d", None)
    if function is None:
        raise ModelError(f"distillation knows convolutions over up to three dimensions, and {node.name} has {rank}")

    def run(attributes: Attributes, x: Any, w: Any, b: Any = None) -> Any:
        pads = list(attributes.get("pads") or [0] * 2 * rank)
        # torch pads from the last dimension on, each with its two sides together.
        order = [side for d in reversed(range(rank)) for side in (pads[d], pads[d + rank])]
        padded = torch.nn.functional.pad(x, order) if any(order) else x
        return function(
            padded,
            w,
            b,
            stride=tuple(attributes.get("strides") or (1,) * rank),
            dilation=tuple(attributes.get("dilations") or (1,) * rank),
            groups=int(attributes.get("group") or 1),
        )

    return run


def _gemm(torch: Any) -> Callable[..., Any]:
    def run(attributes: Attributes, a: Any, b: Any, c: Any = None) -> Any:
        left = a.T if attributes.get("transA") else a
        product = left @ (b.T if attributes.get("transB") else b) * attributes.get("alpha", 1.0)
        return product if c is None else product + attributes.get("beta", 1.0) * c

    return run


def _pool(torch: Any, kind: str) -> Callable[..., Any]:
    def run(attributes: Attributes, x: Any) -> Any:
        kernel = tuple(attributes["kernel_shape"])
        pads = tuple(attributes.get("pads") or (0,) * 2 * len(kernel))
        uneven = pads[: len(kernel)] != pads[len(kernel) :]
        if uneven or attributes.get("ceil_mode") or attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            raise ModelError("distillation does not know pools with uneven padding")
        function = getattr(torch.nn.functional, f"{kind}_pool{len(kernel)}d")
        options = {"count_include_pad": bool(attributes.get("count_include_pad"))} if kind == "avg" else {}
        strides = tuple(attributes.get("strides") or (1,) * len(kernel))
        return function(x, kernel, strides, pads[: len(kernel)], **options)

    return run


def _mean(attributes: Attributes, x: Any, axes: Any = None) -> Any:
    chosen = attributes.get("axes") if axes is None else axes.tolist()
    return x.mean(dim=list(chosen or range(x.ndim)), keepdim=bool(attributes.get("keepdims", 1)))


def _operators(torch: Any) -> dict[str, Callable[..., Any]]:
    nn = torch.nn.functional

    def clip(attributes: Attributes, x: Any, low: Any = None, high: Any = None) -> Any:
        # Before opset 11 the bounds are attributes; heads of newer graphs have them as inputs.
        return torch.clamp(x, attributes.get("min", low), attributes.get("max", high))

    def normalised(attributes: Attributes, x: Any, scale: Any, bias: Any, mean: Any, variance: Any) -> Any:
        return nn.batch_norm(x, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))

    def reshaped(attributes: Attributes, x: Any, shape: Any) -> Any:
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())]
        return x.reshape(sizes)

    def spatial_mean(attributes: Attributes, x: Any) -> Any:
        return x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)

    def hard_sigmoid(attributes: Attributes, x: Any) -> Any:
        return torch.clamp(attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5), 0, 1)

    def leaky(attributes: Attributes, x: Any) -> Any:
        return nn.leaky_relu(x, attributes.get("alpha", 0.01))

    return {
        "Add": lambda _, a, b: a + b,
        "AveragePool": _pool(torch, "avg"),
        "BatchNormalization": normalised,
        "Clip": clip,
        "Concat": lambda attributes, *parts: torch.cat(parts, dim=attributes["axis"]),
        "Div": lambda _, a, b: a / b,
        "Flatten": lambda attributes, x: x.reshape(int(np.prod(x.shape[: attributes.get("axis", 1)])), -1),
        "Gelu": lambda attributes, x: nn.gelu(x, approximate=str(attributes.get("approximate", "none"))),
        "Gemm": _gemm(torch),
        "GlobalAveragePool": spatial_mean,
        "HardSigmoid": hard_sigmoid,
        "HardSwish": lambda _, x: nn.hardswish(x),
        "Identity": lambda _, x: x,
        "LeakyRelu": leaky,
        "MatMul": lambda _, a, b: a @ b,
        "MaxPool": _pool(torch, "max"),
        "Mul": lambda _, a, b: a * b,
        "ReduceMean": _mean,
        "Relu": lambda _, x: torch.relu(x),
        "Reshape": reshaped,
        "Sigmoid": lambda _, x: torch.sigmoid(x),
        "Softplus": lambda _, x: nn.softplus(x),
        "Sub": lambda _, a, b: a - b,
        "Tanh": lambda _, x: torch.tanh(x),
        "Transpose": lambda attributes, x: x.permute(*attributes["perm"]),
    }
