"""The least time of a call: what the layers compute and move, at the rates that this device reaches in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.operators import Layer

if TYPE_CHECKING:
    import torch

FLOAT16_BYTES = 2
COPY_BYTES = 2**30
MATRIX_SIZE = 8192
RUNS = 20
# A dry run's, on the CPU.
CPU_COPY_BYTES, CPU_MATRIX_SIZE, CPU_RUNS = 2**26, 1024, 5


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """What a device reaches.

    Attributes:
        copy_bytes_per_s: read and written by a large copy.
        flop_per_s: of a product of two large float16 matrices (float32 on the CPU).
    """

    copy_bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time of a call.

    Attributes:
        flop: of all steps: two for each product.
        bytes_moved: of all steps: each layer's weight, input and output once, two bytes an element.
        arithmetic_ms, traffic_ms: these at the device's rates.
        ms: layer by layer the longer of the two, summed.
    """

    flop: float
    bytes_moved: float
    arithmetic_ms: float
    traffic_ms: float
    ms: float


def floor_of(layers: Iterable[Layer], rates: DeviceRates, *, batch: int, steps: int) -> Floor:
    """Return the floor of float16 convolutions and linear layers, with all else fused into them for nothing.

    What stays in a cache between two layers may move faster than a copy does, so small models can be below it.

    Args:
        layers: of one step, for one image.
        rates: of the device.
        batch: images of a call; weights move once for all of them.
        steps: of a call.
    """
    flop = bytes_moved = seconds = 0.0
    for layer in layers:
        layer_flop = 2 * layer.products * batch
        layer_bytes = FLOAT16_BYTES * (layer.weights + layer.activations * batch)
        flop, bytes_moved = flop + layer_flop, bytes_moved + layer_bytes
        seconds += max(layer_flop / rates.flop_per_s, layer_bytes / rates.copy_bytes_per_s)
    return Floor(
        flop=flop * steps,
        bytes_moved=bytes_moved * steps,
        arithmetic_ms=flop * steps / rates.flop_per_s * 1e3,
        traffic_ms=bytes_moved * steps / rates.copy_bytes_per_s * 1e3,
        ms=seconds * steps * 1e3,
    )


def measure_rates(device: str) -> DeviceRates:
    """Measure a device: the fastest of several large copies, and of several products of large matrices."""
    import torch

    on_gpu = device.startswith("cuda")
    size, copied, runs = (MATRIX_SIZE, COPY_BYTES, RUNS) if on_gpu else (CPU_MATRIX_SIZE, CPU_COPY_BYTES, CPU_RUNS)
    copy_s = _copy_seconds(device, copied, runs)
    product_s = _product_seconds(device, size, torch.float16 if on_gpu else torch.float32, runs)
    if on_gpu:
        torch.cuda.empty_cache()  # contenders that measure what is free shall not miss it
    return DeviceRates(copy_bytes_per_s=copied / copy_s, flop_per_s=2 * float(size) ** 3 / product_s)


def _copy_seconds(device: str, copied: int, runs: int) -> float:
    import torch

    source = torch.randint(256, (copied // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _fastest(lambda: target.copy_(source), device, runs)


def _product_seconds(device: str, size: int, dtype: torch.dtype, runs: int) -> float:
    import torch

    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return _fastest(lambda: torch.mm(left, right, out=product), device, runs)


def _fastest(run: Callable[[], torch.Tensor], device: str, runs: int) -> float:
    """Return the seconds of the fastest run."""
    clock: Callable[[], float] = time.perf_counter
    if device.startswith("cuda"):
        from benchmarks.kernels import EventClock

        clock = EventClock()
    best = float("inf")
    for _ in range(runs):
        begin = clock()
        run()
        best = min(best, clock() - begin)
    return best
