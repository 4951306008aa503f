"""Up-convolution with the transposed convolution as four small convolutions, one per phase, then the filter."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import Array, Edit, replace_value, sizes_of
from restyle_deploy.graph.rewrites.upsampling_convolution import (
    FACTOR,
    UpsamplingConvolution,
    find_upsampling_convolutions,
)

# Taps of the 3×3 kernel that meet each phase, along one axis: y[2j] = x[j−1]·W[2] + x[j]·W[0], y[2j+1] = x[j]·W[1].
PHASE_TAPS = ((2, 0), (1,))


def phase_upsampling(model: ir.Model, *, layers: Collection[str] | None = None) -> ir.Model:
    """Compute the transposed convolution phase by phase: 2×2, 2×1, 1×2 and 1×1 convolutions, no product wasted.

    The phases are interleaved by two transpositions; then the filter follows as a depthwise convolution. It serves
    libraries whose transposed convolution is slow.

    Args:
        model: changed in place.
        layers: module paths; None for all.
    """
    for found in find_upsampling_convolutions(model, layers):
        sizes = sizes_of(found.x)
        if sizes is None:
            continue
        edit = Edit(model, found.filter, "phase_upsampling")
        y = _interleave(edit, _phases(edit, found), found.weight.shape[1], sizes[1:])
        # The interleaved image has one row and one column of zeros more than the transposed convolution gives.
        kernel = np.tile(np.flip(found.kernel), (found.weight.shape[1], 1, 1, 1))
        y = edit.add(
            "Conv",
            y,
            edit.constant(kernel),
            group=len(kernel),
            pads=(1, 1, 0, 0),
            kernel_shape=kernel.shape[2:],
        )
        replace_value(found.filter.outputs[0], y)
        model.graph.remove((found.filter, found.convolution), safe=True)
    return model


def _phases(edit: Edit, found: UpsamplingConvolution) -> list[ir.Value]:
    """Return the phases (even row and column, even and odd, odd and even, odd), each [N, O, H + 1, W + 1]."""
    phases = []
    _, height, width = sizes_of(found.x) or ()
    for rows in PHASE_TAPS:
        for columns in PHASE_TAPS:
            weight: Array = found.weight[:, :, list(rows)][:, :, :, list(columns)].transpose(1, 0, 2, 3)
            pads = (len(rows) - 1, len(columns) - 1, 1, 1)
            y = edit.add("Conv", found.x, edit.constant(weight), pads=pads, kernel_shape=weight.shape[2:])
            batch = found.x.shape[0] if found.x.shape is not None else None
            y.shape, y.type = ir.Shape((batch, len(weight), height + 1, width + 1)), found.x.type  # other rewrites ask
            phases.append(y)
    return phases


def _interleave(edit: Edit, phases: list[ir.Value], channels: int, size: tuple[int, ...]) -> ir.Value:
    """Return [N, O, 2H + 2, 2W + 2]: columns first, as pairs of single values, then whole rows."""
    height, width = size[0] + 1, size[1] + 1
    y = edit.add("Concat", *phases, axis=1)
    y = edit.add("Reshape", y, edit.integers(-1, FACTOR, FACTOR, channels * height * width))
    y = edit.add("Transpose", y, perm=(0, 1, 3, 2))
    y = edit.add("Reshape", y, edit.integers(-1, FACTOR, channels * height, FACTOR * width))
    y = edit.add("Transpose", y, perm=(0, 2, 1, 3))
    return edit.add("Reshape", y, edit.integers(-1, channels, FACTOR * height, FACTOR * width))
