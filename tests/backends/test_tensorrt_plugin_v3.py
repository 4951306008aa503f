"""The Python `IPluginV3` on a stand-in for TensorRT 10.7; `test_tensorrt_plugins_gpu.py` has the real one."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from restyle_deploy import backends
from restyle_deploy.backends import tensorrt_plugins
from restyle_deploy.backends.tensorrt_plugins import INPUTS, Operation, PluginRoute, register_plugins
from restyle_deploy.ops.kernels.launches import Epilogue, Factor, Filtering
from tests.backends import fake_tensorrt
from tests.backends.fake_tensorrt import DataType, ExpressionBuilder, NetworkTensor, TensorFormat

MODULE = "restyle_deploy.backends.tensorrt_plugin_v3"
EPILOGUE = Epilogue(factors=Factor(31), negative_slope=0.2, gain=1.5)
BIAS_ACT = Operation(arch="sm_89", epilogue=EPILOGUE)
FILTERING = Filtering(up=(2, 2), down=(3, 3), pads=(2, 3, -1, 0), filter_size=(2, 3))
FILTER = Operation(arch="sm_89", epilogue=EPILOGUE, filtering=FILTERING)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_tensorrt.make_module("10.7.0", embeds_kernels=False)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(tensorrt_plugins, "check_available", lambda: None)
    return module


@pytest.fixture
def v3(trt: ModuleType) -> Iterator[Any]:
    """Our module, made anew on the stand-in."""
    yield importlib.import_module(MODULE)
    del sys.modules[MODULE]
    del backends.tensorrt_plugin_v3


@pytest.mark.parametrize("route", [None, "jit"])
def test_registering_twice(trt: Any, v3: Any, monkeypatch: pytest.MonkeyPatch, route: PluginRoute | None) -> None:
    if route is not None:  # an engine's, whatever would be the best one now
        monkeypatch.setattr(tensorrt_plugins, "choose_route", lambda trt: ("aot", "it is newer"))
    assert [register_plugins(trt, route), register_plugins(trt, route)] == ["jit", "jit"]
    assert set(trt.get_plugin_registry().creators) == {(name, "1", "restyle_deploy_jit") for name in INPUTS}
    (field,) = trt.get_plugin_registry().get_creator("BiasActEpilogue", "1", "restyle_deploy_jit").field_names
    assert (field.name, field.type) == ("parameters", trt.PluginFieldType.INT32)


def test_routes_do_not_meet(trt: Any, v3: Any) -> None:
    """An engine that embeds kernels may be loaded before one whose kernels Python launches, and the other way round."""
    embedded = SimpleNamespace(name="BiasActEpilogue", plugin_version="1")
    trt.get_plugin_registry().register_creator(embedded, "restyle_deploy")
    register_plugins(trt, "jit")
    creators = trt.get_plugin_registry().creators
    assert creators["BiasActEpilogue", "1", "restyle_deploy"] is embedded
    assert isinstance(creators["BiasActEpilogue", "1", "restyle_deploy_jit"], v3.KernelPluginCreator)


@pytest.mark.parametrize("operation", [BIAS_ACT, FILTER], ids=lambda operation: operation.op_type)
def test_plugin_is_made_of_what_it_serialises(trt: Any, v3: Any, operation: Operation) -> None:
    creator = v3.KernelPluginCreator(operation.op_type)
    fields = [trt.PluginField("parameters", np.array(operation.to_parameters(), np.int32), None)]
    plugin = creator.create_plugin("layer", fields, trt.TensorRTPhase.BUILD)
    assert (plugin.plugin_name, plugin.plugin_namespace) == (operation.op_type, "restyle_deploy_jit")
    assert (plugin.plugin_version, plugin.num_outputs) == ("1", 1)
    again = creator.create_plugin("layer", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    for copy in (again, again.clone(), again.attach_to_context(None), again.get_capability_interface(None)):
        assert copy.operation.to_parameters() == operation.to_parameters()


def test_meaning_of_the_parameters_belongs_to_the_version() -> None:
    """Engines keep these numbers: whoever changes what they mean raises `VERSION`, too."""
    operation = replace(FILTER, filtering=replace(FILTERING, up=(2, 3), down=(4, 5), is_separable=True))
    slope, gain = 0x3E4CCCCD, 0x3FC00000
    sizes = (2, 3, 4, 5, 2, 3, -1, 0, 2, 3, 1)
    assert (tensorrt_plugins.VERSION, operation.to_parameters()) == ("1", (89, 31, slope, gain, *sizes))
    bits = {factor.name: factor.value for factor in Factor}
    assert bits == {"DEMOD": 1, "NOISE": 2, "BIAS": 4, "NEXT_SCALE": 8, "ACTIVATION": 16}


def test_fields_without_parameters(trt: Any, v3: Any) -> None:
    creator = v3.KernelPluginCreator("BiasActEpilogue")
    with pytest.raises(ValueError, match="got 0 parameters, expected 4 or 15"):
        creator.create_plugin("layer", [], trt.TensorRTPhase.BUILD)


@pytest.mark.parametrize("operation", [BIAS_ACT, FILTER], ids=lambda operation: operation.op_type)
def test_output(v3: Any, operation: Operation) -> None:
    plugin, builder = v3.KernelPlugin(operation), ExpressionBuilder()
    sizes = NetworkTensor(("batch", 16, 7, 9)).expressions(builder)
    (out,) = plugin.get_output_shapes([sizes], [], builder)
    wanted = operation.launch((3, 16, 7, 9), dtype="float32", channels_last=False).out_shape
    assert tuple(size.evaluate({"batch": 3}) for size in out) == wanted
    assert plugin.get_output_data_types([DataType.HALF, DataType.FLOAT]) == [DataType.HALF]


@pytest.mark.parametrize(
    ("type", "layout", "channels", "is_taken"),
    [
        (DataType.FLOAT, TensorFormat.LINEAR, 3, True),
        (DataType.FLOAT, TensorFormat.HWC, 3, True),
        (DataType.FLOAT, TensorFormat.HWC8, 8, False),
        (DataType.HALF, TensorFormat.HWC8, 16, True),
        (DataType.HALF, TensorFormat.HWC8, 12, False),  # TensorRT would pad to 16
        (DataType.BF16, TensorFormat.LINEAR, 3, True),
        (DataType.HALF, TensorFormat.CHW32, 32, False),
        (DataType.INT8, TensorFormat.LINEAR, 3, False),
    ],
)
def test_formats(v3: Any, type: DataType, layout: TensorFormat, channels: int, is_taken: bool) -> None:
    plugin = v3.KernelPlugin(BIAS_ACT)
    image = NetworkTensor(("batch", channels, 8, 8), type).described(layout)
    factor = NetworkTensor(("batch", channels)).described()
    noise = NetworkTensor((1, 1, 8, 8), type).described()
    tensors = [image, factor, noise, factor, factor, image]
    assert plugin.supports_format_combination(0, tensors, 5) is is_taken
    if is_taken:
        assert all(plugin.supports_format_combination(position, tensors, 5) for position in range(6))


@pytest.mark.parametrize(
    ("position", "type", "layout"),
    [
        (1, DataType.HALF, TensorFormat.LINEAR),  # demod is float32
        (3, DataType.FLOAT, TensorFormat.CHW32),
        (2, DataType.FLOAT, TensorFormat.LINEAR),  # noise has the type of x
        (2, DataType.HALF, TensorFormat.HWC8),
        (5, DataType.FLOAT, TensorFormat.HWC8),  # y has the type and the layout of x
        (5, DataType.HALF, TensorFormat.LINEAR),
    ],
)
def test_formats_that_do_not_go_with_x(v3: Any, position: int, type: DataType, layout: TensorFormat) -> None:
    image = NetworkTensor((1, 16, 8, 8), DataType.HALF).described(TensorFormat.HWC8)
    tensors = [image] * position + [NetworkTensor((1, 16, 8, 8), type).described(layout)]
    assert not v3.KernelPlugin(BIAS_ACT).supports_format_combination(position, tensors, 5)


@pytest.mark.parametrize("layout", [TensorFormat.LINEAR, TensorFormat.HWC8])
def test_launch(v3: Any, monkeypatch: pytest.MonkeyPatch, layout: TensorFormat) -> None:
    """The kernel gets the inputs' addresses and the output's; on the stream given."""
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(v3, "enqueue", lambda *arguments, stream: launched.append((*arguments, stream)))
    image = NetworkTensor((2, 16, 7, 9), DataType.BF16).described(layout).desc
    plugin, inputs = v3.KernelPlugin(FILTER), [100, 200, 300, 400, 500, 600]
    plugin.configure_plugin([], [])
    plugin.on_shape_change([], [])
    plugin.enqueue([image] * 6, [image], inputs, [700], 0, 77)
    wanted = FILTER.launch((2, 16, 7, 9), dtype="bfloat16", channels_last=layout is TensorFormat.HWC8)
    assert launched == [(wanted, inputs, 700, 77)]


def test_launch_of_a_type_without_kernel(v3: Any) -> None:
    image = NetworkTensor((2, 16, 7, 9), DataType.INT8).described().desc
    with pytest.raises(TypeError, match="x is INT8"):
        v3.KernelPlugin(BIAS_ACT).enqueue([image] * 5, [image], [0] * 5, [0], 0, 1)
