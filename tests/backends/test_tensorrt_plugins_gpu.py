"""Our plugins in real TensorRT engines, against torch. Needs TensorRT with its libraries, a GPU, and torch for it."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import pytest

from restyle_deploy.backends.tensorrt_plugins import PluginRoute, choose_route
from restyle_deploy.ops.torch_gpu import why_torch_sees_no_gpu
from tests.backends.plugin_engines import CASES, Case, compare, loads_alone

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


@pytest.fixture(scope="module")
def offered() -> PluginRoute:
    """The best route that the installed TensorRT offers."""
    trt: Any = pytest.importorskip("tensorrt", exc_type=ImportError)
    if reason := why_torch_sees_no_gpu():
        pytest.skip(reason)
    return choose_route(trt)[0]


@pytest.fixture(scope="module", params=["aot", "jit"])
def route(request: pytest.FixtureRequest, offered: PluginRoute) -> PluginRoute:
    wanted: PluginRoute = request.param
    if offered == "functions" or (wanted == "aot" and offered == "jit"):
        pytest.skip(f"this TensorRT offers the route {offered} at best, not {wanted}")
    return wanted


@pytest.fixture(scope="module")
def process(route: PluginRoute) -> Iterator[Executor]:
    """A process in which the plugins are registered by this route alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plugin_equals_reference(route: PluginRoute, process: Executor, case: Case) -> None:
    assert process.submit(compare, route, case).result() <= TOLERANCES[case.dtype]


def test_engine_with_embedded_kernels_needs_nothing_of_ours(offered: PluginRoute) -> None:
    if offered != "aot":
        pytest.skip(f"this TensorRT offers the route {offered} at best, not aot")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        assert executor.submit(loads_alone, "aot").result()
