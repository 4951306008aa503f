"""Which operators hold the time of a bundle's engines, and how far from this machine's ceiling they are.

    python -m benchmarks.operators BUNDLE -o FILE.md

The ceiling is the rate of ONNX Runtime's product of two large matrices in the same run.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from restyle_deploy.backends.base import PRECISIONS, RunnerOptions
from restyle_deploy.backends.onnxruntime import create_settings
from restyle_deploy.bundle import Bundle, EngineRecord, find_engine, read_bundle
from restyle_deploy.graph.edit import array_of, sizes_of
from restyle_deploy.processor import describe_processor, usable_cores

RUNS = 5
MATRIX_SIZE = 2048
SHOWN = 9


@click.command(help=__doc__)
@click.argument("directory", metavar="BUNDLE", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Markdown file; else only printed.")
@click.option("--threads", type=click.IntRange(min=1), show_default="the cores")
def main(directory: Path, output: Path | None, threads: int | None) -> None:
    """Profile the engines that the bundle has."""
    bundle = read_bundle(directory)
    options = RunnerOptions(threads=threads or usable_cores())
    ceiling = _measure_ceiling(options)
    text = [
        f"{describe_processor()}, {options.threads} threads, batch 1, medians of {RUNS} runs. Ceiling: a product of two"
        f" {MATRIX_SIZE}×{MATRIX_SIZE} float32 matrices runs at {ceiling / 1e9:.0f} GMAC/s."
    ]
    for name in bundle.graphs:
        products = sum(layer.products for layer in layers_of(bundle.graphs[name].path))
        text.append(
            f"### {name}\n\nAs exported: {products / 1e9:.1f} GMAC in convolutions and linear layers, "
            f"{products / ceiling * 1e3:.0f} ms at the ceiling."
        )
        text += _profiles(bundle, name, options)
    result = "\n\n".join(text) + "\n"
    if output is not None:
        output.write_text(result, encoding="utf-8")
    click.echo(result)


def _profiles(bundle: Bundle, name: str, options: RunnerOptions) -> Iterator[str]:
    """Yield the tables of a graph of all engines that the bundle has, in every precision."""
    profilers: Mapping[str, Callable[[EngineRecord, str, RunnerOptions], dict[str, float]]] = {
        "onnxruntime": _profile_onnxruntime,
        "openvino": _profile_openvino,
    }
    for (backend, profile), precision in product(profilers.items(), PRECISIONS):
        engine = find_engine(bundle, backend=backend, device="cpu", precision=precision)
        if engine is not None:
            graph_options = replace(options, precision=precision).for_graph(name)
            yield _format_profile(f"{backend} {precision}", profile(engine, name, graph_options))


def _format_profile(label: str, operators: Mapping[str, float]) -> str:
    total = sum(operators.values())
    ranked = sorted(operators.items(), key=lambda item: -item[1])
    shown = [*ranked[:SHOWN], ("all others", sum(ms for _, ms in ranked[SHOWN:]))]
    lines = [f"| {name} | {ms:.1f} | {ms / total:.0%} |" for name, ms in shown]
    return "\n".join([f"| {label}, {total:.0f} ms | ms | share |", "|---|---:|---:|", *lines])


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or linear layer, for one image.

    Attributes:
        products: multiplications.
        weights: elements of the weight.
        activations: elements that it reads and writes.
    """

    products: float
    weights: float
    activations: float


def layers_of(graph: Path) -> list[Layer]:
    """Return the convolutions and linear layers of a graph as exported."""
    layers = []
    for node in ir.load(graph).graph:
        weight = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if weight is None or node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        read, written = (_sizes_of_image(value) for value in (node.inputs[0], node.outputs[0]))
        # Each weight meets each pixel: of the input in a transposed convolution, of the output in the others.
        pixels = np.prod((read if node.op_type == "ConvTranspose" else written)[1:])
        layers.append(
            Layer(
                products=float(weight.size * pixels),
                weights=float(weight.size),
                activations=float(np.prod(read) + np.prod(written)),
            )
        )
    return layers


def _sizes_of_image(value: ir.Value | None) -> tuple[int, ...]:
    sizes = sizes_of(value)
    if sizes is None:
        raise ValueError(f"the graph does not tell the shape of {value}")
    return sizes


def _measure_ceiling(options: RunnerOptions) -> float:
    """Return multiplications per second of a large matrix product in ONNX Runtime."""
    size = (MATRIX_SIZE, MATRIX_SIZE)
    left, right = (ir.Value(name=name, shape=ir.Shape(size), type=ir.TensorType(ir.DataType.FLOAT)) for name in "ab")
    node = ir.node("MatMul", (left, right))
    node.outputs[0].name, node.outputs[0].type = "c", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph((left, right), node.outputs, nodes=(node,), opset_imports={"": 20}, name="product")
    content = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(content, create_settings(options), providers=["CPUExecutionProvider"])
    feeds = {name: np.random.default_rng(0).standard_normal(size, np.float32) for name in "ab"}
    best = float("inf")
    for _ in range(3 * RUNS):
        begin = time.perf_counter()
        session.run(None, feeds)
        best = min(best, time.perf_counter() - begin)
    return float(MATRIX_SIZE) ** 3 / best


def _profile_onnxruntime(engine: EngineRecord, role: str, options: RunnerOptions) -> dict[str, float]:
    """Return milliseconds per run by operator."""
    record = engine.graphs[role]
    settings = create_settings(options)
    settings.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        settings.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(record.path), settings, providers=["CPUExecutionProvider"])
        for _ in range(RUNS + 1):
            session.run(None, _random_feeds(engine, role))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    operators: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"]].append(event["dur"] / 1e3)
            operators[event["name"]] = event["args"]["op_name"]
    return _sum_by_operator({name: (operators[name], float(np.median(runs[1:]))) for name, runs in times.items()})


def _profile_openvino(engine: EngineRecord, role: str, options: RunnerOptions) -> dict[str, float]:
    """Return milliseconds per run by operator and the kernel that ran it."""
    import openvino as ov

    from restyle_deploy.backends.openvino import create_settings as create_openvino_settings

    settings = {**create_openvino_settings(options), "PERF_COUNT": True}
    compiled = ov.Core().import_model(engine.graphs[role].path.read_bytes(), "CPU", settings)
    request = compiled.create_infer_request()
    runs: dict[str, list[float]] = defaultdict(list)
    operators: dict[str, str] = {}
    for _ in range(RUNS + 1):
        request.infer(_random_feeds(engine, role))
        for node in request.get_profiling_info():
            runs[node.node_name].append(node.real_time.total_seconds() * 1e3)
            operators[node.node_name] = f"{node.node_type} ({node.exec_type})"
    return _sum_by_operator({name: (operators[name], float(np.median(times[1:]))) for name, times in runs.items()})


def _random_feeds(engine: EngineRecord, role: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        spec.name: random.standard_normal(spec.concrete_shape(1), np.float32) for spec in engine.graphs[role].inputs
    }


def _sum_by_operator(nodes: Mapping[str, tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for operator, ms in nodes.values():
        sums[operator] += ms
    return sums


if __name__ == "__main__":
    main()
