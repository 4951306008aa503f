"""The generator cut off at the encoder's input size: what intermediate steps may render instead of the whole image."""

import onnx_ir as ir

from restyle_deploy.errors import BuildError
from restyle_deploy.graph.edit import Edit, layer_of, sizes_of
from restyle_deploy.model_config import ModelConfig

SKIP_LAYERS = "decoder.to_rgbs."
CURRENT = "current"


def preview_graph(generator: ir.Model, config: ModelConfig) -> ir.Model:
    """Return latent -> current from the skip image of the encoder's size, cropped to the domain.

    Not the same function: upstream pools the full image, to which the finer layers have added detail.

    Args:
        generator: the exported graph; it is not changed, and its weights are shared.
        config: its sizes; `output_size` is larger than `input_size`.
    Raises:
        BuildError: the graph has no skip image of that size.
    """
    size = (3, config.input_size, config.input_size)
    images = [
        node.outputs[0]
        for node in generator.graph
        if layer_of(node).startswith(SKIP_LAYERS) and sizes_of(node.outputs[0]) == size
    ]
    if not images:
        raise BuildError(f"the generator has no image of {size[1]}×{size[2]} px in its layers {SKIP_LAYERS}*")
    batch = images[-1].shape[0] if images[-1].shape is not None else None
    graph = ir.convenience.extract(generator.graph, inputs=list(generator.graph.inputs), outputs=[images[-1]])
    functions = [function.clone() for function in generator.functions.values()]
    model = ir.Model(graph, ir_version=generator.ir_version, functions=functions)
    image, source = graph.outputs[0], graph.outputs[0].producer()
    assert source is not None
    first, end = config.variant.crop_rows(config.input_size)
    if (first, end) != (0, config.input_size):
        edit = Edit(model, source, "crop")
        bounds = [edit.integers(value) for value in (first, end, 2)]
        crop = ir.node("Slice", (image, *bounds), name=f"{layer_of(source)}/crop")
        graph.append(crop)
        shape = ir.Shape((batch, size[0], end - first, size[2]))
        image, image_type = crop.outputs[0], image.type
        image.shape, image.type = shape, image_type
        graph.outputs[0] = image
    image.name = CURRENT
    return model
