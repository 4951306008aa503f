"""Modulation on the activations against modulation on the weights, which is how upstream computes it."""

import contextlib
import io
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.upstream_arithmetic import UpstreamArithmetic
from restyle_deploy.graph.edit import array_of
from restyle_deploy.graph.export import FOLDING_LIMIT
from restyle_deploy.graph.rewrites.constant_weights import constant_weights
from restyle_deploy.ops import fused_bias_act
from restyle_deploy.ops.onnx_functions import OPSET
from tests.graph_models import (
    GraphMaker,
    check_nothing_changes,
    check_rewrite,
    exported,
    operators,
)
from tests.toy import toy_model

EPSILON = 1e-2


def modulated_convolution(
    *,
    channels: tuple[int, int] = (3, 4),
    size: tuple[int, int] = (5, 6),
    kernel_size: int = 3,
    transposed: bool = False,
    demodulated: bool = True,
    power: bool = True,
    axes: tuple[int, ...] | None = (2, 3, 4),
    keepdims: int = 1,
    exponent: float = 2.0,
    epsilon: tuple[float, ...] | str | None = (EPSILON,),
    style_axis: int = 2,
    perm: tuple[int, ...] = (0, 2, 1, 3, 4),
    bias: bool = False,
    squared: str | None = None,
    seed: int = 0,
    **attributes: Any,
) -> ir.Model:
    """Return one modulated convolution of one sample as upstream computes it; with no arguments, StyleGAN2's."""
    maker = GraphMaker(seed)
    in_channels, out_channels = channels
    x = maker.input("x", in_channels, *size, batch=1)
    style = maker.input("style", channels[style_axis == 1], batch=1)
    shape = [1, 1, 1, 1, 1]
    shape[style_axis] = -1
    view = maker.node("Reshape", style, maker.integers(*shape))
    weight = maker.node("Mul", maker.weight(1, out_channels, in_channels, kernel_size, kernel_size), view)
    if demodulated:
        source = weight if squared is None else maker.node(squared, weight)
        square = maker.node("Pow", source, maker.constant([exponent])) if power else maker.node("Mul", source, source)
        total = maker.node("ReduceSum", square, *([maker.integers(*axes)] if axes else []), keepdims=keepdims)
        if isinstance(epsilon, str):
            total = maker.node("Add", total, maker.input(epsilon, batch=1))
        elif epsilon is not None:
            total = maker.node("Add", total, maker.constant(list(epsilon)))
        weight = maker.node("Mul", weight, maker.node("Reciprocal", maker.node("Sqrt", total)))
    sizes = (out_channels, in_channels, kernel_size, kernel_size)
    if transposed:
        weight = maker.node("Transpose", weight, perm=perm)
        sizes = (in_channels, out_channels, kernel_size, kernel_size)
        attributes = {"strides": (2, 2), **attributes}
    weight = maker.node("Reshape", weight, maker.integers(*sizes))
    biases = [maker.weight(out_channels)] if bias else []
    op_type = "ConvTranspose" if transposed else "Conv"
    return maker.model(maker.node(op_type, x, weight, *biases, layer="conv", **attributes))


def computed_weights(model: ir.Model) -> list[ir.Node]:
    """Return the convolutions whose weight is no constant."""
    return [
        node for node in model.graph if node.op_type in ("Conv", "ConvTranspose") and array_of(node.inputs[1]) is None
    ]


