"""The CuPy and PyCUDA example: on a GPU, and its order of calls with stand-ins for the libraries."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from examples import cupy_pipeline
from restyle_deploy import Session

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
STREAM = 77


class RecordedSession:
    """A session on the CPU that takes a stream, and notes it."""

    def __init__(self, session: Session) -> None:
        self.session, self.streams = session, list[object]()

    def invert(self, images: Any, *, steps: int, image_type: str, stream: object) -> Any:
        self.streams.append(stream)
        result = self.session.invert(np.asarray(images), steps=steps, image_type=image_type)
        return SimpleNamespace(images=StandInArray(result.images))


class StandInArray:
    """An array that offers what results on a GPU do."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels = pixels
        self.__cuda_array_interface__ = {"shape": pixels.shape, "typestr": "|u1", "data": (id(pixels), False)}

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.pixels.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.pixels.__dlpack__(**options)


class StandInStream:
    """A stream of either library."""

    ptr = handle = STREAM

    def __init__(self, *, non_blocking: bool = True) -> None:
        self.waits = 0

    def __enter__(self) -> "StandInStream":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def synchronize(self) -> None:
        self.waits += 1


def cupy_stand_in() -> dict[str, ModuleType]:
    cupy: Any = ModuleType("cupy")
    for name in ("asarray", "ascontiguousarray", "from_dlpack"):
        setattr(cupy, name, getattr(np, name))
    cupy.asnumpy = lambda array, stream: np.array(array)
    cupy.cuda = SimpleNamespace(Stream=StandInStream)
    return {"cupy": cupy}


def pycuda_stand_in() -> dict[str, ModuleType]:
    pycuda: Any = ModuleType("pycuda")
    pycuda.autoprimaryctx, pycuda.driver, pycuda.gpuarray = (ModuleType(name) for name in ("context", "drv", "arrays"))
    pycuda.driver.Stream = StandInStream
    held: dict[int, NDArray[np.uint8]] = {}

    def attach(shape: tuple[int, ...], dtype: Any, gpudata: int) -> Any:
        return SimpleNamespace(get_async=lambda stream: held[gpudata])

    def remember(pixels: NDArray[np.uint8], stream: StandInStream) -> NDArray[np.uint8]:
        return pixels.copy()

    pycuda.gpuarray.GPUArray, pycuda.gpuarray.to_gpu_async, pycuda.held = attach, remember, held
    names = ("autoprimaryctx", "driver", "gpuarray")
    return {"pycuda": pycuda, **{f"pycuda.{name}": getattr(pycuda, name) for name in names}}


def test_cupys_arrays_go_through_on_its_stream(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in cupy_stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    with Session.open(toy_bundle, threads=1) as session:
        recorded: Any = RecordedSession(session)
        found = cupy_pipeline.invert_with_cupy(recorded, PICTURES, steps=2)
        expected = session.invert(PICTURES[:, :, ::-1], steps=2, image_type="uint8")
    assert recorded.streams == [STREAM]
    np.testing.assert_array_equal(found, expected.images[:, :, ::-1])


def test_pycudas_arrays_go_through_on_its_stream(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = pycuda_stand_in()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    held: Any = modules["pycuda"].held
    with Session.open(toy_bundle, threads=1) as session:
        recorded: Any = RecordedSession(session)
        invert = recorded.invert

        def noted(*arguments: Any, **options: Any) -> Any:
            result = invert(*arguments, **options)
            held[id(result.images.pixels)] = result.images.pixels
            return result

        recorded.invert = noted
        found = cupy_pipeline.invert_with_pycuda(recorded, PICTURES, steps=2)
        expected = session.invert(PICTURES, steps=2, image_type="uint8")
    assert recorded.streams == [STREAM]
    np.testing.assert_array_equal(found, expected.images)


@pytest.mark.gpu
@pytest.mark.parametrize("library", cupy_pipeline.LIBRARIES)
def test_a_librarys_arrays_on_a_gpu(library: str, toy_bundle: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    pytest.importorskip(library)
    invert: Callable[..., NDArray[np.uint8]] = cupy_pipeline.LIBRARIES[library]
    with Session.open(toy_bundle, backend="pytorch", device="cuda:0") as session:
        found = invert(session, PICTURES, steps=2)
        turn = slice(None, None, -1 if library == "cupy" else 1)
        expected = session.invert(np.ascontiguousarray(PICTURES[:, :, turn]), steps=2, image_type="uint8")
    np.testing.assert_array_equal(found, expected.images[:, :, turn])


def test_a_library_that_is_not_installed_is_named(
    toy_bundle: Path, project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # the import fails as if it were not installed
    arguments = [str(toy_bundle), str(project_root / "examples/photos"), "-o", str(tmp_path)]
    result = CliRunner().invoke(cupy_pipeline.main, [*arguments, "--device", "cpu", "--backend", "onnxruntime"])
    assert result.exit_code == 1
    assert "cupy is not installed" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(toy_bundle: Path, project_root: Path, tmp_path: Path) -> None:
    arguments = [str(toy_bundle), str(project_root / "examples/photos"), "-o", str(tmp_path)]
    result = CliRunner().invoke(cupy_pipeline.main, arguments)
    assert result.exit_code == 1
    assert "device 'cuda:0' cannot run here" in result.output
