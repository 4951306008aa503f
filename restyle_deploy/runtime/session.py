"""The fixed-step loop over a bundle's graphs, on preallocated and bound buffers."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import Runner, RunnerOptions
from restyle_deploy.bundle import Bundle, open_bundle
from restyle_deploy.errors import ShapeError, VerificationError
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.images import normalize_images, resize_image

DEFAULT_MAX_BATCH = 8
# Loops kept bound, each with its buffers: one for full batches, one for what remains.
LOOPS_KEPT = 2
# Float images are meant in [-1, 1]; resampling overshoots a little, while 0..255 would be far off.
LARGEST_VALUE = 1.5


@dataclass(frozen=True, kw_only=True)
class InversionResult:
    """The result of an inversion, owned by the caller.

    Attributes:
        images: [N, 3, R, R'] float32 in about [-1, 1], not clipped; [steps, N, 3, R, R'] with every_step.
        latents: [N, n_styles, style_dim] float32; [steps, N, n_styles, style_dim] with every_step.
    """

    images: NDArray[np.float32]
    latents: NDArray[np.float32]


class Session:
    """A bundle opened on a backend. Threads may share it: their calls run one after the other."""

    def __init__(self, bundle: Bundle, runners: Mapping[str, Runner], description: Mapping[str, Any]) -> None:
        self.bundle = bundle
        self._runners: Mapping[str, Runner] | None = runners
        self._description = description
        self._loops: OrderedDict[tuple[int, int], _Loop] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, bundle: str | Path, *, backend: str = "onnxruntime", device: str = "cpu", threads: int | None = None
    ) -> "Session":
        """Open a bundle and load its graphs.

        Args:
            bundle: the directory.
            backend: a row of `backends.BACKENDS`.
            device: one of the backend's devices.
            threads: CPU threads of one run; None leaves the choice to the backend.
        Raises:
            BundleError: the bundle is missing, damaged or of another format.
            BackendUnavailableError: the backend's library is not installed, or the device cannot run here.
            BuildError: the backend refuses a graph.
            ValueError: no such backend, or fewer than one thread.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, expected at least 1")
        module = load_backend(backend)
        opened = open_bundle(bundle)
        options = RunnerOptions(device=device, threads=threads)
        runners: dict[str, Runner] = {}
        with ExitStack() as loaded:
            for name, graph in opened.graphs.items():
                runners[name] = module.load(graph.path, graph.inputs, graph.outputs, options)
                loaded.callback(runners[name].close)
            loaded.pop_all()  # all are there: the session closes them
        description = {
            "backend": backend,
            "device": device,
            "threads": threads,
            "precision": "fp32",
            "library_versions": dict(module.library_versions()),
        }
        return cls(opened, runners, description)

    @property
    def config(self) -> ModelConfig:
        """The model's sizes and domain."""
        return self.bundle.config

    def describe(self) -> dict[str, Any]:
        """Return backend, device, threads, precision and library versions, for reports."""
        return dict(self._description)

    def invert(
        self, images: NDArray[Any], *, steps: int = 5, every_step: bool = False, max_batch: int = DEFAULT_MAX_BATCH
    ) -> InversionResult:
        """Invert images: `steps` times encode, add the residual, render.

        Args:
            images: uint8 [N, H, W, 3] RGB of any size (resized as upstream does), or float32 [N, 3, h, w] in [-1, 1]
                of the encoder's size. Only read.
            steps: refinement steps, at least 1; upstream uses 5.
            every_step: keep each step: a leading steps axis on both results.
            max_batch: images of one run; more are split, which bounds the working memory of the graphs.
        Returns:
            Arrays that the caller owns.
        Raises:
            TypeError: `images` is no array of uint8 or float32, or `steps` is no whole number.
            ShapeError: another shape.
            ValueError: no image, a value that is not finite or far outside [-1, 1], steps or max_batch below 1, or the
                session is closed.
            VerificationError: the model gave NaN or infinity; the message names the image.
        """
        for name, value in (("steps", steps), ("max_batch", max_batch)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} is a {type(value).__name__}, expected a whole number")
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        steps, max_batch = int(steps), int(max_batch)  # a NumPy integer of 8 bits overflows when doubled
        targets = targets_from_images(images, self.config)
        count, kept = len(targets), (steps if every_step else 1)
        result_images = np.empty((kept, count, 3, *self.config.image_shape), np.float32)
        result_latents = np.empty((kept, count, self.config.n_styles, self.config.style_dim), np.float32)
        with self._lock:
            for first in range(0, count, max_batch):
                part = slice(first, min(first + max_batch, count))
                loop = self._loop(part.stop - part.start, steps if every_step else 0)
                loop.run(targets[part], steps)
                result_images[:, part], result_latents[:, part] = loop.images, loop.results(steps)
        _check_finite(result_images, result_latents, last_step=steps)
        if every_step:
            return InversionResult(images=result_images, latents=result_latents)
        return InversionResult(images=result_images[0], latents=result_latents[0])

    def close(self) -> None:
        """Release the graphs and buffers; safe to call twice."""
        with self._lock:
            self._loops.clear()
            for runner in (self._runners or {}).values():
                runner.close()
            self._runners = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _loop(self, batch: int, steps_kept: int) -> "_Loop":
        if self._runners is None:
            raise ValueError("the session is closed")
        key = (batch, steps_kept)
        if key not in self._loops:
            while len(self._loops) >= LOOPS_KEPT:
                self._loops.popitem(last=False)
            self._loops[key] = _Loop(self.bundle, self._runners, batch=batch, steps_kept=steps_kept)
        self._loops.move_to_end(key)
        return self._loops[key]


