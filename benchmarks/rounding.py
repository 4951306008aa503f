"""What a shorter type costs in quality, on a machine without it: the graphs with rounded tensors, computed in float32.

    python -m benchmarks.rounding --models demo,1024 --golden DIRECTORY --work DIRECTORY

It estimates a backend's own precision, which rounds at places of its own choice: `operands` rounds only what
convolutions and matrix products read, so no backend that computes in this type does less; `weights` only those of them
that are constants, `maps` only the others; `all` rounds whatever a node writes. Sums are kept in float32, as such
hardware keeps them.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import click
import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.models import DEMO, DEMO_BUNDLE, load_inputs
from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.bench.comparison import difference_of
from restyle_deploy.bundle import Bundle, GraphRecord, open_bundle
from restyle_deploy.runtime.session import InversionResult, Session, load_graphs

TYPES: Mapping[str, ir.DataType] = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}
EXTENTS = ("operands", "weights", "maps", "all")
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def round_tensors(model: ir.Model, dtype: ir.DataType, *, extent: str) -> ir.Model:
    """Round float32 tensors to a shorter type and back.

    Args:
        model: without functions; changed in place. Inputs and outputs of the graph stay exact, unless a product reads
            them.
        dtype: the shorter type.
        extent: one of `EXTENTS`.
    """
    written = tuple(model.graph)
    products = [node for node in written if node.op_type in PRODUCTS]
    for operand in dict.fromkeys(value for node in products for value in node.inputs[:2] if _is_float(value)):
        assert operand is not None
        if extent == ("maps" if operand.const_value is not None else "weights"):
            continue
        _round_for(
            model,
            operand,
            [(use.node, use.idx) for use in operand.uses() if use.node in products and use.idx < 2],
            dtype,
        )
    if extent == "all":
        for value in (output for node in written for output in node.outputs if _is_float(output)):
            _round_for(model, value, [(use.node, use.idx) for use in value.uses() if use.node.op_type != "Cast"], dtype)
    return model


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _round_for(model: ir.Model, value: ir.Value, uses: list[tuple[ir.Node, int]], dtype: ir.DataType) -> None:
    """Let these users of a value read it rounded."""
    if not uses:
        return
    short = ir.node("Cast", [value], attributes={"to": dtype})
    back = ir.node("Cast", [short.outputs[0]], attributes={"to": ir.DataType.FLOAT})
    back.outputs[0].shape, back.outputs[0].dtype = value.shape, ir.DataType.FLOAT
    producer = value.producer()
    if producer is not None:
        model.graph.insert_after(producer, (short, back))
    else:
        model.graph.insert_before(model.graph[0], (short, back))
    for node, index in uses:
        node.replace_input_with(index, back.outputs[0])


def rounded_graph(graph: Path, target: Path, dtype: ir.DataType, *, extent: str) -> None:
    """Write a graph with rounded tensors as an ONNX file."""
    inlined = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(onnx.load(graph)), data_prop=True)
    ir.save(round_tensors(ir.from_proto(inlined), dtype, extent=extent), target)


def _invert(
    bundle: Bundle, graphs: Mapping[str, GraphRecord], images: NDArray[np.uint8], steps: int
) -> InversionResult:
    backend = load_backend("onnxruntime")
    with Session(bundle, load_graphs(backend, graphs, RunnerOptions()), {}) as session:
        return session.invert(images, steps=steps)


def measure(directory: Path, images: NDArray[np.uint8], *, steps: int) -> list[dict[str, object]]:
    """Return the difference to the exact result after the last step, for each type and extent."""
    bundle = open_bundle(directory)
    exact = _invert(bundle, bundle.graphs, images, steps)
    rows: list[dict[str, object]] = []
    for name, dtype in TYPES.items():
        for extent in EXTENTS:
            with tempfile.TemporaryDirectory() as folder:
                graphs = {}
                for role, graph in bundle.graphs.items():
                    graphs[role] = replace(graph, path=Path(folder) / f"{role}.onnx")
                    rounded_graph(graph.path, graphs[role].path, dtype, extent=extent)
                difference = difference_of(_invert(bundle, graphs, images, steps), exact)
            rows.append({"type": name, "extent": extent, **asdict(difference)})
            click.echo(json.dumps(rows[-1]), err=True)
    return rows


@click.command()
@click.option("--golden", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Holds the inputs.")
@click.option(
    "--work", type=click.Path(path_type=Path), default="out/cpu", help="Holds bundles that benchmarks.cpu left."
)
@click.option("--models", default=DEMO, show_default=True, help="Names, as of benchmarks.cpu.")
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Refinement steps.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="benchmarks/results/rounding.json")
def main(golden: Path | None, work: Path, models: str, steps: int, output: Path) -> None:
    """Measure what bf16 and fp16 cost in quality, by rounding."""
    results = {}
    for name in models.split(","):
        directory = DEMO_BUNDLE if name == DEMO else work / name
        shape = open_bundle(directory).config.input_shape
        results[name] = measure(directory, load_inputs(name, golden, shape, 1), steps=steps)
    output.write_text(json.dumps({"steps": steps, "models": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
