"""How the two TensorRT libraries differ, and what building and running need of their Python modules."""

import functools
import logging
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from restyle_deploy.backends.base import MOST_IMAGES, UNIFORM_PRECISIONS, EngineOptions
from restyle_deploy.errors import BackendUnavailableError, BuildError

LOGGER = logging.getLogger(__name__)
DEFAULT_BATCHES = (1, 1, 8)
# Those that TensorRT for RTX builds for where it is told none and there is no GPU.
DEFAULT_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
# From this compute capability on there are bfloat16 and TF32, and TensorRT's hardware compatibility.
AMPERE = 80
AMPERE_AND_NEWER = "sm_80+"
# Where TensorRT for RTX takes other graphs; see `tensorrt_products`.
TURING = "sm_75"
_COMMON_OPTIONS = {"min_batch", "opt_batch", "max_batch", "workspace_bytes", "stripped", "no_plugins"}
# How the message begins by which TensorRT for RTX tells the layers of an engine that it has built.
LAYERS_HEADING = "Layers:"
# How the warning begins that a process has had another logger before: each object has its own here.
SECOND_LOGGER = "The logger passed into"
AMPERE_PRECISIONS = ("tf32", "bf16")

T = TypeVar("T")
_LOGGERS: list[Any] = []


@dataclass(frozen=True, kw_only=True)
class Library:
    """How the two libraries differ.

    Attributes:
        backend: its row of `backends.BACKENDS`.
        module: the name to import.
        options: the `EngineOptions` that it takes.
        builds_anywhere: whether it builds without the device, for named compute capabilities.
    """

    backend: str
    module: str
    options: frozenset[str]
    builds_anywhere: bool


TENSORRT = Library(
    backend="tensorrt",
    module="tensorrt",
    options=frozenset(_COMMON_OPTIONS | {"optimization_level", "hardware_compatible", "version_compatible"}),
    builds_anywhere=False,
)
TENSORRT_RTX = Library(
    backend="tensorrt-rtx",
    module="tensorrt_rtx",
    options=frozenset(_COMMON_OPTIONS | {"compute_capabilities"}),
    builds_anywhere=True,
)


def batches_of(engine: EngineOptions) -> tuple[int, int, int]:
    """Return the fewest images of one run, those to be fastest for, and the most.

    Raises:
        ValueError: they are not in order, or too large.
    """
    least = engine.min_batch or DEFAULT_BATCHES[0]
    best = engine.opt_batch or max(least, min(DEFAULT_BATCHES[1], engine.max_batch or DEFAULT_BATCHES[1]))
    most = engine.max_batch or max(best, DEFAULT_BATCHES[2])
    if not 1 <= least <= best <= most <= MOST_IMAGES:
        raise ValueError(
            f"the batches are {least}, {best} and {most}, expected 1 <= least <= best <= most <= {MOST_IMAGES}"
        )
    return least, best, most


def check_precision(library: Library, precision: str) -> None:
    """Raise `BackendUnavailableError` unless there is such a precision."""
    if precision not in UNIFORM_PRECISIONS:
        raise BackendUnavailableError(
            f"backend {library.backend} has no precision {precision}; it has {', '.join(UNIFORM_PRECISIONS)}"
        )


def check_processor(library: Library, precision: str, processor: str) -> None:
    """Raise `BackendUnavailableError` unless a processor, "sm_89" style, has a precision."""
    if precision in AMPERE_PRECISIONS and number_of(processor) < AMPERE:
        raise BackendUnavailableError(
            f"backend {library.backend}: precision {precision} cannot run here: "
            f"{processor} has no such instructions, sm_{AMPERE} and newer have"
        )


def number_of(processor: str) -> int:
    """Return the number in `sm_89`."""
    return int(processor.removeprefix("sm_"))


def describe_gpu(name: str, processor: str) -> str:
    """Return what the record of an engine for one model of GPU has as `processor`: "NVIDIA L4 (sm_89)"."""
    return f"{name} ({processor})"


def list_targets(trt: Any) -> dict[str, str]:
    """Return what the library builds for: the processor, "sm_89" style, by its compute capability, such as "8.9"."""
    names = [name for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
    return {f"{name[2:-1]}.{name[-1]}": f"sm_{name[2:]}" for name in names}


def named_processors(library: Library, trt: Any, capabilities: tuple[str, ...]) -> tuple[str, ...]:
    """Return processors by their compute capabilities, each once.

    Raises:
        ValueError: the library builds for none such.
    """
    targets = list_targets(trt)
    unknown = [capability for capability in capabilities if capability not in targets]
    if unknown:
        raise ValueError(
            f"backend {library.backend} cannot build for compute capability {', '.join(map(repr, unknown))}; "
            f"it can for {', '.join(targets)}"
        )
    return tuple(targets[capability] for capability in dict.fromkeys(capabilities))


class Messages:
    """What a library says only in its log.

    Attributes:
        errors: all, the oldest first.
        engine_layers: the text on the layers of the engine that was built last; "" where there is none.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.engine_layers = ""


def create_logger(trt: Any, messages: Messages, *, warning_level: int = logging.INFO) -> Any:
    """Return a logger that hands a library's messages on to `logging`, and keeps some.

    The libraries call the first logger that they were given as long as any builder or runtime of the process lives,
    and end the process where its owner has let go of it (measured: TensorRT for RTX 1.7.1). So loggers stay.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        messages: takes what is kept, as long as the caller holds it.
        warning_level: that of the library's warnings; those that a build gives are mostly about choices that are not a
            user's.
    """
    logger = _logger_class(trt)(messages, warning_level)
    _LOGGERS.append(logger)
    return logger


@functools.cache
def _logger_class(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self, messages: Messages, warning_level: int) -> None:
            trt.ILogger.__init__(self)
            self._messages, self._warning_level = weakref.ref(messages), warning_level

        def log(self, severity: Any, message: str) -> None:
            kept = self._messages() or Messages()
            if message.startswith(LAYERS_HEADING):
                kept.engine_layers = message
            if severity <= trt.ILogger.Severity.ERROR:
                kept.errors.append(message)
                LOGGER.info("error: %s", message)  # what it leads to is raised, or told by a warning
            elif severity == trt.ILogger.Severity.WARNING and not message.startswith(SECOND_LOGGER):
                LOGGER.log(self._warning_level, "%s", message)
            else:
                LOGGER.debug("%s", message)

    return Logger


def construct(trt: Any, messages: Messages, make: Callable[..., T], *arguments: Any) -> T:
    """Call a class of a library, `Builder` and the like.

    Raises:
        BuildError: it gives nothing, which its bindings call a `TypeError`.
    """
    try:
        return make(*arguments)
    except TypeError as error:
        if "nullptr" not in str(error):
            raise
        reason = describe_errors(messages.errors[-1:])
        raise BuildError(f"{describe_library(trt)} cannot make a {make.__name__}: {reason}") from error


def describe_library(trt: Any) -> str:
    """Return name and version, for messages."""
    return f"{'TensorRT for RTX' if trt.__name__.endswith('_rtx') else 'TensorRT'} {trt.__version__}"


def describe_errors(errors: list[str]) -> str:
    """Return the first error that a logger has kept, in one line."""
    message = next((error for error in errors if error.strip()), "it gives no reason")
    return " ".join(message.split())
