"""What the table of the GPU compares: one row per way to run the same model. A new way is one row here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.contenders import ModelFiles
from benchmarks.processes import UnavailableError
from restyle_deploy.bundle import read_bundle
from restyle_deploy.runtime.results import InversionResult
from restyle_deploy.runtime.session import Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from restyle_deploy.models.restyle import RestyleModel

BASELINE = "upstream"
COMPILED = ("torch-compile", "torch-compile-graph")
CPU = "cpu"


class Inverter(Protocol):
    """An opened contender."""

    def invert(self, target: Tensor, *, steps: int) -> Any:
        """Enqueue an inversion of float32 [N, 3, h, w] on torch's current stream; the result is its own business."""
        ...

    def read(self, result: Any) -> InversionResult:
        """Wait for a result and bring it to the host."""
        ...


@dataclass(frozen=True, kw_only=True)
class GpuContender:
    """A row of the table.

    Attributes:
        name: for `--contenders`.
        label: for the table.
        precision: that it computes in, one of `backends.base.PRECISIONS`.
        open: load a model on a device for batches of so many images.
        engine: backend and precision of the engine that it needs.
        is_ours: whether it is this package's way.
        devices: kinds of device that it runs on.
    """

    name: str
    label: str
    precision: str
    open: Callable[[ModelFiles, str, int], Inverter]
    engine: tuple[str, str] | None = None
    is_ours: bool = False
    devices: tuple[str, ...] = ("cuda",)


