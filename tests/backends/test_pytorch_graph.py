"""Graphs as torch modules: each choice of each plan, each precision and both layouts against ONNX Runtime."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import fx

from restyle_deploy.backends.pytorch_graph import (
    check_border,
    module_from_graph,
    prepare,
    read_exported,
    save,
    tensor_from_array,
)
from restyle_deploy.backends.pytorch_nodes import CONVERSIONS
from restyle_deploy.errors import BuildError
from restyle_deploy.graph import plan
from restyle_deploy.graph.plan import FAMILIES, apply_choices, find_sites
from restyle_deploy.tensors import TensorSpec
from tests.graph_models import (
    FPN,
    IR_SE,
    RESNET,
    Array,
    GraphMaker,
    assert_equal_in_range,
    exported,
    random_inputs,
    run,
)

MOST_CHOICES = max(len(family.choices) for family in FAMILIES.values())
# Largest difference from the exact graph; latents and images of the toy are of order one.
TYPED_TOLERANCE = {"fp16": 5e-3, "bf16": 6e-2}


@pytest.fixture(autouse=True)
def _narrow_layers_are_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy models have fewer channels and pixels than any layer that is worth tiling."""
    monkeypatch.setattr(plan, "WINOGRAD_CHANNELS", 8)
    monkeypatch.setattr(plan, "WINOGRAD_LEAST_PIXELS", 1)


def names_of(model: ir.Model) -> tuple[list[str], list[str]]:
    inputs, outputs = ([value.name or "" for value in values] for values in (model.graph.inputs, model.graph.outputs))
    return inputs, outputs


def run_in_torch(
    model: ir.Model, inputs: Mapping[str, Array], *, precision: str = "fp32", channels_last: bool = False
) -> dict[str, Array]:
    """Prepare a copy of a model and run it as a torch module."""
    prepared = prepare(model.clone(), precision)
    taken, given = names_of(prepared)
    module = module_from_graph(prepared, taken, given, device="cpu", channels_last=channels_last)
    with torch.inference_mode():
        results = module(*(torch.from_numpy(inputs[name]) for name in taken))
    return {name: result.contiguous().numpy() for name, result in zip(given, results, strict=True)}


def rewrite(model: ir.Model, number: int, *, epilogues: bool) -> ir.Model | None:
    """Give each site its family's choice of this number, or its last one; return the graph of the target."""
    sites = find_sites(model)
    choices = {}
    for site in sites:
        known = FAMILIES[site.family].choices
        choices[site.name] = known[min(number, len(known) - 1)]
    return apply_choices(model, sites, choices, epilogues=epilogues)


def check_choices(model: ir.Model, number: int, *, epilogues: bool) -> None:
    rewritten = model.clone()
    target = rewrite(rewritten, number, epilogues=epilogues)
    for batch in (1, 3):
        inputs = random_inputs(model, batch=batch, seed=batch)
        expected = run(model, inputs)
        fed: dict[str, Array] = dict(inputs)
        if target is not None:
            fed |= run_in_torch(target, fed)
        assert_equal_in_range(run_in_torch(rewritten, fed, channels_last=batch == 3), expected)


@pytest.mark.parametrize("epilogues", [False, True], ids=["scaled", "epilogues"])
@pytest.mark.parametrize("number", range(MOST_CHOICES))
def test_generator_computes_the_same_with_every_choice(number: int, epilogues: bool) -> None:
    check_choices(exported("generator"), number, epilogues=epilogues)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("encoder_type", [IR_SE, FPN, RESNET])
def test_encoders_compute_the_same_with_every_choice(encoder_type: str, number: int) -> None:
    check_choices(exported("encoder", encoder_type=encoder_type), number, epilogues=bool(number))


def test_cars_are_cropped() -> None:
    check_choices(exported("generator", dataset_type="cars_encode"), 0, epilogues=True)


@pytest.mark.parametrize("precision", TYPED_TOLERANCE)
@pytest.mark.parametrize("name", ["encoder", "generator"])
def test_typed_graphs_are_near(name: str, precision: str) -> None:
    model = exported(name)
    inputs = random_inputs(model, batch=2)
    found = run_in_torch(model, inputs, precision=precision, channels_last=True)
    for key, expected in run(model, inputs).items():
        assert found[key].dtype == np.float32
        error = np.abs(found[key] - expected).max()
        assert 0 < error <= TYPED_TOLERANCE[precision], key


