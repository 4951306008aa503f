"""Our CUDA kernels as TensorRT plugins: which of TensorRT's plugin interfaces is used, and what a plugin is told.

Routes, best first:

    aot         TensorRT ≥ 10.9, and a driver that takes the PTX of this machine's compiler: it lies in the engine,
                which then needs neither Python nor a library.
    jit         else: a Python `IPluginV3` launches the kernel; `register_plugins` also before loading.
    functions   TensorRT for RTX: no plugins; the operators' function bodies are built.

A plugin has the name and the inputs of an epilogue operator (`ops.onnx_functions`), and one attribute, `parameters`:
int32 values, so that nothing depends on how the ONNX parser orders and types attributes.

Source: the sources of `tensorrt.plugin` 11.4 and of onnx-tensorrt's plugin importer.
"""

import importlib
import logging
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from restyle_deploy.ops.compiler import check_available
from restyle_deploy.ops.cuda_versions import ptx_refusal
from restyle_deploy.ops.kernels.launches import (
    Epilogue,
    Factor,
    Filtering,
    Launch,
    launch_fused_bias_act,
    launch_upfirdn2d,
)
from restyle_deploy.ops.onnx_functions import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

PluginRoute: TypeAlias = Literal["aot", "jit", "functions"]

NAMESPACE = DOMAIN
# Those that Python launches are registered apart: both routes may be used in one process, and an engine of one of them
# would find the other's.
JIT_NAMESPACE = f"{NAMESPACE}_jit"
VERSION = "1"  # of the plugins, and of what `Operation.to_parameters` means: an engine finds no plugin of another one
PARAMETERS = "parameters"
# Names of the inputs, in the order of the kernels' pointers.
FACTOR_INPUTS = ("demod", "noise", "bias", "next_scale")
INPUTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"BiasActEpilogue": ("x", *FACTOR_INPUTS), "UpFirDn2dEpilogue": ("x", "kernel", *FACTOR_INPUTS)}
)
# These have the type of x; all others are float32.
TYPED_LIKE_X = ("x", "noise", "y")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TensorType:
    """A type of x, noise and y.

    Attributes:
        dtype: a key of `launches.ELEMENT_TYPES`.
        code: TensorRT's name for it in lists of supported types.
        channels_last: TensorRT's name of the layout that is [N, H, W, C] in memory.
        channel_multiple: a number of channels that TensorRT does not pad in that layout is a multiple of this.
    """

    dtype: str
    code: str
    channels_last: str
    channel_multiple: int


