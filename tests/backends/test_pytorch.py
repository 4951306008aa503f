"""The backend on torch: what only it has. What all backends share is in `test_contract`."""

import builtins
import gc
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from restyle_deploy.backends import pytorch, pytorch_execution
from restyle_deploy.backends.base import DEFAULT_REQUEST, EngineOptions, RunnerOptions
from restyle_deploy.backends.pytorch_execution import CudaExecution, HostExecution
from restyle_deploy.bundle import Bundle, open_bundle
from restyle_deploy.device_array import DeviceArray
from restyle_deploy.errors import BackendUnavailableError, BuildError, DeviceError
from restyle_deploy.ops import compiler
from restyle_deploy.tensors import TensorSpec

COMPILED_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path) -> Bundle:
    return open_bundle(toy_bundle)


def generate(bundle: Bundle, options: RunnerOptions, *, file: Path | None = None, batch: int = 2) -> Any:
    """Run the generator, or an engine of it, and return the image."""
    record = bundle.graphs["generator"]
    runner = pytorch.load(file or record.path, record.inputs, record.outputs, options)
    buffers = {spec.name: spec.allocate(batch) for spec in record.inputs + record.outputs}
    buffers["latent"][:] = np.random.default_rng(0).standard_normal(buffers["latent"].shape, np.float32)
    runner.bind(buffers)()
    runner.close()
    return buffers["image"]


def test_precisions_of_the_cpu() -> None:
    for precision in ("fp32", "bf16"):
        pytorch.check_options(RunnerOptions(precision=precision))
    for precision in ("fp16", "tf32"):
        with pytest.raises(BackendUnavailableError, match=f"{precision} cannot run here: on cpu known are fp32, bf16"):
            pytorch.check_options(RunnerOptions(precision=precision))


def test_torch_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert pytorch.devices() == ("cpu",)
    with pytest.raises(BackendUnavailableError, match="'cuda:0' cannot run here; available: cpu; this torch was built"):
        pytorch.check_options(RunnerOptions(device="cuda:0"))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch report a GPU of sm_75 and one of sm_90, and our kernels be there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: {"cuda:0": (7, 5), "cuda:1": (9, 0)}[device]
    )
    monkeypatch.setattr(compiler, "check_available", lambda: None)


@pytest.mark.usefixtures("two_gpus")
def test_precisions_of_gpus() -> None:
    assert pytorch.devices() == ("cpu", "cuda:0", "cuda:1")
    for device, precision in (("cuda:0", "fp32"), ("cuda:0", "fp16"), *(("cuda:1", p) for p in ("tf32", "bf16"))):
        pytorch.check_options(RunnerOptions(device=device, precision=precision))
    for precision in ("tf32", "bf16"):
        with pytest.raises(BackendUnavailableError, match=f"{precision} cannot run here: it needs sm_80, .* is sm_75"):
            pytorch.check_options(RunnerOptions(device="cuda:0", precision=precision))


@pytest.mark.usefixtures("two_gpus")
def test_engines_are_for_a_processor_and_our_kernels_are_on_gpus() -> None:
    target = pytorch.check_build(RunnerOptions(device="cuda:1"), EngineOptions())
    assert (target.processor, target.has_kernels, target.refusal) == ("sm_90", True, None)
    assert pytorch.check_build(RunnerOptions(), EngineOptions()).has_kernels is False
    with pytest.raises(ValueError, match="pytorch has no --max-batch, nor any other option of engines"):
        pytorch.check_build(RunnerOptions(), EngineOptions(max_batch=4))


@pytest.mark.usefixtures("two_gpus")
def test_missing_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise BackendUnavailableError("NVRTC is not installed")

    monkeypatch.setattr(compiler, "check_available", refuse)
    with pytest.raises(BackendUnavailableError, match="NVRTC"):
        pytorch.check_options(RunnerOptions(device="cuda:1"))
    pytorch.check_options(RunnerOptions())


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_needs_a_queue(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match=r"RunnerOptions\.queue is None"):
        generate(bundle, RunnerOptions(device="cuda:1"))


