"""Measure the ways to compute each kind of site of a bundle's graphs on this machine, and choose the fastest."""

import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from restyle_deploy.backends.base import DEFAULT_REQUEST, EXACT_PRECISION, Backend, BuildRequest, RunnerOptions
from restyle_deploy.engines import GraphRecord
from restyle_deploy.errors import BuildError, DeviceError
from restyle_deploy.graph.edit import fix_batch
from restyle_deploy.graph.plan import FAMILIES, Choices, Site
from restyle_deploy.graph.rewrites.fuse_epilogue import find_epilogue, fuse_epilogue
from restyle_deploy.graph.rewrites.target_features import target_graph
from restyle_deploy.graph.rewrites.tidy import tidy
from restyle_deploy.latency import measure_interleaved
from restyle_deploy.short_memory import find_short_memory
from restyle_deploy.tensors import BATCH, TensorSpec
from restyle_deploy.tuning import Times
from restyle_deploy.workbench import Workbench, WorkbenchRun

LOGGER = logging.getLogger(__name__)

# Short runs are repeated until they have taken so long together, within these bounds.
MEASURED_MS = 300.0
LEAST_REPEATS, MOST_REPEATS = 5, 30
# Runs that are launched and waited for together on a GPU.
GPU_RUNS = 8
# A choice so much slower than the best one in its first run is not measured further.
DROPPED_ABOVE = 2.0
# The table's choice stays unless another one is faster by more than measuring errs.
LEAST_GAIN = 0.03
# Steps over which the target's graph, run once per image, is spread: upstream's default.
STEPS = 5

