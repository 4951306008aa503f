"""ONNX graphs with random weights and what they compute in ONNX Runtime: what tests of rewrites run on."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from restyle_deploy.graph.edit import Attribute
from restyle_deploy.graph.export import encoder_graph, generator_graph
from restyle_deploy.ops import fused_bias_act, upfirdn2d
from restyle_deploy.ops.onnx_functions import DOMAIN, DOMAIN_VERSION, OPSET
from tests.toy import toy_model

Array = NDArray[np.float32]
Arrays = Mapping[str, Array]

# Rewrites change the rounding and nothing else: largest error, relative to the largest value of a tensor.
TOLERANCE = 1e-4
BATCHES = (1, 3)
CUSTOM_OPERATORS = ("FusedBiasAct", "UpFirDn2d")
IR_VERSION = 10
IR_SE, RESNET, FPN = "BackboneEncoder", "ResNetProgressiveBackboneEncoder", "GradualStyleEncoder"
ENCODER_TYPES = (IR_SE, RESNET, FPN)
"""One encoder of each backbone and family."""


class GraphMaker:
    """A graph in the making; its nodes are named `<layer>/<operator>_<number>`, as the exporter's are."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.RandomState(seed)
        self._inputs: list[onnx.ValueInfoProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._nodes: list[onnx.NodeProto] = []

    def input(self, name: str, *sizes: int | str, batch: int | str = "N") -> str:
        """Add an input [N, *sizes]."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *sizes]))
        return name

    def weight(self, *shape: int, positive: bool = False) -> str:
        """Add a constant of normal numbers, or of their absolute values plus a half."""
        array = self._random.standard_normal(shape)
        return self.constant(np.abs(array) + 0.5 if positive else array)

    def constant(self, array: NDArray[np.floating] | Sequence[float]) -> str:
        """Add a float32 constant."""
        return self._add_constant(np.asarray(array, np.float32))

    def integers(self, *values: int) -> str:
        """Add an int64 constant of one axis."""
        return self._add_constant(np.array(values, np.int64))

    def node(
        self,
        op_type: str,
        *inputs: str,
        layer: str = "layer",
        **attributes: Attribute | None,
    ) -> str:
        """Add a node and return its output; attributes that are None are left out."""
        name = f"{op_type.lower()}_{len(self._nodes)}"
        domain = DOMAIN if op_type in CUSTOM_OPERATORS else ""
        given: dict[str, Any] = {key: value for key, value in attributes.items() if value is not None}
        node = helper.make_node(op_type, inputs, [name], name=f"{layer}/{name}", domain=domain, **given)
        self._nodes.append(node)
        return name

    def filter(
        self, x: str, kernel: str, *, channels: int, up: int = 1, down: int = 1, pads: Sequence[int], layer: str = "up"
    ) -> str:
        """Add an `UpFirDn2d`."""
        factors = {"up": (up, up), "down": (down, down)}
        return self.node("UpFirDn2d", x, kernel, layer=layer, pads=pads, channels=channels, **factors)

    def batchnorm(self, x: str, channels: int, *, mean: str | None = None, epsilon: float | None = None) -> str:
        """Add a `BatchNormalization`; without `epsilon`, with ONNX's default."""
        scale, shift = self.weight(channels), self.weight(channels)
        mean, variance = mean or self.weight(channels), self.weight(channels, positive=True)
        attributes = {} if epsilon is None else {"epsilon": epsilon}
        return self.node("BatchNormalization", x, scale, shift, mean, variance, layer="bn", **attributes)

    def model(self, *outputs: str) -> ir.Model:
        """Return the model with inferred shapes and the bodies of its custom nodes."""
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self._nodes, "random", self._inputs, results, initializer=self._constants)
        bodies = [fused_bias_act.onnx_function(), upfirdn2d.onnx_function()]
        used = {node.op_type for node in self._nodes}
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
            functions=[body for body in bodies if body.name in used],
            ir_version=IR_VERSION,
        )
        return ir.from_proto(onnx.shape_inference.infer_shapes(model))

    def _add_constant(self, array: NDArray[np.generic]) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name


def exported(name: str, *, encoder_type: str = IR_SE, dataset_type: str = "ffhq_encode") -> ir.Model:
    """Return a fresh copy of a toy model's exported "encoder" or "generator", for the caller to change."""
    options = (encoder_type, dataset_type) if name == "encoder" else (IR_SE, dataset_type)
    return ir.from_proto(onnx.load_from_string(_exported_bytes(name, *options)))