class SessionInverter:
    """A session, called with tensors on its device and on torch's stream."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._is_on_host = session.describe()["device"] == CPU

    def invert(self, target: Tensor, *, steps: int) -> Any:
        """See `Inverter`."""
        if self._is_on_host:
            return self._session.invert(target, steps=steps)
        import torch

        return self._session.invert(target, steps=steps, stream=torch.cuda.current_stream().cuda_stream)

    def read(self, result: Any) -> InversionResult:
        """See `Inverter`."""
        from torch.utils.dlpack import from_dlpack

        images, latents = (from_dlpack(array).cpu().numpy() for array in (result.images, result.latents))
        return InversionResult(images=images, latents=latents)


class TorchInverter:
    """A torch model in a loop of torch's own calls; the latent stays float32, as its residuals are small."""

    def __init__(
        self,
        model: RestyleModel,
        average_image: Tensor,
        *,
        dtype: torch.dtype,
        scope: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model, self._average_image = model, average_image
        self._latent_avg, self._dtype, self._scope = model.latent_avg.float(), dtype, scope

    def invert(self, target: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
        """See `Inverter`."""
        import torch

        with torch.inference_mode(), self._scope():
            target = target.to(self._dtype)
            current = self._average_image.to(self._dtype).repeat(len(target), 1, 1, 1)
            latent = self._latent_avg.repeat(len(target), 1, 1)
            for _ in range(steps):
                latent = self._model.encode(target, current, latent)
                image, current = self._model.generate(latent.to(self._dtype))
            return image, latent

    def read(self, result: tuple[Tensor, Tensor]) -> InversionResult:
        """See `Inverter`."""
        images, latents = (tensor.float().cpu().numpy() for tensor in result)
        return InversionResult(images=images, latents=latents)


class CapturedInverter:
    """Another one's calls as one CUDA graph, by torch, for inputs of one shape."""

    def __init__(self, inverter: TorchInverter) -> None:
        self._inverter = inverter
        self._graph: torch.cuda.CUDAGraph | None = None

    def invert(self, target: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
        """See `Inverter`; the first call compiles and captures."""
        import torch

        if self._graph is None:
            self._target = target.clone()
            for _ in range(2):
                self._inverter.invert(self._target, steps=steps)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = self._inverter.invert(self._target, steps=steps)
        self._target.copy_(target)
        self._graph.replay()
        return self._results

    def read(self, result: tuple[Tensor, Tensor]) -> InversionResult:
        """See `Inverter`."""
        return self._inverter.read(result)


def _open_upstream(
    files: ModelFiles,
    device: str,
    _: int,
    *,
    tf32: bool = False,
    half: bool = False,
    compiled: bool = False,
    kernels: bool = False,
) -> TorchInverter:
    """Load upstream's arithmetic; cuDNN measures its ways for each shape, which is to torch's advantage."""
    import torch

    from benchmarks.upstream_arithmetic import UpstreamArithmetic
    from restyle_deploy.checkpoint import load_checkpoint
    from restyle_deploy.models.restyle import model_from_checkpoint
    from restyle_deploy.ops.switch import use_cuda_kernels
    from restyle_deploy.reference import model_from_bundle

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    bundle = read_bundle(files.bundle)
    checkpoint = None if files.checkpoint is None else load_checkpoint(files.checkpoint)
    model = UpstreamArithmetic.from_model(
        model_from_bundle(bundle) if checkpoint is None else model_from_checkpoint(checkpoint)
    )
    latent_avg = model.latent_avg.to(device)
    dtype = torch.float16 if half else torch.float32
    model = model.to(device=device, dtype=dtype)
    model.latent_avg = latent_avg  # not rounded
    if compiled:
        model.encode = torch.compile(model.encode, dynamic=False)  # type: ignore[method-assign]
        model.generate = torch.compile(model.generate, dynamic=False)  # type: ignore[method-assign]
    average_image = torch.from_numpy(bundle.average_image.copy()).to(device)
    return TorchInverter(model, average_image, dtype=dtype, scope=use_cuda_kernels if kernels else nullcontext)


def _open_captured(files: ModelFiles, device: str, batch: int) -> CapturedInverter:
    return CapturedInverter(_open_upstream(files, device, batch, half=True, compiled=True))


def _upstream(**options: bool) -> Callable[[ModelFiles, str, int], Inverter]:
    def open_upstream(files: ModelFiles, device: str, batch: int) -> Inverter:
        return _open_upstream(files, device, batch, **options)

    return open_upstream


def _session(backend: str, precision: str, **options: Any) -> Callable[[ModelFiles, str, int], Inverter]:
    """Return a function that opens a session; one without `plain` needs an engine."""

    def open_session(files: ModelFiles, device: str, batch: int) -> Inverter:
        session = Session.open(
            files.bundle, backend=backend, device=device, precision=precision, max_batch=batch, **options
        )
        if not options.get("plain") and session.describe()["plan"] == "plain":
            session.close()
            raise UnavailableError("the bundle has no engine for it")
        return SessionInverter(session)

    return open_session


def _onnxruntime_rows() -> Iterator[GpuContender]:
    for precision in ("fp32", "tf32", "fp16"):
        yield GpuContender(
            name=f"onnxruntime-{precision}",
            label=f"ONNX Runtime, exported graphs, {precision}",
            precision=precision,
            open=_session("onnxruntime", precision, plain=True),
            devices=("cuda", CPU) if precision == "fp32" else ("cuda",),
        )


def _pytorch_rows() -> Iterator[GpuContender]:
    for precision in ("fp32", "tf32", "fp16", "bf16"):
        yield GpuContender(
            name=f"pytorch-{precision}",
            label=f"our pytorch backend, {precision}",
            precision=precision,
            open=_session("pytorch", precision),
            engine=("pytorch", precision),
            is_ours=True,
            devices=("cuda", CPU) if precision in ("fp32", "bf16") else ("cuda",),
        )
    yield GpuContender(
        name="pytorch-fp16-compiled",
        label="our pytorch backend, fp16, torch.compile",
        precision="fp16",
        open=_session("pytorch", "fp16", compile=True),
        engine=("pytorch", "fp16"),
        is_ours=True,
    )


def _tensorrt_rows() -> Iterator[GpuContender]:
    for backend, label in (("tensorrt", "TensorRT"), ("tensorrt-rtx", "TensorRT for RTX")):
        for precision in ("fp32", "fp16"):
            yield GpuContender(
                name=f"{backend}-{precision}",
                label=f"{label}, {precision}",
                precision=precision,
                open=_session(backend, precision),
                engine=(backend, precision),
                is_ours=True,
            )


_ROWS = (
    GpuContender(
        name=BASELINE,
        label="upstream's arithmetic, torch, float32",
        precision="fp32",
        open=_upstream(),
        devices=("cuda", CPU),
    ),
    GpuContender(
        name="upstream-tf32", label="upstream's arithmetic, torch, TF32", precision="tf32", open=_upstream(tf32=True)
    ),
    GpuContender(
        name="upstream-kernels",
        label="upstream's arithmetic, torch, float32, our two kernels for its own",
        precision="fp32",
        open=_upstream(kernels=True),
    ),
    GpuContender(
        name=COMPILED[0],
        label="upstream's arithmetic, torch.compile, fp16",
        precision="fp16",
        open=_upstream(half=True, compiled=True),
    ),
    GpuContender(
        name=COMPILED[1],
        label="upstream's arithmetic, torch.compile, fp16, as one CUDA graph",
        precision="fp16",
        open=_open_captured,
    ),
    *_onnxruntime_rows(),
    *_pytorch_rows(),
    *_tensorrt_rows(),
)
GPU_CONTENDERS: Mapping[str, GpuContender] = MappingProxyType({row.name: row for row in _ROWS})
