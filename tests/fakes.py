"""A session whose graphs are NumPy code that writes down what it is asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends.base import DEFAULT_REQUEST, BuildRequest, BuildTarget, EngineOptions, RunnerOptions
from restyle_deploy.bundle import Bundle, GraphRecord
from restyle_deploy.device_array import Array
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.model_config import ModelConfig, graph_specs
from restyle_deploy.processor import describe_processor
from restyle_deploy.runtime.loop import LoadedGraph
from restyle_deploy.runtime.session import Session
from restyle_deploy.tensors import TensorSpec
from tests.bundles import borders_of_engine
from tests.recording import RecordingDevice, array_from

Buffers = Mapping[str, NDArray[Any]]

AVERAGE_IMAGE = 0.25
AVERAGE_LATENT = 1.0
# How much brighter a preview is than the image: it tells which of the two a step has rendered.
PREVIEW_ERROR = 0.125
VERSIONS = {"fake": "1.0"}


class FakeRunner:
    """Satisfies `Runner`; `compute` stands for the graph.

    Attributes:
        bound: the buffers of each `bind`.
        ran: addresses of the buffers of each run.
        closed: how often it was closed.
        compute: may be replaced.
        device: whose queue its runs go to; None for runs that are done at once.
        is_capturable: see `Runner`.
    """

    def __init__(
        self, compute: Callable[[Buffers], None], *, role: str = "graph", device: RecordingDevice | None = None
    ) -> None:
        self.compute, self.device, self._role = compute, device, role
        self.is_capturable = True
        self.bound: list[Buffers] = []
        self.ran: list[dict[str, int]] = []
        self.closed = 0

    def bind(self, buffers: Mapping[str, Array]) -> Callable[[], None]:
        arrays = {name: array_from(buffer) for name, buffer in buffers.items()}
        self.bound.append(arrays)
        addresses = {name: array.ctypes.data for name, array in arrays.items()}

        def run() -> None:
            self.ran.append(addresses)
            self.compute(arrays)

        def enqueue() -> None:
            assert self.device is not None
            self.device.enqueue(self._role, run)

        return run if self.device is None else enqueue

    def close(self) -> None:
        self.closed += 1


def encode(buffers: Buffers) -> None:
    """Add the mean difference of target and current to each latent."""
    difference = (buffers["target"] - buffers["current"]).mean(axis=(1, 2, 3))
    np.add(buffers["latent"], difference[:, None, None], out=buffers["latent_out"])


def encode_features(buffers: Buffers) -> None:
    """Do what `encode` does with the features that `describe_target` has left."""
    difference = buffers["target_features"].mean(axis=(1, 2, 3)) - buffers["current"].mean(axis=(1, 2, 3))
    np.add(buffers["latent"], difference[:, None, None], out=buffers["latent_out"])


def describe_target(buffers: Buffers) -> None:
    """Set all features to the mean of the target."""
    buffers["target_features"][:] = buffers["target"].mean(axis=(1, 2, 3))[:, None, None, None]


def generate(buffers: Buffers) -> None:
    """Render a grey image: half the mean of the latent."""
    grey = buffers["latent"].mean(axis=(1, 2)) / 2
    for name in ("image", "current"):
        buffers[name][:] = grey[:, None, None, None]


def preview(buffers: Buffers) -> None:
    """Render what `generate` renders, but brighter, and no image."""
    grey = buffers["latent"].mean(axis=(1, 2)) / 2 + PREVIEW_ERROR
    buffers["current"][:] = grey[:, None, None, None]


def expected_latents(targets: NDArray[np.float32], steps: int, *, preview_error: float = 0.0) -> NDArray[np.float64]:
    """Return the value of each image's latent after each step: [steps, N]."""
    current, latent, results = AVERAGE_IMAGE, np.full(len(targets), AVERAGE_LATENT), []
    for _ in range(steps):
        latent = latent + targets.mean(axis=(1, 2, 3), dtype=np.float64) - current
        current = latent / 2 + preview_error
        results.append(latent)
    return np.stack(results)


def create_session(
    *,
    domain: str = "faces",
    encoder: Callable[[Buffers], None] = encode,
    generator: Callable[[Buffers], None] = generate,
    device: RecordingDevice | None = None,
    **options: Any,
) -> tuple[Session, FakeRunner, FakeRunner]:
    """Return a session of 64 px on exported graphs, and its encoder and generator; `options` are the session's."""
    computes = {"encoder": encoder, "generator": generator}
    runners = {role: FakeRunner(compute, role=role, device=device) for role, compute in computes.items()}
    session = _session_of(runners, domain=domain, batch=None, device=device, **options)
    return session, runners["encoder"], runners["generator"]


