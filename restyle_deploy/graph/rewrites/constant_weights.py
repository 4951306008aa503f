"""Modulation moved from the weights to the activations: 1 of design §5.

Upstream scales a copy of the weights per sample and makes the samples groups of one convolution, so the batch is frozen
into the graph and no weight is constant. Our own exports never have this form; graphs from elsewhere may.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import (
    Array,
    Edit,
    array_of,
    has_explicit_pads,
    integer_of,
    integers_of,
    nodes_of_type,
    replace_value,
    sizes_of,
)

_IN_CHANNELS_FIRST = (0, 2, 1, 3, 4)
_COPIED = ("pads", "strides", "dilations", "kernel_shape", "output_padding")


@dataclass(frozen=True, kw_only=True)
class Modulation:
    """A weight that is scaled by a style, and perhaps demodulated.

    Attributes:
        weight: [O, I, k, k].
        style: [1, I].
        epsilon: added to the sum of squares before its root; None without demodulation.
    """

    weight: Array
    style: ir.Value
    epsilon: float | None


def constant_weights(model: ir.Model) -> ir.Model:
    """Turn conv(x, W·s·demod) of one sample into demod ⊙ conv(x ⊙ s, W), with constant weights.

    demod_o = rsqrt(Σ_i s_i² · Σ_k W_oik² + ε), s the style.

    Args:
        model: changed in place; a graph of one sample (its groups are then 1), as an export with a frozen batch is.
    """
    for op_type in ("Conv", "ConvTranspose"):
        for node in nodes_of_type(model, op_type):
            modulation = _modulation_of(node)
            if modulation is not None:
                _move_modulation(model, node, modulation)
    return model


def _modulation_of(node: ir.Node) -> Modulation | None:
    """Follow a convolution's weight back to the constant that a style scales."""
    if integer_of(node, "group", 1) != 1 or len(node.inputs) > 2 or not has_explicit_pads(node):
        return None
    product = _producer(_modulated_weight_of(node), "Mul")
    epsilon = None
    if product is not None and array_of(product.inputs[0]) is None:  # modulated weight × demodulation
        modulated, demodulation = product.inputs
        epsilon = _epsilon_of(demodulation, modulated)
        if epsilon is None:
            return None
        product = _producer(modulated, "Mul")
    view = _producer(product.inputs[1], "Reshape") if product is not None else None
    weight = array_of(product.inputs[0]) if product is not None else None
    style = view.inputs[0] if view is not None else None
    if weight is None or weight.ndim != 5 or view is None or style is None or sizes_of(style) != weight.shape[2:3]:
        return None
    if sizes_of(view.outputs[0]) != (1, weight.shape[2], 1, 1):
        return None
    return Modulation(weight=weight[0].astype(np.float32), style=style, epsilon=epsilon)


def _modulated_weight_of(node: ir.Node) -> ir.Value | None:
    """Return what a convolution reads as its weight before it loses the axis of samples: [1, O, I, k, k]."""
    reshape = _producer(node.inputs[1], "Reshape")
    value = reshape.inputs[0] if reshape is not None else None
    if reshape is None or reshape.outputs[0].shape is None or sizes_of(value) != tuple(reshape.outputs[0].shape):
        return None
    if node.op_type == "Conv":
        return value
    swap = _producer(value, "Transpose")
    return swap.inputs[0] if swap is not None and integers_of(swap, "perm") == _IN_CHANNELS_FIRST else None


def _epsilon_of(demodulation: ir.Value | None, weight: ir.Value | None) -> float | None:
    """Return ε of 1 / √(Σ weight² + ε) over all axes but the first two; None if the value is another."""
    root = _producer(_input_of(demodulation, "Reciprocal"), "Sqrt")
    energy, epsilon = (root.inputs[0], 0.0) if root is not None else (None, 0.0)
    addition = _producer(energy, "Add")
    if addition is not None:
        constant = array_of(addition.inputs[1])
        if constant is None or constant.size != 1:
            return None
        energy, epsilon = addition.inputs[0], float(constant.reshape(-1)[0])
    total = _producer(energy, "ReduceSum")
    axes = array_of(total.inputs[1]) if total is not None and len(total.inputs) > 1 else None
    if total is None or axes is None or axes.tolist() != [2, 3, 4] or integer_of(total, "keepdims", 1) != 1:
        return None
    square = _producer(total.inputs[0])
    if square is None or square.inputs[0] is not weight:
        return None
    if square.op_type == "Pow":
        exponent = array_of(square.inputs[1])
        return epsilon if exponent is not None and exponent.reshape(-1).tolist() == [2.0] else None
    return epsilon if square.op_type == "Mul" and square.inputs[1] is weight else None


def _move_modulation(model: ir.Model, node: ir.Node, modulation: Modulation) -> None:
    edit = Edit(model, node, "constant_weights")
    style, weight = modulation.style, modulation.weight
    x = node.inputs[0]
    assert x is not None
    y = edit.add("Mul", x, edit.add("Unsqueeze", style, edit.integers(2, 3)))
    layout = weight.transpose(1, 0, 2, 3) if node.op_type == "ConvTranspose" else weight
    attributes = {name: integers_of(node, name) for name in _COPIED if name in node.attributes}
    y = edit.add(node.op_type, y, edit.constant(layout), **attributes)
    if modulation.epsilon is not None:
        energy = np.square(weight, dtype=np.float64).sum((2, 3)).astype(np.float32)  # [O, I]
        epsilon = edit.constant(np.full(len(weight), modulation.epsilon, np.float32))
        energies = edit.add("Gemm", edit.add("Mul", style, style), edit.constant(energy), epsilon, transB=1)
        demod = edit.add("Reciprocal", edit.add("Sqrt", energies))  # [1, O]
        y = edit.add("Mul", y, edit.add("Unsqueeze", demod, edit.integers(2, 3)))
    replace_value(node.outputs[0], y)
    model.graph.remove(node, safe=True)


def _producer(value: ir.Value | None, op_type: str | None = None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and op_type in (None, node.op_type) else None


def _input_of(value: ir.Value | None, op_type: str) -> ir.Value | None:
    node = _producer(value, op_type)
    return node.inputs[0] if node is not None else None
