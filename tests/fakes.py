"""A session whose graphs are NumPy code that writes down what it is asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bundle import Bundle, GraphRecord
from restyle_deploy.model_config import ModelConfig, graph_specs
from restyle_deploy.runtime.session import Session

Buffers = Mapping[str, NDArray[Any]]

AVERAGE_IMAGE = 0.25
AVERAGE_LATENT = 1.0


class FakeRunner:
    """Satisfies `Runner`; `compute` stands for the graph.

    Attributes:
        bound: the buffers of each `bind`.
        ran: addresses of the buffers of each run.
        closed: how often it was closed.
    """

    def __init__(self, compute: Callable[[Buffers], None]) -> None:
        self._compute = compute
        self.bound: list[Buffers] = []
        self.ran: list[dict[str, int]] = []
        self.closed = 0

    def bind(self, buffers: Buffers) -> Callable[[], None]:
        self.bound.append(buffers)
        addresses = {name: array.ctypes.data for name, array in buffers.items()}

        def run() -> None:
            self.ran.append(addresses)
            self._compute(buffers)

        return run

    def close(self) -> None:
        self.closed += 1


def encode(buffers: Buffers) -> None:
    """Add the mean difference of target and current to each latent."""
    difference = (buffers["target"] - buffers["current"]).mean(axis=(1, 2, 3))
    np.add(buffers["latent"], difference[:, None, None], out=buffers["latent_out"])


def generate(buffers: Buffers) -> None:
    """Render a grey image: half the mean of the latent."""
    grey = buffers["latent"].mean(axis=(1, 2)) / 2
    for name in ("image", "current"):
        buffers[name][:] = grey[:, None, None, None]


def expected_latents(targets: NDArray[np.float32], steps: int) -> NDArray[np.float64]:
    """Return the value of each image's latent after each step: [steps, N]."""
    current, latent, results = AVERAGE_IMAGE, np.full(len(targets), AVERAGE_LATENT), []
    for _ in range(steps):
        latent = latent + targets.mean(axis=(1, 2, 3), dtype=np.float64) - current
        current = latent / 2
        results.append(latent)
    return np.stack(results)


def create_session(
    *,
    domain: str = "faces",
    encoder: Callable[[Buffers], None] = encode,
    generator: Callable[[Buffers], None] = generate,
) -> tuple[Session, FakeRunner, FakeRunner]:
    """Return a session of 64 px and its encoder and generator."""
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
    runners = {"encoder": FakeRunner(encoder), "generator": FakeRunner(generator)}
    return Session(bundle, runners, {"backend": "fake"}), runners["encoder"], runners["generator"]
