from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from restyle_deploy.backends import BACKENDS
from restyle_deploy.bench import matrix
from restyle_deploy.bench.matrix import MatrixOptions, configurations_of
from restyle_deploy.bundle import Bundle
from restyle_deploy.engines import DamagedEngine
from restyle_deploy.errors import BackendUnavailableError


def names_of(bundle: Bundle, **options: Any) -> list[str]:
    return [configuration.name for configuration in configurations_of(bundle, MatrixOptions(**options))]


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let backends have devices, or raise; the others are not installed."""

    def pretend(**found: tuple[str, ...] | Exception) -> None:
        def load(name: str) -> SimpleNamespace:
            answer = found.get(name, BackendUnavailableError("not installed"))
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(devices=lambda: answer)

        monkeypatch.setattr(matrix, "load_backend", load)

    return pretend


def test_one_configuration_by_default(bundle: Bundle) -> None:
    assert names_of(bundle) == ["onnxruntime-cpu-fp32-plain-b1"]


def test_all_is_combined_and_batches_rise(bundle: Bundle) -> None:
    found = names_of(
        bundle,
        backends=("openvino", "onnxruntime"),
        precisions=("fp32", "bf16"),
        plans=("engine", "plain"),
        batches=(4, 1),
        previews=(False, True),
        threads=2,
    )
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 2 * 2
    assert found[:4] == [f"openvino-cpu-fp32-{plan}-b{batch}-t2" for batch in (1, 4) for plan in ("engine", "plain")]
    assert found[4] == "openvino-cpu-fp32-engine-preview-b1-t2"
    assert [name.split("-")[0] for name in found] == ["openvino"] * 16 + ["onnxruntime"] * 16


def test_each_backend_has_its_own_device_unless_told(bundle: Bundle) -> None:
    found = names_of(bundle, backends=("onnxruntime", "tensorrt-rtx"))
    assert found == ["onnxruntime-cpu-fp32-plain-b1", "tensorrt-rtx-cuda0-fp32-plain-b1"]
    assert names_of(bundle, device="cuda:1") == ["onnxruntime-cuda1-fp32-plain-b1"]


def test_engines_are_taken_where_there_are_some(bundle: Bundle) -> None:
    engine = cast(Any, SimpleNamespace(key=("openvino", "cpu", "fp32")))
    bundle = replace(bundle, engines=(engine,))
    found = names_of(bundle, backends=("onnxruntime", "openvino"), precisions=("fp32", "bf16"))
    assert [name.removesuffix("-b1") for name in found] == [
        "onnxruntime-cpu-fp32-plain",
        "onnxruntime-cpu-bf16-plain",
        "openvino-cpu-fp32-engine",
        "openvino-cpu-bf16-plain",
    ]


def test_damaged_engine_spoils_only_its_own_row(bundle: Bundle) -> None:
    damaged = DamagedEngine(key=("openvino", "cpu", "fp32"), name="openvino-cpu-fp32", reason="no hash")
    found = names_of(replace(bundle, damaged_engines=(damaged,)), backends=("openvino", "onnxruntime"))
    assert found == ["openvino-cpu-fp32-engine-b1", "onnxruntime-cpu-fp32-plain-b1"]


@pytest.mark.parametrize("names", [("all",), ("onnxruntime", "all")])
def test_all_are_those_with_their_device_here(
    bundle: Bundle, backends: Callable[..., None], names: tuple[str, ...]
) -> None:
    backends(onnxruntime=("cpu", "cuda:0"), openvino=("cpu",), tensorrt=("cpu",))
    found = configurations_of(bundle, MatrixOptions(backends=names))
    assert [configuration.backend for configuration in found] == ["onnxruntime", "openvino"]


def test_broken_backend_is_left_to_its_row(bundle: Bundle, backends: Callable[..., None]) -> None:
    backends(onnxruntime=ImportError("libgomp.so.1"), openvino=("cpu",))
    assert len(names_of(bundle, backends=("all",))) == 2


def test_no_backend_at_all_is_one_line(bundle: Bundle, backends: Callable[..., None]) -> None:
    backends()
    with pytest.raises(BackendUnavailableError, match="no backend is installed that has a device here"):
        names_of(bundle, backends=("all",))


def test_unknown_backend_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        names_of(bundle, backends=("tpu",))
    assert "tpu" not in BACKENDS
