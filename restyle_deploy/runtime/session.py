"""A bundle opened on a backend: from images to images and latents."""

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from numpy.typing import NDArray

from restyle_deploy.backends.base import EXACT_PRECISION
from restyle_deploy.bundle import Bundle
from restyle_deploy.engines import ANY_BATCH, Batches
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.base import Device
from restyle_deploy.runtime.calls import Request, Rules
from restyle_deploy.runtime.deployment import DEFAULT_STEPS
from restyle_deploy.runtime.execution import Execution
from restyle_deploy.runtime.host_device import HostDevice
from restyle_deploy.runtime.loop import LoadedGraph
from restyle_deploy.runtime.loop import load_graphs as load_graphs  # what a session is made of
from restyle_deploy.runtime.open_calls import OpenCalls
from restyle_deploy.runtime.opening import deployment_of, open_deployment
from restyle_deploy.runtime.results import Inversion, PendingInversion
from restyle_deploy.runtime.results import InversionResult as InversionResult  # of `Session.invert`
from restyle_deploy.runtime.targets import LARGEST_VALUE as LARGEST_VALUE  # of `Session.invert`
from restyle_deploy.runtime.targets import targets_from_images as targets_from_images

DEFAULT_MAX_BATCH = 8


class Session:
    """A bundle opened on a backend. Threads may share it: their calls are enqueued one after the other.

    On a GPU, images and results are on the host or on the device; on the CPU all is NumPy's.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: Mapping[str, LoadedGraph],
        description: Mapping[str, Any],
        *,
        batches: Batches = ANY_BATCH,
        device: Device | None = None,
        max_batch: int | None = None,
        steps: int = DEFAULT_STEPS,
        timing_enabled: bool = False,
        capture: bool = True,
    ) -> None:
        """Take over loaded graphs, by role as `BoundGraphs` has them; see `open`.

        Args:
            bundle: the bundle that they belong to.
            graphs: closed with the session, or after an error.
            description: what `describe` returns.
            batches: of one run of the graphs.
            device: that they were loaded on, closed likewise; None for the host.
            max_batch, timing_enabled, capture: see `open`.
            steps: of an inversion that names none.
        Raises:
            DeviceError: there is not enough memory.
        """
        self.bundle = bundle
        self._description = description
        self._device = device or HostDevice()
        self._calls = OpenCalls()
        least, most = batches
        largest = max(least, min(max_batch or most or DEFAULT_MAX_BATCH, most or sys.maxsize))
        self._execution = Execution(
            bundle,
            graphs,
            self._device,
            least_batch=least,
            max_batch=largest,
            timing_enabled=timing_enabled,
            capture=capture,
        )
        self._rules = Rules(
            config=bundle.config,
            device=self._device,
            find_array=self._execution.find_array,
            least_batch=least,
            max_batch=largest,
            steps=steps,
            has_previews="preview" in graphs,
        )

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        backend: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        precision: str | None = None,
        plain: bool | None = None,
        preview_steps: bool | None = None,
        max_batch: int | None = None,
        timing_enabled: bool = False,
        capture: bool = True,
        compile: bool = False,
    ) -> "Session":
        """Open a bundle and load the engine for these options, or the exported graphs if no engine has been built.

        Args:
            bundle: the directory; or a `deploy.toml`, whose values hold where an argument here is None.
            backend: a row of `backends.BACKENDS`; `onnxruntime` unless told.
            device: one of the backend's devices; the backend's default unless told: `cpu`, or `cuda:0`.
            threads: CPU threads of one run; None leaves the choice to the backend.
            precision: one of `backends.base.PRECISIONS`, `fp32` unless told; others are approximate and need engines.
            plain: load the exported graphs, whether there is an engine or not, for any precision.
            preview_steps: let all steps but the last render only up to the encoder's input size, which is approximate
                and needs an engine with a preview graph. Changes nothing for a model that renders that size anyway.
            max_batch: images of one run, for which memory is allocated; unless told as many as the engine takes, or 8
                where it takes any number. On a GPU fewer are filled up to 1, 2, 4 and so on.
            timing_enabled: give each result its `timings`; calls then wait for each other's end.
            capture: record loops on a GPU, so that all steps of a call are one launch; False launches run by run.
            compile: let torch compile what it runs, which takes minutes; other backends ignore it.
        Raises:
            BundleError: the bundle is missing, damaged or of another format; or it lacks the engine or its preview
                graph, or has an engine that cannot be used here: the message names the command that builds it. Or the
                `deploy.toml` is none.
            BackendUnavailableError: the backend's library is not installed, or the device or the precision cannot run
                here.
            BuildError: the backend refuses a graph.
            DeviceError: the GPU lacks memory, or fails.
            ValueError: no such backend, or fewer than one thread or image of a run.
        """
        given = {
            "backend": backend,
            "device": device,
            "threads": threads,
            "precision": precision,
            "plain": plain,
            "preview_steps": preview_steps,
            "max_batch": max_batch,
        }
        deployment = deployment_of(bundle, given)
        opened = open_deployment(deployment, is_compiled=compile)
        return cls(
            opened.bundle,
            opened.graphs,
            opened.description,
            batches=opened.batches,
            device=opened.device,
            max_batch=deployment.max_batch,
            steps=deployment.steps,
            timing_enabled=timing_enabled,
            capture=capture,
        )

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

    @overload
    def invert(
        self,
        images: NDArray[Any],
        *,
        steps: int | None = None,
        every_step: bool = False,
        max_batch: int | None = None,
        image_type: str = "float32",
        start: Inversion | None = None,
        stream: object = None,
    ) -> InversionResult: ...

    @overload
    def invert(
        self,
        images: object,
        *,
        steps: int | None = None,
        every_step: bool = False,
        max_batch: int | None = None,
        image_type: str = "float32",
        start: Inversion | None = None,
        stream: object = None,
    ) -> Inversion: ...

    def invert(
        self,
        images: object,
        *,
        steps: int | None = None,
        every_step: bool = False,
        max_batch: int | None = None,
        image_type: str = "float32",
        start: Inversion | None = None,
        stream: object = None,
    ) -> Inversion:
        """Invert images: `steps` times encode, add the residual, render.

        Args:
            images: uint8 [N, H, W, 3] RGB of any size (resized as upstream does), or float32 [N, 3, h, w] in [-1, 1]
                of the encoder's size. Only read. NumPy's, or another library's by DLPack; on a GPU also an array in its
                memory, contiguous, by DLPack or `__cuda_array_interface__`, which is read in place: write to it again
                in `stream`, or once the result is there.
            steps: refinement steps, at least 1; None for the deployment's, else 5, as upstream.
            every_step: keep each step: a leading steps axis on images and latents. Not with preview_steps.
            max_batch: images of one run; more are split. None, or more than the session's, for the session's. An engine
                that was built for more has its runs filled up. On a GPU runs are filled up to 1, 2, 4 and so on images,
                or to the session's `max_batch`.
            image_type: of the images that are returned; `uint8` are [N, R, R', 3], clipped and truncated as upstream
                saves them.
            start: where the loop starts, instead of the average: the result for the previous frame, or of a session of
                another model of the same sizes, for as many images.
            stream: of the GPU's, a handle or an object with `__cuda_stream__`: work that is in it is waited for, and
                what comes into it later waits for the results.
        Returns:
            For images on the host, arrays that the caller owns. For images on a GPU a `DeviceInversion`, which is
            returned before it is computed; neither its values nor those of the images are checked.
        Raises:
            TypeError: `images` is no array of uint8 or float32, `start` no result, or a number or stream none.
            ShapeError: another shape, of the images or of the start.
            ValueError: no image, a value that is not finite or far outside [-1, 1], steps or max_batch below 1,
                every_step where intermediate steps have no image, an array or a stream of another device, or the
                session is closed.
            VerificationError: the model gave NaN or infinity; the message names the image.
            DeviceError: the GPU lacks memory, or fails.
        """
        request = Request(
            images=images,
            steps=steps,
            every_step=every_step,
            max_batch=max_batch,
            image_type=image_type,
            start=start,
            stream=stream,
        )
        with self._calls:
            call = self._rules.check(request)
            if call.is_on_device:
                return self._execution.invert_on_device(call)
            return self._execution.invert_to_host(call)

    @overload
    def invert_async(self, images: NDArray[Any], **options: Any) -> PendingInversion[InversionResult]: ...

    @overload
    def invert_async(self, images: object, **options: Any) -> PendingInversion[Inversion]: ...

    def invert_async(self, images: object, **options: Any) -> PendingInversion[Inversion]:
        """Begin to invert images, and return at once.

        On a GPU a call of one run is enqueued now. A set that is split, and all on the CPU, goes to one thread of the
        session, which takes one call after the other.

        Args:
            images, options: as `invert` takes them. Images must not change before the result is there.
        Returns:
            What gives the result that `invert` gives, or raises what it raises.
        Raises:
            TypeError, ShapeError, ValueError, DeviceError: what `invert` refuses before it runs.
        """
        with self._calls:
            call = self._rules.check(Request(images=images, **options))
            if self._device.is_host or (call.count > call.max_batch and not call.is_on_device):
                future = self._calls.run_later(lambda: self._execution.invert_to_host(call))
                return PendingInversion(is_done=future.done, finish=future.result)
            return self._execution.start(call)

    def close(self) -> None:
        """Wait for what is in flight, then release graphs and memory; safe to call twice.

        A session that is dropped without it is closed when it is collected, with a `ResourceWarning`.
        Results on the device stay valid: they keep the memory until they are gone.
        """
        self._calls.close()
        self._execution.close()

    def __del__(self) -> None:
        # At the interpreter's end all goes anyway, and what closing takes may be gone; a failed opening has closed.
        if sys.is_finalizing() or not hasattr(self, "_rules") or self._calls.is_closed:
            return
        try:
            warnings.warn(
                f"the session on the bundle {self.bundle.path} was not closed; "
                "use `with Session.open(...)`, or close()",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
        finally:
            self.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
