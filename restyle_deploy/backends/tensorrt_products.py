"""Matrix products as 1×1 convolutions: for Turing, TensorRT for RTX builds the latter only, in float32.

"FP32 GEMM is not supported" is what it says of a product otherwise (measured: version 1.7.1), and style vectors are
float32 in every precision.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from restyle_deploy.graph.edit import Array, Edit, array_of, integer_of, nodes_of_type, replace_value


def convolve_products(model: ir.Model) -> ir.Model:
    """Compute products with constant float32 weights as convolutions of one pixel, in place.

    A linear layer of [N, I] is a 1×1 convolution of [N, I, 1, 1]; S of them at once, [S, N, I] with weights [S, I, O],
    are one in S groups. Other products stay as they are.
    """
    for node in (*nodes_of_type(model, "Gemm"), *nodes_of_type(model, "MatMul")):
        weight = _weight_of(node)
        if weight is not None:
            _convolve(model, node, weight)
    RemoveUnusedNodesPass()(model)  # also of the weights in their former shapes
    return model


def _weight_of(node: ir.Node) -> Array | None:
    """Return the weights, [S, I, O]; None where they are not constant or not float32, or the product has more to do."""
    constant = array_of(node.inputs[1])
    if constant is None or constant.dtype != np.float32:
        return None
    weight = constant.astype(np.float32, copy=False)
    if node.op_type == "MatMul":
        return weight if weight.ndim == 3 else None
    is_plain = integer_of(node, "transA", 0) == 0 and all(
        node.attributes[name].as_float() == 1 for name in ("alpha", "beta") if name in node.attributes
    )
    weight = weight.T if integer_of(node, "transB", 0) else weight
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    has_plain_bias = len(node.inputs) == 2 or (bias is not None and bias.shape == weight.shape[1:])
    return weight[None] if is_plain and has_plain_bias else None


def _convolve(model: ir.Model, node: ir.Node, weight: Array) -> None:
    edit = Edit(model, node, "convolve_products")
    count, features, outputs = weight.shape
    is_batched = node.op_type == "MatMul"
    y, _, *bias = (value for value in node.inputs if value is not None)
    if is_batched:
        y = edit.add("Transpose", y, perm=(1, 0, 2))  # [N, S, I]
    y = edit.add("Reshape", y, edit.integers(-1, count * features, 1, 1))
    kernel = edit.constant(weight.transpose(0, 2, 1).reshape(count * outputs, features, 1, 1))
    y = edit.add("Conv", y, kernel, *bias, group=count, kernel_shape=(1, 1))  # [N, S·O, 1, 1]
    if is_batched:
        y = edit.add("Transpose", edit.add("Reshape", y, edit.integers(-1, count, outputs)), perm=(1, 0, 2))
    else:
        y = edit.add("Reshape", y, edit.integers(-1, outputs))
    replace_value(node.outputs[0], y)
    model.graph.remove(node, safe=True)
