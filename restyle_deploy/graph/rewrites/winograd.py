"""3×3 convolution by Winograd's minimal filtering F(4×4, 3×3): a quarter of the multiplications.

Source: Lavin and Gray, arXiv:1509.09308, section 4.3, whose three matrices stand below.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import (
    Array,
    Edit,
    array_of,
    integer_of,
    integers_of,
    nodes_of_type,
    replace_value,
    sizes_of,
)

TILE = 4
WINDOW = 6
INPUT_TRANSFORM = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float64,
)
WEIGHT_TRANSFORM = (
    np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float64)
    / np.array([24, 24, 24, 24, 24, 24], np.float64)[:, None]
)
OUTPUT_TRANSFORM = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float64
)


def winograd(model: ir.Model, *, layers: Collection[str] | None = None) -> ir.Model:
    """Compute 3×3 convolutions of stride 1 tile by tile, as 36 matrix products over the channels.

    It pays where channels are many and the image small: the transforms move 2.25 times the image's bytes. The
    transformed weights take four times the memory of the given ones.

    Args:
        model: changed in place; images whose sides are no multiples of 4 stay as they are.
        layers: module paths; None for all.
    """
    for node in nodes_of_type(model, "Conv", layers):
        if not can_tile(node):
            continue
        weight = array_of(node.inputs[1])
        x, sizes = node.inputs[0], sizes_of(node.inputs[0])
        assert x is not None
        assert weight is not None
        assert sizes is not None
        edit = Edit(model, node, "winograd")
        y = _convolve(edit, x, weight.astype(np.float32), sizes)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = array_of(node.inputs[2])
            assert bias is not None
            y = edit.add("Add", y, edit.constant(bias.astype(np.float32).reshape(1, -1, 1, 1)))
        replace_value(node.outputs[0], y)
        model.graph.remove(node, safe=True)
    return model


def can_tile(node: ir.Node) -> bool:
    """Whether a node is a 3×3 convolution of stride 1 and padding 1, with constant weight, on whole tiles."""
    if node.op_type != "Conv":
        return False
    weight, sizes = array_of(node.inputs[1]), sizes_of(node.inputs[0])
    if weight is None or sizes is None or weight.shape[2:] != (3, 3):
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None and array_of(node.inputs[2]) is None:
        return False
    return (
        integer_of(node, "group", 1) == 1
        and integers_of(node, "strides", (1, 1)) == (1, 1)
        and integers_of(node, "dilations", (1, 1)) == (1, 1)
        and integers_of(node, "pads") == (1, 1, 1, 1)
        and sizes[1] % TILE == sizes[2] % TILE == 0
    )


def _convolve(edit: Edit, x: ir.Value, weight: Array, sizes: tuple[int, ...]) -> ir.Value:
    """Return the convolution without bias: [N, I, H, W] -> [N, O, H, W]."""
    out_channels, in_channels = weight.shape[:2]
    rows, columns = sizes[1] // TILE, sizes[2] // TILE
    # Tiles of 4×4, one more of each axis than the image has: [4, 4, N, I, rows + 1, columns + 1].
    y = edit.add("Pad", x, edit.integers(0, 0, 1, 1, 0, 0, TILE - 1, TILE - 1))
    y = edit.add("Reshape", y, edit.integers(-1, in_channels, rows + 1, TILE, columns + 1, TILE))
    y = edit.add("Transpose", y, perm=(3, 5, 0, 1, 2, 4))
    # Windows of 6×6: each tile and the first two rows and columns of its neighbours: [6, 6, N, I, rows, columns].
    y = edit.add("Concat", _cut(edit, y, 5, columns), _cut(edit, _cut(edit, y, 1, 2), 5, None), axis=1)
    y = edit.add("Concat", _cut(edit, y, 4, rows), _cut(edit, _cut(edit, y, 0, 2), 4, None), axis=0)
    y = edit.add("Reshape", y, edit.integers(WINDOW**2, -1))
    y = edit.add("MatMul", edit.constant(_both_axes(INPUT_TRANSFORM)), y)
    y = edit.add("Reshape", y, edit.integers(WINDOW**2, -1, in_channels, rows * columns))  # [36, N, I, T]
    transformed = np.einsum("pk,ql,oikl->pqoi", WEIGHT_TRANSFORM, WEIGHT_TRANSFORM, weight, optimize=True)
    product = edit.constant(transformed.reshape(WINDOW**2, 1, out_channels, in_channels).astype(np.float32))
    y = edit.add("MatMul", product, y)  # [36, N, O, T]
    y = edit.add("Reshape", y, edit.integers(WINDOW**2, -1))
    y = edit.add("MatMul", edit.constant(_both_axes(OUTPUT_TRANSFORM)), y)  # [16, N·O·T]
    y = edit.add("Reshape", y, edit.integers(TILE, TILE, -1, out_channels, rows, columns))
    y = edit.add("Transpose", y, perm=(2, 3, 4, 0, 5, 1))
    return edit.add("Reshape", y, edit.integers(-1, out_channels, *sizes[1:]))


def _cut(edit: Edit, value: ir.Value, axis: int, end: int | None) -> ir.Value:
    """Return the first `end` of an axis; with None, all but the first."""
    begin, end = (0, end) if end is not None else (1, np.iinfo(np.int64).max)
    return edit.add("Slice", value, edit.integers(begin), edit.integers(end), edit.integers(axis))


def _both_axes(transform: np.ndarray) -> Array:
    """Return a transform of columns and rows as one matrix over flattened windows."""
    return np.kron(transform, transform).astype(np.float32)
