"""The kinds of nodes that our graphs have, each as a call of torch's or of our operators: one table.

A typed graph keeps its types: torch's functions compute in the type of what they are given, without autocast.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.nn import functional

from restyle_deploy.graph.edit import array_of, has_explicit_pads, integer_of, integers_of
from restyle_deploy.ops import cuda_ops as cuda_ops  # registers torch.ops.restyle_deploy
from restyle_deploy.ops.kernels.launches import separable_taps
from restyle_deploy.ops.onnx_functions import DOMAIN, Factor

_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
# The factors of an epilogue in the order in which its node reads them.
_FACTORS = (Factor.DEMOD, Factor.NOISE, Factor.BIAS, Factor.NEXT_SCALE)


class Builder(Protocol):
    """Takes the calls that nodes become."""

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> fx.Node:
        """Add a call of a function, and return what stands for its result."""
        ...

    def value(self, value: ir.Value) -> Any:
        """Return what stands for a value that was converted before, or for a constant."""
        ...


class Reader:
    """One node of a graph, and the builder that takes what it becomes."""

    def __init__(self, node: ir.Node, builder: Builder) -> None:
        self.node, self.call, self._builder = node, builder.call, builder

    def __getitem__(self, place: int) -> Any:
        """Return what stands for an input; None for one that the node has not."""
        value = self.node.inputs[place] if place < len(self.node.inputs) else None
        return None if value is None else self._builder.value(value)

    def array(self, place: int) -> Any:
        """Return a constant input; raise `ValueError` where it is computed."""
        array = array_of(self.node.inputs[place])
        if array is None:
            raise ValueError(f"{self.node.name} has an input {place} that is no constant")
        return array

    def integers(self, place: int) -> list[int]:
        """Return a constant input as numbers."""
        return [int(number) for number in self.array(place).reshape(-1)]

    def number(self, name: str, default: float) -> float:
        """Return an attribute that is a float."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_float()

    def require(self, fits: bool, what: str) -> None:
        """Raise `ValueError` where a node is used in a way that none of our graphs does."""
        if not fits:
            raise ValueError(f"{self.node.name} ({self.node.op_type}) has {what}, which none of our graphs has")


def _same(function: Callable[..., Any]) -> Callable[[Reader], Any]:
    """Convert a node that takes its inputs as the function does."""
    return lambda node: node.call(function, *(node[place] for place in range(len(node.node.inputs))))


def _convolution(node: Reader) -> Any:
    x, (pads, rest) = node[0], _pads_of(node)
    if rest is not None:
        x = node.call(functional.pad, x, rest)
    strides, dilations = (integers_of(node.node, name, (1, 1)) for name in ("strides", "dilations"))
    return node.call(
        functional.conv2d, x, node[1], node[2], strides, pads, dilations, integer_of(node.node, "group", 1)
    )


def _transposed_convolution(node: Reader) -> Any:
    pads, rest = _pads_of(node)
    node.require(rest is None, "uneven pads")
    strides, out_pads, dilations = (
        integers_of(node.node, name, default)
        for name, default in (("strides", (1, 1)), ("output_padding", (0, 0)), ("dilations", (1, 1)))
    )
    groups = integer_of(node.node, "group", 1)
    return node.call(functional.conv_transpose2d, node[0], node[1], node[2], strides, pads, out_pads, groups, dilations)


def _pads_of(node: Reader) -> tuple[tuple[int, int], list[int] | None]:
    """Return what a convolution pads by itself (vertical, horizontal), or (0, 0) and uneven pads in torch's order."""
    node.require(has_explicit_pads(node.node), "automatic pads")
    top, left, bottom, right = integers_of(node.node, "pads", (0, 0, 0, 0))
    if (top, left) == (bottom, right):
        return (top, left), None
    return (0, 0), [left, right, top, bottom]


def _pooling(function: Callable[..., Any]) -> Callable[[Reader], Any]:
    def convert(node: Reader) -> Any:
        node.require(not any(integers_of(node.node, "pads")), "pads")
        return node.call(
            function, node[0], integers_of(node.node, "kernel_shape"), integers_of(node.node, "strides", (1, 1))
        )

    return convert


