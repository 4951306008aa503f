"""A bundle's graphs -> an engine in the bundle: rewritten by a plan, prepared by a backend, verified."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from restyle_deploy import __version__
from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import EXACT_PRECISION, Backend, RunnerOptions
from restyle_deploy.bundle import Bundle, EngineRecord, GraphRecord, open_bundle, write_engine
from restyle_deploy.engines import ENGINES, engine_directory
from restyle_deploy.errors import VerificationError
from restyle_deploy.files import sha256_of_file
from restyle_deploy.graph.edit import fix_batch
from restyle_deploy.graph.plan import AS_EXPORTED, FAMILIES, TABLE, Choices, Site, apply_choices, find_sites
from restyle_deploy.graph.preview import preview_graph
from restyle_deploy.planner import Clock, choose, measure_sites, measure_whole, specs_of
from restyle_deploy.processor import describe_processor, usable_cores
from restyle_deploy.runtime.session import Session, load_graphs
from restyle_deploy.tuning import Conditions, Times, read_times, write_times
from restyle_deploy.verify import check_parity, compare_with_expectation, load_expectation

LOGGER = logging.getLogger(__name__)
DEFAULT_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to build, and how.

    Attributes:
        backend: a row of `backends.BACKENDS`.
        device, precision, threads: see `RunnerOptions`.
        tune: measure the choices on this machine instead of taking the table's.
        retune: measure those too that were measured before.
        seconds: measuring begins no new kind of site after so long.
    """

    backend: str
    device: str = "cpu"
    precision: str = EXACT_PRECISION
    threads: int | None = None
    tune: bool = False
    retune: bool = False
    seconds: float = DEFAULT_SECONDS

    @property
    def runner(self) -> RunnerOptions:
        """How the engine's graphs will run."""
        return RunnerOptions(device=self.device, threads=self.threads, precision=self.precision)


def build_engine(
    bundle: Path, options: BuildOptions, *, progress: Callable[[str], None] = lambda stage: None
) -> EngineRecord:
    """Build an engine from a bundle's graphs, verify it, and add it to the bundle.

    Args:
        bundle: the directory.
        options: what to build.
        progress: called with a few words as each stage begins.
    Returns:
        The record that the bundle now has. An engine for the same backend, device and precision is replaced.
    Raises:
        BundleError: see `open_bundle`.
        BackendUnavailableError: the backend's library is not installed, or the device or precision cannot run here.
        BuildError: the backend refuses a graph.
        VerificationError: the engine does not compute what the reference model computes.
        ValueError: no such backend, or fewer than one thread.
    After an error the bundle is as it was, except that the times measured so far are kept beside its engines.
    """
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"threads is {options.threads}, expected at least 1")
    module = load_backend(options.backend)
    module.check_options(options.runner)
    progress("checking the bundle")
    opened = open_bundle(bundle)
    key = {"backend": options.backend, "device": options.device, "precision": options.precision}
    directory = engine_directory(opened.path, **key)
    with _new_directory(opened.path / ENGINES) as temporary:
        building = _Building(opened, module, options, progress)
        graphs = building.build_graphs(temporary)
        progress("verifying")
        _verify(opened, module, graphs, options)
        files = {path.name: sha256_of_file(path) for path in sorted(temporary.iterdir())}
        record = EngineRecord(
            **key,
            directory=directory,
            graphs={
                role: replace(graph, path=directory / graph.path.name, sha256=files[graph.path.name])
                for role, graph in graphs.items()
            },
            files=files,
            library_versions=dict(module.library_versions()),
            processor=describe_processor(),
            sources={name: graph.sha256 for name, graph in opened.graphs.items()},
            batch=module.ENGINE_BATCH,
            plan=building.plan(),
        )
        with _replaced(directory, temporary):
            write_engine(opened.path, record)
    return record


@contextmanager
def _new_directory(parent: Path) -> Iterator[Path]:
    """Yield a new hidden directory; in the end remove it if it is still there, and `parent` if it is empty."""
    parent.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".", ignore_cleanup_errors=True) as folder:
            content = Path(folder) / "engine"  # a level deeper: only the owner may read what `tempfile` makes
            content.mkdir()
            yield content
    finally:
        if not any(parent.iterdir()):
            parent.rmdir()


@contextmanager
def _replaced(directory: Path, new: Path) -> Iterator[None]:
    """Put a new directory in the place of another one; after an error in the block, the old one comes back."""
    old = new.with_name("replaced")
    try:
        if directory.exists():
            os.rename(directory, old)
        os.rename(new, directory)
        yield
    except BaseException:
        if directory.exists() and not new.exists():
            os.rename(directory, new)
        if old.exists():
            os.rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


