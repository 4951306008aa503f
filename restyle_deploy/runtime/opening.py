"""A bundle, or a deployment of one -> what a session is made of: graphs loaded on a device."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from restyle_deploy.backends import default_device, load_backend
from restyle_deploy.backends.base import EXACT_PRECISION, Backend, EngineOptions, RunnerOptions
from restyle_deploy.bundle import (
    Bundle,
    EngineRecord,
    check_engine,
    check_graphs,
    find_engine,
    read_bundle,
)
from restyle_deploy.engines import Batches, GraphRecord, batches_of_build, build_command
from restyle_deploy.errors import BackendUnavailableError, BundleError
from restyle_deploy.runtime.base import Device
from restyle_deploy.runtime.deployment import SUFFIX, Deployment, read_deployment
from restyle_deploy.runtime.host_device import HostDevice
from restyle_deploy.runtime.loop import LoadedGraph, load_graphs
from restyle_deploy.runtime.targets import check_count


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a session takes over.

    Attributes:
        bundle: the bundle.
        graphs: by role.
        description: what `Session.describe` returns.
        batches: of one run of the graphs.
        device: that the graphs were loaded on.
    """

    bundle: Bundle
    graphs: Mapping[str, LoadedGraph]
    description: Mapping[str, Any]
    batches: Batches
    device: Device


def deployment_of(bundle: str | Path, given: Mapping[str, Any]) -> Deployment:
    """Return what to open.

    Args:
        bundle: a bundle's directory, or a deployment's file.
        given: values of a `Deployment` that win over the file's and the defaults; None counts as not given.
    Raises:
        BundleError: see `read_deployment`.
        TypeError, ValueError: threads or max_batch are no whole number, or below 1.
    """
    path = Path(bundle)
    is_file = path.suffix == SUFFIX and not path.is_dir()
    deployment = read_deployment(path) if is_file else Deployment(bundle=path)
    values = {name: value for name, value in given.items() if value is not None}
    for name in ("threads", "max_batch"):
        if name in values:
            check_count(name, values[name])
    return replace(deployment, **values)


def open_deployment(deployment: Deployment, *, is_compiled: bool = False) -> Opened:
    """Load a bundle's engine for these options, or its exported graphs if no engine has been built.

    Args:
        deployment: what to open.
        is_compiled: see `RunnerOptions`.
    Raises:
        BundleError, BackendUnavailableError, BuildError, DeviceError, ValueError: see `Session.open`.
    """
    module = load_backend(deployment.backend)
    options = RunnerOptions(
        device=deployment.device or default_device(deployment.backend),
        threads=deployment.threads,
        precision=deployment.precision,
        is_compiled=is_compiled,
    )
    module.check_options(options)
    bundle = read_bundle(deployment.bundle)
    has_previews = deployment.preview_steps and bundle.config.output_size > bundle.config.input_size
    engine = _choose_engine(bundle, deployment.backend, options, plain=deployment.plain, has_previews=has_previews)
    records = {role: record for role, record in (engine or bundle).graphs.items() if role != "preview" or has_previews}
    versions = dict(module.library_versions())
    options, batches = _check_files(bundle, engine, module, options, records)
    description = {
        "backend": deployment.backend,
        "device": options.device,
        "threads": deployment.threads,
        "precision": deployment.precision,
        "plan": engine.plan["origin"] if engine else "plain",
        "preview_steps": has_previews,
        "library_versions": versions,
    }
    with ExitStack() as opened:
        device = open_device(options.device)
        opened.callback(device.close)
        with _weights_of(bundle, engine) as weights, device.unaffected_by_captures():
            graphs = load_graphs(module, records, on_device(options, device), weights)
        opened.pop_all()  # the session closes the device
    return Opened(bundle=bundle, graphs=graphs, description=description, batches=batches, device=device)


def open_device(name: str) -> Device:
    """Return the device that graphs of `RunnerOptions.device` run on; whoever asks closes it.

    Raises:
        DeviceError: a GPU cannot be used.
        BackendUnavailableError: what GPUs need is not installed.
    """
    if name.startswith("cpu"):
        return HostDevice()
    from restyle_deploy.runtime import cuda_device  # which loads what sessions on the CPU have no use for

    return cuda_device.open_device(name)


def on_device(options: RunnerOptions, device: Device) -> RunnerOptions:
    """Return the options of graphs that run in the queue of a device; those of the CPU need none."""
    return options if device.is_host else replace(options, queue=device)


def _check_files(
    bundle: Bundle,
    engine: EngineRecord | None,
    module: Backend,
    options: RunnerOptions,
    records: Mapping[str, GraphRecord],
) -> tuple[RunnerOptions, Batches]:
    """Check what will be loaded; return the options to load it with, and the batches that it takes."""
    if engine is None:
        check_graphs(bundle)
        # A backend that has to build the exported graphs does so as it builds engines without options.
        return options, batches_of_build(module.check_build(options, EngineOptions()).facts)
    check_engine(
        bundle,
        engine,
        library_versions=dict(module.library_versions()),
        processors=module.processors(options.device),
        plugin_hash=module.plugin_hash(),
        roles=records,
    )
    options = replace(
        options,
        host_code_allowed=bool(engine.build.get("version_compatible")),
        plugin_route=engine.build.get("plugin_route"),
    )
    return options, engine.batches


def _choose_engine(
    bundle: Bundle, backend: str, options: RunnerOptions, *, plain: bool, has_previews: bool
) -> EngineRecord | None:
    """Return the engine to load, or None for the exported graphs; raise `BundleError` where what is asked lacks."""
    device, precision = options.device, options.precision
    engine = None if plain else find_engine(bundle, backend=backend, device=device, precision=precision)
    build = f"build it: {build_command(bundle.path, backend=backend, device=device, precision=precision)}"
    if not (engine or plain or precision == EXACT_PRECISION):
        raise BundleError(
            f"{bundle.path}: has no engine for backend {backend}, device {device} and precision {precision}; "
            f"{build}, or run the exported graphs: --plain (plain=True)"
        )
    if has_previews and not (engine and "preview" in engine.graphs):
        mend = "which plain leaves aside; leave one of the two out" if plain else f"which the bundle has not; {build}"
        raise BundleError(f"{bundle.path}: preview steps need an engine with a preview graph, {mend}")
    return engine


@contextmanager
def _weights_of(bundle: Bundle, engine: EngineRecord | None) -> Iterator[Mapping[str, Path]]:
    """Yield the graphs whose weights a stripped engine takes, by role; for another one there is nothing to take."""
    if engine is None or engine.build.get("weights") != "stripped":
        yield {}
        return
    try:
        from restyle_deploy.engine_graphs import write_weights
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{engine.directory}: a stripped engine takes its weights from the bundle's graphs, which needs "
            f"{error.name}; run: pip install 'restyle-deploy[build]'"
        ) from error
    check_graphs(bundle)
    with tempfile.TemporaryDirectory(prefix="restyle-deploy-", ignore_cleanup_errors=True) as folder:
        yield write_weights(bundle, engine, folder=Path(folder))
