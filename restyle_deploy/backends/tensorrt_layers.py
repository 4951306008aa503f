"""The layers of a TensorRT engine as plain values, and the file that keeps them beside it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restyle_deploy.backends.tensorrt_interrupts import Interrupts
from restyle_deploy.backends.tensorrt_library import (
    Messages,
    construct,
    create_logger,
    describe_errors,
    describe_library,
)
from restyle_deploy.engines import LAYERS_SUFFIX
from restyle_deploy.errors import BuildError

_LOGGED_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w*), .*?, Outputs: \[(?P<outputs>.*)\], TacticName: "
    r".*?Metadata: (?P<metadata>.*)"
)
_LOGGED_TENSOR = re.compile(r"Dimensions: \[([^\]]*)\].*?, Datatype: (\w+), Format: \(?(\w+)")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def node_of_layer(layer: Any) -> str | None:
    """Return the name of the ONNX node that a layer of a network was parsed from; None for the parser's own."""
    return next(iter(_ONNX_LAYER.findall(layer.metadata or "")), None)


def describe_layer(layer: Any, node: str) -> dict[str, Any]:
    """Return what a layer of a network is: name, type, and precision and shapes of its outputs; it has no format yet.

    Args:
        layer: of the network.
        node: the name of the ONNX node that it belongs to.
    """
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    return {
        "name": layer.name,
        "type": layer.type.name,
        "precision": ", ".join(dict.fromkeys(output.dtype.name for output in outputs)),
        "format": None,
        "shapes": [list(output.shape) if len(output.shape) >= 0 else [] for output in outputs],
        "model_layers": _model_layers([node]),
    }


def layers_of_engine(trt: Any, plan: Any, *, host_code_allowed: bool) -> list[dict[str, Any]]:
    """Return the layers of a serialised engine, as the library's inspector tells them; needs the GPU.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        plan: the serialised engine, a buffer.
        host_code_allowed: see `RunnerOptions`.
    Raises:
        BuildError: the library does not take the engine, or tells the layers in a way that is not known.
        KeyboardInterrupt: there was a Ctrl-C meanwhile.
    """
    with Interrupts().put_off():
        text = _inspect(trt, plan, host_code_allowed=host_code_allowed)
    try:
        return [describe_inspected(layer) for layer in json.loads(text)["Layers"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BuildError(
            f"{describe_library(trt)} tells the layers in another way: {type(error).__name__}: {error}"
        ) from error


def describe_inspected(layer: Any) -> dict[str, Any]:
    """Return what the inspector says of a layer: an object, or the name alone where it knows no more.

    TensorRT 10 tells format and type in one text, which it has only for sizes that are fixed; TensorRT 11 in two.
    """
    if isinstance(layer, str):
        layer = {"Name": layer}
    outputs = layer.get("Outputs", [])
    pairs = [_format_and_type(output) for output in outputs]
    named = _ONNX_LAYER.findall(layer.get("Metadata", ""))
    return {
        "name": layer["Name"],
        "type": layer.get("LayerType", ""),
        "precision": ", ".join(dict.fromkeys(dtype for _, dtype in pairs)),
        "format": ", ".join(dict.fromkeys(name for name, _ in pairs)),
        "shapes": [output.get("Dimensions", []) for output in outputs],
        "model_layers": _model_layers(named),
    }


def layers_of_log(text: str) -> list[dict[str, Any]]:
    """Return the layers in the text that TensorRT for RTX logs of an engine while it builds it, one line each."""
    layers = []
    for line in text.splitlines():
        found = _LOGGED_LAYER.match(line)
        if found is not None:
            outputs = _LOGGED_TENSOR.findall(found["outputs"])
            layers.append(
                {
                    "name": found["name"],
                    "type": found["type"],
                    "precision": ", ".join(dict.fromkeys(dtype for _, dtype, _ in outputs)),
                    "format": ", ".join(dict.fromkeys(name for _, _, name in outputs)),
                    "shapes": [json.loads(f"[{shape}]") for shape, _, _ in outputs],
                    "model_layers": _model_layers(_ONNX_LAYER.findall(found["metadata"])),
                }
            )
    return layers


def write_layers(engine: Path, source: str, layers: list[dict[str, Any]]) -> None:
    """Write layers beside an engine's file; `source` says what they are of: `engine`, or `network`."""
    path = engine.with_suffix(LAYERS_SUFFIX)
    path.write_text(json.dumps({"of": source, "layers": layers}, indent=1) + "\n", encoding="utf-8")


def _inspect(trt: Any, plan: Any, *, host_code_allowed: bool) -> str:
    messages = Messages()
    runtime = construct(trt, messages, trt.Runtime, create_logger(trt, messages))
    runtime.engine_host_code_allowed = host_code_allowed
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(
            f"{describe_library(trt)} refuses the engine that it built: {describe_errors(messages.errors)}"
        )
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _format_and_type(output: Mapping[str, Any]) -> tuple[str, str]:
    """Return format and type of an output that the inspector describes."""
    values = {key.lower(): str(value) for key, value in output.items()}
    both = values.get("format/datatype", values.get("format", ""))
    return both, values.get("datatype", _type_in(both))


def _type_in(text: str) -> str:
    """Return the type in a text such as "Channel major FP16 format where channel % 8 == 0", or the whole of another."""
    found = re.search(r"FP32|TF32|FP16|BF16|Float|Half|BFloat16|Int32|Int64|Bool|INT8|FP8", text)
    return found.group(0) if found else text


def _model_layers(nodes: list[str]) -> list[str]:
    """Return the module paths in nodes' names, each once."""
    return list(dict.fromkeys(name.partition("/")[0] for name in nodes))