class _Building:
    """One engine in the making: what was chosen and measured on the way."""

    def __init__(
        self, bundle: Bundle, backend: Backend, options: BuildOptions, progress: Callable[[str], None]
    ) -> None:
        self._bundle, self._backend, self._options, self._progress = bundle, backend, options, progress
        self._clock = Clock(seconds=float("inf"))
        self._conditions = Conditions(
            backend=options.backend,
            device=options.device,
            precision=options.precision,
            threads=options.threads or usable_cores(),
            # Of this package too: its rewrites are what is timed.
            library_versions={**backend.library_versions(), "restyle-deploy": __version__},
            processor=describe_processor(),
        )
        self._known = read_times(bundle.path, self._conditions)
        self._anew = options.retune
        self._seconds = 0.0
        self._choices: dict[str, str] = {}
        self._measurements: dict[str, Mapping[str, float]] = {}

    def build_graphs(self, directory: Path) -> dict[str, GraphRecord]:
        """Write the engine files of all roles into a directory."""
        graphs: dict[str, GraphRecord] = {}
        for name, source in self._bundle.graphs.items():
            self._progress(f"reading the {name}")
            model = ir.load(source.path)
            sites = find_sites(model)
            times = self._measure(model, sites) if self._options.tune else {}
            choices = choose(sites, times, TABLE[self._options.backend], precision=self._options.precision)
            built = self._build(name, model, choices, directory)
            if times and self._is_slower(name, built, choices):
                LOGGER.warning("%s: the plan makes it slower; it is computed as exported", name)
                for path in (path for role in built for path in directory.glob(f"{role}.*")):
                    path.unlink()
                choices = dict.fromkeys(choices, AS_EXPORTED)
                built = self._build(name, ir.load(source.path), choices, directory)
            self._choices |= choices
            self._measurements |= {site.name: times[site.key] for site in sites if site.key in times}
            graphs |= built
        return graphs

    def plan(self) -> dict[str, Any]:
        """Return what was chosen and measured, as an engine's record has it."""
        return {
            "origin": "tuned" if self._measurements else "table",
            "choices": self._choices,
            "measurements": self._measurements,
            "seconds": round(self._seconds, 1),
        }

    def _measure(self, model: ir.Model, sites: list[Site]) -> Times:
        """Return the times of the kinds of sites that occur: the known ones and those that time allows to measure."""
        precision = self._options.precision
        unknown = [
            site
            for site in sites
            if self._anew or set(self._known.get(site.key, ())) != set(FAMILIES[site.family].choices_for(precision))
        ]
        began = self._clock.elapsed
        self._known |= measure_sites(
            model,
            unknown,
            backend=self._backend,
            options=self._options.runner,
            clock=Clock(seconds=self._options.seconds / len(self._bundle.graphs)),  # no graph takes another's time
            progress=lambda key: self._progress(f"measuring {key} ({self._clock.elapsed:.0f} s)"),
        )
        self._seconds += self._clock.elapsed - began
        write_times(self._bundle.path, self._conditions, self._known)
        return {site.key: self._known[site.key] for site in sites if site.key in self._known}

    def _build(self, name: str, model: ir.Model, choices: Choices, directory: Path) -> dict[str, GraphRecord]:
        """Write the engine of a graph, and of the graphs that come with it: `target`, `preview`."""
        self._progress(f"building the {name}")
        models = {name: model}
        config = self._bundle.config
        if name == "generator" and config.output_size > config.input_size:
            models["preview"] = preview_graph(model, config)
        graphs = {}
        for role, part in models.items():
            # Without a site nothing is changed: the graph stays as exported.
            sites = [site for site in find_sites(part) if choices[site.name] != AS_EXPORTED]
            if sites:
                target = apply_choices(part, sites, choices)
                if target is not None:
                    graphs["target"] = self._write("target", target, directory)
            graphs[role] = self._write(role, part, directory)
        return graphs

    def _write(self, role: str, model: ir.Model, directory: Path) -> GraphRecord:
        engine = directory / f"{role}{self._backend.ENGINE_SUFFIX}"
        fix_batch(model, self._backend.ENGINE_BATCH)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".") as folder:
            graph = Path(folder) / f"{role}.onnx"
            ir.save(model, graph, external_data=f"{role}.data")
            self._backend.build(graph, engine, self._options.runner)
        inputs, outputs = specs_of(model)
        return GraphRecord(path=engine, sha256="", inputs=inputs, outputs=outputs)

    def _is_slower(self, name: str, built: Mapping[str, GraphRecord], choices: Choices) -> bool:
        """Whether a plan makes a whole graph slower than it is as exported; measured unless it is known."""
        exported = self._bundle.graphs[name]
        described = json.dumps([exported.sha256, sorted(choices.items())])
        key = f"whole {name} {hashlib.sha256(described.encode()).hexdigest()[:16]}"
        if self._anew or set(self._known.get(key, ())) != {"exported", "planned"}:
            self._progress(f"comparing the {name} with the exported graph")
            began = self._clock.elapsed
            self._known[key] = measure_whole(
                exported, built[name], built.get("target"), backend=self._backend, options=self._options.runner
            )
            self._seconds += self._clock.elapsed - began
            write_times(self._bundle.path, self._conditions, self._known)
        times = self._known[key]
        self._measurements[f"whole {name}"] = times
        return times["planned"] > times["exported"]


def _verify(bundle: Bundle, backend: Backend, graphs: Mapping[str, GraphRecord], options: BuildOptions) -> None:
    """Run the bundle's expectation on the engine; a preview has none, so that it only has to be finite."""
    exact = {role: graph for role, graph in graphs.items() if role != "preview"}
    description = {"precision": options.precision, "preview_steps": False}
    expectation = load_expectation(bundle.expectation)
    with Session(bundle, load_graphs(backend, exact, options.runner), description) as session:
        check_parity(compare_with_expectation(session, expectation), f"the engine for {options.backend}")
    if "preview" in graphs:
        _check_preview(backend, graphs["preview"], expectation.latents[0], options.runner)


def _check_preview(
    backend: Backend, preview: GraphRecord, latents: NDArray[np.float32], options: RunnerOptions
) -> None:
    """Raise `VerificationError` unless the preview of the first of [N, S, D] latents is finite."""
    (latent,), (current,) = preview.inputs, preview.outputs
    buffers = {latent.name: np.ascontiguousarray(latents[:1]), current.name: current.allocate(1)}
    runner = backend.load(preview.path, preview.inputs, preview.outputs, options)
    try:
        runner.bind(buffers)()
    finally:
        runner.close()
    if not np.isfinite(buffers[current.name]).all():
        raise VerificationError("the engine's preview is not finite; check the model: restyle-deploy verify BUNDLE")