NO_WEIGHTS: Mapping[str, Path] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How long measuring may go on.

    Attributes:
        seconds: from the making of this on.
        now: seconds, monotonic.
    """

    seconds: float
    now: Callable[[], float] = time.perf_counter
    begin: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "begin", self.now())

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return self.now() - self.begin

    @property
    def is_over(self) -> bool:
        """Whether no more site may be begun."""
        return self.elapsed >= self.seconds


def choose(sites: Iterable[Site], times: Times, table: Choices, *, precision: str = EXACT_PRECISION) -> dict[str, str]:
    """Return a choice for each site: the fastest where there are times, the table's elsewhere.

    Args:
        sites: of the graphs.
        times: what was measured, perhaps for other sites too.
        table: family -> choice; a family's exported choice takes the place of one that the precision does not allow.
        precision: that the engine computes in.
    """
    choices = {}
    for site in sites:
        family, measured = FAMILIES[site.family], times.get(site.key, {})
        allowed = family.choices_for(precision)
        usual = table[site.family] if table[site.family] in allowed else family.exported
        known = {choice: time_ms for choice, time_ms in measured.items() if choice in allowed}
        fastest = min(known, key=known.__getitem__, default=usual)
        least_gain = family.least_gain.get(fastest, LEAST_GAIN)
        gains = usual not in known or known[fastest] < (1 - least_gain) * known[usual]
        choices[site.name] = fastest if gains else usual
    return choices


def measure_sites(
    model: ir.Model,
    sites: Iterable[Site],
    *,
    backend: Backend,
    options: RunnerOptions,
    clock: Clock,
    request: BuildRequest = DEFAULT_REQUEST,
    epilogues: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    refused: Callable[[str, str], None] = lambda key, choice: None,
) -> dict[str, dict[str, float]]:
    """Time all choices of each kind of site, each as a small graph cut out of the exported one.

    A choice that the backend refuses is left out, as is one for which the device lacks something now.

    Args:
        model: the exported graph; not changed.
        sites: of this graph. One is measured for each key, the heaviest first.
        backend: builds and runs the small graphs.
        options: how they run.
        clock: when it is over, the sites not begun are left out.
        request: how they are built.
        epilogues: whether what follows a convolution becomes one node, see `apply_choices`; such a filter is measured
            with what follows it, as one kernel may compute both.
        progress: told the kind of site that is being measured.
        refused: told the kind of site and the choice that the backend refuses, now and later.
    Returns:
        Medians in milliseconds at the smallest batch, by key and choice.
    Raises:
        BuildError: the backend refuses all choices of a kind of site.
    """
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        groups[site.key].append(site)
    times: dict[str, dict[str, float]] = {}
    for key, group in sorted(groups.items(), key=lambda item: -item[1][0].work * len(item[1])):
        if clock.is_over:
            break
        progress(key)
        site = _with_epilogue(model, group[0]) if epilogues else group[0]
        times[key] = _measure_site(
            model,
            site,
            backend=backend,
            options=options,
            request=request,
            epilogues=epilogues,
            refused=partial(refused, key),
        )
    return times


def measure_whole(
    exported: GraphRecord,
    planned: GraphRecord,
    target: GraphRecord | None,
    *,
    backend: Backend,
    options: RunnerOptions,
    request: BuildRequest = DEFAULT_REQUEST,
    weights: Mapping[str, Path] = NO_WEIGHTS,
    refused: Callable[[str], None] = lambda choice: None,
) -> dict[str, float]:
    """Time a whole graph as exported and as planned.

    Args:
        exported: the bundle's graph; an engine is built from it, as it would be without the plan.
        planned: the engine's.
        target: what the plan computes once per image instead, if it does.
        backend, options: how they run.
        request: how the engine was built.
        weights: what stripped engines were built from, by the stem of the engine's file.
        refused: told `exported` where the backend refuses that graph, now and later.
    Returns:
        Milliseconds of a step with the smallest batch, by `exported` and `planned`; `planned` alone where the exported
        graph is refused, or the device lacks something for it: there is nothing to compare with then.
    Raises:
        BuildError: the backend refuses to load what it has built.
    """
    with (
        tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder,
        Workbench(options, gpu_runs=GPU_RUNS) as bench,
    ):
        runs: dict[str, WorkbenchRun] = {}
        try:
            model = ir.load(exported.path)
            runs["exported"] = _load(model, Path(folder), "exported", bench, backend=backend, request=request)
        except (BuildError, DeviceError) as error:
            LOGGER.warning("the exported graph is no alternative to the plan: %s", error)
            if _is_lasting(error):
                refused("exported")
        for key, record in {"planned": planned, "target": target}.items():
            if record is not None:
                file = record.path
                runner = bench.load(backend, file, record.inputs, record.outputs, weights.get(file.stem))
                values = random_inputs(record.inputs, batch=_batch_of(request))
                runs[key] = bench.bind(runner, record.outputs, values)
        first = measure_interleaved(runs, warmup=1, repeats=1)
        repeats = repeats_for(min(first[key].median_ms for key in first if key != "target"))
        latencies = measure_interleaved(runs, warmup=0, repeats=repeats)
    samples = {key: np.array(latency.samples_ms) for key, latency in latencies.items()}
    planned_ms = samples["planned"] + samples.get("target", 0.0) / STEPS
    if "exported" not in samples:
        return {"planned": float(np.median(planned_ms)) / bench.runs_per_call}
    exported_ms = float(np.median(samples["exported"])) / bench.runs_per_call
    # By the ratio in each round, as a disturbance of the machine hits both alike.
    return {"exported": exported_ms, "planned": exported_ms * float(np.median(planned_ms / samples["exported"]))}


def _measure_site(
    model: ir.Model,
    site: Site,
    *,
    backend: Backend,
    options: RunnerOptions,
    request: BuildRequest,
    epilogues: bool,
    refused: Callable[[str], None],
) -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder,
        Workbench(options, gpu_runs=GPU_RUNS) as bench,
    ):
        runs: dict[str, WorkbenchRun] = {}
        extra_runs: dict[str, WorkbenchRun] = {}
        failures: list[Exception] = []
        for number, choice in enumerate(FAMILIES[site.family].choices_for(options.precision)):
            part, extra = _candidate(model, site, choice, epilogues=epilogues)
            try:
                loaded = [
                    _load(graph, Path(folder), f"{number}{index}", bench, backend=backend, request=request)
                    for index, graph in enumerate((part, extra))
                    if graph is not None
                ]
            except (BuildError, DeviceError) as error:
                LOGGER.warning("%s: %s is left out: %s", site.key, choice, error)
                failures.append(error)
                if _is_lasting(error):
                    refused(choice)
                continue
            runs[choice] = loaded[0]
            extra_runs.update((choice, run) for run in loaded[1:])
        if not runs:
            raise BuildError(f"{site.key}: no way to compute it is taken; the last one: {failures[-1]}")
        # The first run of a graph also allocates.
        again = measure_interleaved(runs, warmup=1, repeats=1)
        best = min(latency.median_ms for latency in again.values())
        kept = {choice: run for choice, run in runs.items() if again[choice].median_ms <= DROPPED_ABOVE * best}
        repeats = repeats_for(best)
        measured = measure_interleaved(kept, warmup=0, repeats=repeats)
        extra_times = measure_interleaved(extra_runs, warmup=1, repeats=repeats) if extra_runs else {}
    times = {choice: latency.median_ms for choice, latency in {**again, **measured}.items()}
    for choice, latency in extra_times.items():
        times[choice] += latency.median_ms / STEPS
    return {choice: time_ms / bench.runs_per_call for choice, time_ms in times.items()}


def _is_lasting(error: Exception) -> bool:
    """Whether a failure is the backend's refusal of a graph; a device that lacks memory may have it the next time."""
    return isinstance(error, BuildError) and find_short_memory(str(error)) is None


