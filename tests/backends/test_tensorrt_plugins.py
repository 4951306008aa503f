import itertools
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
import pytest

from restyle_deploy.backends import tensorrt_plugins
from restyle_deploy.backends.tensorrt_plugins import (
    INPUTS,
    TENSOR_TYPES,
    Operation,
    prepare_graph,
    register_plugins,
)
from restyle_deploy.errors import BackendUnavailableError
from restyle_deploy.graph.precision import set_precision
from restyle_deploy.graph.rewrites.fuse_epilogue import fuse_epilogue
from restyle_deploy.ops.compiler import CompiledKernels, check_available
from restyle_deploy.ops.kernels.launches import INSTANTIATIONS, Epilogue, Factor, Filtering
from tests.backends import fake_tensorrt
from tests.backends.fake_tensorrt import DataType, NetworkTensor, TensorFormat, build_embedded

TYPES = [getattr(DataType, name) for name in TENSOR_TYPES]
FACTORS = [0, 1, 2, 4, 8, 16, 20, 23, 31]
IMAGES = [
    (1, 1),
    (3, 5),
    (16, 9),
    (16, 64),
    (512, 33),
    (64, 256),
]  # channels, and rows; columns are half as many, plus 1
FILTERINGS = [
    Filtering(pads=(1, 1, 1, 1), filter_size=(4, 4), is_separable=True),
    Filtering(up=(2, 2), pads=(2, 2, 1, 1), filter_size=(4, 4), is_separable=True),
    Filtering(up=(2, 2), pads=(2, 2, 1, 1), filter_size=(4, 4)),
    Filtering(up=(3, 3), down=(2, 2), pads=(2, 3, -1, 0), filter_size=(2, 3)),
]


def epilogue_of(factors: int) -> Epilogue:
    activation = {"negative_slope": 0.2, "gain": 1.4142135} if factors & Factor.ACTIVATION else {}
    return Epilogue(factors=Factor(factors), **activation)


