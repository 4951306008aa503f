"""This machine's processor: what engines and measurements depend on."""

import os
import platform
from pathlib import Path

# Instruction sets that libraries choose their kernels by, as Linux names them, the oldest first.
INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)
CPUINFO = Path("/proc/cpuinfo")


def describe_processor() -> str:
    """Return model name and instruction sets, such as "AMD EPYC (avx2, fma)"; the sets only where Linux lists them."""
    found = ", ".join(read_instruction_sets())
    return f"{read_model_name()} ({found})" if found else read_model_name()


def usable_cores() -> int:
    """Return the number of logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_model_name() -> str:
    """Return the processor's model name, from Linux's list where there is one."""
    return _read_first("model name") or platform.processor() or platform.machine()


def read_instruction_sets() -> tuple[str, ...]:
    """Return those of `INSTRUCTION_SETS` that the processor has; none where Linux does not list them."""
    listed = (_read_first("flags") or _read_first("Features")).split()  # x86, ARM
    return tuple(name for name in INSTRUCTION_SETS if name in listed)


def _read_first(key: str) -> str:
    """Return the value that the list has for the first processor, or nothing."""
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPUINFO.is_file() else []
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")
