"""One refinement step as two ONNX graphs with a free batch."""

import ast
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from restyle_deploy.errors import ExportError
from restyle_deploy.model_config import graph_specs
from restyle_deploy.models.restyle import RestyleModel
from restyle_deploy.ops import fused_bias_act, upfirdn2d
from restyle_deploy.ops.onnx_functions import DOMAIN, DOMAIN_VERSION, OPSET
from restyle_deploy.tensors import BATCH, TensorSpec

# Traced with two images: the exporter would take a batch of one for a constant.
TRACED_BATCH = 2
# Constants of any size are folded; the exporter's default leaves the scaling of large weights to every start.
FOLDING_LIMIT = 2**31


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An ONNX model and its border."""

    model: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def encoder_graph(model: RestyleModel) -> Graph:
    """Export target, current, latent -> latent_out; the residual is added inside."""
    return _export(model, "encoder", model.encode)


def generator_graph(model: RestyleModel) -> Graph:
    """Export latent -> image, current; the image is cropped and pooled inside."""
    return _export(model, "generator", model.generate)


class _Call(nn.Module):
    """A method of the model as a module, which the exporter asks for."""

    def __init__(self, model: RestyleModel, method: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.model = model
        self._method = method

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self._method(*inputs)


def _export(model: RestyleModel, name: str, method: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> Graph:
    inputs, outputs = graph_specs(model.config)[name]
    example = tuple(torch.zeros(spec.concrete_shape(TRACED_BATCH)) for spec in inputs)
    batch = torch.export.Dim(BATCH, min=1)
    # The exporter reports each of its passes as a warning or on the root logger; none concerns the user.
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Call(model, method).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            optimize=False,
            verbose=False,
        )
        if program is None:
            raise ExportError(f"{name}: the exporter returned nothing")
        onnxscript.optimizer.optimize(program.model, input_size_limit=FOLDING_LIMIT, output_size_limit=FOLDING_LIMIT)
    return Graph(model=_with_layer_names(_with_functions(program.model_proto)), inputs=inputs, outputs=outputs)


def _with_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Add the bodies of the custom nodes that occur, so that any ONNX runtime runs the file."""
    bodies = {"FusedBiasAct": fused_bias_act.onnx_function, "UpFirDn2d": upfirdn2d.onnx_function}
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    model.functions.extend(bodies[name]() for name in sorted(used))
    if used and DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    return model


def _with_layer_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name nodes after the module they come from, and drop the exporter's notes, which tell paths of this machine."""
    for node in model.graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        layer = next((scope for scope in reversed(scopes[:-1]) if scope), "model").removeprefix("model.")
        node.name = f"{layer}/{node.name.removeprefix('node_')}"
    graph = model.graph
    for described in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del described.metadata_props[:]
    return model


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Raise the level of loggers to ERROR for a while."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
