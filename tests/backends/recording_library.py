"""A stand-in for the module `tensorrt` that builds and loads nothing, and writes down what it is asked for."""

import json
from types import SimpleNamespace
from typing import Any

from restyle_deploy.backends.tensorrt import TensorRtBackend
from restyle_deploy.backends.tensorrt_library import TENSORRT

KEPT, MEASURED = b"what a former build has measured", b"what this build has measured"


class RecordingLibrary:
    """What `tensorrt_network` and `layers_of_engine` take of the module.

    Attributes:
        calls: what was asked for, in order, with arguments.
        cache_fits: whether a timing cache that is not empty is taken.
        cache_is_kept: whether there is a timing cache after a build.
        plan: what a build returns; None for a refusal.
        engine_is_taken: whether a runtime takes an engine.
        layers: what the inspector tells.
    """

    __version__ = "10.9.0"
    __name__ = "tensorrt"
    QuickPluginCreationRequest = object
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    BuilderFlag = SimpleNamespace(TF32="tf32", STRIP_PLAN="strip", VERSION_COMPATIBLE="compatible")
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    LayerInformationFormat = SimpleNamespace(JSON="json")
    IProgressMonitor = type("IProgressMonitor", (), {})

    class ILogger:
        Severity = SimpleNamespace(ERROR=1, WARNING=2)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.cache_fits = self.cache_is_kept = self.engine_is_taken = True
        self.plan: bytes | None = b"plan"
        self.layers = json.dumps({"Layers": [{"Name": "decoder.conv/Conv_0"}]})
        self._cache = b""

    def note(self, name: str, returned: Any = None) -> Any:
        """Return a function that notes its call and returns this."""

        def noted(*arguments: Any, **_: Any) -> Any:
            self.calls.append((name, *arguments))
            return returned

        return noted

    def named(self, name: str) -> list[list[Any]]:
        """Return the arguments of all calls of a function."""
        return [arguments for called, *arguments in self.calls if called == name]

    def Builder(self, logger: Any) -> Any:
        """Return a builder, whose network is empty."""
        self.calls.append(("Builder",))

        def build(network: Any, config: Any) -> bytes | None:
            if self.plan is None:
                logger.log(1, "no memory is left")
            return self.plan

        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(num_layers=0, num_inputs=0),
            create_builder_config=lambda: self._config(logger),
            create_optimization_profile=object,
            build_serialized_network=build,
            is_network_supported=lambda network, config: True,
        )

    def _config(self, logger: Any) -> Any:
        def attach(cache: bytes, *, ignore_mismatch: bool) -> bool:
            self.calls.append(("set_timing_cache", cache, ignore_mismatch))
            if cache and not self.cache_fits:
                logger.log(1, "the timing cache is of another device")
                return False
            return True

        return SimpleNamespace(
            set_flag=self.note("set_flag"),
            clear_flag=self.note("clear_flag"),
            add_optimization_profile=self.note("add_optimization_profile"),
            create_timing_cache=lambda content: content,
            set_timing_cache=attach,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: MEASURED) if self.cache_is_kept else None,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        """Return a parser that takes any file."""
        return SimpleNamespace(parse_from_file=lambda path: True)

    def Runtime(self, logger: Any) -> Any:
        """Return a runtime; what it allows is noted when it takes an engine."""

        def deserialize(plan: bytes) -> Any:
            self.calls.append(("deserialize", runtime.engine_host_code_allowed))
            if not self.engine_is_taken:
                logger.log(1, "the engine holds host code")
                return None
            inspector = SimpleNamespace(get_engine_information=lambda form: self.layers)
            return SimpleNamespace(create_engine_inspector=lambda: inspector)

        runtime = SimpleNamespace(engine_host_code_allowed=False, deserialize_cuda_engine=deserialize)
        return runtime


def recorded() -> tuple[TensorRtBackend, RecordingLibrary]:
    """Return the backend on such a library."""
    library = RecordingLibrary()
    return TensorRtBackend(TENSORRT, library), library
