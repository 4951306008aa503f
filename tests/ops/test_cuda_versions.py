"""Which drivers go with which compilers, without either; and what a real cuda-core says of the stand-in driver."""

import sys
from typing import Any

import pytest

from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.ops import cuda_versions
from restyle_deploy.ops.cuda_versions import Version, check_driver, ptx_refusal
from restyle_deploy.runtime.device import driver_version
from tests.backends.host_driver.stand_in import HostDriver


def set_versions(monkeypatch: pytest.MonkeyPatch, compiler: Version, driver: Version | None) -> None:
    monkeypatch.setattr(cuda_versions, "compiler_version", lambda: compiler)
    monkeypatch.setattr(cuda_versions, "driver_version", lambda: driver)


@pytest.mark.parametrize(
    ("compiler", "driver", "refusal"),
    [
        ((13, 5), (13, 0), "a driver of CUDA 13.0 takes no PTX of NVRTC 13.5"),
        ((14, 0), (13, 5), "a driver of CUDA 13.5 takes no PTX of NVRTC 14.0"),
        ((13, 10), (13, 9), "a driver of CUDA 13.9 takes no PTX of NVRTC 13.10"),
        ((13, 5), (13, 5), ""),
        ((13, 5), (14, 0), ""),
        ((13, 5), None, ""),
    ],
)
def test_ptx_is_for_drivers_no_older_than_the_compiler(
    monkeypatch: pytest.MonkeyPatch, compiler: Version, driver: Version | None, refusal: str
) -> None:
    set_versions(monkeypatch, compiler, driver)
    assert ptx_refusal() == refusal


def test_ptx_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_versions, "driver_version", lambda: (13, 0))
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert ptx_refusal() == ""


@pytest.mark.parametrize(("compiler", "driver"), [((13, 5), (13, 0)), ((13, 0), (14, 1)), ((13, 5), None)])
def test_drivers_that_take_cubins(monkeypatch: pytest.MonkeyPatch, compiler: Version, driver: Version | None) -> None:
    set_versions(monkeypatch, compiler, driver)
    check_driver()


@pytest.mark.parametrize(
    ("compiler", "driver", "message"),
    [
        (
            (14, 1),
            (13, 2),
            r"NVRTC 14.1, and the driver is of CUDA 13.2; run: pip install 'nvidia-cuda-nvrtc==13.2.\*'",
        ),
        ((13, 5), (12, 8), r"the driver is of CUDA 12.8; it has to be 13.0 or newer, or build .*, with --no-plugins"),
    ],
)
def test_drivers_that_are_too_old(
    monkeypatch: pytest.MonkeyPatch, compiler: Version, driver: Version, message: str
) -> None:
    set_versions(monkeypatch, compiler, driver)
    with pytest.raises(BackendUnavailableError, match=message):
        check_driver()


@pytest.mark.parametrize(("answer", "version"), [((0, 13020), (13, 2)), ((0, 12080), (12, 8)), ((34, 0), None)])
def test_version_of_a_driver(monkeypatch: pytest.MonkeyPatch, answer: Any, version: Version | None) -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: answer)
    assert driver_version() == version


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")

    def fail() -> None:
        raise RuntimeError("no libcuda")  # so do the exceptions of cuda-bindings derive

    monkeypatch.setattr(driver, "cuDriverGetVersion", fail)
    assert driver_version() is None
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert driver_version() is None


def test_stand_in_driver_has_a_version(host_driver: HostDriver) -> None:
    run = host_driver.run("from restyle_deploy.runtime.device import driver_version\nprint(driver_version()[0])")
    assert run.output == "13\n"