def test_engine_holds_short_weights_and_computes_the_same(bundle: Bundle, tmp_path: Path) -> None:
    graph = bundle.graphs["generator"].path
    sizes = {}
    for precision in ("fp32", "bf16"):
        options = RunnerOptions(precision=precision)
        engine = tmp_path / f"{precision}{pytorch.ENGINE_SUFFIX}"
        pytorch.build(graph, engine, options)
        sizes[precision] = (tmp_path / f"{engine.stem}.weights").stat().st_size
        found = generate(bundle, options, file=engine)
        np.testing.assert_array_equal(found, generate(bundle, options))
    assert sizes["bf16"] < 0.8 * sizes["fp32"]


def test_calls_of_a_graph_are_counted(bundle: Bundle) -> None:
    graph = bundle.graphs["generator"].path
    facts = pytorch.check_graph(graph, RunnerOptions(), DEFAULT_REQUEST)
    assert facts["calls"] > 50
    assert pytorch.check_graph(graph, RunnerOptions(precision="bf16"), DEFAULT_REQUEST)["calls"] > facts["calls"]


def test_graph_with_another_border_is_refused(bundle: Bundle) -> None:
    record = bundle.graphs["generator"]
    other = (TensorSpec(name="code", dtype="float32", shape=("N", 10, 16)),)
    with pytest.raises(BuildError, match=r"refuses generator\.onnx: its inputs are latent, expected code"):
        pytorch.load(record.path, other, record.outputs, RunnerOptions())


