"""The GPUs of this machine, as backends name them. Without a driver, or cuda-core, there is none."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

from restyle_deploy.backends.base import Queue, RunnerOptions
from restyle_deploy.cuda_driver import REMEDY, current_context, primary_context
from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.errors import DeviceError


def find_devices() -> tuple[tuple[str, ...], str]:
    """Return the GPUs, `cuda:0` and so on, and why there is none where there is none."""
    try:
        from cuda.core import Device
    except ModuleNotFoundError as error:
        return (), f"{error.name} is not installed; run: pip install 'restyle-deploy[cuda]'"
    try:
        count = len(Device.get_all_devices())
    except Exception as error:  # cuda-core's exceptions for a missing or failing driver have no common base
        if type(error).__name__ == "DynamicLibNotFoundError":
            return (), "there is no NVIDIA driver"
        return (), str(error).partition("\n")[0] or type(error).__name__
    return tuple(f"cuda:{index}" for index in range(count)), "" if count else "the driver lists no GPU"


def find_processor(device: str) -> str:
    """Return the compute capability of one of the devices, "sm_89" style."""
    from cuda.core import Device

    return f"sm_{Device(index_of(device)).arch}"


def find_name(device: str) -> str:
    """Return the name of one of the devices, such as "NVIDIA L4"."""
    from cuda.core import Device

    return str(Device(index_of(device)).name)


def current_device(device: str) -> AbstractContextManager[None]:
    """Make one of the devices the calling thread's while a `with` lasts, and then the former one again.

    What TensorRT creates, measures and loads meanwhile is for that device.
    """
    return current_context(primary_context(index_of(device)))


def index_of(device: str) -> int:
    """Return the number in `cuda:0`."""
    return int(device.partition(":")[2])


def queue_of(options: RunnerOptions) -> Queue:
    """Return the queue that a GPU's runs are enqueued on.

    Raises:
        ValueError: there is none; whoever loads a graph to run it opens the device first.
    """
    if options.queue is None:
        raise ValueError(
            f"a graph on {options.device} runs in the queue of an opened device, and RunnerOptions.queue is None; "
            f"open one: restyle_deploy.runtime.device.open_device({options.device!r})"
        )
    return options.queue


def device_error(subject: str, error: BaseException | str, *, what: str = "run the graph") -> DeviceError:
    """Return what a library says of what a GPU refused, as an error of one line with what may mend it.

    Args:
        subject: who says it.
        error: the library's, or its message.
        what: it cannot do.
    """
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return DeviceError(f"{subject} cannot {what}: {reason.rstrip('.')}; {REMEDY}")


def end_capture(stream: int) -> None:
    """End a capture of a stream that a library has begun and not finished; nothing happens where there is none.

    Args:
        stream: a `CUstream` as a number.
    """
    from cuda.bindings import driver

    error, status = driver.cuStreamIsCapturing(stream)
    if error == driver.CUresult.CUDA_SUCCESS and status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
        _, graph = driver.cuStreamEndCapture(stream)  # an error where the capture is invalid, which then has no graph
        if graph is not None and int(graph):
            driver.cuGraphDestroy(graph)


def device_arrays(buffers: Mapping[str, Array], device: str) -> dict[str, DeviceArray]:
    """Return buffers as arrays of a GPU, which they are already.

    Raises:
        TypeError: one lies in the memory of the host.
        ValueError: one lies on another GPU.
    """
    arrays = {name: array for name, array in buffers.items() if isinstance(array, DeviceArray)}
    others = [name for name in buffers if name not in arrays]
    if others:
        raise TypeError(f"got NumPy arrays for {', '.join(others)}, expected arrays of {device}, where the graph runs")
    for name, array in arrays.items():
        if array.device_index != index_of(device):
            raise ValueError(f"{name} is on cuda:{array.device_index}, the graph runs on {device}")
    return arrays
