"""One engine in the making: its graphs planned, measured where asked for, rewritten, and built by the backend."""

import hashlib
import json
import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from restyle_deploy import __version__
from restyle_deploy.backends import default_device
from restyle_deploy.backends.base import (
    EXACT_PRECISION,
    WITHOUT_PLUGINS,
    Backend,
    BuildRequest,
    BuildTarget,
    EngineOptions,
    RunnerOptions,
)
from restyle_deploy.bundle import Bundle, GraphRecord
from restyle_deploy.engine_graphs import digest_of_graph, graphs_by_role, needs_epilogues, save_graph
from restyle_deploy.engines import ENGINES
from restyle_deploy.graph.plan import AS_EXPORTED, FAMILIES, Choices, Site, find_sites, table_of
from restyle_deploy.planner import Clock, choose, measure_sites, measure_whole, specs_of
from restyle_deploy.processor import usable_cores
from restyle_deploy.runtime.device import find_devices, find_name
from restyle_deploy.tuning import Conditions, KeptTimes, Times

LOGGER = logging.getLogger(__name__)
DEFAULT_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to build, and how.

    Attributes:
        backend: a row of `backends.BACKENDS`.
        device: see `RunnerOptions`; None for the backend's own default.
        precision, threads: see `RunnerOptions`.
        tune: measure the choices on this machine instead of taking the table's.
        retune: measure those too that were measured before.
        seconds: measuring begins no new kind of site after so long.
        engine: what only some backends have.
        plugin_route: see `RunnerOptions`; no command line has it, as only trials of a GPU want another than the best.
    """

    backend: str
    device: str | None = None
    precision: str = EXACT_PRECISION
    threads: int | None = None
    tune: bool = False
    retune: bool = False
    seconds: float = DEFAULT_SECONDS
    engine: EngineOptions = EngineOptions()
    plugin_route: str | None = None

    @property
    def arguments(self) -> list[str]:
        """What a command line needs to build the same, beside backend, device, precision and --tune."""
        seconds = ["--seconds", f"{self.seconds:g}"] if self.tune and self.seconds != DEFAULT_SECONDS else []
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        return [*threads, *seconds, *self.engine.arguments]

    @property
    def runner(self) -> RunnerOptions:
        """How the engine's graphs will run."""
        device = self.device or default_device(self.backend)
        return RunnerOptions(
            device=device,
            threads=self.threads,
            precision=self.precision,
            host_code_allowed=self.engine.version_compatible,
            plugin_route=WITHOUT_PLUGINS if self.engine.no_plugins else self.plugin_route,
        )


@dataclass(frozen=True, kw_only=True)
class BuiltGraphs:
    """The files of an engine, not yet in the bundle.

    Attributes:
        directory: holds them and nothing else.
        graphs: by role; their hashes are still to be taken.
        facts: what the backend stated, by role.
        weights: for a stripped engine, the graphs that it was built from, by role; outside the directory.
        plan: see `EngineRecord`.
    """

    directory: Path
    graphs: Mapping[str, GraphRecord]
    facts: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, Path]
    plan: Mapping[str, Any]