@pytest.mark.parametrize("factor", [1e-8, 3e3])
def test_styles_beyond_the_range_of_float16_change_no_result(factor: float) -> None:
    """Demodulation takes their size out again, all but epsilon's part; typed naively, they overflow or vanish."""
    model = exported("generator")
    inputs = {"latent": np.float32(factor) * random_inputs(model, batch=2)["latent"]}
    found = run_in_torch(model, inputs, precision="fp16", channels_last=True)
    for name, expected in run(model, inputs).items():
        assert np.isfinite(found[name]).all()
        assert np.abs(found[name] - expected).max() <= 1e-2 * np.abs(expected).max(), name


def calls_of(module: fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def test_a_layer_is_one_convolution_and_one_pass() -> None:
    prepared = prepare(exported("generator"), "fp16")
    module = module_from_graph(prepared, *names_of(prepared), device="meta")
    convolutions, ours = (torch.nn.functional.conv_transpose2d, torch.conv2d), torch.ops.restyle_deploy
    calls = calls_of(module)
    layers = 9  # of 64 px: one of 4 px and two of each of the four larger sizes
    assert calls.count(ours.fused_bias_act) == 5  # those that keep their size
    assert calls.count(ours.upfirdn2d) == 8  # those that double it, and the image so far
    assert sum(call in convolutions for call in calls) == layers + 5  # with those to the image
    assert torch.nn.functional.leaky_relu not in calls


def test_weights_of_convolutions_have_type_and_layout_of_the_maps() -> None:
    prepared = prepare(exported("encoder"), "bf16")
    module = module_from_graph(prepared, *names_of(prepared), device="cpu", channels_last=True)
    kernels = [
        module.get_buffer(str(node.args[1].target))
        for node in module.graph.nodes
        if node.op == "call_function" and node.target is torch.conv2d
    ]
    assert kernels
    for kernel in kernels:
        assert kernel.dtype == torch.bfloat16
        assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_a_saved_graph_is_the_same(tmp_path: Path) -> None:
    model = prepare(exported("generator"), "bf16")
    save(model, tmp_path / "generator.typed.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"generator.typed.onnx", "generator.typed.weights"}
    inputs = random_inputs(model, batch=2)
    results = []
    for one in (model, read_exported(tmp_path / "generator.typed.onnx")):
        module = module_from_graph(one, *names_of(one), device="cpu")
        with torch.inference_mode():
            results.append(module(torch.from_numpy(inputs["latent"])))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="nowhere.*cannot be written: No such file"):
        save(exported("generator"), tmp_path / "nowhere" / "generator.typed.onnx")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, ml_dtypes.bfloat16])
def test_tensors_hold_what_arrays_did(dtype: type) -> None:
    array: NDArray[Any] = np.arange(6).reshape(2, 3).astype(dtype)
    array.flags.writeable = False
    tensor = tensor_from_array(array)
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert str(tensor.dtype).removeprefix("torch.") == np.dtype(dtype).name
    tensor[0, 0] = 1
    assert array[0, 0] == 0


def test_border_of_other_names_is_refused() -> None:
    model = exported("generator")
    latent, image = (TensorSpec(name=name, dtype="float32", shape=("N", 1)) for name in ("latent", "image"))
    with pytest.raises(ValueError, match="its outputs are current, image, expected image"):
        check_border(model, [latent], [image])
    with pytest.raises(ValueError, match="its inputs are latent, expected image"):
        check_border(model, [image], [image])


def convert(model: ir.Model) -> fx.GraphModule:
    return module_from_graph(model, *names_of(model), device="meta")