@settings(max_examples=40)
@given(
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel_size=st.sampled_from([1, 3]),
    transposed=st.booleans(),
    demodulated=st.booleans(),
    power=st.booleans(),
    epsilon=st.sampled_from([None, (1e-8,), (EPSILON,)]),
    seed=st.integers(0, 99),
)
def test_computes_the_same(
    channels: tuple[int, int], size: tuple[int, int], kernel_size: int, transposed: bool, **changes: Any
) -> None:
    border = 0 if transposed else kernel_size // 2
    pads = (border,) * 4
    model = modulated_convolution(
        channels=channels, size=size, kernel_size=kernel_size, transposed=transposed, pads=pads, **changes
    )
    rewritten = check_rewrite(constant_weights, model, batches=(1,))
    assert computed_weights(model)
    assert not computed_weights(rewritten)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"bias": True}, id="biased convolution"),
        pytest.param({"channels": (4, 4), "style_axis": 1}, id="style of the output"),
        pytest.param({"channels": (4, 4), "style_axis": 1, "demodulated": False}, id="style of the output, plain"),
        pytest.param({"axes": (3, 4)}, id="demodulation of each pair"),
        pytest.param({"axes": None}, id="demodulation of all outputs at once"),
        pytest.param({"channels": (4, 4), "axes": (1, 3, 4)}, id="demodulation of the input"),
        pytest.param({"channels": (4, 3), "keepdims": 0, "axes": (1, 2, 3)}, id="energy without its axes"),
        pytest.param({"exponent": 4.0}, id="other power"),
        pytest.param({"squared": "Exp"}, id="energy of another weight"),
        pytest.param({"squared": "Exp", "power": False}, id="energy of another weight, multiplied"),
        pytest.param({"epsilon": (0.1, 0.2, 0.3)}, id="several epsilons"),
        pytest.param({"epsilon": "fed"}, id="epsilon that is fed"),
        pytest.param({"auto_pad": "SAME_UPPER"}, id="padding left to the runtime"),
        pytest.param({"channels": (4, 4), "transposed": True, "perm": (0, 1, 2, 4, 3)}, id="other transposition"),
    ],
)
def test_other_weights_stay(changes: dict[str, Any]) -> None:
    check_nothing_changes(constant_weights, modulated_convolution(**changes))


def test_constant_and_fed_weights_stay() -> None:
    maker = GraphMaker()
    x = maker.input("x", 3, 5, 5)
    fed = maker.input("weight", 3, 3, 3, batch=4)
    reshaped = maker.node("Reshape", maker.input("flat", 27, batch=4), maker.integers(4, 3, 3, 3))
    swapped = maker.node("Reshape", maker.input("swapped", 36, batch=3), maker.integers(3, 4, 3, 3))
    convolutions = [maker.node("Conv", x, weight) for weight in (maker.weight(4, 3, 3, 3), fed, reshaped)]
    model = maker.model(*convolutions, maker.node("ConvTranspose", x, swapped))
    check_nothing_changes(constant_weights, model)


def test_own_exports_stay() -> None:
    check_nothing_changes(constant_weights, exported("generator"))


def test_upstreams_generator_has_no_computed_weight_left() -> None:
    model = export_upstream()
    # One per styled layer and one per image layer, at 4 to 64 px.
    assert len(computed_weights(model)) == 9 + 5
    rewritten = check_rewrite(constant_weights, model, batches=(1,))
    assert not computed_weights(rewritten)
    assert operators(rewritten)["Conv"] == operators(model)["Conv"]
    assert operators(rewritten)["ConvTranspose"] == operators(model)["ConvTranspose"] == 4


class Generate(nn.Module):
    """The generator with upstream's arithmetic, as a module, which the exporter asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.upstream = UpstreamArithmetic.from_model(toy_model())

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        return self.upstream.generate(latent)


def export_upstream() -> ir.Model:
    """Export it for one image, which is all that this arithmetic can be exported for."""
    module = Generate().eval()
    latent = torch.zeros(1, *module.upstream.latent_avg.shape)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        program = torch.onnx.export(
            module,
            (latent,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["latent"],
            output_names=["image", "current"],
            optimize=False,
            verbose=False,
        )
    assert program is not None
    onnxscript.optimizer.optimize(program.model, input_size_limit=FOLDING_LIMIT, output_size_limit=FOLDING_LIMIT)
    proto = program.model_proto
    proto.functions.append(fused_bias_act.onnx_function())
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)
