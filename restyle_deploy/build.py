"""A bundle's graphs -> an engine in the bundle: rewritten by a plan, prepared by a backend, verified."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.backends import load_backend
from restyle_deploy.backends.base import Backend, BuildTarget, RunnerOptions
from restyle_deploy.building import DEFAULT_SECONDS as DEFAULT_SECONDS
from restyle_deploy.building import Building, BuiltGraphs
from restyle_deploy.building import BuildOptions as BuildOptions
from restyle_deploy.bundle import Bundle, EngineRecord, open_bundle, write_engine
from restyle_deploy.engines import (
    CACHE_SUFFIX,
    ENGINES,
    Batches,
    batches_of_build,
    describe_engine,
    engine_directory,
)
from restyle_deploy.errors import BackendUnavailableError, VerificationError
from restyle_deploy.files import (
    hold_lock,
    locked_working_directory,
    place_directory,
    remove_abandoned_directories,
    sha256_of_file,
)
from restyle_deploy.runtime.loop import load_graphs
from restyle_deploy.runtime.opening import on_device, open_device
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import check_parity, compare_with_expectation, load_expectation
from restyle_deploy.workbench import Workbench

LOGGER = logging.getLogger(__name__)
_HOST = "cpu"


def build_engine(
    bundle: Path, options: BuildOptions, *, progress: Callable[[str], None] = lambda stage: None
) -> EngineRecord:
    """Build an engine from a bundle's graphs, verify it where it can run here, and add it to the bundle.

    Args:
        bundle: the directory.
        options: what to build.
        progress: called with a few words as each stage begins.
    Returns:
        The record that the bundle now has; `build["verified"]` says whether the engine could run here, and was compared
        with the reference model. An engine for the same backend, device and precision is replaced; the log warns of
        one that is for other processors or was built with other options.
    Raises:
        BundleError: see `open_bundle`.
        BackendUnavailableError: the backend's library is not installed, or the device or precision cannot run here.
        BuildError: the backend refuses a graph.
        VerificationError: the engine does not compute what the reference model computes.
        ValueError: no such backend, fewer than one thread, an option that the backend lacks or that means nothing
            without another, or options that contradict each other.
    After an error the bundle is as it was, except that the times measured so far are kept beside its engines.
    """
    backend, target = _check_options(options)
    progress("checking the bundle")
    opened = open_bundle(bundle)
    former = _former_engine(opened, options)
    if former is not None and _is_other(former, options, target):
        LOGGER.warning("this build replaces %s", describe_engine(former))
    with _working_directory(opened.path) as working:
        built = Building(opened, backend, options, target=target, progress=progress).build(working)
        if target.refusal is None:
            progress("verifying")
            _verify(opened, backend, built, options=options, batches=batches_of_build(target.facts))
        record = _record_of(opened, backend, built, options=options, target=target)
        with hold_lock(opened.path), place_directory(built.directory, record.directory):
            write_engine(opened.path, record)
    return record


def describe_build(
    bundle: Path, options: BuildOptions, *, progress: Callable[[str], None] = lambda stage: None
) -> dict[str, Any]:
    """Tell what `build_engine` would build, as plain values; nothing is measured, and the bundle is not changed.

    The graphs are rewritten by the plan that the table or former measurements give, and shown to the backend's library
    as far as it can judge them without building.

    Args:
        bundle, options, progress: see `build_engine`.
    Raises:
        BundleError, BackendUnavailableError, BuildError, ValueError: see `build_engine`.
    """
    backend, target = _check_options(options)
    progress("checking the bundle")
    opened = open_bundle(bundle)
    building = Building(opened, backend, options, target=target, progress=progress)
    key = _key_of(options)
    former = _former_engine(opened, options)
    return {
        **key,
        "directory": str(engine_directory(opened.path, **key)),
        "replaces": None if former is None else describe_engine(former),
        "libraries": dict(backend.library_versions()),
        "processor": target.processor,
        **({} if "profile" in target.facts else {"batch": backend.ENGINE_BATCH}),
        "verification": target.refusal or "on this machine",
        "build": dict(target.facts),
        **building.describe(),
    }


def _check_options(options: BuildOptions) -> tuple[Backend, BuildTarget]:
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"threads is {options.threads}, expected at least 1")
    if options.seconds != DEFAULT_SECONDS and not options.tune:
        raise ValueError("--seconds is the time for --tune and --retune; add one of them, or leave it out")
    backend = load_backend(options.backend)
    target = backend.check_build(options.runner, options.engine)
    if options.threads is not None and options.runner.device != _HOST:
        raise ValueError(f"--threads is for engines on the CPU, this one is for {options.runner.device}; leave it out")
    if options.tune and target.refusal is not None:
        raise BackendUnavailableError(
            f"backend {options.backend}: --tune measures on the device, but {target.refusal}; leave it out"
        )
    return backend, target


def _former_engine(bundle: Bundle, options: BuildOptions) -> EngineRecord | None:
    """Return the engine that a build replaces; a damaged record is none."""
    key = tuple(_key_of(options).values())
    return next((engine for engine in bundle.engines if engine.key == key), None)


def _is_other(engine: EngineRecord, options: BuildOptions, target: BuildTarget) -> bool:
    """Whether an engine is for other processors than a build, or has other options."""
    return engine.processor != target.processor or engine.build.get("options", []) != options.arguments


def _key_of(options: BuildOptions) -> dict[str, str]:
    return {"backend": options.backend, "device": options.runner.device, "precision": options.precision}


@contextmanager
def _working_directory(bundle: Path) -> Iterator[Path]:
    """Yield a hidden directory in a bundle's `engines`, after those of killed builds are gone; remove it in the end."""
    parent = bundle / ENGINES
    with ExitStack() as working:
        with hold_lock(bundle):  # else another build might see the directory before it is locked
            parent.mkdir(exist_ok=True)
            working.callback(_remove_if_empty, bundle, parent)
            remove_abandoned_directories(parent)
            path = working.enter_context(locked_working_directory(parent))
        yield path