Make = Callable[[GraphMaker, str], str]
STRANGE: dict[str, tuple[str, Make]] = {
    "unknown node": ("Neg, which none", lambda g, x: g.node("Neg", x)),
    "automatic pads": ("automatic pads", lambda g, x: g.node("Conv", x, g.weight(2, 2, 3, 3), auto_pad="SAME_UPPER")),
    "uneven pads": (
        "uneven pads",
        lambda g, x: g.node("ConvTranspose", x, g.weight(2, 2, 3, 3), pads=(0, 1, 1, 1)),
    ),
    "padded pool": ("pads", lambda g, x: g.node("MaxPool", x, kernel_shape=(3, 3), pads=(1, 1, 1, 1))),
    "slopes": ("slopes that differ", lambda g, x: g.node("PRelu", x, g.weight(2, 4, 4))),
    "scaled product": (
        "factors",
        lambda g, x: g.node("Gemm", g.node("Reshape", x, g.integers(-1, 32)), g.weight(32, 2), alpha=0.5),
    ),
    "exponent": ("another exponent than 2", lambda g, x: g.node("Pow", x, g.constant([3.0]))),
    "indices": ("several indices", lambda g, x: g.node("Gather", x, g.integers(0, 1), axis=1)),
    "computed axes": ("no constant", lambda g, x: g.node("ReduceMean", x, g.node("Shape", x, start=2, end=3))),
    "depth": ("another order", lambda g, x: g.node("DepthToSpace", g.weight(1, 4, 1, 1), blocksize=2, mode="CRD")),
    "other factors": (
        "other factors vertically",
        lambda g, x: g.node("UpFirDn2d", x, g.weight(2, 2), up=(1, 2), down=(1, 1), pads=(1, 1, 1, 1), channels=2),
    ),
    "resize": (
        "the attributes",
        lambda g, x: g.node(
            "Resize", x, "", g.constant([1, 1, 2, 2]), mode="nearest", coordinate_transformation_mode="asymmetric"
        ),
    ),
}


@pytest.mark.parametrize(("words", "make"), STRANGE.values(), ids=STRANGE.keys())
def test_what_no_graph_of_ours_has_is_refused(words: str, make: Make) -> None:
    maker = GraphMaker()
    result = make(maker, maker.input("x", 2, 4, 4))
    with pytest.raises(ValueError, match=words):
        convert(maker.model(result))


def test_value_that_nothing_computes_is_named() -> None:
    model = exported("generator")
    model.graph.remove(next(node for node in model.graph if node.op_type == "Gemm"), safe=False)
    with pytest.raises(ValueError, match="is not computed before it is read"):
        convert(model)


SMALL: dict[str, Make] = {
    "uneven pads": lambda g, x: g.node("Conv", x, g.weight(3, 2, 2, 2), g.weight(3), pads=(1, 0, 0, 1)),
    "strided slice": lambda g, x: g.node("Slice", x, g.integers(1), g.integers(2**62), g.integers(3), g.integers(2)),
    "slice of first axes": lambda g, x: g.node("Slice", x, g.integers(0, 1), g.integers(2**62, 2)),
    "pad": lambda g, x: g.node("Pad", x, g.integers(0, 0, 1, 2, 0, 0, 3, 0)),
    "product": lambda g, x: g.node("Gemm", g.node("Reshape", x, g.integers(-1, 32)), g.weight(32, 3), g.weight(3)),
    "one slope": lambda g, x: g.node("PRelu", x, g.constant([0.3])),
    "whole shape": lambda g, x: g.node(
        "Resize",
        x,
        "",
        "",
        g.node("Concat", g.node("Shape", x, start=0, end=2), g.integers(7, 5), axis=0),
        mode="linear",
        coordinate_transformation_mode="align_corners",
    ),
    "depth": lambda g, x: g.node("DepthToSpace", g.node("Conv", x, g.weight(8, 2, 1, 1)), blocksize=2),
}


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL.keys())
def test_single_nodes_compute_what_onnx_says(make: Make) -> None:
    maker = GraphMaker()
    model = maker.model(make(maker, maker.input("x", 2, 4, 4)))
    inputs = random_inputs(model, batch=3)
    assert_equal_in_range(run_in_torch(model, inputs, channels_last=True), run(model, inputs))


def test_table_has_the_nodes_of_our_graphs_and_no_others() -> None:
    found: set[tuple[str, str]] = set()
    for name, encoder_type in (("generator", IR_SE), ("encoder", IR_SE), ("encoder", FPN), ("encoder", RESNET)):
        for number in range(MOST_CHOICES):
            for precision in ("fp32", "fp16"):
                model = exported(name, encoder_type=encoder_type)
                rewrite(model, number, epilogues=number % 2 == 0)
                found |= {(node.domain, node.op_type) for node in prepare(model, precision).graph}
    found |= {(node.domain, node.op_type) for node in exported("generator").graph}
    assert set(CONVERSIONS) == found
