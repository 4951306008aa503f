"""Our plugins as Python `IPluginV3`, for a TensorRT that cannot embed kernels in engines.

An engine that holds them needs this module to be registered before it is loaded, and CUDA kernels compiled on that
machine: the first run of a shape's kernel compiles it, or takes it from the cache.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorrt as trt

from restyle_deploy.backends.tensorrt_plugins import (
    INPUTS,
    JIT_NAMESPACE,
    PARAMETERS,
    TENSOR_TYPES,
    TYPED_LIKE_X,
    VERSION,
    Operation,
    tensor_type,
)
from restyle_deploy.ops.launching import enqueue


class KernelPlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc, unused-ignore]
    """One of our operators; TensorRT calls all methods.

    Owned by TensorRT, which clones it freely: it holds nothing but what it computes.
    """

    def __init__(self, operation: Operation) -> None:
        trt.IPluginV3.__init__(self)
        trt.IPluginV3OneCore.__init__(self)
        trt.IPluginV3OneBuild.__init__(self)
        trt.IPluginV3OneRuntime.__init__(self)
        self.operation = operation
        self.plugin_name = operation.op_type
        self.plugin_namespace = JIT_NAMESPACE
        self.plugin_version = VERSION
        self.num_outputs = 1

    def get_capability_interface(self, type: Any) -> "KernelPlugin":
        """Return the object that builds and runs: this one."""
        return self

    def clone(self) -> "KernelPlugin":
        """Return a copy."""
        return KernelPlugin(self.operation)

    def attach_to_context(self, context: Any) -> "KernelPlugin":
        """Return a copy for an execution context."""
        return self.clone()

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Return the type of y: that of x."""
        return [input_types[0]]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        """Return the sizes of y as expressions of those of x."""
        x, y = inputs[0], trt.DimsExprs(4)
        height, width = (_Size(x[axis], builder) for axis in (2, 3))
        out_height, out_width = self.operation.out_size(height, width)
        y[0], y[1], y[2], y[3] = x[0], x[1], out_height.expression, out_width.expression
        return [y]

    def supports_format_combination(self, position: int, tensors: Sequence[Any], input_count: int) -> bool:
        """Whether a tensor's type and layout go with those before it."""
        image, described = tensors[0].desc, tensors[position].desc
        name = (*INPUTS[self.plugin_name], "y")[position]
        is_linear = described.format == trt.TensorFormat.LINEAR
        if name == "x":
            return described.type.name in TENSOR_TYPES and (is_linear or _is_unpadded_channels_last(described))
        if name == "y":
            return bool(described.type == image.type and described.format == image.format)
        return bool(is_linear and described.type == (image.type if name in TYPED_LIKE_X else trt.float32))

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Take the ranges of sizes: nothing depends on them before a run."""

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Take the sizes of the next runs: `enqueue` is told them, too."""

    def get_fields_to_serialize(self) -> Any:
        """Return what the engine keeps of this plugin."""
        self.parameters = np.array(self.operation.to_parameters(), np.int32)  # the field points to it
        return trt.PluginFieldCollection([trt.PluginField(PARAMETERS, self.parameters, trt.PluginFieldType.INT32)])

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch the kernel on a stream, given as a handle; tensors are addresses on the device.

        Raises:
            TypeError: x has a type that the kernels do not take.
            ValueError: no kernel for these sizes.
            BackendUnavailableError, BuildError: as `launching.enqueue`.
        """
        image = input_desc[0]
        chosen = self.operation.launch(
            tuple(image.dims),
            dtype=tensor_type(image.type).dtype,
            channels_last=image.format != trt.TensorFormat.LINEAR,
        )
        enqueue(chosen, inputs, outputs[0], stream=stream)


class KernelPluginCreator(trt.IPluginCreatorV3One):  # type: ignore[misc, unused-ignore]
    """Makes the plugins of one name, for the parser and when an engine is loaded."""

    def __init__(self, op_type: str) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name = op_type
        self.plugin_namespace = JIT_NAMESPACE
        self.plugin_version = VERSION
        field = trt.PluginField(PARAMETERS, np.array([], np.int32), trt.PluginFieldType.INT32)
        self.field_names = trt.PluginFieldCollection([field])

    def create_plugin(self, name: str, fields: Iterable[Any], phase: Any) -> KernelPlugin:
        """Return a plugin of the parameters among the fields.

        Raises:
            ValueError: there are none, or not the right number.
        """
        parameters = [value for field in fields if field.name == PARAMETERS for value in field.data]
        return KernelPlugin(Operation.from_parameters(parameters))


def register() -> None:
    """Register the creators of our plugins; those that are registered stay."""
    registry = trt.get_plugin_registry()
    for op_type in INPUTS:
        if registry.get_creator(op_type, VERSION, JIT_NAMESPACE) is None:
            registry.register_creator(KernelPluginCreator(op_type), JIT_NAMESPACE)


def _is_unpadded_channels_last(described: Any) -> bool:
    element = TENSOR_TYPES[described.type.name]
    has_layout: bool = described.format.name == element.channels_last
    return has_layout and described.dims[1] % element.channel_multiple == 0


class _Size:
    """A symbolic size with the operators that `Operation.out_size` uses on ints."""

    def __init__(self, expression: Any, builder: Any) -> None:
        self.expression = expression
        self._builder = builder

    def __add__(self, other: int) -> "_Size":
        return self._combine(trt.DimensionOperation.SUM, other)

    def __mul__(self, other: int) -> "_Size":
        return self._combine(trt.DimensionOperation.PROD, other)

    def __floordiv__(self, other: int) -> "_Size":
        return self._combine(trt.DimensionOperation.FLOOR_DIV, other)

    def _combine(self, operation: Any, other: int) -> "_Size":
        constant = self._builder.constant(other)
        return _Size(self._builder.operation(operation, self.expression, constant), self._builder)