# By the name of TensorRT's DataType. HWC is for float32 alone, HWC8 for the types of two bytes.
TENSOR_TYPES: Mapping[str, TensorType] = MappingProxyType(
    {
        "FLOAT": TensorType(dtype="float32", code="FP32", channels_last="HWC", channel_multiple=1),
        "HALF": TensorType(dtype="float16", code="FP16", channels_last="HWC8", channel_multiple=8),
        "BF16": TensorType(dtype="bfloat16", code="BF16", channels_last="HWC8", channel_multiple=8),
    }
)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What a plugin computes.

    Attributes:
        arch: the GPU architecture that an embedded kernel is compiled for, "sm_89" style.
        epilogue: the factors that are present; its noise strength is 1, the graph's noise has it already.
        filtering: of an UpFirDn2dEpilogue; None for a BiasActEpilogue.
    """

    arch: str
    epilogue: Epilogue
    filtering: Filtering | None = None

    @property
    def op_type(self) -> str:
        """The plugin's name."""
        return "BiasActEpilogue" if self.filtering is None else "UpFirDn2dEpilogue"

    def to_parameters(self) -> tuple[int, ...]:
        """Return the int32 values of the plugin's attribute."""
        _, slope_bits, gain_bits = self.epilogue.scalars
        head = (int(self.arch.removeprefix("sm_")), int(self.epilogue.factors), slope_bits, gain_bits)
        if self.filtering is None:
            return head
        filtering = self.filtering
        sizes = (*filtering.up, *filtering.down, *filtering.pads, *filtering.filter_size)
        return (*head, *sizes, int(filtering.is_separable))

    @staticmethod
    def from_parameters(parameters: Iterable[int]) -> "Operation":
        """Return what `to_parameters` was called on.

        Raises:
            ValueError: a wrong number of values.
        """
        values = tuple(int(value) for value in parameters)
        if len(values) not in (4, 15):
            raise ValueError(f"plugin: got {len(values)} parameters, expected 4 or 15")
        arch, factors, slope_bits, gain_bits, *sizes = values
        slope, gain = struct.unpack("<ff", struct.pack("<ii", slope_bits, gain_bits))
        return Operation(
            arch=f"sm_{arch}",
            epilogue=Epilogue(factors=Factor(factors), negative_slope=slope, gain=gain),
            filtering=_filtering_of(sizes) if sizes else None,
        )

    def launch(self, shape: Sequence[int], *, dtype: str, channels_last: bool) -> Launch:
        """Choose the kernel for an x of [N, C, H, W].

        Raises:
            TypeError: no kernel for this dtype.
            ValueError: no kernel for this shape or filtering.
        """
        if self.filtering is None:
            return launch_fused_bias_act(shape, self.epilogue, dtype=dtype, channels_last=channels_last)
        return launch_upfirdn2d(shape, self.filtering, self.epilogue, dtype=dtype, channels_last=channels_last)

    def out_size(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Return H', W' of y; ints for ints, symbolic for TensorRT's symbolic integers."""
        if self.filtering is None:
            return height, width
        (up, _), (down, _), (top, left, bottom, right) = self.filtering.up, self.filtering.down, self.filtering.pads
        rows, columns = self.filtering.filter_size
        return (
            (height * up + (top + bottom - rows)) // down + 1,
            (width * up + (left + right - columns)) // down + 1,
        )


def tensor_type(data_type: Any) -> TensorType:
    """Return what we know of a `tensorrt.DataType`.

    Raises:
        TypeError: our kernels do not take it.
    """
    if data_type.name not in TENSOR_TYPES:
        raise TypeError(f"plugin: x is {data_type.name}, expected one of {', '.join(TENSOR_TYPES)}")
    return TENSOR_TYPES[data_type.name]


def choose_route(trt: Any) -> tuple[PluginRoute, str]:
    """Return the best route that a TensorRT module offers on this machine, and the reason.

    Args:
        trt: the module `tensorrt`, at least 10.1, or `tensorrt_rtx`.
    """
    version = f"{trt.__name__} {trt.__version__}"
    if trt.__name__ != "tensorrt":
        return "functions", f"{version} takes no Python plugins"
    if not hasattr(trt, "QuickPluginCreationRequest"):
        return "jit", f"{version} cannot embed kernels in the engine (since 10.9): Python launches them"
    refusal = ptx_refusal()
    if refusal:
        return "jit", f"{refusal}, which {version} would embed in the engine: Python launches the kernels"
    return "aot", f"{version} embeds kernels in the engine"


def register_plugins(trt: Any, route: PluginRoute | None = None) -> PluginRoute:
    """Make our plugins known to TensorRT; safe to call again.

    Needed before a graph is parsed and, for the route "jit", before an engine is loaded.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        route: that an engine was built by; None: the best one, whose reason is logged, see `choose_route`.
    Returns:
        The route, for `prepare_graph`.
    Raises:
        BackendUnavailableError: the compiler of the kernels is not installed, or the driver is too old for it.
    """
    if route is None:
        route, reason = choose_route(trt)
        _logger.info("plugin route %s: %s", route, reason)
    if route == "functions":
        return route
    check_available()
    # Here, because these are made of this module's `Operation`, and one imports TensorRT.
    if route == "aot":
        from restyle_deploy.backends import tensorrt_plugin_aot

        tensorrt_plugin_aot.register(importlib.import_module(f"{trt.__name__}.plugin"))
    else:
        from restyle_deploy.backends import tensorrt_plugin_v3

        tensorrt_plugin_v3.register()
    return route


def prepare_graph(model: "ir.Model", route: PluginRoute, *, arch: str | None = None) -> "ir.Model":
    """Replace our operators by our plugins, in place; the route "functions" leaves the graph alone.

    To be called last: the plugins' nodes mean nothing to the rewrites, and the function bodies go.

    Args:
        model: our operators are at its top level; types of all their inputs are known.
        route: what `register_plugins` returned.
        arch: the architecture that embedded kernels are compiled for; they run on it and on later ones. Not read for
            the route "functions".
    Raises:
        BuildError: the type of an operator's input is not known, or none that the kernels take.
    """
    if route != "functions":
        assert arch is not None
        from restyle_deploy.backends.tensorrt_plugin_graph import bind_plugins  # onnx_ir is there for builds alone

        bind_plugins(model, arch=arch, is_aot=route == "aot")
    return model


def _filtering_of(sizes: Sequence[int]) -> Filtering:
    up, other_up, down, other_down, top, left, bottom, right, rows, columns, is_separable = sizes
    return Filtering(
        up=(up, other_up),
        down=(down, other_down),
        pads=(top, left, bottom, right),
        filter_size=(rows, columns),
        is_separable=bool(is_separable),
    )
