"""Where bfloat16 costs the latents: the encoder cut behind one of its blocks, the parts in float32 or bfloat16.

    python -m benchmarks.encoder_precision BUNDLE CASE.npz

Runs the fixed-step loop of the exported graphs in OpenVINO on each input of a golden case, and compares latents and
last image with the loop in float32. "Refined" is bfloat16 as sessions compute it: see `backends.openvino_rounding`.
Needs a CPU with bfloat16. Writes benchmarks/results/encoder-precision.json.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.bundle import Bundle, read_bundle
from restyle_deploy.engine_graphs import save_graph
from restyle_deploy.graph.edit import layer_of
from restyle_deploy.planner import specs_of
from restyle_deploy.processor import describe_processor
from restyle_deploy.workbench import Workbench

RESULT = Path("benchmarks/results/encoder-precision.json")
BACKEND = "openvino"
STEPS = 5
PEAK = 2.0  # of images in [-1, 1]

Arrays = Mapping[str, NDArray[np.float32]]
Graph = Callable[[Arrays], Arrays]


@click.command(help=__doc__)
@click.argument("directory", metavar="BUNDLE", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("case", metavar="CASE.npz", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--blocks", default="2,6,20,23", show_default=True, help="Blocks behind which the encoder is cut.")
@click.option("-o", "--output", default=RESULT, show_default=True, type=click.Path(path_type=Path))
def main(directory: Path, case: Path, blocks: str, output: Path) -> None:
    """Measure all combinations, and print and store them."""
    with np.load(case) as arrays:
        images = arrays["input"]
    targets = np.ascontiguousarray((images.astype(np.float32) / 255 - 0.5).transpose(0, 3, 1, 2) / 0.5)
    rows = measure(read_bundle(directory), targets, tuple(map(int, blocks.split(","))))
    content = {"processor": describe_processor(), "case": case.stem, "steps": STEPS, "rows": rows}
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        click.echo(
            f"{row['what']}, image {row['image']}: {row['psnr_db']:.1f} dB, latents {row['latent_errors'][-1]:.4f}"
        )


def measure(
    bundle: Bundle, targets: NDArray[np.float32], blocks: tuple[int, ...], *, short: str = "bf16"
) -> list[dict[str, Any]]:
    """Return a row for each combination and image: errors of the latents by step, and the PSNR of the last image.

    Args:
        bundle: with a backbone of blocks.
        targets: float32 [N, 3, h, w] in [-1, 1], of the encoder's size.
        blocks: numbers of the blocks behind which the encoder is cut.
        short: the precision that is compared with float32.
    """
    precisions = ("fp32", short)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        whole = {role: ir.load(bundle.graphs[role].path) for role in ("encoder", "generator")}
        files = {role: save_graph(model, role, Path(folder), batch=1) for role, model in whole.items()}
        encoders, generators = (
            {name: opened.enter_context(_open(files[role], name)) for name in precisions}
            for role in ("encoder", "generator")
        )
        encoders["refined"] = opened.enter_context(_open(files["encoder"], short, role="encoder"))
        expected = [_invert(bundle, target, encoders["fp32"], generators["fp32"]) for target in _each(targets)]

        def note(what: str, encode: Graph, generate: Graph) -> None:
            for index, (target, (latents, image)) in enumerate(zip(_each(targets), expected, strict=True)):
                found, rendered = _invert(bundle, target, encode, generate)
                errors = [float(np.abs(one - other).max()) for one, other in zip(found, latents, strict=True)]
                mse = float(np.mean((rendered - image) ** 2))
                psnr = 10 * np.log10(PEAK**2 / mse) if mse else float("inf")
                rows.append({"what": what, "image": index, "latent_errors": errors, "psnr_db": psnr})

        for encoder, encode in encoders.items():
            for generator, generate in generators.items():
                if (encoder, generator) != ("fp32", "fp32"):
                    note(f"encoder {encoder}, generator {generator}", encode, generate)
        for block in blocks:
            front, back = split_encoder(bundle, block, Path(folder))
            for first, second in (precisions, precisions[::-1]):
                with _open(front, first) as begin, _open(back, second) as end:
                    what = f"encoder {first} to block {block}, {second} from there on, generator fp32"
                    note(what, _chain(begin, end), generators["fp32"])
    return rows


def _each(targets: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return the images of a batch as batches of one."""
    return np.split(targets, len(targets))


def split_encoder(bundle: Bundle, block: int, folder: Path) -> tuple[Path, Path]:
    """Write the encoder as two graphs, up to the end of a block and from there on; return the files.

    Raises:
        ValueError: the encoder has no such block.
    """
    path = bundle.graphs["encoder"].path
    pattern = re.compile(rf"encoder\.body\.{block}(\.|$)")
    nodes = [node for node in ir.load(path).graph if pattern.match(layer_of(node) or "")]
    if not nodes:
        raise ValueError(f"the encoder has no block {block}")
    border = nodes[-1].outputs[0].name
    assert border is not None
    parts = {"front": (["target", "current"], [border]), "back": ([border, "latent"], ["latent_out"])}
    files = []
    for name, (inputs, outputs) in parts.items():
        model = ir.load(path)
        graph = ir.convenience.extract(model.graph, inputs=inputs, outputs=outputs)
        functions = [function.clone() for function in model.functions.values()]
        part = ir.Model(graph, ir_version=model.ir_version, functions=functions)
        files.append(save_graph(part, f"{name}{block}", folder, batch=1))
    return files[0], files[1]


@contextmanager
def _open(file: Path, precision: str, *, role: str = "") -> Iterator[Graph]:
    """Yield a graph as a function from inputs to outputs, by name."""
    inputs, outputs = specs_of(ir.load(file))
    with Workbench(RunnerOptions(precision=precision, role=role)) as bench:
        runner = bench.load(load_backend(BACKEND), file, inputs, outputs)

        def run(values: Arrays) -> Arrays:
            bound = bench.bind(runner, outputs, {spec.name: values[spec.name] for spec in inputs})
            bound()
            return {spec.name: bound.result(spec.name).copy() for spec in outputs}

        yield run


def _chain(front: Graph, back: Graph) -> Graph:
    return lambda values: back({**values, **front(values)})


def _invert(
    bundle: Bundle, target: NDArray[np.float32], encode: Graph, generate: Graph
) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """Return the latents of all steps and the last image."""
    latent, latents = bundle.latent_avg[None].astype(np.float32), []
    rendered: Arrays = {"current": bundle.average_image.reshape(target.shape).astype(np.float32)}
    for _ in range(STEPS):
        latent = encode({"target": target, "current": rendered["current"], "latent": latent})["latent_out"]
        rendered = generate({"latent": latent})
        latents.append(latent)
    return latents, rendered["image"]


if __name__ == "__main__":
    main()
