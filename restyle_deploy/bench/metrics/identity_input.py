"""How a face-embedding model wants its images: from the options, its sidecar and its own input."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restyle_deploy.bench.metrics.base import MetricOptions
from restyle_deploy.errors import MetricError

CHANNELS = ("rgb", "bgr")
# The sidecar's keys and how many numbers each holds.
_NUMBERS = {"size": 2, "mean": 3, "std": 3, "crop": 4}
_HALVES = (0.5, 0.5, 0.5)
_WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class IdentityInput:
    """What a face-embedding model is given.

    Attributes:
        size: (height, width).
        mean, std: of the channels of values in [0, 1], in the order of `channels`.
        channels: "rgb" or "bgr".
        crop: (top, left, bottom, right) as fractions of the image's sides.
        is_channels_last: [N, h, w, 3] instead of [N, 3, h, w].
        batch: images of one run; `None`: any number.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str
    crop: tuple[float, ...]
    is_channels_last: bool
    batch: int | None


def identity_input_from(file: Path, shape: Sequence[Any], options: MetricOptions) -> IdentityInput:
    """Collect what a model wants: the options win over the sidecar, the sidecar over the model's input and defaults.

    Args:
        file: the model; its sidecar has the same name with the suffix `.json` and need not exist.
        shape: of its input, as ONNX Runtime gives it: numbers, and names (or `None`) where any number is taken.
        options: the fields `identity_...`.
    Raises:
        MetricError: the input takes no images of three channels, the size is unknown or another than the input's, the
            sidecar cannot be read, or a value is out of range.
    """
    sidecar = _read_sidecar(sidecar_of(file))
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        raise MetricError(
            f"{file}: not a face-embedding model: its input is {list(shape)}; expected [N, 3, h, w] or [N, h, w, 3]"
        )
    is_channels_last = shape[1] != 3
    own = tuple(shape[1:3] if is_channels_last else shape[2:4])
    crop = options.identity_crop or sidecar.get("crop", _WHOLE)
    std = options.identity_std or sidecar.get("std", _HALVES)
    if not (0 <= crop[0] < crop[2] <= 1 and 0 <= crop[1] < crop[3] <= 1):
        raise MetricError(
            f"crop {list(crop)} of the identity model is none: expected 0 <= top < bottom <= 1, and so on"
        )
    if min(std) <= 0:
        raise MetricError(f"standard deviations {list(std)} of the identity model: expected numbers above 0")
    return IdentityInput(
        size=_choose_size(file, own, options.identity_size or sidecar.get("size")),
        mean=options.identity_mean or sidecar.get("mean", _HALVES),
        std=std,
        channels=options.identity_channels or sidecar.get("channels", CHANNELS[0]),
        crop=crop,
        is_channels_last=is_channels_last,
        batch=shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None,
    )


def sidecar_of(file: Path) -> Path:
    """Return the path of a model's sidecar, which need not exist."""
    return file.with_suffix(".json")


def _choose_size(file: Path, own: tuple[Any, ...], wanted: Sequence[float] | None) -> tuple[int, int]:
    """Return the input's (height, width), where a side may be open in the model or not be asked for."""
    fixed = [side if isinstance(side, int) and side > 0 else None for side in own]
    chosen = [int(side) for side in wanted] if wanted else fixed
    if None in chosen or min(side or 0 for side in chosen) < 1:
        raise MetricError(f"{file}: takes images of any size; say which: --identity-size 112 112")
    if any(side not in (None, given) for side, given in zip(fixed, chosen, strict=True)):
        raise MetricError(
            f"{file}: takes images of {own[0]}x{own[1]} pixels, but {chosen[0]}x{chosen[1]} was asked for"
        )
    return chosen[0] or 0, chosen[1] or 0


def _read_sidecar(path: Path) -> Mapping[str, Any]:
    """Return the fields of the sidecar; none where there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MetricError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise MetricError(f"{path}: not a JSON file: {error}") from error
    known = [*_NUMBERS, "channels"]
    if not isinstance(content, dict) or not set(content) <= set(known):
        raise MetricError(f"{path}: expected an object with some of {', '.join(known)}, got {_brief(content)}")
    for name, count in _NUMBERS.items():
        if name in content and not _are_numbers(content[name], count):
            raise MetricError(f"{path}: {name} is {_brief(content[name])}, expected {count} numbers")
    if content.get("channels", CHANNELS[0]) not in CHANNELS:
        raise MetricError(f"{path}: channels is {_brief(content['channels'])}, expected rgb or bgr")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def _are_numbers(value: object, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value)
    )


def _brief(value: object) -> str:
    return json.dumps(value)[:80]
