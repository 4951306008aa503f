"""The torch model rebuilt from exported graphs: the same function as the one that was exported."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from restyle_deploy.bundle import Bundle, GraphRecord, open_bundle
from restyle_deploy.errors import BundleError, ShapeError
from restyle_deploy.graph.export import encoder_graph, generator_graph
from restyle_deploy.model_config import graph_specs
from restyle_deploy.models.encoders import ENCODERS
from restyle_deploy.models.restyle import RestyleModel
from restyle_deploy.reference import invert_with_model, model_from_bundle
from restyle_deploy.verify import load_expectation, reduce_images
from tests.toy import toy_model

TOLERANCE = 1e-5


def bundle_of(folder: Path, model: RestyleModel) -> Bundle:
    """Export a model's graphs, and nothing else of a bundle."""
    records = {}
    for name, export in (("encoder", encoder_graph), ("generator", generator_graph)):
        onnx.save(export(model).model, folder / f"{name}.onnx")
        inputs, outputs = graph_specs(model.config)[name]
        records[name] = GraphRecord(path=folder / f"{name}.onnx", sha256="", inputs=inputs, outputs=outputs)
    return Bundle(
        path=folder,
        config=model.config,
        checkpoint_sha256="",
        graphs=records,
        latent_avg=model.latent_avg.numpy(),
        average_image=model.average_image().numpy(),
        expectation=folder / "expectation.npz",
        engines=(),
        verification={},
    )


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy of the toy bundle, whose graphs a test may change."""
    shutil.copytree(toy_bundle, tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


def change_graph(bundle: Bundle, name: str, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(bundle.graphs[name].path)
    change(model.graph)
    onnx.save(model, bundle.graphs[name].path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder_type", "dataset_type"),
    [*((name, "ffhq_encode") for name in ENCODERS), ("BackboneEncoder", "cars_encode")],
)
def test_every_type_is_rebuilt(encoder_type: str, dataset_type: str, tmp_path: Path) -> None:
    model = toy_model(encoder_type=encoder_type, dataset_type=dataset_type, encoder_units=[1, 2, 1, 1])
    rebuilt = model_from_bundle(bundle_of(tmp_path, model))
    target = torch.rand(2, 3, *model.config.input_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for found, expected in zip(rebuilt.invert(target, steps=3), model.invert(target, steps=3), strict=True):
        for name in ("latent", "image", "current"):
            difference = (getattr(found, name) - getattr(expected, name)).abs().max()
            assert difference <= TOLERANCE, name


def test_what_is_rebuilt_is_a_model_at_rest(bundle: Bundle) -> None:
    model = model_from_bundle(bundle)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (bundle.config.mapping_layers, model.config.mapping_layers) == (2, 0)
    assert not any(value.is_meta for value in model.state_dict().values())


def test_weights_are_those_of_the_checkpoint_where_nothing_was_folded(bundle: Bundle) -> None:
    found, expected = model_from_bundle(bundle).state_dict(), toy_model().state_dict()
    assert found.keys() == {key for key in expected if not key.startswith("decoder.style.")}
    for key in ("encoder.styles.0.linear.weight", "decoder.convs.0.conv.weight", "decoder.to_rgbs.0.bias"):
        torch.testing.assert_close(found[key], expected[key])


def test_absorbed_batch_norm_is_the_identity(bundle: Bundle) -> None:
    batch_norm = model_from_bundle(bundle).get_submodule("encoder.input_layer.1")
    values = torch.linspace(-3, 3, 8 * 4).view(1, 8, 2, 2)
    found = batch_norm(values) - batch_norm.bias.view(1, -1, 1, 1)  # type: ignore[operator]
    torch.testing.assert_close(found, values, rtol=0, atol=5e-7)


def test_inversion_is_that_of_the_checkpoints_model(toy_bundle: Path) -> None:
    bundle = open_bundle(toy_bundle)
    expectation, model = load_expectation(bundle.expectation), model_from_bundle(bundle)
    average = bundle.average_image
    every = invert_with_model(
        model, expectation.inputs, average_image=average, steps=expectation.steps, every_step=True
    )
    pooled, crop = reduce_images(every.images)
    assert np.abs(every.latents - expectation.latents).max() <= TOLERANCE
    assert np.abs(pooled - expectation.images_pooled).max() <= TOLERANCE
    assert np.abs(crop - expectation.images_crop).max() <= TOLERANCE
    last = invert_with_model(model, expectation.inputs, average_image=average, steps=expectation.steps)
    assert np.array_equal(last.images, every.images[-1])
    assert np.array_equal(last.latents, every.latents[-1])


def test_wrong_arguments_of_an_inversion(bundle: Bundle) -> None:
    model, images = model_from_bundle(bundle), np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="steps is 0"):
        invert_with_model(model, images, average_image=bundle.average_image, steps=0)
    with pytest.raises(ShapeError, match="one image is"):
        invert_with_model(model, images[0], average_image=bundle.average_image, steps=1)


def test_unknown_encoder_type(bundle: Bundle) -> None:
    strange = replace(bundle, config=replace(bundle.config, encoder_type="Strange"))
    with pytest.raises(BundleError, match="encoder_type is 'Strange', expected one of BackboneEncoder"):
        model_from_bundle(strange)


def test_all_missing_nodes_of_a_graph_are_named(bundle: Bundle) -> None:
    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for name in ("encoder.styles.0.linear", "encoder.body.0.res_layer.1"):
                node.name = node.name.replace(f"{name}/", "elsewhere/")

    change_graph(bundle, "encoder", change)
    with pytest.raises(BundleError) as caught:
        model_from_bundle(bundle)
    message = str(caught.value)
    assert str(bundle.graphs["encoder"].path) in message
    assert "encoder.styles.0.linear has 0 nodes Gemm with 2 constants, expected 1" in message
    assert "encoder.body.0.res_layer.1 has 0 nodes Conv with 1 constants, expected 1" in message
    assert "(Gemm) belongs to no layer of the model" in message


@pytest.mark.parametrize(
    ("name", "path", "op_type"),
    [
        ("encoder", "encoder.input_layer.2", "PRelu"),
        ("encoder", "encoder.body.0.res_layer.4", "Conv"),
        ("encoder", "encoder.body.0.res_layer.0", "BatchNormalization"),
        ("generator", "decoder.conv1.conv", "Conv"),
        ("generator", "decoder.convs.0.conv", "ConvTranspose"),
        ("generator", "decoder.convs.0", "FusedBiasAct"),
        ("generator", "decoder.to_rgbs.0", "UpFirDn2d"),
    ],
)
def test_weight_of_another_shape_is_named(bundle: Bundle, name: str, path: str, op_type: str) -> None:
    def change(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.name.startswith(f"{path}/") and node.op_type == op_type)
        node.input[1] = "short"
        graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((3, 2), np.float32), "short"))

    change_graph(bundle, name, change)
    with pytest.raises(BundleError, match=rf"{path}/\w+ has a constant float32 \[3, 2\], expected float32 \["):
        model_from_bundle(bundle)


def test_weight_of_no_layer_is_named(bundle: Bundle) -> None:
    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "tint"))
        graph.node.append(onnx.helper.make_node("Mul", ["image", "tint"], ["tinted"], name="model/tint"))

    change_graph(bundle, "generator", change)
    with pytest.raises(BundleError, match=r"model/tint \(Mul\) belongs to no layer of the model"):
        model_from_bundle(bundle)


def test_demodulation_of_other_weights_is_named(bundle: Bundle) -> None:
    def change(graph: onnx.GraphProto) -> None:
        node = next(
            node for node in graph.node if node.name.startswith("decoder.conv1.conv/") and node.op_type == "Gemm"
        )
        energy = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
        energy.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(energy), energy.name))

    change_graph(bundle, "generator", change)
    with pytest.raises(BundleError, match=r"decoder\.conv1\.conv: the demodulation does not fit the weight"):
        model_from_bundle(bundle)
