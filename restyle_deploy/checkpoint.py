"""Official `.pt` files -> `Checkpoint`. Nothing in a file is executed, nothing in it is passed over silently."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from restyle_deploy.errors import CheckpointError
from restyle_deploy.files import sha256_of_file
from restyle_deploy.model_config import (
    OFFICIAL_INPUT_SIZE,
    OFFICIAL_MAPPING_LAYERS,
    OFFICIAL_STYLE_DIM,
    OFFICIAL_WIDTHS,
    ModelConfig,
    official_generator_channels,
)
from restyle_deploy.variants import VARIANTS, variant_from_dataset_type

OFFICIAL_ENCODER_TYPE = "BackboneEncoder"
OFFICIAL_OUTPUT_SIZE = 1024
OFFICIAL_DATASET_TYPE = "ffhq_encode"
# Below, the style heads have no map to reduce; above, upstream's generator has no channels.
SMALLEST_SIZE, LARGEST_SIZE = 32, 1024
ENCODER_STAGES = 4


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        path: the file.
        sha256: of the file, hexadecimal.
        config: the architecture, from the file's options and the overrides.
        state_dict: `encoder.*` and `decoder.*`, floating point as float32, all finite; may be mapped from the file.
        latent_avg: [n_styles, style_dim] float32.
    """

    path: Path
    sha256: str
    config: ModelConfig
    state_dict: Mapping[str, Tensor]
    latent_avg: Tensor


