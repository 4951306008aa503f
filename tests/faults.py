"""Faults planted into a layer of an ONNX file, or of an engine of a bundle."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

from restyle_deploy.bundle import write_engine
from restyle_deploy.files import sha256_of_file
from tests.bundles import add_engine


def plant_fault(graph: Path, layer: str, *, factor: float = 1.05) -> None:
    """Multiply the first float constant that a node of a layer takes."""
    model = onnx.load(graph)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = (
        constants[name]
        for node in model.graph.node
        if node.name.partition("/")[0] == layer
        for name in node.input
        if name in constants and constants[name].data_type == onnx.TensorProto.FLOAT
    )
    tensor = next(taken)
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array((array * np.float32(factor)).astype(np.float32), tensor.name))
    onnx.save(model, graph)


def add_faulty_engine(bundle: Path, role: str, layer: str, **fault: Any) -> None:
    """Add an engine for ONNX Runtime with a fault in one layer, whose hashes fit."""
    record = add_engine(bundle)
    path = record.graphs[role].path
    plant_fault(path, layer, **fault)
    digest = sha256_of_file(path)
    graphs = {**record.graphs, role: replace(record.graphs[role], sha256=digest)}
    write_engine(bundle, replace(record, graphs=graphs, files={**record.files, path.name: digest}))