def test_missing_graph_libraries_name_the_command(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.endswith("pytorch_graph"):
            raise ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(BackendUnavailableError, match=re.escape("onnx_ir to read graphs; run: pip install 'restyle-")):
        generate(bundle, RunnerOptions())


def test_arrays_of_a_gpu_are_refused_on_the_cpu() -> None:
    array = DeviceArray(address=256, shape=(2, 3), dtype=np.dtype(np.float32))
    with pytest.raises(TypeError, match="for latent, expected NumPy's"):
        HostExecution(None).tensors_of({"latent": array})


def test_threads_are_set_for_a_run_only() -> None:
    kept = torch.get_num_threads()
    other = kept + 1
    with HostExecution(other).scope():
        assert torch.get_num_threads() == other
    assert torch.get_num_threads() == kept
    with pytest.raises(ZeroDivisionError), HostExecution(other).scope():
        raise ZeroDivisionError
    assert torch.get_num_threads() == kept
    with HostExecution(None).scope():
        assert torch.get_num_threads() == kept


@pytest.mark.slow
def test_compiled_graph_computes_the_same(bundle: Bundle) -> None:
    expected = generate(bundle, RunnerOptions())
    found = generate(bundle, RunnerOptions(is_compiled=True))
    np.testing.assert_allclose(found, expected, rtol=0, atol=COMPILED_TOLERANCE)


class RecordedQueue:
    """A queue whose stream is no more than a number."""

    stream = 77

    def reserve_scratch(self, nbytes: int) -> None:
        raise AssertionError("torch has memory of its own")

    def scratch_address(self) -> int:
        raise AssertionError("torch has memory of its own")


class RecordedCuda:
    """Stands in for `torch.cuda`, and notes which scopes are entered and left."""

    def __init__(self) -> None:
        self.active: list[str] = []
        self.entered: list[str] = []
        self.pools: list[weakref.ref[Any]] = []
        self.allocated_in: list[list[str]] = []
        self.is_capturing = False
        self.emptied = 0

    def ExternalStream(self, handle: int, *, device: int) -> str:  # noqa: N802 - torch's name
        return f"stream {handle} of {device}"

    def MemPool(self) -> Any:  # noqa: N802 - torch's name
        pool = type("Pool", (), {})()
        self.pools.append(weakref.ref(pool))
        return pool

    def device(self, index: int) -> Any:
        return self._scope(f"device {index}")

    def stream(self, stream: str) -> Any:
        return self._scope(stream)

    def use_mem_pool(self, pool: Any, index: int) -> Any:
        return self._scope(f"pool {[one() for one in self.pools].index(pool)} on {index}")

    def is_current_stream_capturing(self) -> bool:
        assert self.active[-1].startswith("stream 77")
        return self.is_capturing

    def empty_cache(self) -> None:
        self.emptied += 1

    @contextmanager
    def _scope(self, name: str) -> Iterator[None]:
        self.active.append(name)
        self.entered.append(name)
        yield
        self.active.remove(name)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> RecordedCuda:
    recorded = RecordedCuda()
    monkeypatch.setattr(torch, "cuda", recorded)
    monkeypatch.setattr(pytorch_execution, "_WORKSPACES", {})
    monkeypatch.setattr(pytorch_execution, "primary_context", lambda index: index)
    monkeypatch.setattr(pytorch_execution, "current_context", lambda context: recorded._scope(f"context {context}"))
    create = torch.ones

    def ones(*shape: int, device: str) -> torch.Tensor:
        recorded.allocated_in.append(list(recorded.active))
        return create(*shape)

    monkeypatch.setattr(torch, "ones", ones)
    return recorded


def arithmetic() -> tuple[Any, ...]:
    """Return torch's settings that a run may change."""
    cudnn = torch.backends.cudnn
    return (
        cudnn.benchmark,
        cudnn.deterministic,
        pytorch_execution._CONVOLUTIONS.fp32_precision,
        pytorch_execution._RECURRENT.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )


@pytest.mark.parametrize(("precision", "convolutions"), [("fp32", "ieee"), ("fp16", "ieee"), ("tf32", "tf32")])
def test_gpu_runs_are_on_the_sessions_stream_and_from_its_pool(
    cuda: RecordedCuda, precision: str, convolutions: str
) -> None:
    execution = CudaExecution(RunnerOptions(device="cuda:1", precision=precision, queue=RecordedQueue()))
    kept = arithmetic()
    with execution.scope():
        assert cuda.active == ["context 1", "device 1", "stream 77 of 1", "pool 1 on 1"]
        assert arithmetic() == (True, True, convolutions, convolutions, "ieee")
        assert torch.backends.cudnn.allow_tf32 == (convolutions == "tf32")  # torch refuses to tell what is mixed
    assert cuda.active == []
    assert arithmetic() == kept


def test_precision_of_all_stays_the_one_of_matrix_products() -> None:
    settings: Any = torch.backends
    try:
        for precision in ("tf32", "ieee"):
            settings.fp32_precision = precision
            with pytorch_execution._arithmetic(tf32=False):
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == precision
    finally:
        settings.fp32_precision = "none"


def test_settings_come_back_after_an_error(cuda: RecordedCuda) -> None:
    execution = CudaExecution(RunnerOptions(device="cuda:0", queue=RecordedQueue()))
    kept = arithmetic()
    with pytest.raises(ZeroDivisionError), pytorch_execution._arithmetic(tf32=False):
        raise ZeroDivisionError
    assert arithmetic() == kept
    with execution.scope():
        assert arithmetic() != kept
    assert arithmetic() == kept


ERRORS_OF_THE_GPU = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee more"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    *([torch.AcceleratorError("CUDA error: an illegal memory access")] if hasattr(torch, "AcceleratorError") else []),
]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("error", ERRORS_OF_THE_GPU, ids=lambda error: str(error)[:24])
def test_what_the_gpu_refuses_during_a_run_is_a_device_error(error: RuntimeError) -> None:
    def fail() -> None:
        raise error

    run = pytorch._BoundRun(fail, CudaExecution(RunnerOptions(device="cuda:0", queue=RecordedQueue())), [], [], ())
    reason = re.escape(str(error).partition("\n")[0].rstrip("."))
    with pytest.raises(
        DeviceError, match=rf"^cuda:0: PyTorch \S+ cannot run the graph: {reason}; where memory"
    ) as caught:
        run()
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_capturing", [False, True])
def test_run_takes_what_torch_keeps_elsewhere_where_memory_lacks(cuda: RecordedCuda, is_capturing: bool) -> None:
    cuda.is_capturing = is_capturing
    calls = []

    def lack_once() -> tuple[()]:
        calls.append(cuda.emptied)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ()

    execution = CudaExecution(RunnerOptions(device="cuda:0", queue=RecordedQueue()))
    run = pytorch._BoundRun(lack_once, execution, [], [], ())
    if is_capturing:
        with pytest.raises(DeviceError, match="out of memory"):
            run()
        assert calls == [0]
    else:
        run()
        assert calls == [0, 1]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes cannot be multiplied"), NotImplementedError("CUDA error: none"), KeyError("x")],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_a_program_stay_what_they_are(error: Exception) -> None:
    execution = CudaExecution(RunnerOptions(device="cuda:0", queue=RecordedQueue()))
    with pytest.raises(type(error)) as caught, execution.scope():
        raise error
    assert caught.value is error