def _batch_norm(node: Reader) -> Any:
    scale, bias, mean, variance = (node[place] for place in range(1, 5))
    epsilon = node.number("epsilon", 1e-5)
    return node.call(functional.batch_norm, node[0], mean, variance, scale, bias, False, 0.0, epsilon)


def _prelu(node: Reader) -> Any:
    slopes = node.array(1)
    node.require(slopes.size == max(slopes.shape, default=1), "slopes that differ within a channel")
    return node.call(functional.prelu, node[0], node.call(torch.flatten, node[1]))


def _linear(node: Reader) -> Any:
    is_plain = node.number("alpha", 1.0) == 1.0 == node.number("beta", 1.0)
    node.require(is_plain and not integer_of(node.node, "transA", 0), "factors")
    weight = node[1] if integer_of(node.node, "transB", 0) else node.call(torch.t, node[1])
    return node.call(functional.linear, node[0], weight, node[2])


def _power(node: Reader) -> Any:
    node.require(bool((node.array(1) == 2).all()), "another exponent than 2")
    return node.call(torch.square, node[0])


def _reduction(function: Callable[..., Any]) -> Callable[[Reader], Any]:
    def convert(node: Reader) -> Any:
        return node.call(function, node[0], node.integers(1), keepdim=bool(integer_of(node.node, "keepdims", 1)))

    return convert


def _unsqueeze(node: Reader) -> Any:
    x = node[0]
    for axis in sorted(node.integers(1)):
        x = node.call(torch.unsqueeze, x, axis)
    return x


def _gather(node: Reader) -> Any:
    index = node.array(1)
    node.require(index.ndim == 0, "several indices")
    return node.call(torch.select, node[0], integer_of(node.node, "axis", 0), int(index))


def _slice(node: Reader) -> Any:
    starts, ends = node.integers(1), node.integers(2)
    axes = node.integers(3) if len(node.node.inputs) > 3 else list(range(len(starts)))
    steps = node.integers(4) if len(node.node.inputs) > 4 else [1] * len(starts)
    index = [slice(None)] * (max(axes) + 1)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, end, step)
    return node.call(operator.getitem, node[0], tuple(index))


def _pad(node: Reader) -> Any:
    pads = node.integers(1)
    rank = len(pads) // 2
    # Torch counts from the last axis.
    pairs = [pads[axis + side * rank] for axis in reversed(range(rank)) for side in (0, 1)]
    return node.call(functional.pad, node[0], pairs)


def _concatenate(node: Reader) -> Any:
    sources = [value.producer() for value in node.node.inputs if value is not None]
    if any(source is not None and source.op_type == "Shape" for source in sources):
        return node.call(operator.add, node[0], node.integers(1))  # of sizes, which are numbers here
    parts = [node[place] for place in range(len(node.node.inputs))]
    return node.call(torch.cat, parts, integer_of(node.node, "axis", 0))


def _sizes_of(x: Tensor, start: int, end: int | None) -> list[int]:
    return list(x.shape[start:end])


def _shape(node: Reader) -> Any:
    end = integer_of(node.node, "end", 0) if "end" in node.node.attributes else None
    return node.call(_sizes_of, node[0], integer_of(node.node, "start", 0), end)


