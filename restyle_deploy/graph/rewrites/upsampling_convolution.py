"""Where a transposed convolution meets the FIR filter, and the 6×6 kernel that is both: what (b) and (c) start from."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import (
    Array,
    array_of,
    has_explicit_pads,
    integer_of,
    integers_of,
    nodes_of_type,
    only_user,
)

KERNEL_SIZE = 3
FILTER_SIZE = 4
FACTOR = 2


@dataclass(frozen=True, kw_only=True)
class UpsamplingConvolution:
    """A 3×3 transposed convolution of stride 2 whose result only the 4×4 filter reads, padded by 1 all around.

    Attributes:
        convolution, filter: the nodes.
        x: [N, I, H, W].
        weight: [I, O, 3, 3].
        kernel: [4, 4].
    """

    convolution: ir.Node
    filter: ir.Node
    x: ir.Value
    weight: Array
    kernel: Array


def find_upsampling_convolutions(
    model: ir.Model, layers: Collection[str] | None = None
) -> Iterator[UpsamplingConvolution]:
    """Yield the pairs that occur in StyleGAN2; the graph may be changed meanwhile."""
    for node in nodes_of_type(model, "UpFirDn2d", layers):
        convolution = node.inputs[0].producer() if node.inputs[0] is not None else None
        kernel = array_of(node.inputs[1])
        if convolution is None or convolution.op_type != "ConvTranspose" or kernel is None:
            continue
        weight, x = array_of(convolution.inputs[1]), convolution.inputs[0]
        if (
            weight is not None
            and x is not None
            and _is_plain_filter(node, kernel)
            and _is_plain_convolution(convolution, weight)
            and only_user(convolution.outputs[0]) is node
        ):
            yield UpsamplingConvolution(
                convolution=convolution,
                filter=node,
                x=x,
                weight=weight.astype(np.float32),
                kernel=kernel.astype(np.float32),
            )


def merged_kernel(found: UpsamplingConvolution) -> Array:
    """Return the transposed convolution's weight, convolved with the filter: [I, O, 6, 6].

    Sample r of the filtered image is Σ_i x[i]·F[r + 2 − 2i]: a transposed convolution of stride 2 and padding 2.
    """
    size = KERNEL_SIZE + FILTER_SIZE - 1
    merged = np.zeros((*found.weight.shape[:2], size, size))  # float64: summed, then rounded once
    for (row, column), tap in np.ndenumerate(found.kernel):
        merged[:, :, row : row + KERNEL_SIZE, column : column + KERNEL_SIZE] += found.weight * np.float64(tap)
    return merged.astype(np.float32)


def _is_plain_filter(node: ir.Node, kernel: np.ndarray) -> bool:
    return (
        kernel.shape == (FILTER_SIZE, FILTER_SIZE)
        and integers_of(node, "up") == integers_of(node, "down") == (1, 1)
        and integers_of(node, "pads") == (1, 1, 1, 1)
    )


def _is_plain_convolution(node: ir.Node, weight: np.ndarray) -> bool:
    return (
        weight.shape[2:] == (KERNEL_SIZE, KERNEL_SIZE)
        and len(node.inputs) == 2
        and integers_of(node, "strides") == (FACTOR, FACTOR)
        and has_explicit_pads(node)
        and not any(integers_of(node, "pads"))
        and not any(integers_of(node, "output_padding"))
        and integers_of(node, "dilations", (1, 1)) == (1, 1)
        and integer_of(node, "group", 1) == 1
    )