def _remove_if_empty(bundle: Path, parent: Path) -> None:
    with hold_lock(bundle):
        if not any(parent.iterdir()):
            parent.rmdir()


def _record_of(
    bundle: Bundle, backend: Backend, built: BuiltGraphs, *, options: BuildOptions, target: BuildTarget
) -> EngineRecord:
    key = _key_of(options)
    directory = engine_directory(bundle.path, **key)
    paths = [path for path in sorted(built.directory.iterdir()) if path.suffix != CACHE_SUFFIX]
    files = {path.name: sha256_of_file(path) for path in paths}
    arguments = options.arguments
    return EngineRecord(
        **key,
        directory=directory,
        graphs={
            role: replace(graph, path=directory / graph.path.name, sha256=files[graph.path.name])
            for role, graph in built.graphs.items()
        },
        files=files,
        library_versions=dict(backend.library_versions()),
        processor=target.processor,
        sources={name: graph.sha256 for name, graph in bundle.graphs.items()},
        batch=backend.ENGINE_BATCH,
        plan=built.plan,
        build={
            "verified": target.refusal is None,
            "reason": target.refusal,
            **({"options": arguments} if arguments else {}),
            **target.facts,
            **({"graphs": dict(built.facts)} if any(built.facts.values()) else {}),
        },
    )


def _verify(bundle: Bundle, backend: Backend, built: BuiltGraphs, *, options: BuildOptions, batches: Batches) -> None:
    """Run the bundle's expectation on the engine; a preview has none, so that it only has to be finite."""
    exact = {role: graph for role, graph in built.graphs.items() if role != "preview"}
    description = {"precision": options.precision, "preview_steps": False}
    expectation = load_expectation(bundle.expectation)
    with ExitStack() as opened:
        device = open_device(options.runner.device)
        opened.callback(device.close)
        graphs = load_graphs(backend, exact, on_device(options.runner, device), built.weights)
        opened.pop_all()  # the session closes the device
    with Session(bundle, graphs, description, batches=batches, device=device) as session:
        check_parity(compare_with_expectation(session, expectation), f"the engine for {options.backend}")
    if "preview" in built.graphs:
        latents = np.repeat(expectation.latents[0, :1], batches[0], axis=0)
        _check_preview(backend, built, latents, options.runner)


def _check_preview(backend: Backend, built: BuiltGraphs, latents: NDArray[np.float32], options: RunnerOptions) -> None:
    """Raise `VerificationError` unless the previews of [N, S, D] latents are finite."""
    preview = built.graphs["preview"]
    (latent,), (current,) = preview.inputs, preview.outputs
    with Workbench(options.for_graph("preview")) as bench:
        runner = bench.load(backend, preview.path, preview.inputs, preview.outputs, built.weights.get("preview"))
        run = bench.bind(runner, preview.outputs, {latent.name: latents})
        run()
        is_finite = np.isfinite(run.result(current.name)).all()
    if not is_finite:
        raise VerificationError("the engine's preview is not finite; check the model: restyle-deploy verify BUNDLE")
