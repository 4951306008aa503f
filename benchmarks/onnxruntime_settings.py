"""Measure what ONNX Runtime's settings change for a bundle's encoder and generator, run in turn as a session does.

    python -m benchmarks.onnxruntime_settings [BUNDLE]

All settings run in every round. Prints the ratio of each to the backend's own settings in the same round (below 1 is
faster), and the seconds of opening the graphs, and stores both in benchmarks/results/onnxruntime-settings.json.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import onnx_ir as ir
import onnxruntime as ort

from restyle_deploy.backends import onnxruntime as backend
from restyle_deploy.backends.base import RunnerOptions
from restyle_deploy.bench.comparison import Ratio, ratio_from_samples
from restyle_deploy.bench.environment import describe_environment
from restyle_deploy.bench.measure import measure_interleaved, step_latency_from
from restyle_deploy.bundle import Bundle, GraphRecord, open_bundle
from restyle_deploy.files import replace_when_complete
from restyle_deploy.graph.plan import TABLE, apply_choices, find_sites
from restyle_deploy.planner import choose, random_inputs, specs_of

DEMO_BUNDLE = Path("engines/demo-faces")
RESULT = Path("benchmarks/results/onnxruntime-settings.json")
AS_BUILT = "as built"
WARMUP = 3
_ERRORS_ONLY = 3

Change = Callable[[ort.SessionOptions], object]


def list_settings() -> dict[str, Change]:
    """Return what is measured: changes to the backend's own settings."""
    levels, threads = ort.GraphOptimizationLevel, os.cpu_count() or 1
    settings: dict[str, Change] = {
        AS_BUILT: lambda settings: None,
        "optimisation: extended": _attributes(graph_optimization_level=levels.ORT_ENABLE_EXTENDED),
        "optimisation: basic": _attributes(graph_optimization_level=levels.ORT_ENABLE_BASIC),
        "spinning after runs": _entries({"session.force_spinning_stop": "0"}),
        "no spinning": _entries({"session.force_spinning_stop": "0", "session.intra_op.allow_spinning": "0"}),
        "no arena": _attributes(enable_cpu_mem_arena=False),
        "memory pattern": _attributes(enable_mem_pattern=True),
        "shared arena, grown as requested": _entries({"session.use_env_allocators": "1"}),
        "denormals as zero": _entries({"session.set_denormal_as_zero": "1"}),
        "no prepacking": _entries({"session.disable_prepacking": "1"}),
        "one thread": _attributes(intra_op_num_threads=1),
    }
    if threads > 1:
        pinned = ";".join(str(core) for core in range(2, threads + 1))  # the caller's thread is not theirs to pin
        affinity = _entries({"session.intra_op_thread_affinities": pinned})
        count = _attributes(intra_op_num_threads=threads)
        settings["threads pinned"] = lambda settings: (count(settings), affinity(settings))
    return settings


def measure_settings(bundle: Bundle, settings: Mapping[str, Change], *, rounds: int) -> dict[str, Any]:
    """Time the bundle's graphs, rewritten after the table, with each of the settings.

    Returns:
        Plain values: `settings` with the latency and the ratio of each, `opening_seconds` of the exported and the
        rewritten graphs and of the engine.
    """
    with tempfile.TemporaryDirectory() as folder:
        records = _rewrite(bundle, Path(folder))
        runs = {name: _bind_in_turn(records, change) for name, change in settings.items()}
        latencies = measure_interleaved(runs, warmup=WARMUP, repeats=rounds)
        del runs
        usual_ms = latencies[AS_BUILT].samples_ms
        return {
            "settings": {
                name: {
                    "ratio": asdict(ratio_from_samples(latency.samples_ms, usual_ms)),
                    "latency": asdict(step_latency_from(latency)),
                }
                for name, latency in latencies.items()
            },
            "opening_seconds": _time_opening(bundle, records, Path(folder)),
        }