def create_engine_session(
    *,
    roles: tuple[str, ...] = (),
    batch: int | None = None,
    domain: str = "faces",
    device: RecordingDevice | None = None,
    **options: Any,
) -> tuple[Session, dict[str, FakeRunner]]:
    """Return a session of 64 px on an engine with `roles` besides encoder and generator, and all its runners."""
    runners = create_runners(roles, device)
    return _session_of(runners, domain=domain, batch=batch, device=device, **options), runners


def create_runners(roles: tuple[str, ...], device: RecordingDevice | None = None) -> dict[str, FakeRunner]:
    """Return a runner for each graph of an engine with these roles besides encoder and generator."""
    optional = {"target": describe_target, "preview": preview}
    encoder = encode_features if "target" in roles else encode
    computes = {"encoder": encoder, "generator": generate, **{role: optional[role] for role in roles}}
    return {role: FakeRunner(compute, role=role, device=device) for role, compute in computes.items()}


class MadeUpBackend:
    """The part of `Backend` that no graph takes part in.

    Attributes:
        kernels: what `plugin_hash` returns.
    """

    ENGINE_SUFFIX = ".fake"
    ENGINE_BATCH: int | None = None
    ENGINE_OPTIONS: frozenset[str] = frozenset()

    kernels: str | None = None

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def library_versions(self) -> Mapping[str, str]:
        return VERSIONS

    def check_options(self, options: RunnerOptions) -> None:
        if options.device not in self.devices():
            raise BackendUnavailableError(f"backend fake: device {options.device!r} cannot run here")

    def processors(self, device: str) -> tuple[str, ...]:
        return (describe_processor(),)

    def plugin_hash(self) -> str | None:
        return self.kernels

    def check_build(self, options: RunnerOptions, engine: EngineOptions) -> BuildTarget:
        return BuildTarget(processor=describe_processor(), refusal=None, has_kernels=False, facts={})

    def check_graph(self, graph: Path, options: RunnerOptions, request: BuildRequest) -> Mapping[str, Any]:
        return {}


class FakeBackend(MadeUpBackend):
    """Satisfies `Backend`; its engines are files of any content, and the stem of a file's name is the graph's role.

    Attributes:
        loaded: files, with the options, in the order of loading.
        runners: by role; made anew by each load.
        computes: by role, for loads to come.
        weights: that stripped engines were loaded with, by the file's stem.
    """

    def __init__(self, computes: Mapping[str, Callable[[Buffers], None]]) -> None:
        self.computes = dict(computes)
        self.loaded: list[tuple[Path, RunnerOptions]] = []
        self.runners: dict[str, FakeRunner] = {}
        self.weights: dict[str, Path | None] = {}

    def build(
        self, graph: Path, engine: Path, options: RunnerOptions, request: BuildRequest = DEFAULT_REQUEST
    ) -> Mapping[str, Any]:
        engine.write_bytes(graph.read_bytes())
        return {}

    def load(
        self,
        file: Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: RunnerOptions,
        weights: Path | None = None,
    ) -> FakeRunner:
        self.loaded.append((file, options))
        self.weights[file.stem] = weights
        self.runners[file.stem] = FakeRunner(self.computes[file.stem])
        return self.runners[file.stem]


def _session_of(
    runners: Mapping[str, FakeRunner], *, domain: str, batch: int | None, device: RecordingDevice | None, **options: Any
) -> Session:
    config = ModelConfig(encoder_type="BackboneEncoder", domain=domain, output_size=64, input_size=32, style_dim=4)
    graphs = {
        name: GraphRecord(path=Path(f"{name}.onnx"), sha256="", inputs=inputs, outputs=outputs)
        for name, (inputs, outputs) in graph_specs(config).items()
    }
    bundle = Bundle(
        path=Path("made-up"),
        config=config,
        checkpoint_sha256="",
        graphs=graphs,
        latent_avg=np.full((config.n_styles, config.style_dim), AVERAGE_LATENT, np.float32),
        average_image=np.full((3, *config.input_shape), AVERAGE_IMAGE, np.float32),
        expectation=Path("expectation.npz"),
        engines=(),
        verification={},
    )
    borders = borders_of_engine(config, tuple(runners), batch=batch)
    loaded = {
        role: LoadedGraph(
            record=GraphRecord(path=Path(role), sha256="", inputs=borders[role][0], outputs=borders[role][1]),
            runner=runner,
        )
        for role, runner in runners.items()
    }
    description = {"backend": "fake", "precision": "fp32", "preview_steps": "preview" in runners}
    return Session(bundle, loaded, description, device=device, **options)
