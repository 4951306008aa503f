"""A bundle opened on a backend: from images to images and latents."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import EXACT_PRECISION, Backend, RunnerOptions
from restyle_deploy.bundle import (
    Bundle,
    EngineRecord,
    GraphRecord,
    build_command,
    check_engine,
    check_graphs,
    find_engine,
    read_bundle,
)
from restyle_deploy.errors import BundleError, ShapeError, VerificationError
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.processor import describe_processor
from restyle_deploy.runtime.images import normalize_images, resize_image
from restyle_deploy.runtime.loop import LoadedGraph, Loop

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

    def __init__(self, bundle: Bundle, graphs: Mapping[str, LoadedGraph], description: Mapping[str, Any]) -> None:
        """Take over loaded graphs, by role as `Loop` has them; see `open`.

        Args:
            bundle: the bundle that they belong to.
            graphs: closed with the session.
            description: what `describe` returns.
        """
        self.bundle = bundle
        self._graphs: Mapping[str, LoadedGraph] | None = graphs
        self._has_previews = "preview" in graphs
        self._description = description
        self._loops: OrderedDict[tuple[int, int], Loop] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        backend: str = "onnxruntime",
        device: str = "cpu",
        threads: int | None = None,
        precision: str = EXACT_PRECISION,
        plain: bool = False,
        preview_steps: bool = False,
    ) -> "Session":
        """Open a bundle and load the engine for these options, or the exported graphs if no engine has been built.

        Args:
            bundle: the directory.
            backend: a row of `backends.BACKENDS`.
            device: one of the backend's devices.
            threads: CPU threads of one run; None leaves the choice to the backend.
            precision: one of `backends.base.PRECISIONS`; all but fp32 are approximate, and need an engine.
            plain: load the exported graphs, whether there is an engine or not, for any precision.
            preview_steps: let all steps but the last render only up to the encoder's input size, which is approximate
                and needs an engine with a preview graph. Changes nothing for a model that renders that size anyway.
        Raises:
            BundleError: the bundle is missing, damaged or of another format; or it lacks the engine or its preview
                graph, or has an engine that cannot be used here: the message names the command that builds it.
            BackendUnavailableError: the backend's library is not installed, or the device or the precision cannot run
                here.
            BuildError: the backend refuses a graph.
            ValueError: no such backend, or fewer than one thread.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}, expected at least 1")
        module = load_backend(backend)
        options = RunnerOptions(device=device, threads=threads, precision=precision)
        module.check_options(options)
        opened = read_bundle(bundle)
        has_previews = preview_steps and opened.config.output_size > opened.config.input_size
        engine = _choose_engine(opened, backend, options, plain=plain, has_previews=has_previews)
        records = {
            role: record for role, record in (engine or opened).graphs.items() if role != "preview" or has_previews
        }
        versions = dict(module.library_versions())
        if engine:
            check_engine(opened, engine, library_versions=versions, processor=describe_processor(), roles=records)
        else:
            check_graphs(opened)
        description = {
            "backend": backend,
            "device": device,
            "threads": threads,
            "precision": precision,
            "plan": engine.plan["origin"] if engine else "plain",
            "preview_steps": has_previews,
            "library_versions": versions,
        }
        return cls(opened, load_graphs(module, records, options), description)

    @property
    def config(self) -> ModelConfig:
        """The model's sizes and domain."""
        return self.bundle.config

    @property
    def is_approximate(self) -> bool:
        """Whether results differ from the model's by more than rounding, because of the precision or of previews."""
        description = self.describe()
        return description["precision"] != EXACT_PRECISION or bool(description["preview_steps"])

    def describe(self) -> dict[str, Any]:
        """Return what results and times depend on, for reports.

        Backend, device, threads, precision and library versions; `plan`: `tuned` or `table` for an engine, `plain` for
        the exported graphs; `preview_steps`: whether steps but the last render in small.
        """
        return dict(self._description)

    def invert(
        self, images: NDArray[Any], *, steps: int = 5, every_step: bool = False, max_batch: int = DEFAULT_MAX_BATCH
    ) -> InversionResult:
        """Invert images: `steps` times encode, add the residual, render.

        Args:
            images: uint8 [N, H, W, 3] RGB of any size (resized as upstream does), or float32 [N, 3, h, w] in [-1, 1]
                of the encoder's size. Only read.
            steps: refinement steps, at least 1; upstream uses 5.
            every_step: keep each step: a leading steps axis on both results. Not with preview_steps.
            max_batch: images of one run; more are split, which bounds the working memory of the graphs.
        Returns:
            Arrays that the caller owns.
        Raises:
            TypeError: `images` is no array of uint8 or float32, or `steps` is no whole number.
            ShapeError: another shape.
            ValueError: no image, a value that is not finite or far outside [-1, 1], steps or max_batch below 1,
                every_step where intermediate steps have no image, or the session is closed.
            VerificationError: the model gave NaN or infinity; the message names the image.
        """
        for name, value in (("steps", steps), ("max_batch", max_batch)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} is a {type(value).__name__}, expected a whole number")
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if every_step and self._has_previews:
            raise ValueError("every_step: with preview_steps only the last step has an image; open a session without")
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
            for graph in (self._graphs or {}).values():
                graph.runner.close()
            self._graphs = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _loop(self, batch: int, steps_kept: int) -> Loop:
        if self._graphs is None:
            raise ValueError("the session is closed")
        key = (batch, steps_kept)
        if key not in self._loops:
            while len(self._loops) >= LOOPS_KEPT:
                self._loops.popitem(last=False)
            self._loops[key] = Loop(self.bundle, self._graphs, batch=batch, steps_kept=steps_kept)
        self._loops.move_to_end(key)
        return self._loops[key]


def _choose_engine(
    bundle: Bundle, backend: str, options: RunnerOptions, *, plain: bool, has_previews: bool
) -> EngineRecord | None:
    """Return the engine to load, or None for the exported graphs; raise `BundleError` where what is asked lacks."""
    device, precision = options.device, options.precision
    engine = None if plain else find_engine(bundle, backend=backend, device=device, precision=precision)
    build = f"build it: {build_command(bundle.path, backend=backend, device=device, precision=precision)}"
    if not (engine or plain or precision == EXACT_PRECISION):
        raise BundleError(
            f"{bundle.path}: has no engine for backend {backend}, device {device} and precision {precision}; "
            f"{build}, or run the exported graphs: --plain (plain=True)"
        )
    if has_previews and not (engine and "preview" in engine.graphs):
        mend = "which plain leaves aside; leave one of the two out" if plain else f"which the bundle has not; {build}"
        raise BundleError(f"{bundle.path}: preview steps need an engine with a preview graph, {mend}")
    return engine


def load_graphs(
    module: Backend, records: Mapping[str, GraphRecord], options: RunnerOptions
) -> Mapping[str, LoadedGraph]:
    """Load graphs by role, for `Session`; when one is refused, release those before it."""
    graphs: dict[str, LoadedGraph] = {}
    with ExitStack() as loaded:
        for role, record in records.items():
            runner = module.load(record.path, record.inputs, record.outputs, options)
            loaded.callback(runner.close)
            graphs[role] = LoadedGraph(record=record, runner=runner)
        loaded.pop_all()  # all are there: the session closes them
    return graphs


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
