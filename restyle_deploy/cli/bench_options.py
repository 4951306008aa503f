"""Options of `restyle-deploy bench`: what is measured, and what quality is counted by."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from restyle_deploy.backends import BACKENDS
from restyle_deploy.backends.base import EXACT_PRECISION, PRECISIONS

PLANS = ("engine", "plain")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}

# Those of `bench.metrics.METRICS`, which --help need not import.
_METRIC_NAMES = ("mse", "l2", "psnr_db", "ssim", "ms_ssim", "lpips", "identity", "dlib")

Callback = Callable[[click.Context, click.Parameter, str], Any]


def parse_numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Return the whole numbers in a list such as 1,2,5: each at least 1 and given once."""
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of whole numbers such as {parameter.default}") from None
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise click.BadParameter(f"{value!r}: each number is at least 1 and given once")
    return numbers


def _parse_names(known: tuple[str, ...]) -> Callback:
    def parse(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
        if value is None:
            return None
        names = tuple(value.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise click.BadParameter(f"{', '.join(map(repr, unknown))}: known are {', '.join(known)}")
        return names

    return parse


def parse_metrics(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the names of metrics in a list such as psnr_db,ssim."""
    if value is None:
        return None
    names = tuple(value.split(","))
    _check_metrics(names)
    return names


def parse_minimums(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """Return the limits in texts such as psnr_db=20, by metric."""
    found = {}
    for value in values:
        name, equals, number = value.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = math.nan
        if not equals or not math.isfinite(found[name]):
            raise click.BadParameter(f"{value!r} is no metric=value such as psnr_db=20")
    if found:
        _check_metrics(tuple(found))
    return found


def _check_metrics(names: tuple[str, ...]) -> None:
    from restyle_deploy.bench.metrics import METRICS

    known = [metric.name for metric in METRICS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.BadParameter(f"no metric {', '.join(map(repr, unknown))}; there are {', '.join(known)}")


def parse_seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Return the seconds in a text such as 90, 15m or 2h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", value or "")
    if value is not None and (found is None or float(found[1]) == 0):
        raise click.BadParameter(f"{value!r} is no time such as 90, 90s, 15m or 2h")
    return float(found[1]) * _SECONDS[found[2]] if found else None


def parse_shares(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Return the shares in a list such as 0.5,0.9."""
    try:
        shares = tuple(float(part) for part in value.split(",")) if value else ()
    except ValueError:
        shares = (0.0,)
    if any(not 0 < share <= 2 for share in shares):
        raise click.BadParameter(f"{value!r} is no list of shares such as 0.5,0.9, each above 0 and at most 2")
    return shares


def matrix_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which configurations are measured."""
    backends = ("all", *BACKENDS)
    options = [
        click.option(
            "--backend",
            "backends",
            default="onnxruntime",
            show_default=True,
            callback=_parse_names(backends),
            help=f"Backends: a list of {', '.join(BACKENDS)}; or all, which are installed and have a device.",
        ),
        click.option("--device", show_default="each backend's", help="Device of all of them."),
        click.option(
            "--precision",
            "precisions",
            default=EXACT_PRECISION,
            show_default=True,
            callback=_parse_names(PRECISIONS),
            help=f"Precisions: a list of {', '.join(PRECISIONS)}; all but fp32 are approximate.",
        ),
        click.option(
            "--plan",
            "plans",
            callback=_parse_names(PLANS),
            show_default="engine where there is one, else plain",
            help="Plans: engine, plain (the exported graphs), or both.",
        ),
        click.option(
            "--batch", "batches", default="1", show_default=True, callback=parse_numbers, help="Images of one call."
        ),
        click.option(
            "--preview-steps",
            is_flag=True,
            help="Also render all steps but the last only up to the encoder's size (approximate).",
        ),
        click.option("--threads", type=click.IntRange(min=1), show_default="the backend's choice", help="CPU threads."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def metric_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which quality metrics are measured, and the files that they need."""
    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    triple = click.Tuple([float, float, float])
    options = [
        click.option(
            "--metrics",
            "metric_names",
            callback=parse_metrics,
            help=f"A list of {', '.join(_METRIC_NAMES)}; see docs/metrics.md.",
            show_default="all that can run",
        ),
        click.option("--lpips-backbone", type=file, help="AlexNet weights of LPIPS; never downloaded."),
        click.option("--identity-model", type=file, help="ONNX face embedding, for the identity similarity."),
        click.option("--identity-size", type=click.Tuple([int, int]), help="Height and width of its input."),
        click.option("--identity-mean", type=triple, help="Mean of its input's channels."),
        click.option("--identity-std", type=triple, help="Standard deviation of its input's channels."),
        click.option("--identity-channels", type=click.Choice(["rgb", "bgr"]), help="Their order."),
        click.option(
            "--identity-crop",
            type=click.Tuple([float, float, float, float]),
            help="Part of the image that it sees: top, left, bottom, right as fractions.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command
