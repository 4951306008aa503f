"""The CUDA versions of the kernels' compiler and of the driver, and which of them go together.

A driver takes cubins of any compiler of its major version, but PTX of none that is newer than itself.
"""

from typing import TypeAlias

from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.runtime.device import NEEDED, driver_version, require_cuda_core

Version: TypeAlias = tuple[int, int]

# There is no NVRTC of an older major version under the name that the extra `cuda` installs.
LEAST_DRIVER: Version = (13, 0)


def compiler_version() -> Version:
    """Return the version of NVRTC, such as (13, 0).

    Raises:
        BackendUnavailableError: cuda-core or NVRTC is not installed.
    """
    require_cuda_core()  # what is compiled here is launched by it
    from cuda.bindings import nvrtc
    from cuda.pathfinder import DynamicLibNotFoundError

    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except DynamicLibNotFoundError as error:
        raise BackendUnavailableError(NEEDED.format("nvidia-cuda-nvrtc")) from error
    return major, minor


def ptx_refusal() -> str:
    """Return why the driver does not take the PTX of the compiler; empty where it does, or where one of them is absent.

    An engine that embeds PTX is of no use then.
    """
    driver = driver_version()
    try:
        compiler = compiler_version()
    except BackendUnavailableError:
        return ""
    if driver is None or compiler <= driver:
        return ""
    return f"a driver of CUDA {_format(driver)} takes no PTX of NVRTC {_format(compiler)}"


def check_driver() -> None:
    """Find out whether the driver, if there is one, takes what the compiler makes for a GPU of just one architecture.

    The driver has to be one of CUDA 13.0 or newer, and of the compiler's major version or a newer one.

    Raises:
        BackendUnavailableError: it does not, or the compiler is not installed.
    """
    compiler, driver = compiler_version(), driver_version()
    if driver is None or compiler[0] <= driver[0]:
        return
    has_compiler = driver >= LEAST_DRIVER
    mend = f"run: {_matching_compiler(driver)}" if has_compiler else f"it has to be {_format(LEAST_DRIVER)} or newer"
    raise BackendUnavailableError(
        f"the CUDA kernels are compiled by NVRTC {_format(compiler)}, and the driver is of CUDA {_format(driver)}; "
        f"{mend}, or build TensorRT engines without our kernels: restyle-deploy build, with --no-plugins"
    )


def _matching_compiler(driver: Version) -> str:
    return f"pip install 'nvidia-cuda-nvrtc=={_format(driver)}.*'"


def _format(version: Version) -> str:
    return ".".join(map(str, version))
