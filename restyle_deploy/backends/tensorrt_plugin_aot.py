"""Our plugins by the decorators of `tensorrt.plugin`: the engine holds the kernel's PTX and how it is launched.

TensorRT passes the kernel the inputs' pointers, then int32 arguments, then the output's pointer. Grid and arguments are
symbolic in the sizes of the tensors, which the engine knows when it runs.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends.tensorrt_plugins import (
    INPUTS,
    NAMESPACE,
    PARAMETERS,
    TYPED_LIKE_X,
    Operation,
    tensor_type,
)
from restyle_deploy.ops.compiler import compile_kernels
from restyle_deploy.ops.kernels.geometry import Blocks, Threads, fused_bias_act_grid, upfirdn2d_grid
from restyle_deploy.ops.kernels.launches import ELEMENT_TYPES


def register(plugin: Any) -> None:
    """Register our plugins with the decorators of `tensorrt.plugin`; those that are registered stay.

    Args:
        plugin: the module `tensorrt.plugin` of TensorRT ≥ 10.9.
    """
    for op_type in INPUTS:
        if not hasattr(getattr(plugin.op, NAMESPACE, None), op_type):
            _register(plugin, op_type)


def _register(plugin: Any, op_type: str) -> None:
    """Register one plugin. The decorators read the functions' signatures: the inputs' names, then the attributes."""
    identifier, tensors = f"{NAMESPACE}::{op_type}", INPUTS[op_type]

    def describe(x: Any, *_: Any, parameters: NDArray[np.int32]) -> Any:
        y = x.like()
        y.shape_expr[2], y.shape_expr[3] = Operation.from_parameters(parameters).out_size(*tuple(x.shape_expr)[2:])
        return y

    def list_formats(x: Any, *_: Any) -> list[Any]:
        return [plugin.AutoTuneCombination(types, layouts) for types, layouts in _formats(op_type, x)]

    def embed_kernel(x: Any, *rest: Any) -> tuple[str, bytes, Any, Any]:
        *_, parameters, (y,), _tactic = rest
        return _embedded_kernel(plugin, Operation.from_parameters(parameters), x, y)

    described = {**dict.fromkeys(tensors, plugin.TensorDesc), PARAMETERS: NDArray[np.int32]}
    kernel = tuple[str, bytes, plugin.KernelLaunchParams, plugin.SymIntExprs]
    plugin.register(identifier)(_with_signature(describe, described, plugin.TensorDesc))
    plugin.autotune(identifier)(_with_signature(list_formats, _unannotated(*tensors, "outputs")))
    arguments = _unannotated(*tensors, PARAMETERS, "outputs", "tactic")
    plugin.aot_impl(identifier)(_with_signature(embed_kernel, arguments, kernel))


def _unannotated(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, inspect.Parameter.empty)


def _with_signature(
    function: Callable[..., Any], parameters: Mapping[str, Any], returns: Any = inspect.Signature.empty
) -> Callable[..., Any]:
    """Give a function the signature that TensorRT is to read."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    signed: Any = function
    signed.__signature__ = inspect.Signature(named, return_annotation=returns)
    return function


def _formats(op_type: str, x: Any) -> list[tuple[str, str]]:
    """Return the types and layouts of inputs and output that a plugin takes, comma-separated as TensorRT reads them."""
    element, names = tensor_type(x.dtype), (*INPUTS[op_type], "y")
    types = ",".join(element.code if name in TYPED_LIKE_X else "FP32" for name in names)
    layouts = ["LINEAR"]
    if x.shape[1] > 0 and x.shape[1] % element.channel_multiple == 0:
        layouts.append(element.channels_last)
    return [(types, ",".join(layout if name in ("x", "y") else "LINEAR" for name in names)) for layout in layouts]


def _embedded_kernel(plugin: Any, operation: Operation, x: Any, y: Any) -> tuple[str, bytes, Any, Any]:
    """Return symbol, PTX, grid and block, and the int32 arguments, the latter two symbolic in the sizes of x and y."""
    element, channels_last = tensor_type(x.dtype), x.format.name != "LINEAR"
    # Of a range of batches the upper end must be launchable, too. The kernel is the same for all.
    largest = x.shape.max if x.shape.is_dynamic else x.shape
    launch = operation.launch(tuple(largest), dtype=element.dtype, channels_last=channels_last)
    extents = _extents(operation, x, y)
    grid, block = _geometry(operation, extents, dtype=element.dtype, channels_last=channels_last)
    compiled = compile_kernels(launch.kernel, [launch.expression], arch=operation.arch, format="ptx")
    names = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")
    sizes = plugin.KernelLaunchParams(**dict(zip(names, (*grid, *block), strict=True)))
    scalars = (*extents, *launch.scalars[len(extents) :])
    arguments = plugin.SymIntExprs.from_tuple(tuple(plugin.SymInt32(scalar) for scalar in scalars))
    return compiled.names[launch.expression], compiled.code.rstrip(b"\0"), sizes, arguments


def _extents(operation: Operation, x: Any, y: Any) -> tuple[Any, ...]:
    """Return the symbolic ones of the kernel's arguments, which come first."""
    batch, channels, height, width = x.shape_expr
    if operation.filtering is None:
        return batch, channels, height * width
    return batch, channels, height, width, *tuple(y.shape_expr)[2:]


def _geometry(
    operation: Operation, extents: tuple[Any, ...], *, dtype: str, channels_last: bool
) -> tuple[Blocks, Threads]:
    item_bytes = ELEMENT_TYPES[dtype].item_bytes
    if operation.filtering is None:
        batch, channels, pixels = extents
        return fused_bias_act_grid(batch, channels, pixels, item_bytes, channels_last=channels_last)
    batch, channels, *_, out_height, out_width = extents
    return upfirdn2d_grid(
        operation.filtering.config,
        *(batch, channels, out_height, out_width),
        item_bytes=item_bytes,
        channels_last=channels_last,
    )
