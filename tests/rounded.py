"""A typed graph in float32 that rounds as the short type does: what tests of precisions run on a CPU.

ONNX Runtime computes most float16 operators in float32 and keeps that between them, so that nothing overflows. Here
each value that the graph types to float16 or bfloat16 is cast there and back, once, behind the node that gives it: a
value beyond the range becomes infinite, as in a kernel that accumulates in float32 and stores the short type.
"""

import numpy as np
import onnx.inliner
import onnx_ir as ir

SHORT = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def round_values(model: ir.Model) -> ir.Model:
    """Return a graph of float32 kernels that computes what a typed graph computes, functions of ours inlined."""
    proto = onnx.inliner.inline_local_functions(ir.to_proto(model))
    rounded = ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True))
    for value in rounded.graph.initializers.values():
        if value.dtype in SHORT:
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in tuple(rounded.graph):
        for output in node.outputs:
            assert output.dtype is not None, f"{node.name}: no type"
        if node.outputs[0].dtype in SHORT:
            _round_output(rounded, node, node.outputs[0])
        elif node.op_type == "CastLike":
            _replace_cast(rounded, node)
    return rounded


def _round_output(model: ir.Model, node: ir.Node, output: ir.Value) -> None:
    short = output.dtype
    assert short is not None
    computed = output if node.op_type not in ("Cast", "CastLike") else node.inputs[0]
    assert computed is not None
    there = ir.node("Cast", [computed], attributes={"to": short})
    back = ir.node("Cast", [there.outputs[0]], attributes={"to": ir.DataType.FLOAT})
    model.graph.insert_after(node, [there, back])
    ir.convenience.replace_all_uses_with(output, back.outputs[0], replace_graph_outputs=True)
    if computed is output:
        there.replace_input_with(0, output)
        output.type = ir.TensorType(ir.DataType.FLOAT)
    else:
        model.graph.remove(node, safe=True)


def _replace_cast(model: ir.Model, node: ir.Node) -> None:
    """Let a `CastLike` to float32 not ask for the type of its second input, which has changed."""
    cast = ir.node("Cast", [node.inputs[0]], attributes={"to": ir.DataType.FLOAT})
    model.graph.insert_after(node, cast)
    ir.convenience.replace_all_uses_with(node.outputs[0], cast.outputs[0], replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
