"""Demodulation, noise, bias, activation and the next style of a modulated convolution as one node."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from restyle_deploy.graph.edit import Edit, array_of, integers_of, nodes_of_type, only_user, replace_value, sizes_of
from restyle_deploy.ops.onnx_functions import DOMAIN, DOMAIN_VERSION, OPSET, Factor, onnx_function

_PIXEL_AXES = [2, 3]


@dataclass(frozen=True, kw_only=True)
class _Epilogue:
    """A chain of nodes that reads `x` and ends with the last of `nodes`.

    Attributes:
        x: [N, C, H, W], the convolution's result, or the filter's.
        activation: the `FusedBiasAct`.
        demod, next_scale: [N, C], or None.
        noise: [1, 1, H, W], or None.
        nodes: those that the new node replaces, in order; unsqueezed factors may have other users and are not here.
    """

    x: ir.Value
    activation: ir.Node
    demod: ir.Value | None
    noise: ir.Value | None
    next_scale: ir.Value | None
    nodes: tuple[ir.Node, ...]

    @property
    def filter(self) -> ir.Node | None:
        """The `UpFirDn2d` whose result the chain alone reads; one that upsamples belongs to the skip image."""
        node = self.x.producer()
        is_filter = node is not None and node.op_type == "UpFirDn2d" and integers_of(node, "up") == (1, 1)
        return node if is_filter and only_user(self.x) is self.nodes[0] else None

    @property
    def factors(self) -> Factor:
        """The factors that are present."""
        given = {Factor.DEMOD: self.demod, Factor.NOISE: self.noise, Factor.NEXT_SCALE: self.next_scale}
        bits = Factor.BIAS | Factor.ACTIVATION
        for factor, value in given.items():
            bits |= factor if value is not None else Factor.NONE
        return bits


def fuse_epilogue(model: ir.Model, *, layers: Collection[str] | None = None) -> ir.Model:
    """Turn gain · lrelu(x ⊙ demod + noise + bias) ⊙ next style into one `BiasActEpilogue`, or `UpFirDn2dEpilogue`.

    The latter where x is a filter's result. Demodulation, noise and next style are each taken in where they are; the
    style only if the convolution that it belongs to is the one reader of the activation. A `FusedBiasAct` with nothing
    around it stays. For backends with our kernels; any other runtime runs the functions that come with the nodes.

    Args:
        model: changed in place.
        layers: module paths; None for all.
    """
    for node in nodes_of_type(model, "FusedBiasAct", layers):
        found = _find_epilogue(node)
        if found is not None and (found.filter is not None or len(found.nodes) > 1):
            _fuse(model, found)
    return model


def find_epilogue(model: ir.Model, name: str) -> tuple[tuple[str, ...], str] | None:
    """Return the border of what `fuse_epilogue` makes one node behind a value: names of its factors, and of its result.

    Args:
        model: not changed.
        name: of the convolution's result, or the filter's.
    Returns:
        The factors are those that are computed, not constants. None where there is nothing of the kind.
    """
    for node in nodes_of_type(model, "FusedBiasAct"):
        found = _find_epilogue(node)
        if found is not None and found.x.name == name:
            computed = [value for value in (found.demod, found.next_scale) if array_of(value) is None]
            result = found.nodes[-1].outputs[0]
            return tuple(value.name or "" for value in computed if value is not None), result.name or ""
    return None


def _find_epilogue(activation: ir.Node) -> _Epilogue | None:
    x = activation.inputs[0]
    if x is None or array_of(activation.inputs[1]) is None:
        return None
    nodes, demod, noise, next_scale = [activation], None, None, None
    add = _only_producer(x, "Add")
    if add is not None and (parts := _split_noise(add)) is not None:
        x, noise = parts
        nodes.insert(0, add)
    scaling = _only_producer(x, "Mul")
    if scaling is not None and (scaled := _split_scaling(scaling)) is not None:
        x, demod = scaled
        nodes.insert(0, scaling)
    modulation = only_user(activation.outputs[0])
    modulated = _split_scaling(modulation) if modulation is not None and modulation.op_type == "Mul" else None
    if modulation is not None and modulated is not None and modulated[0] is activation.outputs[0]:
        next_scale = modulated[1]
        nodes.append(modulation)
    return _Epilogue(x=x, activation=activation, demod=demod, noise=noise, next_scale=next_scale, nodes=tuple(nodes))


def _split_noise(add: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return (image, noise) of their sum; the noise is a constant [1, 1, H, W] of the image's size."""
    for image, noise in (add.inputs, reversed(add.inputs)):
        array = array_of(noise)
        if image is not None and noise is not None and array is not None and array.ndim == 4:
            sizes = sizes_of(add.outputs[0])
            if array.shape[:2] == (1, 1) and sizes is not None and array.shape[2:] == sizes[1:]:
                return image, noise
    return None


def _split_scaling(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return (image, factor) of an image times a factor [N, C] that was given two more axes."""
    for image, factor in (node.inputs, reversed(node.inputs)):
        unsqueeze = factor.producer() if factor is not None else None
        if image is None or unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or unsqueeze.inputs[0] is None:
            continue
        axes, sizes = array_of(unsqueeze.inputs[1]), sizes_of(image)
        has_axes = axes is not None and axes.tolist() == _PIXEL_AXES
        if has_axes and sizes is not None and sizes_of(unsqueeze.inputs[0]) == sizes[:1]:
            return image, unsqueeze.inputs[0]
    return None


def _only_producer(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the node of this operator that gives a value which nothing else reads."""
    node = value.producer()
    return node if node is not None and node.op_type == op_type and only_user(value) is not None else None


def _fuse(model: ir.Model, found: _Epilogue) -> None:
    last, filter_ = found.nodes[-1], found.filter
    edit = Edit(model, found.activation, "fuse_epilogue")
    factors = [
        edit.constant(np.ones((1, 1), np.float32)) if found.demod is None else found.demod,
        edit.constant(np.zeros((1, 1, 1, 1), np.float32)) if found.noise is None else found.noise,
        found.activation.inputs[1],
        edit.constant(np.ones((1, 1), np.float32)) if found.next_scale is None else found.next_scale,
    ]
    op_type, images = ("BiasActEpilogue", [found.x]) if filter_ is None else ("UpFirDn2dEpilogue", filter_.inputs)
    node = ir.node(op_type, [*images, *factors], domain=DOMAIN, name=found.activation.name)
    for copied in (found.activation, *([filter_] if filter_ is not None else [])):
        for attribute in copied.attributes.values():
            node.attributes.add(attribute)
    node.attributes.add(ir.AttrInt64("factors", int(found.factors)))
    model.graph.insert_before(last, node)  # where the next style is known too
    replace_value(last.outputs[0], node.outputs[0])
    unsqueezed = {value.producer() for part in found.nodes for value in part.inputs if value is not None}
    model.graph.remove([*reversed(found.nodes), *([filter_] if filter_ is not None else [])], safe=True)
    for producer in unsqueezed:
        if producer is not None and producer.op_type == "Unsqueeze" and not producer.outputs[0].uses():
            model.graph.remove(producer, safe=True)
    add_function(model, op_type)


def add_function(model: ir.Model, op_type: str, *, opset: int = OPSET) -> None:
    """Give a model the body of an operator of ours, in the place of any that it has; `opset` as for `onnx_function`."""
    function = ir.serde.deserialize_function(onnx_function(op_type, opset=opset))
    model.functions[function.identifier()] = function
    model.graph.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)