def _with_epilogue(model: ir.Model, site: Site) -> Site:
    """Return a site that ends with what follows its filter; another site as it is."""
    found = find_epilogue(model, site.outputs[0]) if site.family == "upsampling" else None
    if found is None:
        return site
    factors, result = found
    return replace(site, inputs=(*site.inputs, *factors), outputs=(result,))


def _candidate(
    model: ir.Model, site: Site, choice: str, *, epilogues: bool = False
) -> tuple[ir.Model, ir.Model | None]:
    """Cut a site out and rewrite it: (graph, graph that runs once per image)."""
    part = _extract(model, site)
    extra = None
    rewrite = FAMILIES[site.family].rewrites.get(choice)
    if rewrite is not None:
        extra = target_graph(part) if site.family == "target" else None
        rewrite(part, layers=[site.layer])
    if epilogues:
        fuse_epilogue(part)
    return tidy(part), extra


def _extract(model: ir.Model, site: Site) -> ir.Model:
    graph = ir.convenience.extract(model.graph, inputs=list(site.inputs), outputs=list(site.outputs))
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)


def _load(
    model: ir.Model, folder: Path, stem: str, bench: Workbench, *, backend: Backend, request: BuildRequest
) -> WorkbenchRun:
    """Build and load a graph, and bind random inputs of the smallest batch."""
    path, engine = folder / f"{stem}.graph.onnx", folder / f"{stem}{backend.ENGINE_SUFFIX}"
    fix_batch(model, backend.ENGINE_BATCH)
    ir.save(model, path, external_data=f"{stem}.data")
    backend.build(path, engine, bench.options, request)
    inputs, outputs = specs_of(model)
    runner = bench.load(backend, engine, inputs, outputs, path if request.engine.stripped else None)
    return bench.bind(runner, outputs, random_inputs(inputs, batch=_batch_of(request)))


def _batch_of(request: BuildRequest) -> int:
    return request.engine.min_batch or 1


def repeats_for(run_ms: float) -> int:
    """Return how often to repeat a run that takes so long."""
    return min(MOST_REPEATS, max(LEAST_REPEATS, int(MEASURED_MS / run_ms)))


def random_inputs(inputs: tuple[TensorSpec, ...], *, batch: int = 1) -> dict[str, NDArray[np.float32]]:
    """Return random inputs by name, normally distributed, the same for the same specs and batch."""
    random = np.random.default_rng(0)
    return {spec.name: random.standard_normal(spec.concrete_shape(batch), dtype=np.float32) for spec in inputs}


def specs_of(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the specs of a graph's inputs and outputs: float32, the first axis is the batch."""
    inputs, outputs = (tuple(_spec(value) for value in values) for values in (model.graph.inputs, model.graph.outputs))
    return inputs, outputs


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None
    batch, *sizes = value.shape
    known = tuple(size for size in sizes if isinstance(size, int))
    assert len(known) == len(sizes), f"{value.name} has the shape {value.shape}"
    return TensorSpec(name=value.name, dtype="float32", shape=(batch if isinstance(batch, int) else BATCH, *known))
