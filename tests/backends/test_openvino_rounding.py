"""An encoder that is made fit for bfloat16: what it computes, what is exact in it, and what that is worth."""

import io
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset15 as ops

from restyle_deploy.backends import openvino as backend_module
from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.backends.openvino_rounding import LEAST_PIXELS_SPLIT, MOST_WEIGHTS_SPLIT, refine_encoder
from restyle_deploy.bundle import Bundle, open_bundle
from restyle_deploy.errors import BackendUnavailableError

ATTRIBUTE = "DisablePrecisionConversion"
BF16 = RunnerOptions(precision="bf16")


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Bundle:
    return open_bundle(toy_bundle)


@pytest.fixture
def encoder(bundle: Bundle) -> ov.Model:
    return backend_module._read_graph(bundle.graphs["encoder"].path, RunnerOptions())


def inputs_of(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(1)
    return {
        spec.name: random.uniform(-1, 1, spec.concrete_shape(1)).astype(np.float32)
        for spec in bundle.graphs["encoder"].inputs
    }


def run(model: ov.Model, bundle: Bundle, options: RunnerOptions) -> NDArray[np.float32]:
    fixed = backend_module._model_of_batch(model, 1)
    compiled = ov.Core().compile_model(fixed, "CPU", backend_module.create_settings(options))
    latents: NDArray[np.float32] = compiled(inputs_of(bundle))["latent_out"]
    return latents.copy()


def count(model: ov.Model, operator: str) -> int:
    return sum(node.get_type_name() == operator for node in model.get_ordered_ops())


def convolution(x: ov.Output, weights: NDArray[np.float32], stride: int = 1) -> ov.Node:
    pad = weights.shape[-1] // 2
    return ops.convolution(x, ops.constant(weights), [stride] * 2, [pad] * 2, [pad] * 2, [1, 1])


def test_in_float32_nothing_changes(bundle: Bundle, encoder: ov.Model) -> None:
    expected = run(encoder, bundle, RunnerOptions())
    refine_encoder(encoder)
    np.testing.assert_allclose(run(encoder, bundle, RunnerOptions()), expected, atol=1e-5 * np.abs(expected).max())


def test_gates_and_sums_stay_exact(encoder: ov.Model, tmp_path: Path) -> None:
    """Their mark has to be one that OpenVINO writes, as it is in a blob too."""
    blocks, convolutions = count(encoder, "Sigmoid"), count(encoder, "Convolution")
    assert blocks > 0
    refine_encoder(encoder)
    marked = [node for node in encoder.get_ordered_ops() if f"{ATTRIBUTE}_0" in node.get_rt_info()]
    kinds = [node.get_type_name() for node in marked]
    assert kinds.count("Sigmoid") == kinds.count("Multiply") == blocks
    assert blocks < kinds.count("Add") <= blocks + convolutions  # a block's sum, and a convolution's bias
    ov.serialize(encoder, tmp_path / "encoder.xml")
    written = (tmp_path / "encoder.xml").read_text()
    assert written.count(f'name="{ATTRIBUTE}" version="0" value="dynamic:f16"') == len(marked)


def test_weights_are_two_parts(bundle: Bundle) -> None:
    random = np.random.default_rng(0)
    weights = random.normal(size=(4, 3, 3, 3)).astype(np.float32)
    bias = random.normal(size=(1, 4, 1, 1)).astype(np.float32)
    x = ops.parameter([1, 3, 16, 16], np.float32)
    model = ov.Model([ops.relu(ops.add(convolution(x, weights, stride=2), ops.constant(bias)))], [x], "one")
    image = random.normal(size=(1, 3, 16, 16)).astype(np.float32)
    exact = backend_module.create_settings(RunnerOptions())
    expected = ov.Core().compile_model(model, "CPU", exact)(image)[0]
    refine_encoder(model)
    parts = [node.input_value(1).get_node().get_data() for node in model.get_ordered_ops() if is_convolution(node)]
    assert len(parts) == 2
    np.testing.assert_array_equal(parts[0] + parts[1], weights)
    large, small = sorted(parts, key=lambda part: -np.abs(part).max())
    assert not (large.view(np.uint32) & 0xFFFF).any()
    assert (np.abs(small) <= np.abs(large) * 2**-7).all()
    np.testing.assert_allclose(ov.Core().compile_model(model, "CPU", exact)(image)[0], expected, atol=1e-5)


def is_convolution(node: ov.Node) -> bool:
    return bool(node.get_type_name() == "Convolution")


@pytest.mark.parametrize(("side", "channels", "parts"), [(7, 1025, 1), (8, 1025, 2), (1, 1024, 2)])
def test_many_weights_for_few_pixels_stay_one_part(side: int, channels: int, parts: int) -> None:
    assert (side**2 >= LEAST_PIXELS_SPLIT or channels * 1024 <= MOST_WEIGHTS_SPLIT) is (parts == 2)
    x = ops.parameter([-1, 1024, side, side], np.float32)
    model = ov.Model([convolution(x, np.ones((channels, 1024, 1, 1), np.float32))], [x], "one")
    refine_encoder(model)
    assert count(model, "Convolution") == parts


def test_computed_weights_stay(bundle: Bundle) -> None:
    x, weights = ops.parameter([1, 3, 8, 8], np.float32), ops.parameter([4, 3, 1, 1], np.float32)
    model = ov.Model([ops.convolution(x, weights, [1, 1], [0, 0], [0, 0], [1, 1])], [x, weights], "one")
    refine_encoder(model)
    assert count(model, "Convolution") == 1


@pytest.mark.parametrize(
    ("options", "is_refined"),
    [
        (BF16.for_graph("encoder"), True),
        (BF16.for_graph("target"), True),
        (BF16.for_graph("generator"), False),
        (BF16, False),
        (RunnerOptions().for_graph("encoder"), False),
        (RunnerOptions(precision="mixed").for_graph("encoder"), False),
    ],
)
def test_encoders_in_bfloat16_are_refined(bundle: Bundle, options: RunnerOptions, is_refined: bool) -> None:
    plain = backend_module._read_graph(bundle.graphs["encoder"].path, RunnerOptions())
    model = backend_module._read_graph(bundle.graphs["encoder"].path, options)
    assert (count(model, "Convolution") > count(plain, "Convolution")) is is_refined


def network() -> ov.Model:
    """Return blocks with gates, as an encoder has them, whose last maps are averaged."""
    random, channels = np.random.default_rng(2), 64

    def weights(inputs: int, outputs: int, size: int) -> NDArray[np.float32]:
        values = random.normal(size=(outputs, inputs, size, size)) / np.sqrt(inputs * size**2)
        return np.asarray(values, np.float32)

    image = ops.parameter([1, channels, 32, 32], np.float32)
    x = image
    for _ in range(8):
        y = ops.relu(convolution(x, weights(channels, channels, 3)))
        y = convolution(y, weights(channels, channels, 3))
        squeezed = ops.relu(convolution(ops.reduce_mean(y, np.array([2, 3]), keep_dims=True), weights(channels, 4, 1)))
        x = ops.add(x, ops.multiply(y, ops.sigmoid(convolution(squeezed, weights(4, channels, 1)))))
    last = convolution(x, weights(channels, channels, 1))  # what follows the last convolution is in float32 in any case
    return ov.Model([ops.reduce_mean(last, np.array([2, 3]))], [image], "blocks")


@pytest.mark.parametrize("is_blob", [False, True])
def test_bfloat16_is_nearer_to_float32(is_blob: bool) -> None:
    """Both as a graph is compiled, and as it comes back from an engine's file."""
    try:
        backend_module.check_options(BF16)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    core, settings = ov.Core(), backend_module.create_settings(BF16)
    image = np.random.default_rng(3).normal(size=(1, 64, 32, 32)).astype(np.float32)
    exact = core.compile_model(network(), "CPU", backend_module.create_settings(RunnerOptions()))(image)[0]
    plain = core.compile_model(network(), "CPU", settings)(image)[0]
    model = network()
    refine_encoder(model)
    compiled = core.compile_model(model, "CPU", settings)
    if is_blob:
        file = io.BytesIO()
        compiled.export_model(file)
        compiled = core.import_model(file.getvalue(), "CPU", settings)
    refined = compiled(image)[0]
    assert 0 < rms(refined - exact) < 0.5 * rms(plain - exact)


def rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
