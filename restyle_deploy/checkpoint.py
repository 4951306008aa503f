"""Official `.pt` files -> `Checkpoint`. Nothing in a file is executed, nothing in it is passed over silently."""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restyle_deploy.errors import CheckpointError
from restyle_deploy.files import sha256_of_file
from restyle_deploy.model_config import ModelConfig, official_generator_channels
from restyle_deploy.variants import VARIANTS, variant_from_dataset_type

OFFICIAL_ENCODER_TYPE = "BackboneEncoder"
OFFICIAL_OUTPUT_SIZE = 1024
OFFICIAL_DATASET_TYPE = "ffhq_encode"


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
    mapping_layers = sum(key.startswith("decoder.style.") and key.endswith(".weight") for key in state_dict)
    config = config_from_options(content.get("opts") or {}, mapping_layers=mapping_layers, overrides=overrides or {})
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
        mapping_layers: layers of the mapping network in the state dict; 0 when it is absent.
        overrides: fields of `ModelConfig` that win.
    Raises:
        CheckpointError: names every impossible or unknown value at once.
    """
    known = {field.name for field in fields(ModelConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise CheckpointError(f"unknown model fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    domain = variant_from_dataset_type(str(options.get("dataset_type", OFFICIAL_DATASET_TYPE))).name
    values: dict[str, Any] = {
        "encoder_type": OFFICIAL_ENCODER_TYPE,
        "output_size": OFFICIAL_OUTPUT_SIZE,
        "domain": domain,
        "mapping_layers": mapping_layers,
    }
    values |= {key: value for key, value in options.items() if key in known and value is not None}
    values |= overrides
    _check_sizes(values)
    channels = values.get("generator_channels") or official_generator_channels(values["output_size"])
    values["generator_channels"] = {int(size): int(count) for size, count in channels.items()}
    for key in ("encoder_widths", "encoder_units"):
        if key in values:
            values[key] = tuple(values[key])
    _check_channels(values)
    return ModelConfig(**values)


def check_state_dict(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise `CheckpointError` with every missing, unexpected and misshapen key, or return."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen = [
        f"{key} (got {list(found[key].shape)}, expected {list(tensor.shape)})"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    named = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
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
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Unsupported" not in str(error):
            raise CheckpointError(f"{path}: not a torch checkpoint ({_first_line(error)})") from error
        raise CheckpointError(
            f"{path}: holds pickled objects other than tensors and plain values, which could run code, and is refused "
            f"({_pickled_name(error)}); save it again with plain values only"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable torch checkpoint ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict with `state_dict`")
    return content


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _pickled_name(error: Exception) -> str:
    words = str(error).split()
    return next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "GLOBAL"), "unnamed")


def _as_float32(state_dict: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise CheckpointError(f"{path}: `state_dict` holds something else than tensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in state_dict.items()}


def _check_finite(tensors: Mapping[str, Any], path: Path) -> None:
    bad = [key for key, value in tensors.items() if isinstance(value, Tensor) and not bool(value.isfinite().all())]
    if bad:
        raise CheckpointError(f"{path}: NaN or infinity in {', '.join(bad)}")


def _repeat_latent_avg(latent_avg: Any, config: ModelConfig, path: Path) -> Tensor:
    shapes = [(config.style_dim,), (1, config.style_dim), (config.n_styles, config.style_dim)]
    if not isinstance(latent_avg, Tensor) or tuple(latent_avg.shape) not in shapes:
        got = list(latent_avg.shape) if isinstance(latent_avg, Tensor) else type(latent_avg).__name__
        raise CheckpointError(f"{path}: latent_avg: got {got}, expected {list(shapes[-1])} or {list(shapes[0])}")
    return latent_avg.float().expand(shapes[-1]).contiguous()


def _check_sizes(values: Mapping[str, Any]) -> None:
    problems = []
    sizes = {key: values.get(key, 8) for key in ("output_size", "input_size", "style_dim")}
    sizes["input_size"] = values.get("input_size", 256)
    not_whole = [key for key, value in sizes.items() if not isinstance(value, int) or value < 1]
    problems += [f"{key} is {sizes[key]!r}, expected a positive whole number" for key in not_whole]
    if not not_whole:
        output, pooled = sizes["output_size"], sizes["input_size"]
        if output < 8 or output & (output - 1):
            problems.append(f"output_size is {output}, expected a power of two of at least 8")
        if pooled < 16 or pooled & (pooled - 1) or output % pooled:
            problems.append(f"input_size is {pooled}, expected a power of two from 16 to output_size ({output})")
    if values["domain"] not in VARIANTS:
        problems.append(f"domain is {values['domain']!r}, expected one of {', '.join(VARIANTS)}")
    if problems:
        raise CheckpointError("impossible model options: " + "; ".join(problems))


def _check_channels(values: Mapping[str, Any]) -> None:
    expected = official_generator_channels(values["output_size"])
    if set(values["generator_channels"]) != set(expected):
        raise CheckpointError(
            f"impossible model options: generator_channels has {sorted(values['generator_channels'])}, "
            f"expected the sizes {sorted(expected)}"
        )
