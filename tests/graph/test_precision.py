"""Graphs typed to float16 and bfloat16: their types, their range and their errors."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from restyle_deploy.errors import BuildError
from restyle_deploy.graph.plan import FAMILIES, TABLE, apply_choices, find_sites
from restyle_deploy.graph.precision import FLOAT32, FLOAT32_PLACES, ISLANDS, SHORT_TYPES, set_precision, set_types
from restyle_deploy.graph.rewrites.target_features import target_graph
from restyle_deploy.ops.onnx_functions import DOMAIN
from tests.graph_models import (
    ENCODER_TYPES,
    Array,
    Arrays,
    GraphMaker,
    border,
    check_nothing_changes,
    content,
    exported,
    operators,
    random_inputs,
    run,
)
from tests.rounded import round_values

LATENT_TOLERANCE = {"fp16": 2e-3, "bf16": 2e-2}
LEAST_PSNR = {"fp16": 60.0, "bf16": 45.0}
ADVERSARIAL_PSNR = 45.0


def planned(
    model: ir.Model, backend: str = "tensorrt", *, epilogues: bool = True, upsampling: str | None = None
) -> ir.Model:
    """Rewrite an exported graph by a backend's table, or its up-convolutions by another choice."""
    sites = find_sites(model)
    table = {**TABLE[backend], **({"upsampling": upsampling} if upsampling else {})}
    apply_choices(model, sites, {site.name: table[site.family] for site in sites}, epilogues=epilogues)
    return model


PREPARATIONS: Mapping[str, Callable[[ir.Model], ir.Model]] = {
    "as exported": lambda model: model,
    "tensorrt": planned,
    "tensorrt without epilogues": lambda model: planned(model, epilogues=False),
    "tensorrt-rtx": lambda model: planned(model, "tensorrt-rtx"),
}
# What tuning may choose.
UPSAMPLING = FAMILIES["upsampling"].choices_for("fp16")
GRAPHS = [("generator", ENCODER_TYPES[0]), *(("encoder", encoder_type) for encoder_type in ENCODER_TYPES)]


def psnr_db(found: Array, expected: Array) -> float:
    """Return the peak signal-to-noise ratio; the peak is the range of the expected image."""
    error = np.sqrt(np.mean(np.square(found - expected, dtype=np.float64)))
    return float(20 * np.log10(np.ptp(expected) / error))


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_float32_graphs_stay(precision: str) -> None:
    check_nothing_changes(lambda model: set_precision(model, precision), exported("generator"))


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="precision is 'int8', expected one of fp32, tf32, fp16, bf16"):
        set_precision(exported("generator"), "int8")


@pytest.mark.parametrize("preparation", PREPARATIONS)
@pytest.mark.parametrize(("name", "encoder_type"), GRAPHS)
@pytest.mark.parametrize("precision", SHORT_TYPES)
def test_types_are_sound(precision: str, name: str, encoder_type: str, preparation: str) -> None:
    model = PREPARATIONS[preparation](exported(name, encoder_type=encoder_type))
    before, short = border(model), SHORT_TYPES[precision]
    assert set_precision(model, precision) is model
    assert border(model) == before
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    for node in model.graph:
        types = {place: value.dtype for place, value in enumerate(node.inputs) if value is not None}
        floats = {place: dtype for place, dtype in types.items() if dtype in (FLOAT32, short)}
        fixed = FLOAT32_PLACES.get(node.op_type, frozenset())
        assert all(floats[place] == FLOAT32 for place in fixed & floats.keys()), node.name
        assert len({dtype for place, dtype in floats.items() if place not in fixed}) <= 1, node.name
    for node in (node for node in model.graph if node.op_type in ("Conv", "ConvTranspose")):
        is_depthwise = node.inputs[1] is not None and node.inputs[1].shape is not None and node.inputs[1].shape[1] == 1
        assert is_depthwise or node.outputs[0].dtype == short, f"{node.name} computes in {node.outputs[0].dtype}"


@pytest.mark.parametrize(("name", "encoder_type"), GRAPHS)
def test_casts_stand_at_borders_only(name: str, encoder_type: str) -> None:
    """None reads a large map, but for the images that come in and ToRGB's three channels."""
    model = set_precision(planned(exported(name, encoder_type=encoder_type)), "fp16")
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert casts
    for node in casts:
        (value,) = node.inputs
        assert value is not None
        assert value.const_value is None
        assert value.shape is not None
        sizes = [size if isinstance(size, int) else 1 for size in value.shape]
        is_small = len(sizes) < 4 or sizes[2] * sizes[3] == 1
        assert is_small or value.is_graph_input() or sizes[1] == 3, node.name


