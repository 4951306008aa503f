"""The models of the speed table: the shipped one, and official architectures with made-up weights."""

import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import ModelFiles
from restyle_deploy.backends import load_backend
from restyle_deploy.bundle import check_engine, find_engine, read_bundle
from restyle_deploy.errors import BackendUnavailableError, BundleError, RestyleDeployError
from restyle_deploy.runtime.images import load_image, resize_image

DEMO = "demo"
DEMO_BUNDLE = Path("engines/demo-faces")
DEMO_IMAGES = Path("examples/photos")
# Cases of the golden directory, by the side of what they render.
GOLDEN_CASES: Mapping[str, str] = MappingProxyType(
    {"256": "e4e_church_256", "512": "psp_cars_512", "1024": "psp_ffhq_1024"}
)
MODELS = (DEMO, *GOLDEN_CASES)


class NeedsEngine(Protocol):
    """A contender of any table, as far as its engine goes."""

    @property
    def name(self) -> str:
        """In the table."""
        ...

    @property
    def engine(self) -> tuple[str, str] | None:
        """Backend and precision."""
        ...


def prepare_model(name: str, golden: Path | None, work: Path, progress: Callable[[str], None]) -> ModelFiles:
    """Return a model's bundle in the work directory; it is made unless a former run left it there.

    Args:
        name: one of `MODELS`.
        golden: directory with `weights.py` and the cases; the demo needs none.
        work: keeps checkpoints and bundles.
        progress: told in a few words what begins.
    """
    bundle, checkpoint = work / name, work / f"{name}.pt"
    if name == DEMO:
        if not bundle.exists():
            shutil.copytree(DEMO_BUNDLE, bundle)
        return ModelFiles(name=name, bundle=bundle)
    if golden is None:
        raise ValueError(f"model {name} needs the golden directory")
    if not checkpoint.is_file():
        progress(f"{name}: writing the checkpoint")
        unfinished = checkpoint.with_suffix(".part")
        case = golden / f"{GOLDEN_CASES[name]}.json"
        subprocess.run([sys.executable, str(golden / "weights.py"), str(case), str(unfinished)], check=True)
        unfinished.replace(checkpoint)
    if not bundle.exists():
        progress(f"{name}: exporting")
        _run_apart(_export, checkpoint, bundle)
    return ModelFiles(name=name, bundle=bundle, checkpoint=checkpoint)


def build_engines(
    files: ModelFiles,
    contenders: Sequence[NeedsEngine],
    threads: int | None,
    progress: Callable[[str], None],
    *,
    device: str = "cpu",
    tune: bool = True,
) -> dict[str, str]:
    """Build the engines that contenders need; those that fit are kept.

    Args:
        files: the model.
        contenders: of which some need engines.
        threads: of a run on the CPU; None leaves the choice to the library.
        progress: told in a few words what begins.
        device: that the engines are for.
        tune: measure the plan's choices on the device.
    Returns:
        By the name of each contender whose engine cannot be built here: why.
    """
    refused: dict[tuple[str, str], str] = {}
    for backend, precision in sorted({contender.engine for contender in contenders if contender.engine}):
        if _has_engine(files.bundle, backend, precision, device):
            continue
        progress(f"{files.name}: building {backend} {precision}")
        try:
            _run_apart(_build, files.bundle, backend, precision, threads, device, tune)
        except (RestyleDeployError, RuntimeError) as error:  # RuntimeError: the library's own, or its process died
            progress(f"{files.name}: {error}")
            refused[backend, precision] = str(error)
    return {contender.name: refused[contender.engine] for contender in contenders if contender.engine in refused}


def load_inputs(name: str, golden: Path | None, shape: tuple[int, int], count: int) -> NDArray[np.uint8]:
    """Return a batch of the model's own images, uint8 [count, H, W, 3]: mirrored and repeated until it is full.

    Args:
        name: one of `MODELS`.
        golden: holds the case's inputs.
        shape: height and width of the encoder's input.
        count: images of the batch.
    """
    if name == DEMO:
        images = np.stack([resize_image(load_image(path), shape) for path in sorted(DEMO_IMAGES.glob("*.png"))])
    else:
        assert golden is not None
        with np.load(golden / f"{GOLDEN_CASES[name]}.npz") as arrays:
            images = arrays["input"]
    images = np.concatenate([images, images[:, :, ::-1]])
    return np.ascontiguousarray(images[np.arange(count) % len(images)])


def _has_engine(directory: Path, backend: str, precision: str, device: str) -> bool:
    """Whether the bundle has an engine that can be used here as it is."""
    bundle = read_bundle(directory)
    engine = find_engine(bundle, backend=backend, device=device, precision=precision)
    if engine is None:
        return False
    try:
        module = load_backend(backend)
        check_engine(
            bundle,
            engine,
            library_versions=module.library_versions(),
            processors=module.processors(engine.device),
            plugin_hash=module.plugin_hash(),
        )
    except (BackendUnavailableError, BundleError):
        return False
    return True


def _run_apart(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a process of its own, whose memory is gone afterwards."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(function, *arguments).result()


def _export(checkpoint: Path, bundle: Path) -> None:
    from restyle_deploy.export import export_checkpoint

    export_checkpoint(checkpoint, bundle)


def _build(bundle: Path, backend: str, precision: str, threads: int | None, device: str, tune: bool) -> None:
    from restyle_deploy.build import BuildOptions, build_engine

    options = BuildOptions(backend=backend, device=device, precision=precision, tune=tune, threads=threads)
    build_engine(bundle, options)