def inputs_of(operation: Operation, sizes: tuple[int | str, ...], type: DataType, largest: int) -> list[NetworkTensor]:
    """The inputs of a plugin; absent factors are the size of neutral elements, which the kernels do not read."""
    batch, channels = sizes[:2]
    out_size = operation.out_size(*(size for size in sizes[2:] if isinstance(size, int)))
    present: dict[str, tuple[int | str, ...]] = {
        "demod": (batch, channels),
        "noise": (1, 1, *out_size),
        "bias": (channels,),
        "next_scale": (batch, channels),
    }
    flags = {"demod": Factor.DEMOD, "noise": Factor.NOISE, "bias": Factor.BIAS, "next_scale": Factor.NEXT_SCALE}
    tensors = {"x": NetworkTensor(sizes, type, largest)}
    if operation.filtering is not None:
        tensors["kernel"] = NetworkTensor(operation.filtering.filter_size)
    for name, flag in flags.items():
        shape = present[name] if flag in operation.epilogue.factors else (1,) * len(present[name])
        tensors[name] = NetworkTensor(shape, type if name == "noise" else DataType.FLOAT, largest)
    return [tensors[name] for name in INPUTS[operation.op_type]]


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A TensorRT 11.4 that embeds kernels, with the real decorators and nothing registered."""
    fake_tensorrt.require_decorators()
    module = fake_tensorrt.make_module("11.4.0.106", embeds_kernels=True)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    yield module
    for name in [name for name in sys.modules if name.startswith("tensorrt.")]:
        del sys.modules[name]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...], str, str]]:
    """What is compiled, without compiling it: kernel, expressions, architecture, format."""
    requests = []

    def pretend(kernel: str, expressions: Sequence[str], *, arch: str, format: str) -> CompiledKernels:
        requests.append((kernel, tuple(expressions), arch, format))
        names = {expression: f"symbol of {expression}" for expression in expressions}
        return CompiledKernels(code=b"some PTX\0", format="ptx", arch=arch, names=names)

    monkeypatch.setattr("restyle_deploy.backends.tensorrt_plugin_aot.compile_kernels", pretend)
    monkeypatch.setattr(tensorrt_plugins, "check_available", lambda: None)
    return requests


def check_kernels(trt: Any, operation: Operation, sizes: tuple[int, int, int, int], type: DataType) -> None:
    """All that is embedded for a batch of 1 to 5 is what `launches` has for each of them."""
    channels, height, width = sizes[1:]
    inputs = inputs_of(operation, ("batch", channels, height, width), type, largest=5)
    for kernel in build_embedded(trt, operation.op_type, operation.to_parameters(), inputs):
        is_channels_last = kernel.formats[0] is not TensorFormat.LINEAR
        for batch in (1, 2, 5):
            wanted = operation.launch(
                (batch, channels, height, width),
                dtype=TENSOR_TYPES[type.name].dtype,
                channels_last=is_channels_last,
            )
            out_shape, grid, block, scalars = kernel.evaluate(batch=batch)
            assert (out_shape, grid, block, scalars) == (wanted.out_shape, wanted.grid, wanted.block, wanted.scalars)
            assert (kernel.name, kernel.code) == (f"symbol of {wanted.expression}", b"some PTX")


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("factors", FACTORS)
def test_embedded_bias_act_equals_launches(
    trt: ModuleType, compiled: list[tuple[str, tuple[str, ...], str, str]], type: DataType, factors: int
) -> None:
    assert register_plugins(trt) == "aot"
    operation = Operation(arch="sm_89", epilogue=epilogue_of(factors))
    for channels, height in IMAGES:
        check_kernels(trt, operation, (1, channels, height, height // 2 + 1), type)
    assert {(kernel, arch, format) for kernel, _, arch, format in compiled} == {("fused_bias_act", "sm_89", "ptx")}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("filtering", FILTERINGS)
def test_embedded_upfirdn2d_equals_launches(
    trt: ModuleType, compiled: list[tuple[str, tuple[str, ...], str, str]], type: DataType, filtering: Filtering
) -> None:
    register_plugins(trt)
    for factors, (channels, height) in itertools.product((0, 20, 31), IMAGES[1:]):
        operation = Operation(arch="sm_120", epilogue=epilogue_of(factors), filtering=filtering)
        check_kernels(trt, operation, (1, channels, height, height // 2 + 1), type)
    assert {(kernel, arch, format) for kernel, _, arch, format in compiled} == {("upfirdn2d", "sm_120", "ptx")}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_generator(
    trt: ModuleType, compiled: list[tuple[str, tuple[str, ...], str, str]], project_root: Path, precision: str
) -> None:
    """All of a generator's operators become plugins, of instantiations that are tested."""
    register_plugins(trt)
    model = fuse_epilogue(ir.load(project_root / "engines/demo-faces/generator.onnx"))
    prepare_graph(set_precision(model, precision), "aot", arch="sm_89")
    nodes = [node for node in model.graph if node.domain]
    assert {node.op_type for node in nodes} == set(INPUTS)
    for node in nodes:
        operation = Operation.from_parameters(node.attributes["parameters"].as_ints())
        image, *rest = (network_tensor(value) for value in node.inputs)
        channels, height, width = (size for size in image.sizes[1:] if isinstance(size, int))
        kernels = list(build_embedded(trt, node.op_type, operation.to_parameters(), [image, *rest]))
        assert kernels[0].formats[0] is TensorFormat.LINEAR
        assert len(kernels) == 1 + (channels % TENSOR_TYPES[image.type.name].channel_multiple == 0)
        wanted = operation.launch(
            (3, channels, height, width), dtype=TENSOR_TYPES[image.type.name].dtype, channels_last=False
        )
        assert kernels[0].evaluate(N=3)[0] == wanted.out_shape
        out_sizes = node.outputs[0].shape
        assert out_sizes is not None
        assert tuple(out_sizes)[1:] == wanted.out_shape[1:]
    for kernel, expressions, _, _ in compiled:
        assert set(expressions) <= set(INSTANTIATIONS[kernel])


def network_tensor(value: ir.Value | None) -> NetworkTensor:
    assert value is not None
    assert value.shape is not None
    types = {"FLOAT": DataType.FLOAT, "FLOAT16": DataType.HALF, "BFLOAT16": DataType.BF16}
    sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return NetworkTensor(sizes, types[str(value.dtype)], largest=8)