@pytest.mark.parametrize("name", ["encoder", "generator"])
def test_weights_are_stored_once_and_short(name: str) -> None:
    model = planned(exported(name))
    before = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value)
    set_precision(model, "fp16")
    constants = {key: value.const_value for key, value in model.graph.initializers.items() if value.const_value}
    # Norms of weights are the only new ones.
    assert sum(constant.size for constant in constants.values()) <= 1.02 * before
    for value in model.graph.initializers.values():
        assert value.uses()
    kernels = [node.inputs[1] for node in model.graph if node.op_type in ("Conv", "ConvTranspose")]
    assert all(kernel is not None and kernel.dtype == ir.DataType.FLOAT16 for kernel in kernels)


def test_every_island_is_there() -> None:
    model = planned(exported("generator"))
    found = [{node.op_type for node in island.find(model)} for island in ISLANDS]
    assert {"Gemm", "Sqrt", "Reciprocal"} <= found[0]
    assert {"Add", "AveragePool", "UpFirDn2d"} <= found[1]
    assert all(island.what and island.why for island in ISLANDS)


def test_a_copy_keeps_its_types() -> None:
    """Clones share their types' objects."""
    model = exported("generator")
    before = content(model)
    set_precision(model.clone(), "fp16")
    assert content(model) == before


def test_output_of_a_convolution_is_cast_to_float32() -> None:
    target = target_graph(exported("encoder"))
    assert target is not None
    before = border(target)
    set_precision(target, "fp16")
    assert border(target) == before
    assert [node.op_type for node in target.graph] == ["Cast", "Conv", "Cast"]
    onnx.checker.check_model(ir.to_proto(target), full_check=True)


def test_scales_of_a_resize_stay_float32() -> None:
    maker = GraphMaker()
    x = maker.node("Conv", maker.input("x", 3, 4, 4), maker.weight(2, 3, 1, 1))
    x = maker.node("Resize", x, "", maker.constant([1, 1, 2, 2]))
    model = set_precision(maker.model(maker.node("Conv", x, maker.weight(2, 2, 1, 1))), "bf16")
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_weight_beyond_the_range_is_refused() -> None:
    maker = GraphMaker()
    model = maker.model(maker.node("Conv", maker.input("x", 1, 4, 4), maker.constant(np.full((1, 1, 1, 1), 7e4))))
    set_precision(model.clone(), "bf16")
    with pytest.raises(
        BuildError, match="layer: a weight of magnitude 7e.04 is beyond the range of float16; build with"
    ):
        set_precision(model, "fp16")


def test_value_without_a_type_is_refused() -> None:
    maker = GraphMaker()
    model = maker.model(maker.node("Conv", maker.input("x", 1, 4, 4), maker.weight(1, 1, 1, 1)))
    (node,) = model.graph
    node.domain, node.outputs[0].shape = "elsewhere", None
    model.graph.opset_imports["elsewhere"] = 1
    with pytest.raises(BuildError, match="layer/conv_0: ONNX infers no type for what Conv gives"):
        set_precision(model, "fp16")


def test_rounded_values_overflow() -> None:
    """What the tests of ranges stand on: beyond 65504 a value becomes infinite, although float32 computes it."""
    maker = GraphMaker()
    x = maker.node("Conv", maker.input("x", 1, 1, 1), maker.constant(np.full((1, 1, 1, 1), 1e3)))
    model = maker.model(maker.node("Conv", x, maker.constant(np.full((1, 1, 1, 1), 1e-3))))
    inputs = {"x": np.array([1, 60, 70, 1 / 3], np.float32).reshape(4, 1, 1, 1)}
    found = {
        precision: next(iter(run(round_values(set_types(model.clone(), short)), inputs).values())).ravel()
        for precision, short in SHORT_TYPES.items()
    }
    np.testing.assert_allclose(found["fp16"][[0, 1, 3]], [1, 60, 1 / 3], rtol=2e-3)
    assert np.isinf(found["fp16"][2])
    np.testing.assert_allclose(found["bf16"], [1, 60, 70, 1 / 3], rtol=2e-2)
    assert 0 < abs(found["fp16"][3] - 1 / 3) < abs(found["bf16"][3] - 1 / 3)


@pytest.mark.parametrize("preparation", PREPARATIONS)
@pytest.mark.parametrize("precision", SHORT_TYPES)
def test_image_keeps_its_quality(precision: str, preparation: str) -> None:
    model = exported("generator")
    inputs = random_inputs(model, batch=2)
    found = run_typed(PREPARATIONS[preparation](model.clone()), precision, inputs)
    for name, expected in run(model, inputs).items():
        assert psnr_db(found[name], expected) > LEAST_PSNR[precision]


