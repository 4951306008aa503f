"""Arguments and options that several commands share."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from restyle_deploy.backends import BACKENDS, default_device
from restyle_deploy.backends.base import EXACT_PRECISION, MOST_IMAGES, PRECISIONS

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# More than any GPU has.
_MOST_BYTES = 2**40

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
images_argument = click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
preview_option = click.option(
    "--preview-steps", is_flag=True, help="Render all steps but the last only up to the encoder's size (approximate)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


PRECISION_HELP = (
    "What is computed in; all but fp32 are approximate. mixed: the encoder in fp32, the generator in bf16 (openvino)."
)


def device_option(help_text: str) -> Decorator:
    """Return the option --device, whose default is that of the backend; --backend has to be eager."""
    defaults = ", ".join(dict.fromkeys(row.device for row in BACKENDS.values()))
    return click.option("--device", callback=_default_device, show_default=f"the backend's: {defaults}", help=help_text)


def session_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --backend, --device, --threads, --precision and --plain."""
    options: list[Decorator] = [
        click.option(
            "--backend",
            type=click.Choice(list(BACKENDS)),
            default="onnxruntime",
            show_default=True,
            is_eager=True,
            help="Library that runs the graphs.",
        ),
        device_option("Device that the backend runs on."),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            show_default="the backend's choice",
            help="CPU threads of one run.",
        ),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            default=EXACT_PRECISION,
            show_default=True,
            help=PRECISION_HELP,
        ),
        click.option("--plain", is_flag=True, help="Run the exported graphs, even where an engine has been built."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that only some backends have; a backend without one refuses it."""
    batches = click.IntRange(1, MOST_IMAGES)
    options: list[Decorator] = [
        click.option(
            "--min-batch", type=batches, help="Both TensorRT libraries: fewest images of one run.", show_default="1"
        ),
        click.option(
            "--opt-batch",
            type=batches,
            help="Both TensorRT libraries: images of one run to be fastest for.",
            show_default="1, or --min-batch",
        ),
        click.option(
            "--max-batch",
            type=batches,
            help="Both TensorRT libraries: most images of one run.",
            show_default="8, or the largest of the others",
        ),
        click.option(
            "--workspace",
            "workspace_bytes",
            callback=_parse_bytes,
            metavar="BYTES",
            help="Both TensorRT libraries: memory for one layer's own use, as 512M or 1.5G, by powers of 1024.",
        ),
        click.option(
            "--optimization-level", type=click.IntRange(0, 5), help="TensorRT: higher levels build for longer."
        ),
        click.option(
            "--compute-capability",
            "compute_capabilities",
            multiple=True,
            callback=_parse_capabilities,
            help="TensorRT for RTX: GPUs that the engine is for, wherever it is built, as 8.9 or 8.6,8.9; repeatable.",
            show_default="that of the GPU; without one 8.0, 8.6, 8.9, 12.0",
        ),
        click.option(
            "--hardware-compatible", is_flag=True, help="TensorRT: the engine runs on all GPUs from Ampere on, slower."
        ),
        click.option(
            "--version-compatible",
            is_flag=True,
            help="TensorRT: the engine runs with later versions of the same major version of the library.",
        ),
        click.option(
            "--stripped",
            is_flag=True,
            help="Both TensorRT libraries: leave the weights out; opening takes them from the bundle's graphs.",
        ),
        click.option(
            "--no-plugins",
            is_flag=True,
            help="Both TensorRT libraries: their own operations replace our CUDA kernels; TensorRT for RTX has none.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _parse_bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Return the number in a text such as 512M, 1.5G, 2GB or 2 GiB."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{value!r} is no number of bytes, such as 512M, 1.5G or 2GiB")
    number = float(found.group(1)) * _UNITS[found.group(2).upper()]
    if number < 1:
        raise click.BadParameter(f"{value!r} is no memory at all; name some, such as 512M, or leave it out")
    if number > _MOST_BYTES:
        raise click.BadParameter(f"{value!r} is more memory than any GPU has; name at most 1T")
    return int(number)


def _parse_capabilities(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Return compute capabilities as 8.9, from texts such as "8.6, 8.9", sm_89 and 89."""
    return tuple(_parse_capability(text.strip()) for value in values for text in value.split(","))


def _parse_capability(text: str) -> str:
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text, re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{text!r} is no compute capability; write 8.9, sm_89 or 89, several as 8.9,12.0")
    return ".".join(found.groups())


def _default_device(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    backend = context.params.get("backend")  # missing where --backend itself is
    return default_device(backend) if value is None and backend else value