@pytest.mark.parametrize(
    ("type", "channels", "wanted"),
    [
        (DataType.FLOAT, 3, [TensorFormat.LINEAR, TensorFormat.HWC]),
        (DataType.HALF, 16, [TensorFormat.LINEAR, TensorFormat.HWC8]),
        (DataType.BF16, 8, [TensorFormat.LINEAR, TensorFormat.HWC8]),
        (DataType.HALF, 12, [TensorFormat.LINEAR]),  # TensorRT would pad to 16
    ],
)
@pytest.mark.usefixtures("compiled")
def test_layouts_offered(trt: ModuleType, type: DataType, channels: int, wanted: list[TensorFormat]) -> None:
    register_plugins(trt)
    operation = Operation(arch="sm_89", epilogue=epilogue_of(31))
    inputs = inputs_of(operation, (2, channels, 8, 8), type, largest=2)
    kernels = list(build_embedded(trt, operation.op_type, operation.to_parameters(), inputs))
    assert [kernel.formats for kernel in kernels] == [(layout, *[TensorFormat.LINEAR] * 4, layout) for layout in wanted]
    assert {kernel.types for kernel in kernels} == {(type, DataType.FLOAT, type, *[DataType.FLOAT] * 2, type)}


@pytest.mark.usefixtures("compiled")
def test_batch_range_that_no_grid_holds(trt: ModuleType) -> None:
    register_plugins(trt)
    operation = Operation(arch="sm_89", epilogue=epilogue_of(0), filtering=FILTERINGS[0])
    inputs = inputs_of(operation, ("batch", 512, 8, 8), DataType.FLOAT, largest=1000)
    with pytest.raises(ValueError, match="split the batch"):
        list(build_embedded(trt, operation.op_type, operation.to_parameters(), inputs))


@pytest.mark.usefixtures("compiled")
def test_type_without_kernel(trt: ModuleType) -> None:
    register_plugins(trt)
    operation = Operation(arch="sm_89", epilogue=epilogue_of(31))
    inputs = inputs_of(operation, (1, 8, 4, 4), DataType.INT8, largest=1)
    with pytest.raises(TypeError, match="x is INT8, expected one of FLOAT, HALF, BF16"):
        list(build_embedded(trt, operation.op_type, operation.to_parameters(), inputs))


@pytest.mark.usefixtures("compiled")
def test_registering_twice(trt: Any) -> None:
    assert [register_plugins(trt), register_plugins(trt)] == ["aot", "aot"]
    assert set(trt.get_plugin_registry().creators) == {(name, "1", "restyle_deploy") for name in INPUTS}


@pytest.mark.parametrize(
    ("operation", "type"),
    [
        (Operation(arch="sm_90", epilogue=epilogue_of(31)), DataType.HALF),
        (Operation(arch="sm_90", epilogue=epilogue_of(23), filtering=FILTERINGS[0]), DataType.BF16),
    ],
    ids=lambda value: value.op_type if isinstance(value, Operation) else None,
)
def test_ptx(trt: ModuleType, operation: Operation, type: DataType) -> None:
    try:
        check_available()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    register_plugins(trt)
    inputs = inputs_of(operation, ("batch", 16, 32, 32), type, largest=4)
    kernel = next(build_embedded(trt, operation.op_type, operation.to_parameters(), inputs))
    text = kernel.code.decode("ascii")
    assert ".target sm_90" in text
    assert f".entry {kernel.name}(" in text
    declared = text.split(f".entry {kernel.name}(")[1].split(")")[0]
    _, _, _, scalars = kernel.evaluate(batch=4)
    kinds = [line.split()[1] for line in declared.splitlines() if line.strip()]
    assert kinds == [".u64"] * len(inputs) + [".u32"] * len(scalars) + [".u64"]


@pytest.mark.parametrize("filtering", [None, *FILTERINGS])
@pytest.mark.parametrize("factors", FACTORS)
def test_parameters_are_kept(filtering: Filtering | None, factors: int) -> None:
    epilogue = epilogue_of(factors)
    operation = Operation(arch="sm_75", epilogue=epilogue, filtering=filtering)
    parameters = operation.to_parameters()
    struct.pack(f"<{len(parameters)}i", *parameters)
    kept = Operation.from_parameters(parameters)
    assert (kept.arch, kept.filtering, kept.epilogue.factors) == ("sm_75", filtering, factors)
    assert kept.epilogue.scalars == epilogue.scalars


def test_wrong_number_of_parameters() -> None:
    with pytest.raises(ValueError, match="got 3 parameters, expected 4 or 15"):
        Operation.from_parameters([89, 31, 0])