class _Loop:
    """Buffers of one batch size and the runs bound to them. `run` allocates nothing.

    Two latents take turns: step t reads one and writes the other. With `steps_kept` there are as many images and one
    more latent, and every step has its own.
    """

    def __init__(self, bundle: Bundle, runners: Mapping[str, Runner], *, batch: int, steps_kept: int) -> None:
        self._bundle = bundle
        specs = {spec.name: spec for graph in bundle.graphs.values() for spec in graph.inputs + graph.outputs}
        self._target, self._current = specs["target"].allocate(batch), specs["current"].allocate(batch)
        self.images = specs["image"].allocate(batch, leading=(max(1, steps_kept),))
        self._latents = specs["latent"].allocate(batch, leading=(max(2, steps_kept + 1),))
        self._steps_kept = steps_kept
        self._runs: list[Callable[[], None]] = []
        for step in range(max(2, steps_kept)):
            before, after = self._latents[step], self._latents[(step + 1) % len(self._latents)]
            encoder = {"target": self._target, "current": self._current, "latent": before, "latent_out": after}
            image = self.images[step % len(self.images)]
            self._runs.append(runners["encoder"].bind(encoder))
            self._runs.append(runners["generator"].bind({"latent": after, "image": image, "current": self._current}))

    def run(self, target: NDArray[np.float32], steps: int) -> None:
        """Start from the average and take `steps` steps."""
        np.copyto(self._target, target)
        np.copyto(self._current, self._bundle.average_image)
        np.copyto(self._latents[0], self._bundle.latent_avg)
        for index in range(2 * steps):
            self._runs[index % len(self._runs)]()

    def results(self, steps: int) -> NDArray[np.float32]:
        """Return the latents that `run` left: a view of [kept, N, S, D]."""
        if self._steps_kept:
            return self._latents[1:]
        last = steps % 2
        return self._latents[last : last + 1]


def targets_from_images(images: NDArray[Any], config: ModelConfig) -> NDArray[np.float32]:
    """Return images as the encoder takes them: float32 [N, 3, h, w] in [-1, 1].

    Args:
        images: see `Session.invert`.
        config: gives the encoder's input size.
    Raises:
        TypeError, ShapeError, ValueError: see `Session.invert`.
    """
    if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.float32):
        got = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise TypeError(f"images: got {got}, expected a NumPy array of uint8 [N,H,W,3] or float32 [N,3,h,w]")
    height, width = config.input_shape
    if images.dtype == np.uint8:
        if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
            raise ShapeError(
                f"images: got uint8 {list(images.shape)}, expected [N, H, W, 3]; one image is images[None]"
            )
    elif images.ndim != 4 or images.shape[1:] != (3, height, width):
        raise ShapeError(f"images: got float32 {list(images.shape)}, expected [N, 3, {height}, {width}]")
    if len(images) == 0:
        raise ValueError("images: got none, expected at least one")
    if images.dtype == np.uint8:
        return normalize_images(np.stack([resize_image(image, (height, width)) for image in images]))
    bad = [index for index, image in enumerate(images) if not np.isfinite(image).all()]
    if bad:
        raise ValueError(f"images: NaN or infinity in image {', '.join(map(str, bad))}")
    largest = float(np.abs(images).max())
    if largest > LARGEST_VALUE:
        raise ValueError(
            f"images: float32 values up to {largest:g}, expected [-1, 1]; pass 0..255 as uint8 [N, H, W, 3]"
        )
    return images


def _check_finite(images: NDArray[np.float32], latents: NDArray[np.float32], *, last_step: int) -> None:
    """Raise `VerificationError` at the first step that is not finite; arrays are [kept, N, ...]."""
    first_step = last_step - len(latents) + 1
    for step, results in enumerate(zip(latents, images, strict=True), start=first_step):
        for name, array in zip(("latent", "image"), results, strict=True):
            finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)  # [N]
            if not finite.all():
                raise VerificationError(
                    f"the {name} of image {int(np.argmin(finite))} is not finite after step {step}; "
                    "check the model: restyle-deploy verify BUNDLE"
                )
