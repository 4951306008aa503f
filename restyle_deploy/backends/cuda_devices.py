"""What backends on a GPU share: the current device, the queue, their arrays, and what they say when it refuses."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

from restyle_deploy.backends.base import Queue, RunnerOptions
from restyle_deploy.device_array import Array, DeviceArray
from restyle_deploy.errors import DeviceError
from restyle_deploy.runtime.device import REMEDY, current_context, index_of, primary_context


def current_device(device: str) -> AbstractContextManager[None]:
    """Make one of the devices the calling thread's while a `with` lasts, and then the former one again.

    What TensorRT creates, measures and loads meanwhile is for that device.
    """
    return current_context(primary_context(index_of(device)))


def queue_of(options: RunnerOptions) -> Queue:
    """Return the queue that a GPU's runs are enqueued on.

    Raises:
        ValueError: there is none; whoever loads a graph to run it opens the device first.
    """
    if options.queue is None:
        raise ValueError(
            f"a graph on {options.device} runs in the queue of an opened device, and RunnerOptions.queue is None; "
            f"open one: restyle_deploy.runtime.opening.open_device({options.device!r})"
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
