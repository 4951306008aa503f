"""Noise and bias scaled beforehand by the activation's gain, so that no pass over the image applies it."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import Edit, array_of, nodes_of_type, only_user, replace_value


def scale_constants(model: ir.Model, *, layers: Collection[str] | None = None) -> ir.Model:
    """Turn gain · lrelu(x ⊙ demod + noise + bias) into lrelu(x ⊙ (gain·demod) + gain·noise + gain·bias).

    A positive gain passes through the leaky ReLU; noise and bias are constants, and demod has one value per channel.

    Args:
        model: changed in place; `FusedBiasAct` whose input is x ⊙ demod + noise becomes standard operators.
        layers: module paths; None for all.
    """
    for node in nodes_of_type(model, "FusedBiasAct", layers):
        gain, slope = node.attributes["gain"].as_float(), node.attributes["negative_slope"].as_float()
        bias, add = array_of(node.inputs[1]), _producer(node.inputs[0], "Add")
        noise = array_of(add.inputs[1]) if add is not None else None
        scaling = _producer(add.inputs[0], "Mul") if add is not None else None
        if bias is None or noise is None or add is None or scaling is None or gain <= 0:
            continue
        x, demod = scaling.inputs
        unsqueeze = _producer(demod, "Unsqueeze")
        if x is None or unsqueeze is None or unsqueeze.inputs[0] is None or unsqueeze.inputs[1] is None:
            continue
        edit = Edit(model, node, "scale_constants")
        factor = np.float32(gain)
        scaled = edit.add("Mul", unsqueeze.inputs[0], edit.constant(factor.reshape(1)))  # [N, O]
        y = edit.add("Mul", x, edit.add("Unsqueeze", scaled, unsqueeze.inputs[1]))
        y = edit.add("Add", y, edit.constant(noise.astype(np.float32) * factor))
        y = edit.add("Add", y, edit.constant((bias.astype(np.float32) * factor).reshape(1, -1, 1, 1)))
        replace_value(node.outputs[0], edit.add("LeakyRelu", y, alpha=slope))
        model.graph.remove((node, add, scaling, unsqueeze), safe=True)
    return model


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node of this operator that gives a value which nothing else reads."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and only_user(node.outputs[0]) is not None else None
