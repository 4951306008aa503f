"""Engines of one plugin each, on real TensorRT. A process takes one route: plugins are registered once in it."""

import itertools
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from restyle_deploy.backends import tensorrt_plugins
from restyle_deploy.backends.tensorrt_plugins import PluginRoute, prepare_graph, register_plugins
from restyle_deploy.ops.upfirdn2d import upfirdn2d_epilogue
from restyle_deploy.runtime.device import find_processor
from tests.backends.plugin_models import (
    ACTIVATION,
    BLUR,
    SEPARABLE,
    SHAPE,
    SKIP,
    Arrays,
    factors_of,
    filtered_size,
    image_of,
    model_of,
)

DTYPES: dict[str, tuple[Any, torch.dtype]] = {
    "float32": (np.float32, torch.float32),
    "float16": (np.float16, torch.float16),
    "bfloat16": (ml_dtypes.bfloat16, torch.bfloat16),
}
BATCHES = (1, 2, 4)
IDENTITY = np.ones((1, 1), np.float32)
GEOMETRIES: dict[str, dict[str, Any] | None] = {"bias_act": None, "blur": BLUR, "skip_upsample": SKIP}


@dataclass(frozen=True)
class Case:
    """What one engine computes, in which type and layout of x and y."""

    geometry: str
    dtype: str
    channels_last: bool
    factors: int = 31


CASES = tuple(Case(*each) for each in itertools.product(GEOMETRIES, DTYPES, (False, True)))


def compare(route: PluginRoute, case: Case) -> float:
    """Build and run an engine; return the largest error, relative to the largest value, against torch in float32.

    Args:
        route: "aot" for what this TensorRT offers first, "jit" for the Python `IPluginV3`.
    """
    import tensorrt as trt

    if register_plugins(trt, "jit" if route == "jit" else None) != route:
        raise RuntimeError(f"TensorRT {trt.__version__} does not offer the route {route}")
    inputs, model = _inputs_and_model(case)
    prepare_graph(model, route, arch=find_processor("cuda:0"))
    plan = _build(trt, ir.to_proto(model).SerializeToString(), channels_last=case.channels_last)
    tensors = {name: torch.from_numpy(array.astype(np.float32)).cuda() for name, array in inputs.items()}
    dtype = DTYPES[case.dtype][1]
    image = tensors["x"].to(dtype)
    if case.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    wanted = _reference(case, tensors)
    got = torch.empty_like(wanted, dtype=dtype, memory_format=_memory_format(case))
    fed = {name: tensors[name] for name in ("demod", "next_scale")}
    _run(trt, plan, {"x": image, **fed}, got)
    return float((got.float() - wanted).abs().max() / wanted.abs().max())


def loads_alone(route: PluginRoute) -> bool:
    """Whether a process that knows nothing of our plugins loads an engine."""
    import tensorrt as trt

    assert register_plugins(trt) == route
    _, model = _inputs_and_model(CASES[0])
    prepare_graph(model, route, arch=find_processor("cuda:0"))
    plan = _build(trt, ir.to_proto(model).SerializeToString(), channels_last=False)
    script = (
        "import sys, tensorrt as trt; "
        "engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(open(sys.argv[1], 'rb').read()); "
        "sys.exit(engine is None)"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan"
        file.write_bytes(plan)
        return subprocess.run([sys.executable, "-c", script, str(file)], cwd=folder, check=False).returncode == 0


def _inputs_and_model(case: Case) -> tuple[Arrays, ir.Model]:
    element, geometry = DTYPES[case.dtype][0], GEOMETRIES[case.geometry]
    # Eight channels: the fewest that TensorRT does not pad.
    image = np.concatenate([image_of(0), image_of(1)], axis=1).astype(element)
    size = filtered_size(geometry, SEPARABLE) if geometry is not None else SHAPE[2:]
    factors = factors_of(case.factors, size, channels=image.shape[1])
    factors["noise"] = factors["noise"].astype(element)
    kernel = {"kernel": SEPARABLE} if geometry is not None else {}
    inputs: Arrays = {"x": image, **kernel, **factors}
    attributes = {**(geometry or {}), **ACTIVATION, "factors": case.factors}
    if geometry is not None:
        attributes["channels"] = image.shape[1]
    op_type = "BiasActEpilogue" if geometry is None else "UpFirDn2dEpilogue"
    constants = {name: array for name, array in inputs.items() if name not in ("x", "demod", "next_scale")}
    model = model_of(op_type, inputs, constants=constants, **attributes)
    for value in model.graph.inputs:
        value.shape = ir.Shape(("batch", *inputs[value.name or ""].shape[1:]))
    return inputs, model


def _reference(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    # What is rounded before the kernel sees it is rounded here, too.
    dtype = DTYPES[case.dtype][1]
    geometry = GEOMETRIES[case.geometry]
    epilogue: dict[str, Any] = {name: tensors[name] for name in ("demod", "bias", "next_scale")}
    epilogue["noise"] = tensors["noise"].to(dtype).float()
    epilogue |= ACTIVATION
    filtering: dict[str, Any] = {}
    if geometry is not None:
        filtering = {"up": geometry["up"][0], "down": geometry["down"][0], "pads": tuple(geometry["pads"])}
    kernel = tensors.get("kernel", torch.from_numpy(IDENTITY).cuda())
    return upfirdn2d_epilogue(tensors["x"].to(dtype).float(), kernel, **filtering, **epilogue)


def _memory_format(case: Case) -> torch.memory_format:
    return torch.channels_last if case.channels_last else torch.contiguous_format


def _build(trt: Any, model: bytes, *, channels_last: bool) -> bytes:
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    # From version 11 on all networks are strongly typed: the flag is there for older programs, and ignored.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.WARNING))
    if not parser.parse(model):
        raise RuntimeError("; ".join(str(parser.get_error(index)) for index in range(parser.num_errors)))
    image, result = network.get_input(0), network.get_output(0)
    if channels_last:
        layout = tensorrt_plugins.tensor_type(image.dtype).channels_last
        for tensor in (image, result):
            tensor.allowed_formats = 1 << int(getattr(trt.TensorFormat, layout))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        profile.set_shape(tensor.name, *((batch, *tuple(tensor.shape)[1:]) for batch in BATCHES))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT built no engine; its log says why")
    return bytes(plan)


def _run(trt: Any, plan: bytes, inputs: dict[str, torch.Tensor], output: torch.Tensor) -> None:
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    for name, tensor in inputs.items():
        context.set_input_shape(name, tuple(tensor.shape))
        context.set_tensor_address(name, tensor.data_ptr())
    context.set_tensor_address("y", output.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if not context.execute_async_v3(stream.cuda_stream):
        raise RuntimeError("the engine did not run; TensorRT's log says why")
    stream.synchronize()