def _resize_to(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return functional.interpolate(x, size=tuple(sizes[2:]), mode="bilinear", align_corners=True)


def _resize(node: Reader) -> Any:
    texts = {name: node.node.attributes[name].as_string() for name in ("mode", "coordinate_transformation_mode")}
    is_ours = texts == {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
    node.require(is_ours and len(node.node.inputs) == 4, f"the attributes {texts}")
    return node.call(_resize_to, node[0], node[3])


def _from_depth(x: Tensor, size: int) -> Tensor:
    batch, channels, height, width = x.shape
    kept = channels // size**2
    blocks = x.reshape(batch, size, size, kept, height, width).permute(0, 3, 4, 1, 5, 2)  # [N, C, H, b, W, b]
    return blocks.reshape(batch, kept, height * size, width * size)


def _depth_to_space(node: Reader) -> Any:
    mode = node.node.attributes.get("mode")
    node.require(mode is None or mode.as_string() == "DCR", "another order of channels")
    return node.call(_from_depth, node[0], integer_of(node.node, "blocksize", 1))


def _fused_bias_act(node: Reader) -> Any:
    slope, gain = node.number("negative_slope", 1.0), node.number("gain", 1.0)
    return node.call(torch.ops.restyle_deploy.fused_bias_act, node[0], node[1], None, None, 1.0, None, slope, gain)


def _epilogue_of(node: Reader, first: int) -> tuple[Any, ...]:
    """Return the last arguments of our operators, from the factors that a node reads from an input on."""
    present = Factor(integer_of(node.node, "factors", 0))
    node.require(Factor.ACTIVATION in present, "no activation")
    demod, noise, bias, next_scale = (
        node[first + place] if factor in present else None for place, factor in enumerate(_FACTORS)
    )
    return bias, demod, noise, 1.0, next_scale, node.number("negative_slope", 1.0), node.number("gain", 1.0)


def _bias_act_epilogue(node: Reader) -> Any:
    return node.call(torch.ops.restyle_deploy.fused_bias_act, node[0], *_epilogue_of(node, 1))


def _filter(node: Reader) -> Any:
    return node.call(torch.ops.restyle_deploy.upfirdn2d, *_filtering_of(node), None, None, None, 1.0, None, None, None)


def _filter_epilogue(node: Reader) -> Any:
    return node.call(torch.ops.restyle_deploy.upfirdn2d, *_filtering_of(node), *_epilogue_of(node, 2))


def _filtering_of(node: Reader) -> tuple[Any, ...]:
    (up, up_x), (down, down_x) = (integers_of(node.node, name, (1, 1)) for name in ("up", "down"))
    node.require((up, down) == (up_x, down_x), "other factors vertically than horizontally")
    is_separable = separable_taps(node.array(1).tolist()) is not None
    return node[0], node[1], up, down, list(integers_of(node.node, "pads", (0, 0, 0, 0))), is_separable


CONVERSIONS: Mapping[tuple[str, str], Callable[[Reader], Any]] = MappingProxyType(
    {
        ("", "Abs"): _same(torch.abs),
        ("", "Add"): _same(torch.add),
        ("", "AveragePool"): _pooling(functional.avg_pool2d),
        ("", "BatchNormalization"): _batch_norm,
        ("", "Cast"): lambda node: node.call(
            torch.Tensor.to, node[0], _TYPES[ir.DataType(integer_of(node.node, "to", 0))]
        ),
        ("", "Concat"): _concatenate,
        ("", "Conv"): _convolution,
        ("", "ConvTranspose"): _transposed_convolution,
        ("", "DepthToSpace"): _depth_to_space,
        ("", "Div"): _same(torch.div),
        ("", "Gather"): _gather,
        ("", "Gemm"): _linear,
        ("", "LeakyRelu"): lambda node: node.call(functional.leaky_relu, node[0], node.number("alpha", 0.01)),
        ("", "MatMul"): _same(torch.matmul),
        ("", "Max"): _same(torch.maximum),
        ("", "MaxPool"): _pooling(functional.max_pool2d),
        ("", "Mul"): _same(torch.mul),
        ("", "PRelu"): _prelu,
        ("", "Pad"): _pad,
        ("", "Pow"): _power,
        ("", "Reciprocal"): _same(torch.reciprocal),
        ("", "ReduceMax"): _reduction(torch.amax),
        ("", "ReduceMean"): _reduction(torch.mean),
        ("", "Relu"): _same(torch.relu),
        ("", "Reshape"): lambda node: node.call(torch.reshape, node[0], node.integers(1)),
        ("", "Resize"): _resize,
        ("", "Shape"): _shape,
        ("", "Sigmoid"): _same(torch.sigmoid),
        ("", "Slice"): _slice,
        ("", "Sqrt"): _same(torch.sqrt),
        ("", "Transpose"): lambda node: node.call(torch.permute, node[0], integers_of(node.node, "perm")),
        ("", "Unsqueeze"): _unsqueeze,
        (DOMAIN, "BiasActEpilogue"): _bias_act_epilogue,
        (DOMAIN, "FusedBiasAct"): _fused_bias_act,
        (DOMAIN, "UpFirDn2d"): _filter,
        (DOMAIN, "UpFirDn2dEpilogue"): _filter_epilogue,
    }
)