@pytest.mark.parametrize("preparation", ["as exported", "tensorrt"])
@pytest.mark.parametrize("encoder_type", ENCODER_TYPES)
@pytest.mark.parametrize("precision", SHORT_TYPES)
def test_latent_keeps_its_quality(precision: str, encoder_type: str, preparation: str) -> None:
    model = exported("encoder", encoder_type=encoder_type)
    inputs = random_inputs(model, batch=2)
    found = run_typed(PREPARATIONS[preparation](model.clone()), precision, inputs)["latent_out"]
    expected = run(model, inputs)["latent_out"]
    assert np.abs(found - expected).max() <= LATENT_TOLERANCE[precision] * max(1, np.abs(expected).max())


def run_typed(model: ir.Model, precision: str, inputs: Arrays) -> dict[str, Array]:
    return run(round_values(set_precision(model, precision)), inputs)


def with_styles_times(model: ir.Model, factors: tuple[float, ...]) -> ir.Model:
    """Scale the styles of the demodulated layers, each by the next factor; others would scale the image."""
    wanted = (node for node in model.graph if node.op_type == "Gemm" and "modulation" in (node.name or ""))
    layers = [node for node in wanted if "to_rgb" not in (node.name or "")]
    assert len(layers) == 9
    for index, node in enumerate(layers):
        for value in node.inputs[1:]:
            assert value is not None
            assert value.const_value is not None
            array = value.const_value.numpy() * np.float32(factors[index % len(factors)])
            value.const_value = ir.tensor(array, name=value.name)
    return model


# Below about 1e-3, epsilon takes part in the sum of squares: the layer's signal fades, and noise and bias are left.
ADVERSARIAL = {"large": (1e5,), "huge": (1e12,), "tiny": (1e-4,), "vanishing": (1e-9,), "both": (1e5, 1e-3, 1e8, 1e-5)}


@pytest.mark.parametrize(
    ("norms", "preparation"),
    [*((norms, "tensorrt") for norms in ADVERSARIAL), *(("both", name) for name in PREPARATIONS if name != "tensorrt")],
)
def test_adversarial_styles_stay_in_range(norms: str, preparation: str) -> None:
    model = with_styles_times(exported("generator"), ADVERSARIAL[norms])
    prepared = check_range(model, PREPARATIONS[preparation])
    if max(ADVERSARIAL[norms]) > 1:
        naive = run(round_values(set_types(prepared, ir.DataType.FLOAT16)), random_inputs(prepared, batch=2))
        assert not np.isfinite(naive["image"]).all()


@pytest.mark.parametrize("epilogues", [True, False])
@pytest.mark.parametrize("choice", UPSAMPLING)
@pytest.mark.parametrize("norms", ["large", "both"])
def test_adversarial_styles_stay_in_range_whatever_tuning_chooses(norms: str, choice: str, epilogues: bool) -> None:
    model = with_styles_times(exported("generator"), ADVERSARIAL[norms])
    check_range(model, lambda model: planned(model, epilogues=epilogues, upsampling=choice))


def check_range(model: ir.Model, prepare: Callable[[ir.Model], ir.Model]) -> ir.Model:
    """Compare a generator, prepared and typed to float16, with itself in float32; return it prepared, not typed."""
    inputs = random_inputs(model, batch=2)
    expected = run(model, inputs)
    prepared = prepare(model)
    found = run_typed(prepared.clone(), "fp16", inputs)
    for name, array in expected.items():
        assert np.isfinite(found[name]).all()
        assert psnr_db(found[name], array) >= ADVERSARIAL_PSNR
    return prepared


def test_latents_of_any_size_stay_in_range() -> None:
    """ToRGB's styles and the image grow with the latent."""
    model = exported("generator")
    for scale in (0, 1e-6, 1e6):
        inputs = {"latent": random_inputs(model, batch=2)["latent"] * np.float32(scale)}
        expected, found = run(model, inputs), run_typed(planned(model.clone()), "fp16", inputs)
        assert psnr_db(found["image"], expected["image"]) >= ADVERSARIAL_PSNR


def test_custom_nodes_read_factors_in_float32() -> None:
    model = set_precision(planned(exported("generator")), "fp16")
    for node in (node for node in model.graph if node.domain == DOMAIN and node.op_type != "UpFirDn2d"):
        types = [value.dtype for value in node.inputs if value is not None]
        short = {0, types.index(ir.DataType.FLOAT16, 1)}
        assert short == {0, 2 if node.op_type == "BiasActEpilogue" else 3}
        assert [place for place, dtype in enumerate(types) if dtype == ir.DataType.FLOAT16] == sorted(short)
    assert operators(model)["BiasActEpilogue"] == 5
    assert all(
        node.inputs[0].dtype == FLOAT32 for node in model.graph if node.op_type == "UpFirDn2d" and node.inputs[0]
    )