def load_checkpoint(path: Path, *, overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read an official checkpoint.

    Args:
        path: a file with `state_dict`, `opts` and `latent_avg`; other entries (optimiser, discriminator) are ignored.
        overrides: fields of `ModelConfig` that win over the file's options (a recipe's `[model]` table).
    Raises:
        CheckpointError: the file cannot be read, holds other pickled objects than tensors and plain values, lacks an
            entry, announces an impossible architecture, or holds NaN or infinity.
    Source: upstream models/psp.py, pSp.load_weights.
    """
    content = _read_file(path)
    missing = [key for key in ("state_dict", "latent_avg") if key not in content]
    if missing:
        raise CheckpointError(
            f"{path}: no {' and no '.join(missing)} in it (found: {', '.join(map(str, content)) or 'nothing'}); "
            "expected a checkpoint of the official training code"
        )
    state_dict = _as_float32(content["state_dict"], path)
    options = {} if content.get("opts") is None else content["opts"]
    if not isinstance(options, Mapping):
        raise CheckpointError(f"{path}: `opts` is a {type(options).__name__}, expected a dict")
    has_mapping = any(key.startswith("decoder.style.") for key in state_dict)
    mapping_layers = options.get("mapping_layers", OFFICIAL_MAPPING_LAYERS) if has_mapping else 0
    try:
        config = config_from_options(options, mapping_layers=mapping_layers, overrides=overrides or {})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_finite({**state_dict, "latent_avg": content["latent_avg"]}, path)
    return Checkpoint(
        path=path,
        sha256=sha256_of_file(path),
        config=config,
        state_dict=state_dict,
        latent_avg=_repeat_latent_avg(content["latent_avg"], config, path),
    )


def config_from_options(
    options: Mapping[str, Any], *, mapping_layers: int, overrides: Mapping[str, Any]
) -> ModelConfig:
    """Return the architecture that a checkpoint's options mean; what they do not say is as in the official models.

    Args:
        options: the checkpoint's `opts`; of the official ones `encoder_type`, `output_size` and `dataset_type` count,
            and any field of `ModelConfig` may be given for a model of another size.
        mapping_layers: layers of the mapping network; 0 when the state dict has none of it.
        overrides: fields of `ModelConfig` that win.
    Raises:
        CheckpointError: names every impossible or unknown value at once.
    """
    known = {field.name for field in fields(ModelConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise CheckpointError(f"unknown model fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    given = {key: value for key, value in options.items() if value is not None}
    values: dict[str, Any] = {
        "encoder_type": OFFICIAL_ENCODER_TYPE,
        "domain": variant_from_dataset_type(str(given.get("dataset_type", OFFICIAL_DATASET_TYPE))).name,
        "output_size": OFFICIAL_OUTPUT_SIZE,
        "input_size": OFFICIAL_INPUT_SIZE,
        "style_dim": OFFICIAL_STYLE_DIM,
        "generator_channels": {},
        "encoder_widths": OFFICIAL_WIDTHS,
        "encoder_units": (),
    }
    values |= {key: value for key, value in given.items() if key in known}
    values |= {"mapping_layers": mapping_layers, **overrides}
    values["generator_channels"] = _with_whole_keys(values["generator_channels"])
    problems = _find_problems(values)
    if problems:
        raise CheckpointError("impossible model options: " + "; ".join(problems))
    values["generator_channels"] = values["generator_channels"] or official_generator_channels(values["output_size"])
    for key in ("encoder_widths", "encoder_units"):
        values[key] = tuple(values[key])
    return ModelConfig(**values)


def check_state_dict(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise `CheckpointError` with every missing, unexpected and misshapen (or mistyped) key, or return."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen = [
        f"{key} (got {_describe(found[key])}, expected {_describe(tensor)})"
        for key, tensor in expected.items()
        if key in found and _describe(found[key]) != _describe(tensor)
    ]
    named = {"missing": missing, "unexpected": unexpected, "of another shape or type": misshapen}
    problems = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in named.items() if keys]
    if problems:
        raise CheckpointError(
            f"{path}: the weights do not fit the architecture that the options announce; {'; '.join(problems)}"
        )


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file can fail anywhere in the reader
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path}: holds pickled objects other than tensors and plain values, which could run code, and is "
                f"refused ({refused[1]}); save it again with plain values only"
            ) from error
        raise CheckpointError(f"{path}: not a torch checkpoint, or damaged ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict with `state_dict`")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # its text advises to load the file with code execution
        return "its content is no pickle of tensors and plain values"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _as_float32(state_dict: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(key, str) and _is_dense_tensor(value) for key, value in state_dict.items()
    ):
        raise CheckpointError(f"{path}: `state_dict` holds something else than dense tensors by name")
    tensors = {key: value.detach() for key, value in state_dict.items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def _is_dense_tensor(value: Any) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
        and value.device.type == "cpu"
    )


def _check_finite(tensors: Mapping[str, Any], path: Path) -> None:
    bad = [key for key, value in tensors.items() if isinstance(value, Tensor) and not bool(value.isfinite().all())]
    if bad:
        raise CheckpointError(f"{path}: NaN or infinity in {', '.join(bad)}")


def _repeat_latent_avg(latent_avg: Any, config: ModelConfig, path: Path) -> Tensor:
    shapes = [(config.style_dim,), (1, config.style_dim), (config.n_styles, config.style_dim)]
    if not _is_dense_tensor(latent_avg) or tuple(latent_avg.shape) not in shapes:
        got = list(latent_avg.shape) if isinstance(latent_avg, Tensor) else type(latent_avg).__name__
        raise CheckpointError(f"{path}: latent_avg: got {got}, expected {list(shapes[-1])} or {list(shapes[0])}")
    return latent_avg.detach().float().expand(shapes[-1]).contiguous()


def _with_whole_keys(channels: Any) -> Any:
    """Return channels by size with sizes that were written as text (JSON and TOML have no other keys) as numbers."""
    if not isinstance(channels, Mapping):
        return channels
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: value for key, value in channels.items()}


def _find_problems(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each field that is not what the architecture needs."""
    output_size = values["output_size"]
    largest = output_size if _is_size(output_size) else LARGEST_SIZE
    sizes = sorted(official_generator_channels(largest))
    channels, widths, units = (values[key] for key in ("generator_channels", "encoder_widths", "encoder_units"))
    expectations = {
        "encoder_type": (isinstance(values["encoder_type"], str), "a name"),
        "domain": (values["domain"] in list(VARIANTS), f"one of {', '.join(VARIANTS)}"),
        "output_size": (_is_size(output_size), f"a power of two from {SMALLEST_SIZE} to {LARGEST_SIZE}"),
        "input_size": (
            _is_size(values["input_size"], largest=largest),
            f"a power of two from {SMALLEST_SIZE} to output_size ({output_size})",
        ),
        "style_dim": (_is_count(values["style_dim"]), "a positive whole number"),
        "mapping_layers": (_is_count(values["mapping_layers"], smallest=0), "a whole number, 0 or more"),
        "encoder_widths": (_are_stages(widths), f"{ENCODER_STAGES} positive whole numbers"),
        "encoder_units": (_are_stages(units) or units in ((), []), f"{ENCODER_STAGES} positive whole numbers, or none"),
        "generator_channels": (
            channels == {} or _are_channels(channels, sizes),
            f"a positive whole number for each of the sizes {', '.join(map(str, sizes))}",
        ),
    }
    return [f"{key} is {values[key]!r}, expected {text}" for key, (fits, text) in expectations.items() if not fits]


def _is_count(value: Any, *, smallest: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= smallest


def _is_size(value: Any, *, largest: int = LARGEST_SIZE) -> bool:
    return _is_count(value, smallest=SMALLEST_SIZE) and value & (value - 1) == 0 and value <= largest


def _are_stages(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) == ENCODER_STAGES and all(map(_is_count, values))


def _are_channels(channels: Any, sizes: list[int]) -> bool:
    return isinstance(channels, Mapping) and set(channels) == set(sizes) and all(map(_is_count, channels.values()))