def up_convolution(
    *,
    size: tuple[int, int] = (4, 5),
    channels: tuple[int, int] = (3, 2),
    weight_size: int = 3,
    kernel_size: tuple[int, int] = (4, 4),
    strides: tuple[int, int] = (2, 2),
    convolution_pads: tuple[int, ...] = (0, 0, 0, 0),
    output_padding: tuple[int, int] = (0, 0),
    dilations: tuple[int, int] = (1, 1),
    group: int = 1,
    bias: bool = False,
    up: int = 1,
    down: int = 1,
    pads: tuple[int, ...] = (1, 1, 1, 1),
    computed_weight: bool = False,
    computed_kernel: bool = False,
    second_user: bool = False,
    seed: int = 0,
) -> ir.Model:
    """Return a transposed convolution and the filter after it; with no arguments, StyleGAN2's."""
    maker = GraphMaker(seed)
    x = maker.input("x", channels[0], *size)
    weight = maker.weight(channels[0], channels[1] // group, weight_size, weight_size)
    kernel = maker.weight(*kernel_size)
    if computed_weight:
        weight = maker.node("Mul", weight, maker.input("factor", batch=1))
    if computed_kernel:
        kernel = maker.node("Mul", kernel, maker.input("factor", batch=1))
    convolved = maker.node(
        "ConvTranspose",
        *(x, weight, *([maker.weight(channels[1])] if bias else [])),
        layer="up",
        strides=strides,
        pads=convolution_pads,
        output_padding=output_padding,
        dilations=dilations,
        group=group,
    )
    filtered = maker.filter(convolved, kernel, channels=channels[1], up=up, down=down, pads=pads)
    return maker.model(filtered, *([maker.node("Neg", convolved)] if second_user else []))


def run(model: ir.Model, inputs: Arrays) -> dict[str, Array]:
    """Run a model on the CPU and return its outputs by name."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(content(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def random_inputs(model: ir.Model, *, batch: int, seed: int = 0) -> dict[str, Array]:
    """Return normal numbers for each input whose sizes but the first are known.

    An encoder's latent is zero: added to what the encoder predicts, it would hide errors of that.
    """
    random = np.random.RandomState(seed)
    shapes = {value.name or "": tuple(value.shape or ()) for value in model.graph.inputs}
    sizes = {name: [size if isinstance(size, int) else batch for size in shape] for name, shape in shapes.items()}
    inputs = {name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    if "latent" in inputs and len(inputs) > 1:
        inputs["latent"][:] = 0
    return inputs


def check_rewrite(
    rewrite: Callable[[ir.Model], object], model: ir.Model, *, batches: Sequence[int] = BATCHES
) -> ir.Model:
    """Rewrite a copy of a model, assert that border and function stayed, and return the copy."""
    rewritten = model.clone()
    assert rewrite(rewritten) is rewritten
    assert border(rewritten) == border(model)
    for batch in batches:
        inputs = random_inputs(model, batch=batch, seed=batch)
        assert_equal_in_range(run(rewritten, inputs), run(model, inputs))
    return rewritten


def check_nothing_changes(rewrite: Callable[[ir.Model], object], model: ir.Model) -> None:
    """Assert that a rewrite finds nothing to do."""
    before = content(model)
    assert rewrite(model) is model
    assert content(model) == before


def assert_equal_in_range(found: Arrays, expected: Arrays) -> None:
    """Assert that arrays differ by at most `TOLERANCE` of the largest expected value."""
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        error, largest = np.abs(found[name] - array).max(), np.abs(array).max()
        assert error <= TOLERANCE * largest, f"{name}: error {error:.2g}, largest value {largest:.2g}"


def border(model: ir.Model) -> list[tuple[str | None, str, str]]:
    """Return name, type and shape of all inputs and outputs, in order."""
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(value.name, str(value.type), str(value.shape)) for value in values]


def content(model: ir.Model) -> bytes:
    """Return a model's file."""
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def operators(model: ir.Model) -> Counter[str]:
    """Count the nodes of each operator."""
    return Counter(node.op_type for node in model.graph)


def layers_with(model: ir.Model, op_type: str) -> set[str]:
    """Return the layers that have a node of an operator."""
    return {(node.name or "").partition("/")[0] for node in model.graph if node.op_type == op_type}


@functools.cache
def _exported_bytes(name: str, encoder_type: str, dataset_type: str) -> bytes:
    model = toy_model(encoder_type=encoder_type, dataset_type=dataset_type)
    graph = {"encoder": encoder_graph, "generator": generator_graph}[name](model)
    data: bytes = graph.model.SerializeToString()
    return data