class Building:
    """One engine in the making: what was chosen and measured on the way."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        options: BuildOptions,
        *,
        target: BuildTarget,
        progress: Callable[[str], None],
    ) -> None:
        self._bundle, self._backend, self._options, self._progress = bundle, backend, options, progress
        self._target = target
        self._clock = Clock(seconds=float("inf"))
        conditions = Conditions(
            backend=options.backend,
            device=options.runner.device,
            precision=options.precision,
            threads=options.threads or usable_cores(),
            # Of this package too: its rewrites, and its kernels, are what is timed.
            library_versions={
                **backend.library_versions(),
                "restyle-deploy": __version__,
                **({"kernels": backend.plugin_hash() or ""} if target.has_kernels else {}),
            },
            processor=_processor_of_times(target.processor, options.runner.device),
        )
        # Each graph's own: a kind of site may occur in both, and `mixed` computes them in two precisions.
        precisions = {self._runner_of(name).precision for name in bundle.graphs}
        self._kept = {
            precision: KeptTimes(bundle.path, replace(conditions, precision=precision)) for precision in precisions
        }
        self._anew = options.retune
        self._seconds = 0.0
        self._choices: dict[str, str] = {}
        self._measurements: dict[str, Mapping[str, float]] = {}
        self._facts: dict[str, Mapping[str, Any]] = {}
        self._weights: dict[str, Path] = {}

    def build(self, working: Path) -> BuiltGraphs:
        """Write the engine files of all roles into a new directory in `working`."""
        directory = working / "engine"  # not itself: only the owner may read what `tempfile` makes
        directory.mkdir()
        graphs: dict[str, GraphRecord] = {}
        for name, source in self._bundle.graphs.items():
            model, sites, times = self._read(name, is_measured=self._options.tune)
            choices = self._choose(name, sites, times)
            built = self._build(name, model, choices, directory)
            if times and self._is_slower(name, built, choices):
                LOGGER.warning("%s: the plan makes it slower; it is computed as exported", name)
                for path in (path for role in built for path in directory.glob(f"{role}.*")):
                    path.unlink()
                choices = dict.fromkeys(choices, AS_EXPORTED)
                built = self._build(name, ir.load(source.path), choices, directory)
            self._note(sites, choices, times)
            graphs |= built
        facts = {role: self._facts[role] for role in graphs}
        return BuiltGraphs(directory=directory, graphs=graphs, facts=facts, weights=self._weights, plan=self._plan())

    def describe(self) -> dict[str, Any]:
        """Return the plan and, by role, what would be built, as plain values."""
        graphs: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder:
            for name in self._bundle.graphs:
                model, sites, times = self._read(name, is_measured=False)
                choices = self._choose(name, sites, times)
                self._note(sites, choices, times)
                for role, part in self._rewrite(name, model, choices).items():
                    self._progress(f"checking the {role}")
                    path = save_graph(part, role, Path(folder), batch=self._backend.ENGINE_BATCH)
                    request = BuildRequest(engine=self._options.engine)
                    facts = self._backend.check_graph(path, self._runner_of(role), request)
                    graphs[role] = {"file": f"{role}{self._backend.ENGINE_SUFFIX}", "nodes": len(part.graph), **facts}
        return {"plan": self._plan(), "graphs": graphs}

    def _read(self, name: str, *, is_measured: bool) -> tuple[ir.Model, list[Site], Times]:
        """Return a graph of the bundle, its sites and their times, the known ones unless there is no tuning."""
        self._progress(f"reading the {name}")
        model = ir.load(self._bundle.graphs[name].path)
        sites = find_sites(model)
        if is_measured:
            return model, sites, self._measure(name, model, sites)
        known = self._kept_of(name).times if self._options.tune else {}
        return model, sites, {site.key: known[site.key] for site in sites if site.key in known}

    def _choose(self, name: str, sites: list[Site], times: Times) -> dict[str, str]:
        precision = self._runner_of(name).precision
        return choose(sites, times, table_of(self._options.backend, precision), precision=precision)

    def _runner_of(self, role: str) -> RunnerOptions:
        return self._options.runner.for_graph(role)

    def _note(self, sites: list[Site], choices: Choices, times: Times) -> None:
        self._choices |= choices
        self._measurements |= {site.name: times[site.key] for site in sites if site.key in times}

    def _plan(self) -> dict[str, Any]:
        """Return what was chosen and measured, as an engine's record has it."""
        return {
            "origin": "tuned" if self._measurements else "table",
            "choices": self._choices,
            "measurements": self._measurements,
            "seconds": round(self._seconds, 1),
        }

    def _measure(self, name: str, model: ir.Model, sites: list[Site]) -> Times:
        """Return the times of the kinds of sites that occur: the known ones and those that time allows to measure."""
        options, kept = self._runner_of(name), self._kept_of(name)
        unknown = [site for site in sites if self._anew or not _is_known(site, kept, options.precision)]
        refused: dict[str, list[str]] = defaultdict(list)
        began = self._clock.elapsed
        times = measure_sites(
            model,
            unknown,
            backend=self._backend,
            options=options,
            clock=Clock(seconds=self._options.seconds / len(self._bundle.graphs)),  # no graph takes another's time
            request=self._request,
            epilogues=self._needs_epilogues,
            progress=lambda key: self._progress(f"measuring {key} ({self._clock.elapsed:.0f} s)"),
            refused=lambda key, choice: refused[key].append(choice),
        )
        self._seconds += self._clock.elapsed - began
        kept.update(times, refused)
        return {site.key: kept.times[site.key] for site in sites if site.key in kept.times}

    def _kept_of(self, name: str) -> KeptTimes:
        return self._kept[self._runner_of(name).precision]

    @property
    def _request(self) -> BuildRequest:
        return BuildRequest(engine=self._options.engine, cache=self._bundle.path / ENGINES)

    @property
    def _needs_epilogues(self) -> bool:
        return needs_epilogues(self._options.precision, has_kernels=self._target.has_kernels)

    def _rewrite(self, name: str, model: ir.Model, choices: Choices) -> dict[str, ir.Model]:
        return graphs_by_role(name, model, self._bundle.config, choices=choices, epilogues=self._needs_epilogues)

    def _build(self, name: str, model: ir.Model, choices: Choices, directory: Path) -> dict[str, GraphRecord]:
        """Write the engine of a graph, and of the graphs that come with it: `target`, `preview`."""
        self._progress(f"building the {name}")
        models = self._rewrite(name, model, choices)
        return {role: self._write(role, part, directory) for role, part in models.items()}

    def _write(self, role: str, model: ir.Model, directory: Path) -> GraphRecord:
        engine = directory / f"{role}{self._backend.ENGINE_SUFFIX}"
        request = replace(self._request, progress=lambda text: self._progress(f"building the {role}: {text}"))
        folder = Path(tempfile.mkdtemp(dir=directory.parent))  # removed with the working directory at the latest
        graph = save_graph(model, role, folder, batch=self._backend.ENGINE_BATCH)
        facts = dict(self._backend.build(graph, engine, self._runner_of(role), request))
        if self._options.engine.stripped:
            self._weights[role] = graph
            facts["digest"] = digest_of_graph(graph)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        self._facts[role] = facts
        inputs, outputs = specs_of(model)
        return GraphRecord(path=engine, sha256="", inputs=inputs, outputs=outputs)

    def _is_slower(self, name: str, built: Mapping[str, GraphRecord], choices: Choices) -> bool:
        """Whether a plan makes a whole graph slower than it is as exported; measured unless it is known.

        It does not where the backend refuses the graph as exported.
        """
        exported, kept = self._bundle.graphs[name], self._kept_of(name)
        described = json.dumps([exported.sha256, sorted(choices.items())])
        key = f"whole {name} {hashlib.sha256(described.encode()).hexdigest()[:16]}"
        if self._anew or kept.tried(key) != {"exported", "planned"}:
            self._progress(f"comparing the {name} with the exported graph")
            began = self._clock.elapsed
            refused: list[str] = []
            measured = measure_whole(
                exported,
                built[name],
                built.get("target"),
                backend=self._backend,
                options=self._runner_of(name),
                request=self._request,
                weights=self._weights,
                refused=refused.append,
            )
            self._seconds += self._clock.elapsed - began
            kept.update({key: measured}, {key: refused} if refused else {})
        times = self._measurements[f"whole {name}"] = kept.times[key]
        return "exported" in times and times["planned"] > times["exported"]


def _processor_of_times(processor: str, device: str) -> str:
    """Return what times depend on: what engines are built for, and the model of the GPU at hand, if there is one."""
    if device not in find_devices()[0]:
        return processor
    name = find_name(device)
    return processor if name in processor else f"{processor} on {name}"


def _is_known(site: Site, kept: KeptTimes, precision: str) -> bool:
    """Whether all choices of a kind of site have a time, but for those that the backend refused."""
    return kept.tried(site.key) == set(FAMILIES[site.family].choices_for(precision))