def _rewrite(bundle: Bundle, folder: Path) -> dict[str, GraphRecord]:
    """Write encoder and generator after the table's plan."""
    records = {}
    for name, record in bundle.graphs.items():
        model = ir.load(record.path)
        sites = find_sites(model)
        apply_choices(model, sites, choose(sites, {}, TABLE["onnxruntime"]))
        path = folder / f"{name}.onnx"
        ir.save(model, path, external_data=f"{name}.data")
        inputs, outputs = specs_of(model)
        records[name] = GraphRecord(path=path, sha256="", inputs=inputs, outputs=outputs)
    return records


def _bind_in_turn(records: Mapping[str, GraphRecord], change: Change) -> Callable[[], None]:
    """Open the graphs with changed settings, and return a function that runs one after the other."""
    runs = []
    for record in records.values():
        settings = backend.create_settings(RunnerOptions())
        change(settings)
        session = ort.InferenceSession(str(record.path), settings, providers=["CPUExecutionProvider"])
        runner = backend.OnnxRuntimeRunner(session, record.inputs, record.outputs)
        outputs = {spec.name: spec.allocate(1) for spec in record.outputs}
        runs.append(runner.bind({**random_inputs(record.inputs), **outputs}))

    def run_in_turn() -> None:
        for run in runs:
            run()

    return run_in_turn


def _time_opening(bundle: Bundle, rewritten: Mapping[str, GraphRecord], folder: Path) -> dict[str, float]:
    """Return the seconds of opening both graphs: as exported, rewritten, and as an engine."""
    (folder / "engine").mkdir()
    files = {
        "exported": [record.path for record in bundle.graphs.values()],
        "rewritten": [record.path for record in rewritten.values()],
        "engine": [folder / "engine" / f"{name}.onnx" for name in rewritten],
    }
    for source, engine in zip(files["rewritten"], files["engine"], strict=True):
        backend.build(source, engine, RunnerOptions())
    seconds = {}
    for name, paths in files.items():
        begin = time.perf_counter()
        for path in paths:
            backend.load(path, (), (), RunnerOptions())
        seconds[name] = time.perf_counter() - begin
    return seconds


def _attributes(**values: object) -> Change:
    def change(settings: ort.SessionOptions) -> None:
        for name, value in values.items():
            setattr(settings, name, value)

    return change


def _entries(entries: Mapping[str, str]) -> Change:
    def change(settings: ort.SessionOptions) -> None:
        for key, value in entries.items():
            settings.add_session_config_entry(key, value)

    return change


def _register_arena() -> None:
    """Make the arena of all sessions that ask for it; it takes no more from the system than a tensor needs."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    same_as_requested = {"max_mem": 0, "arena_extend_strategy": 1}
    own_choice = {"initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({**same_as_requested, **own_choice}))


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path), default=DEMO_BUNDLE)
@click.option("--rounds", type=click.IntRange(min=1), default=100, show_default=True, help="Measured runs of each.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=RESULT, show_default=True, help="File."
)
def main(bundle: Path, rounds: int, output: Path) -> None:
    """Measure, store and print."""
    environment = asdict(describe_environment())
    ort.set_default_logger_severity(_ERRORS_ONLY)  # it warns of settings that are changed once more
    _register_arena()
    result = measure_settings(open_bundle(bundle), list_settings(), rounds=rounds)
    content = {"bundle": bundle.name, "rounds": rounds, "environment": environment, **result}
    with replace_when_complete(output) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, row in result["settings"].items():
        ratio = Ratio(**row["ratio"])
        median_ms = row["latency"]["median_ms"]
        quartiles = f"{ratio.lower_quartile:.3f} to {ratio.upper_quartile:.3f}"
        click.echo(f"{name:<34}{median_ms:9.2f} ms  × {ratio.median:.3f} ({quartiles})")
    for name, seconds in result["opening_seconds"].items():
        click.echo(f"opening, {name:<25}{seconds:9.3f} s")


if __name__ == "__main__":
    main()