def test_graphs_on_one_queue_share_a_pool_that_goes_with_it(cuda: RecordedCuda) -> None:
    first, second = RecordedQueue(), RecordedQueue()
    executions = [CudaExecution(RunnerOptions(device="cuda:0", queue=queue)) for queue in (first, first, second)]
    cuda.entered.clear()
    for execution in executions:
        with execution.scope():
            pass
    assert [name for name in cuda.entered if name.startswith("pool")] == ["pool 1 on 0", "pool 1 on 0", "pool 2 on 0"]
    del executions[:2], execution
    gc.collect()
    assert [pool() is None for pool in cuda.pools] == [False, True, False]
    assert (first.stream, second.stream) == (77, 77)  # queues that are alive
    again = CudaExecution(RunnerOptions(device="cuda:0", queue=first))
    assert len(cuda.pools) == 4
    with again.scope():
        assert cuda.active[-1] == "pool 3 on 0"


def test_what_cublas_keeps_for_a_stream_has_a_pool_of_its_own(cuda: RecordedCuda) -> None:
    """Torch may free it while CUDA graphs use it: then nobody else may be given the memory."""
    for queue in (RecordedQueue(), RecordedQueue()):  # of one stream, which the second session takes over
        executions = [CudaExecution(RunnerOptions(device="cuda:1", queue=queue)) for _ in range(2)]
        assert executions[0]._pool is executions[1]._pool
    assert cuda.allocated_in == [["context 1", "device 1", "stream 77 of 1", "pool 0 on 1"]]
    del executions
    gc.collect()
    assert [pool() is None for pool in cuda.pools] == [False, True, True]


def test_memory_of_runs_goes_when_the_runner_is_closed(cuda: RecordedCuda) -> None:
    queue = RecordedQueue()
    execution = CudaExecution(RunnerOptions(device="cuda:0", queue=queue))
    runner = pytorch.PyTorchRunner(torch.neg, (), (), execution)
    del execution
    runner.close()
    runner.close()
    gc.collect()
    assert [pool() is None for pool in cuda.pools] == [False, True]  # the first one is cuBLAS's
    with pytest.raises(ValueError, match="the runner is closed"):
        runner.bind({})


@pytest.mark.usefixtures("cuda")
def test_arrays_of_the_host_are_refused_on_a_gpu() -> None:
    execution = CudaExecution(RunnerOptions(device="cuda:0", queue=RecordedQueue()))
    with pytest.raises(TypeError, match="got NumPy arrays for latent, expected arrays of cuda:0"):
        execution.tensors_of({"latent": np.zeros((1, 2), np.float32)})


def test_device_arrays_are_described_without_their_stream() -> None:
    array = DeviceArray(address=512, shape=(2, 3), dtype=np.dtype(np.float32), stream=77)
    interface = pytorch_execution._Interface(array).__cuda_array_interface__
    assert interface == {"shape": (2, 3), "typestr": "<f4", "data": (512, False), "version": 2}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_replays_outlive_what_others_allocate(bundle: Bundle, precision: str) -> None:
    if "cuda:0" not in pytorch.devices():
        pytest.skip("torch finds no GPU")
    from restyle_deploy.runtime.cuda_device import open_device

    device, record = open_device("cuda:0"), bundle.graphs["generator"]
    options = RunnerOptions(device="cuda:0", precision=precision, queue=device)
    runner = pytorch.load(record.path, record.inputs, record.outputs, options)
    arrays: dict[str, DeviceArray] = {}
    blocks = []
    for spec in record.inputs + record.outputs:
        shape = spec.concrete_shape(2)
        blocks.append(device.allocate(int(np.prod(shape)) * np.dtype(spec.dtype).itemsize))
        array = device.array(blocks[-1], 0, shape, spec.dtype)
        assert isinstance(array, DeviceArray)
        arrays[spec.name] = array
    tensors = CudaExecution(options).tensors_of(arrays)
    tensors["latent"].copy_(torch.randn(tensors["latent"].shape, generator=torch.Generator().manual_seed(0)))
    torch.cuda.synchronize()
    run = runner.bind(arrays)
    run()
    device.synchronize()
    expected = tensors["image"].clone()
    replay = device.capture(run)
    others = [torch.full((1 << 20,), float("nan"), device="cuda:0") for _ in range(64)]
    tensors["image"].zero_()
    torch.cuda.synchronize()
    replay()
    device.synchronize()
    assert torch.equal(tensors["image"], expected)
    assert all(other.isnan().all() for other in others)
    replay.close()
    runner.close()
    for block in blocks:
        block.close()
    device.close()
