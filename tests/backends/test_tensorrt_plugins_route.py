from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from restyle_deploy.backends import tensorrt_plugins
from restyle_deploy.backends.tensorrt_plugins import choose_route, register_plugins, tensor_type
from restyle_deploy.errors import BackendUnavailableError


def test_tensor_type_of_unknown() -> None:
    with pytest.raises(TypeError, match="x is CHW, expected one of FLOAT, HALF, BF16"):
        tensor_type(SimpleNamespace(name="CHW"))


def fake_library(name: str, version: str, *members: str) -> Any:
    library: Any = ModuleType(name)
    library.__version__ = version
    for member in members:
        setattr(library, member, object())
    return library


@pytest.mark.parametrize(
    ("library", "route", "reason"),
    [
        (fake_library("tensorrt", "11.4.0.106", "QuickPluginCreationRequest", "IPluginV3"), "aot", "tensorrt 11.4"),
        (fake_library("tensorrt", "10.7.0", "IPluginV3"), "jit", "since 10.9"),
        (fake_library("tensorrt_rtx", "1.7.1", "IPluginV3"), "functions", "tensorrt_rtx 1.7.1 takes no Python plugins"),
    ],
)
def test_route(monkeypatch: pytest.MonkeyPatch, library: ModuleType, route: str, reason: str) -> None:
    monkeypatch.setattr(tensorrt_plugins, "ptx_refusal", lambda: "")
    chosen, why = choose_route(library)
    assert chosen == route
    assert reason in why


def test_python_launches_what_the_driver_takes_no_ptx_of(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = "a driver of CUDA 13.0 takes no PTX of NVRTC 13.5"
    monkeypatch.setattr(tensorrt_plugins, "ptx_refusal", lambda: refusal)
    chosen, why = choose_route(fake_library("tensorrt", "11.4.0", "QuickPluginCreationRequest", "IPluginV3"))
    assert chosen == "jit"
    assert why.startswith(refusal)
    assert choose_route(fake_library("tensorrt_rtx", "1.7.1"))[0] == "functions"


def test_route_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert register_plugins(fake_library("tensorrt_rtx", "1.7.1")) == "functions"
    assert "plugin route functions: tensorrt_rtx 1.7.1 takes no Python plugins" in caplog.text


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def miss() -> None:
        raise BackendUnavailableError("the CUDA kernels need cuda-core")

    monkeypatch.setattr(tensorrt_plugins, "check_available", miss)
    with pytest.raises(BackendUnavailableError, match="need cuda-core"):
        register_plugins(fake_library("tensorrt", "11.4.0", "QuickPluginCreationRequest"))
