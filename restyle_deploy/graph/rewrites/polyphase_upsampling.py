"""Up-convolution as a 3×3 convolution to four phases, which are then interleaved: (b) of design §5."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import Array, Edit, replace_value
from restyle_deploy.graph.rewrites.upsampling_convolution import (
    FACTOR,
    KERNEL_SIZE,
    find_upsampling_convolutions,
    merged_kernel,
)


def polyphase_upsampling(model: ir.Model, *, layers: Collection[str] | None = None) -> ir.Model:
    """Compute the four phases of the filtered image as channels of one convolution, then depth to space.

    Sample y = 2j + p is Σ_d x[j + d]·F[p + 2 − 2d] over d in {−1, 0, 1}, F the merged 6×6 kernel; borders included.

    Args:
        model: changed in place.
        layers: module paths; None for all.
    """
    for found in find_upsampling_convolutions(model, layers):
        edit = Edit(model, found.filter, "polyphase_upsampling")
        weight = edit.constant(_phase_weights(merged_kernel(found)))
        phases = edit.add("Conv", found.x, weight, pads=(1, 1, 1, 1), kernel_shape=(KERNEL_SIZE, KERNEL_SIZE))
        y = edit.add("DepthToSpace", phases, blocksize=FACTOR, mode="DCR")
        replace_value(found.filter.outputs[0], y)
        model.graph.remove((found.filter, found.convolution), safe=True)
    return model


def _phase_weights(merged: Array) -> Array:
    """Return [4·O, I, 3, 3], the phases (top left, top right, bottom left, bottom right) in blocks of O channels."""
    taps = np.array([[p + 2 - 2 * d for d in (-1, 0, 1)] for p in range(FACTOR)])  # [phase, 3]
    phases = [merged[:, :, rows][:, :, :, columns] for rows in taps for columns in taps]  # each [I, O, 3, 3]
    return np.concatenate([phase.transpose(1, 0, 2, 3) for phase in phases])
