"""A stand-in for the module `tensorrt`, as far as plugins need one, and for what TensorRT does with a plugin.

`tensorrt.plugin` is the real one: the bindings' wheel has it in plain Python, without the library that it is about.
"""

import enum
import importlib.util
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

Sizes = Mapping[str, int]


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT32, INT8, BOOL, INT64 = range(7)


class TensorFormat(enum.Enum):
    LINEAR, HWC, HWC8, CHW32 = range(4)


class DimensionOperation(enum.Enum):
    SUM, SUB, PROD, FLOOR_DIV, CEIL_DIV, MAX, MIN, EQUAL, LESS = range(9)


_COMPUTE: dict[DimensionOperation, Callable[[int, int], int]] = {
    DimensionOperation.SUM: operator.add,
    DimensionOperation.SUB: operator.sub,
    DimensionOperation.PROD: operator.mul,
    DimensionOperation.FLOOR_DIV: operator.floordiv,
    DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class Expression:
    """An `IDimensionExpr`, which can be evaluated."""

    def __init__(self, compute: Callable[[Sizes], int], is_constant: bool) -> None:
        self.evaluate = compute
        self._is_constant = is_constant

    def is_constant(self) -> bool:
        return self._is_constant

    def get_constant_value(self) -> int:
        assert self._is_constant
        return self.evaluate({})


class ExpressionBuilder:
    def constant(self, value: int) -> Expression:
        assert type(value) is int
        return Expression(lambda sizes: value, True)

    def named(self, name: str) -> Expression:
        return Expression(lambda sizes: sizes[name], False)

    def operation(self, kind: DimensionOperation, first: Expression, second: Expression) -> Expression:
        assert isinstance(first, Expression)
        assert isinstance(second, Expression)
        return Expression(
            lambda sizes: _COMPUTE[kind](first.evaluate(sizes), second.evaluate(sizes)),
            first.is_constant() and second.is_constant(),
        )


class Dims(tuple[int, ...]):
    MAX_DIMS = 8


class DimsExprs(list[Any]):
    def __init__(self, sizes: "int | Sequence[Any]") -> None:
        super().__init__([None] * sizes if isinstance(sizes, int) else sizes)


class PluginTensorDesc:
    def __init__(self) -> None:
        self.dims, self.type, self.format, self.scale = Dims(), DataType.FLOAT, TensorFormat.LINEAR, 1.0


class PluginFieldType(enum.Enum):
    INT8, INT16, INT32, INT64, FLOAT16, FLOAT32, FLOAT64, CHAR, UNKNOWN = range(9)


class TensorRTPhase(enum.Enum):
    BUILD, RUNTIME = range(2)


class QuickPluginCreationRequest(enum.Enum):
    UNKNOWN, PREFER_JIT, PREFER_AOT, STRICT_JIT, STRICT_AOT = range(5)


class DynamicPluginTensorDesc:
    def __init__(self) -> None:
        self.desc, self.min, self.opt, self.max = PluginTensorDesc(), Dims(), Dims(), Dims()


class PluginField:
    def __init__(self, name: str, data: Any, type: Any) -> None:
        self.name, self.data, self.type = name, data, type


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        key = creator.name, creator.plugin_version, namespace
        assert key not in self.creators
        self.creators[key] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators.get((name, version, namespace))


_KINDS = (
    *(DataType, TensorFormat, DimensionOperation, Dims, DimsExprs),
    *(PluginField, PluginFieldType, PluginTensorDesc, DynamicPluginTensorDesc, TensorRTPhase),
)


def make_module(version: str, *, embeds_kernels: bool) -> Any:
    """Return a module `tensorrt` with an empty plugin registry; its `plugin` is the bindings', where these are."""
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = version
    found = importlib.util.find_spec("tensorrt_bindings")
    trt.__path__ = list(found.submodule_search_locations or ()) if found is not None else []
    for kind in _KINDS:
        setattr(trt, kind.__name__, kind)
    trt.float32, trt.float16, trt.bfloat16, trt.int32 = DataType.FLOAT, DataType.HALF, DataType.BF16, DataType.INT32
    trt.IDimensionExpr, trt.IExprBuilder, trt.PluginFieldCollection = Expression, ExpressionBuilder, list
    trt.PluginArgType, trt.PluginArgDataType = SimpleNamespace(INT=0), SimpleNamespace(INT32=0, INT16=1, INT8=2)
    interfaces = ["ITensor", "ISymExpr", "IPluginV3", "IPluginCreatorV3One", "IPluginCreatorV3Quick"]
    interfaces += [f"IPluginV3One{part}" for part in ("Core", "Build", "Runtime")]
    interfaces += [f"IPluginV3Quick{part}" for part in ("Core", "Build", "Runtime", "AOTBuild")]
    for name in interfaces:
        setattr(trt, name, type(name, (), {}))
    if embeds_kernels:
        trt.QuickPluginCreationRequest = QuickPluginCreationRequest
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    logger = SimpleNamespace(log=lambda severity, message: None)
    trt.Logger = type("Logger", (), {"WARNING": 1, "__new__": lambda cls: logger})
    return trt


def require_decorators() -> None:
    """Skip a test that needs the real `tensorrt.plugin`."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("the package tensorrt-cu13-bindings is not installed: pip install tensorrt-cu13-bindings")


@dataclass(frozen=True)
class NetworkTensor:
    """A tensor of a network; a size may be a name: one that is free, of at most `largest`."""

    sizes: tuple[int | str, ...]
    type: DataType = DataType.FLOAT
    largest: int = 1

    def described(self, format: TensorFormat = TensorFormat.LINEAR) -> DynamicPluginTensorDesc:
        described = DynamicPluginTensorDesc()
        described.desc.dims = Dims(-1 if isinstance(size, str) else size for size in self.sizes)
        described.max = Dims(self.largest if isinstance(size, str) else size for size in self.sizes)
        described.desc.type, described.desc.format = self.type, format
        return described

    def expressions(self, builder: ExpressionBuilder) -> DimsExprs:
        return DimsExprs([builder.named(n) if isinstance(n, str) else builder.constant(n) for n in self.sizes])


@dataclass(frozen=True)
class EmbeddedKernel:
    """What an engine keeps of a plugin, of one combination of types and layouts."""

    types: tuple[DataType, ...]
    formats: tuple[TensorFormat, ...]
    name: str
    code: bytes
    out_sizes: Sequence[Expression]
    geometry: Sequence[Expression]
    arguments: Sequence[Expression]

    def evaluate(self, **sizes: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the output's sizes, grid, block and scalar arguments."""
        out, geometry, arguments = (
            tuple(each.evaluate(sizes) for each in part) for part in (self.out_sizes, self.geometry, self.arguments)
        )
        return out, geometry[:3], geometry[3:6], arguments


class _Arguments(dict[int, Any]):
    nbSymExprs = 0


def build_embedded(
    trt: Any, op_type: str, parameters: Sequence[int], inputs: Sequence[NetworkTensor]
) -> Iterator[EmbeddedKernel]:
    """Do with a plugin what a build does, once for each combination of types and layouts that it takes."""
    creator = trt.get_plugin_registry().get_creator(op_type, "1", "restyle_deploy")
    # The parser gives integers of a list as int32.
    fields = [trt.PluginField("parameters", np.array(parameters, np.int32), trt.PluginFieldType.INT32)]
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    made = creator.create_plugin(op_type, "restyle_deploy", fields, trt.TensorRTPhase.BUILD, request)
    builder = ExpressionBuilder()
    (out_type,) = made.get_output_data_types([tensor.type for tensor in inputs], [len(t.sizes) for t in inputs])
    expressions = [tensor.expressions(builder) for tensor in inputs]
    (out_sizes,) = made.get_output_shapes(expressions, [], builder)
    output = NetworkTensor(tuple("out" for _ in out_sizes), out_type)
    tensors = [*inputs, output]
    flat = made.get_supported_format_combinations([tensor.described() for tensor in tensors], len(inputs))
    for start in range(0, len(flat), len(tensors)):
        combination = flat[start : start + len(tensors)]
        described = [tensor.described(each.format) for tensor, each in zip(tensors, combination, strict=True)]
        if any(each.type != tensor.type for each, tensor in zip(combination, tensors, strict=True)):
            continue  # a strongly typed network has its types
        made.configure_plugin(described[: len(inputs)], described[len(inputs) :])
        made.set_tactic(0)
        launch, arguments = SimpleNamespace(), _Arguments()
        made.get_launch_params(expressions, described, len(inputs), launch, arguments, builder)
        name, code = made.get_kernel(*([each.desc for each in part] for part in (described[:-1], described[-1:])))
        axes = [f"{part}_{axis}" for part in ("grid", "block") for axis in "xyz"]
        assert sorted(arguments) == list(range(arguments.nbSymExprs))
        yield EmbeddedKernel(
            types=tuple(each.type for each in combination),
            formats=tuple(each.format for each in combination),
            name=name,
            code=code,
            out_sizes=out_sizes,
            geometry=[getattr(launch, axis).expr for axis in axes],
            arguments=[arguments[index].expr for index in range(arguments.nbSymExprs)],
        )
