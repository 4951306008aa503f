"""A bundle opened on a backend: from images to images and latents."""

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends import default_device, load_backend
from restyle_deploy.backends.base import EXACT_PRECISION, EngineOptions, RunnerOptions
from restyle_deploy.bundle import (
    Bundle,
    EngineRecord,
    check_engine,
    check_graphs,
    find_engine,
    read_bundle,
)
from restyle_deploy.engines import ANY_BATCH, Batches, batches_of_build, build_command
from restyle_deploy.errors import BackendUnavailableError, BundleError, VerificationError
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.loop import LoadedGraph, Loop
from restyle_deploy.runtime.loop import load_graphs as load_graphs  # what a session is made of
from restyle_deploy.runtime.targets import LARGEST_VALUE as LARGEST_VALUE  # of `Session.invert`
from restyle_deploy.runtime.targets import targets_from_images as targets_from_images

DEFAULT_MAX_BATCH = 8
# Loops kept bound, each with its buffers: one for full batches, one for what remains.
LOOPS_KEPT = 2


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

    def __init__(
        self,
        bundle: Bundle,
        graphs: Mapping[str, LoadedGraph],
        description: Mapping[str, Any],
        *,
        batches: Batches = ANY_BATCH,
    ) -> None:
        """Take over loaded graphs, by role as `Loop` has them; see `open`.

        Args:
            bundle: the bundle that they belong to.
            graphs: closed with the session.
            description: what `describe` returns.
            batches: of one run of the graphs.
        """
        self.bundle = bundle
        self._graphs: Mapping[str, LoadedGraph] | None = graphs
        self._has_previews = "preview" in graphs
        self._description = description
        self._batches = batches
        self._loops: OrderedDict[tuple[int, int], Loop] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        backend: str = "onnxruntime",
        device: str | None = None,
        threads: int | None = None,
        precision: str = EXACT_PRECISION,
        plain: bool = False,
        preview_steps: bool = False,
    ) -> "Session":
        """Open a bundle and load the engine for these options, or the exported graphs if no engine has been built.

        Args:
            bundle: the directory.
            backend: a row of `backends.BACKENDS`.
            device: one of the backend's devices; None for its default: `cpu`, or `cuda:0`.
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
        options = RunnerOptions(device=device or default_device(backend), threads=threads, precision=precision)
        module.check_options(options)
        opened = read_bundle(bundle)
        has_previews = preview_steps and opened.config.output_size > opened.config.input_size
        engine = _choose_engine(opened, backend, options, plain=plain, has_previews=has_previews)
        records = {
            role: record for role, record in (engine or opened).graphs.items() if role != "preview" or has_previews
        }
        versions = dict(module.library_versions())
        if engine:
            check_engine(
                opened,
                engine,
                library_versions=versions,
                processors=module.processors(options.device),
                plugin_hash=module.plugin_hash(),
                roles=records,
            )
            options = replace(
                options,
                host_code_allowed=bool(engine.build.get("version_compatible")),
                plugin_route=engine.build.get("plugin_route"),
            )
            batches = engine.batches
        else:
            check_graphs(opened)
            # A backend that has to build the exported graphs does so as it builds engines without options.
            batches = batches_of_build(module.check_build(options, EngineOptions()).facts)
        description = {
            "backend": backend,
            "device": options.device,
            "threads": threads,
            "precision": precision,
            "plan": engine.plan["origin"] if engine else "plain",
            "preview_steps": has_previews,
            "library_versions": versions,
        }
        with _weights_of(opened, engine) as weights:
            return cls(opened, load_graphs(module, records, options, weights), description, batches=batches)

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
            max_batch: images of one run; more are split, which bounds the working memory of the graphs. An engine
                that was built for fewer gets no more than that, and one for more has its runs filled up.
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
        least, most = self._batches
        max_batch = max(least, min(max_batch, most or max_batch))
        with self._lock:
            for first in range(0, count, max_batch):
                size = min(max_batch, count - first)
                part = slice(first, first + size)
                loop = self._loop(max(least, size), steps if every_step else 0)
                loop.run(targets[part], steps)
                result_images[:, part], result_latents[:, part] = loop.images[:, :size], loop.results(steps)[:, :size]
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


@contextmanager
def _weights_of(bundle: Bundle, engine: EngineRecord | None) -> Iterator[Mapping[str, Path]]:
    """Yield the graphs whose weights a stripped engine takes, by role; for another one there is nothing to take."""
    if engine is None or engine.build.get("weights") != "stripped":
        yield {}
        return
    try:
        from restyle_deploy.engine_graphs import write_weights
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{engine.directory}: a stripped engine takes its weights from the bundle's graphs, which needs "
            f"{error.name}; run: pip install 'restyle-deploy[build]'"
        ) from error
    check_graphs(bundle)
    with tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder:
        yield write_weights(bundle, engine, folder=Path(folder))


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
