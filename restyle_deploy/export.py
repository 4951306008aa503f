"""A checkpoint -> a bundle that has been verified: the whole way in one function."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from restyle_deploy.bundle import (
    AVERAGE_IMAGE,
    EXPECTATION,
    FILES,
    LATENT_AVG,
    MANIFEST,
    write_manifest,
    write_verification,
)
from restyle_deploy.checkpoint import load_checkpoint
from restyle_deploy.errors import CheckpointError, ExportError
from restyle_deploy.files import replace_directory_when_complete
from restyle_deploy.graph.export import encoder_graph, generator_graph
from restyle_deploy.models.restyle import RestyleModel, model_from_checkpoint
from restyle_deploy.runtime.session import InversionResult, Session, targets_from_images
from restyle_deploy.verify import (
    STEPS,
    Expectation,
    Parity,
    check_parity,
    compare_with_reference,
    create_inputs,
    reduce_images,
    save_expectation,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERIFICATION_BACKEND = "onnxruntime"


def export_checkpoint(
    checkpoint_path: Path,
    output: Path,
    *,
    recipe: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Parity:
    """Export an official checkpoint as a bundle, and verify it before it appears under its name.

    The torch model and the exported graphs run 3 steps on the same two images.

    Args:
        checkpoint_path: an official `.pt` file.
        output: the bundle's directory; its parent is created.
        recipe: a TOML file whose `[model]` table wins over the checkpoint's options.
        overwrite: replace a bundle that is there.
        progress: called with a few words as each stage begins.
    Returns:
        The differences that were measured.
    Raises:
        CheckpointError: see `load_checkpoint` and `model_from_checkpoint`; or the recipe cannot be read.
        ExportError: the directory exists and is not to be replaced, or is no bundle.
        VerificationError: latents differ by more than 1e-4 or images by more than 1e-3; there is no bundle then.
    """
    _check_output(output, overwrite=overwrite)
    overrides = read_recipe(recipe) if recipe else {}
    progress(f"reading {checkpoint_path.name}")
    checkpoint = load_checkpoint(checkpoint_path, overrides=overrides)
    model = model_from_checkpoint(checkpoint)
    config, sha256 = checkpoint.config, checkpoint.sha256
    del checkpoint
    with replace_directory_when_complete(output, overwrite=overwrite) as directory:
        for name, export in (("encoder", encoder_graph), ("generator", generator_graph)):
            progress(f"exporting the {name}")
            onnx.save(export(model).model, directory / f"{name}.onnx")
        progress(f"running the reference model for {STEPS} steps")
        inputs = create_inputs(config)
        reference = _invert_with_model(model, inputs)
        _write_arrays(model, inputs, reference, directory)
        del model
        write_manifest(directory, config=config, checkpoint_sha256=sha256)
        progress(f"running the graphs for {STEPS} steps")
        with Session.open(directory, backend=VERIFICATION_BACKEND) as session:
            parity = compare_with_reference(session, inputs, reference)
            description = session.describe()
        check_parity(parity, checkpoint_path.name)
        record = {**parity.as_json(), "steps": STEPS, "reference": f"torch {torch.__version__}", **description}
        write_verification(directory, record)
    return parity


def read_recipe(path: Path) -> Mapping[str, Any]:
    """Return the `[model]` table of a recipe: fields of `ModelConfig`.

    Raises:
        CheckpointError: the file cannot be read, is not TOML, or has no such table.
    """
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable recipe ({error})") from error
    model = recipe.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: the recipe has no [model] table")
    return model


def _check_output(output: Path, *, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise ExportError(f"{output}: exists already; add --overwrite to replace it, or choose another name")
    foreign = sorted({path.name for path in output.iterdir()} - FILES) if output.is_dir() else [output.name]
    if foreign or not (output / MANIFEST).is_file():  # a damaged bundle may be replaced, anything else may not
        raise ExportError(
            f"{output}: is no bundle (it holds {', '.join(foreign) or f'no {MANIFEST}'}) and is not replaced; "
            "choose another name"
        )


def _invert_with_model(model: RestyleModel, inputs: NDArray[np.uint8]) -> InversionResult:
    """Return every step of the torch model for the inputs."""
    results = model.invert(torch.from_numpy(targets_from_images(inputs, model.config)), steps=STEPS)
    return InversionResult(
        images=np.stack([result.image.numpy() for result in results]),
        latents=np.stack([result.latent.numpy() for result in results]),
    )


def _write_arrays(model: RestyleModel, inputs: NDArray[np.uint8], reference: InversionResult, directory: Path) -> None:
    np.save(directory / LATENT_AVG, model.latent_avg.numpy())
    np.save(directory / AVERAGE_IMAGE, model.average_image().numpy())
    pooled, crop = reduce_images(reference.images)
    expectation = Expectation(inputs=inputs, latents=reference.latents, images_pooled=pooled, images_crop=crop)
    save_expectation(directory / EXPECTATION, expectation)
