"""What a session adds to the runs of its graphs: the time of an inversion over the sum of its ONNX Runtime runs."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.bench.comparison import Ratio, ratio_from_samples
from restyle_deploy.bench.measure import measure_interleaved
from restyle_deploy.bundle import find_engine
from restyle_deploy.runtime.loop import LoadedGraph
from restyle_deploy.runtime.session import Session

BACKEND = "onnxruntime"
WARMUP = 5


def measure_loop_overhead(
    bundle: Path, images: NDArray[np.uint8], *, steps: int, rounds: int, threads: int | None
) -> Ratio:
    """Time whole inversions and, in the same rounds, the same runs on buffers of their own and nothing else.

    Args:
        bundle: its engine for ONNX Runtime is measured, or its exported graphs where there is none.
        images: uint8 [N, H, W, 3]: the batch.
        steps: refinement steps; the runs are so many of the encoder and of the generator, and one of the target's
            features where the engine has them.
        rounds: measured calls of each.
        threads: of a run; None leaves the choice to ONNX Runtime.
    """
    module, options = load_backend(BACKEND), RunnerOptions(threads=threads)
    with Session.open(bundle, backend=BACKEND, threads=threads) as session:
        engine = find_engine(session.bundle, backend=BACKEND, device=options.device, precision=options.precision)
        records = (engine or session.bundle).graphs
        buffers = {
            spec.name: np.zeros((len(images), *(int(size) for size in spec.shape[1:])), np.float32)
            for record in records.values()
            for spec in record.inputs + record.outputs
        }
        runs = {}
        for role, record in records.items():
            runner = module.load(record.path, record.inputs, record.outputs, options)
            runs[role] = LoadedGraph(record=record, runner=runner).bind(buffers)
        order = [*runs.get("target", ()), *(steps * [*runs["encoder"], *runs["generator"]])]

        def run_graphs() -> None:
            for run in order:
                run()

        latencies = measure_interleaved(
            {"inversion": lambda: session.invert(images, steps=steps), "graphs": run_graphs},
            warmup=WARMUP,
            repeats=rounds,
        )
    return ratio_from_samples(latencies["inversion"].samples_ms, latencies["graphs"].samples_ms)
