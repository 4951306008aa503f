"""The float32 reference of a verification: every step's results, and the state that the next step starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bundle import Bundle
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.runtime.targets import targets_from_images

Array = NDArray[np.float32]

# By name: the libraries that it needs, and the extra of this package that installs them.
REFERENCES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "onnxruntime": (("onnxruntime",), "onnxruntime"),
    "torch": (("torch", "onnx"), "export"),
}
# For `verify_drift`: the stored results are all that is compared.
NO_REFERENCE = "none"
_ERRORS_ONLY = 3


@dataclass(frozen=True, kw_only=True)
class State:
    """What a step starts from.

    Attributes:
        latents: [N, S, D] float32.
        current: [N, 3, h, w] float32, the last image at the encoder's size.
    """

    latents: Array
    current: Array


@dataclass(frozen=True, kw_only=True)
class ReferenceRun:
    """What a reference computed, freely running from the average.

    Attributes:
        name: what computed it, for people.
        targets: [N, 3, h, w] float32.
        average: the state before the first step.
        images: [steps, N, 3, R, R'] float32.
        latents: [steps, N, S, D] float32.
        currents: [steps, N, 3, h, w] float32.
    """

    name: str
    targets: Array
    average: State
    images: Array
    latents: Array
    currents: Array

    @property
    def steps(self) -> int:
        """Refinement steps that it took."""
        return len(self.latents)

    def state_before(self, step: int) -> State:
        """Return what a step starts from; the first step is 1."""
        if step == 1:
            return self.average
        return State(latents=self.latents[step - 2], current=self.currents[step - 2])


def run_reference(
    bundle: Bundle, images: NDArray[Any], *, steps: int, name: str | None = None, threads: int | None = None
) -> ReferenceRun:
    """Take `steps` steps with a float32 reference.

    Args:
        bundle: an opened bundle; its exported graphs are read.
        images: as for `Session.invert`, in one batch.
        steps: at least 1.
        name: one of `REFERENCES`: `onnxruntime` runs the exported graphs on the CPU as they are, without ONNX Runtime's
            optimisations; `torch` rebuilds the torch model from them. None: the first that is installed.
        threads: CPU threads; None leaves the choice to the library. torch keeps to those that it has.
    Raises:
        BackendUnavailableError: the reference's libraries are not installed.
        BundleError: see `reference.model_from_bundle`.
        TypeError, ShapeError, ValueError: see `Session.invert`; or no such reference.
    """
    chosen = _choose_reference(name)
    targets = targets_from_images(images, bundle.config)
    count = len(targets)
    average = State(
        latents=np.repeat(bundle.latent_avg[None], count, axis=0),
        current=np.repeat(bundle.average_image[None], count, axis=0),
    )
    if chosen == "torch":
        return _run_model(bundle, targets, average, steps)
    return _run_graphs(bundle, targets, average, steps, threads)


def run_graph(graph: Path, inputs: Mapping[str, Array], *, threads: int | None = None) -> dict[str, Array]:
    """Run an ONNX file on the CPU in float32, node by node as the file has them, and return all its outputs by name.

    Raises:
        BackendUnavailableError: ONNX Runtime is not installed.
    """
    _require("onnxruntime")
    session = _open_graph(graph, threads)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _choose_reference(name: str | None) -> str:
    if name is None:
        installed = (one for one, (libraries, _) in REFERENCES.items() if all(map(find_spec, libraries)))
        name = next(installed, next(iter(REFERENCES)))
    if name not in REFERENCES:
        raise ValueError(f"unknown reference {name!r}; known are {', '.join(REFERENCES)}")
    _require(name)
    return name


def _require(name: str) -> None:
    libraries, extra = REFERENCES[name]
    missing = [library for library in libraries if find_spec(library) is None]
    if missing:
        raise BackendUnavailableError(
            f"the reference {name} needs {' and '.join(missing)}, not installed here; "
            f"run: pip install 'restyle-deploy[{extra}]'"
        )


def _open_graph(graph: Path, threads: int | None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _run_graphs(bundle: Bundle, targets: Array, average: State, steps: int, threads: int | None) -> ReferenceRun:
    import onnxruntime as ort

    encoder, generator = (_open_graph(bundle.graphs[name].path, threads) for name in ("encoder", "generator"))
    latents, current = average.latents, average.current
    kept: list[tuple[Array, Array, Array]] = []
    for _ in range(steps):
        (latents,) = encoder.run(["latent_out"], {"target": targets, "current": current, "latent": latents})
        image, current = generator.run(["image", "current"], {"latent": latents})
        kept.append((image, latents, current))
    return _run_of(f"the exported graphs in ONNX Runtime {ort.__version__}, float32", targets, average, kept)


def _run_model(bundle: Bundle, targets: Array, average: State, steps: int) -> ReferenceRun:
    import torch

    from restyle_deploy.reference import model_from_bundle

    model = model_from_bundle(bundle)
    latents, current = torch.from_numpy(average.latents), torch.from_numpy(average.current)
    kept: list[tuple[Array, Array, Array]] = []
    with torch.inference_mode():
        for _ in range(steps):
            result = model.run_step(torch.from_numpy(targets), current, latents)
            latents, current = result.latent, result.current
            kept.append((result.image.numpy(), latents.numpy(), current.numpy()))
    return _run_of(f"the torch model in torch {torch.__version__}, float32", targets, average, kept)


def _run_of(name: str, targets: Array, average: State, kept: list[tuple[Array, Array, Array]]) -> ReferenceRun:
    images, latents, currents = (np.stack(arrays) for arrays in zip(*kept, strict=True))
    return ReferenceRun(name=name, targets=targets, average=average, images=images, latents=latents, currents=currents)
