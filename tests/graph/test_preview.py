"""The generator cut off at the encoder's input size."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from restyle_deploy.errors import BuildError
from restyle_deploy.graph.plan import TABLE, apply_choices, find_sites
from restyle_deploy.graph.preview import preview_graph
from restyle_deploy.models.restyle import RestyleModel
from tests.graph_models import (
    BATCHES,
    Array,
    assert_equal_in_range,
    content,
    exported,
    random_inputs,
    run,
)
from tests.toy import toy_model

DATASET_TYPES = pytest.mark.parametrize("dataset_type", ["ffhq_encode", "cars_encode"])


def render_preview(model: RestyleModel, latent: Array) -> Array:
    """Return what the image layer of the encoder's size has summed up, cropped to the domain."""
    images: list[Tensor] = []
    for layer in model.decoder.to_rgbs:
        layer.register_forward_hook(lambda module, inputs, output: images.append(output))
    model.decoder(torch.from_numpy(latent))
    size = model.config.input_size
    (image,) = (image for image in images if image.shape[-1] == size)
    first, end = model.config.variant.crop_rows(size)
    return np.asarray(image[:, :, first:end])


@DATASET_TYPES
def test_image_is_the_models_skip_image(dataset_type: str) -> None:
    model, generator = toy_model(dataset_type=dataset_type), exported("generator", dataset_type=dataset_type)
    before = content(generator)
    preview = preview_graph(generator, model.config)
    assert content(generator) == before
    onnx.checker.check_model(content(preview))
    (latent,), (current,) = preview.graph.inputs, preview.graph.outputs
    assert (latent.name, current.name) == ("latent", "current")
    assert tuple(map(str, current.shape or ())) == ("N", "3", *map(str, model.config.input_shape))
    for batch in BATCHES:
        inputs = random_inputs(preview, batch=batch, seed=batch)
        assert_equal_in_range(run(preview, inputs), {"current": render_preview(model, inputs["latent"])})


def test_finer_layers_are_left_out() -> None:
    config, generator = toy_model().config, exported("generator")
    preview = preview_graph(generator, config)
    layers = {(node.name or "").partition("/")[0] for node in preview.graph}
    assert "decoder.to_rgbs.2" in layers
    assert not [layer for layer in layers if layer.startswith(("decoder.to_rgbs.3", "decoder.convs.6"))]
    assert set(preview.graph.initializers) < set(generator.graph.initializers)


@DATASET_TYPES
def test_preview_is_rewritten_like_the_generator(dataset_type: str) -> None:
    config, generator = toy_model(dataset_type=dataset_type).config, exported("generator", dataset_type=dataset_type)
    sites, table = find_sites(generator), TABLE["onnxruntime"]
    preview = preview_graph(generator, config)
    expected = preview.clone()
    apply_choices(preview, sites, {site.name: table[site.family] for site in sites})
    assert not preview.functions
    inputs = random_inputs(expected, batch=2)
    assert_equal_in_range(run(preview, inputs), run(expected, inputs))


def test_a_generator_without_that_image_is_refused() -> None:
    with pytest.raises(BuildError, match="the generator has no image of 128×128 px"):
        preview_graph(exported("generator"), replace(toy_model().config, input_size=128))


def test_an_encoder_has_no_preview() -> None:
    with pytest.raises(BuildError, match="the generator has no image of 32×32 px"):
        preview_graph(exported("encoder"), toy_model().config)
