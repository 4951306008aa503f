"""The GPUs of this machine, as the TensorRT backends name them. Without a driver, or cuda-core, there is none."""


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


def set_current(device: str) -> None:
    """Make one of the devices the calling thread's: what TensorRT creates, measures and loads there is for that one."""
    from cuda.core import Device

    Device(index_of(device)).set_current()


def index_of(device: str) -> int:
    """Return the number in `cuda:0`."""
    return int(device.partition(":")[2])
