"""Checkpoint to bundle: what is written, what is refused, and that nothing half-made is left."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import restyle_deploy.export
from restyle_deploy import verify
from restyle_deploy.bundle import open_bundle
from restyle_deploy.checkpoint import load_checkpoint
from restyle_deploy.errors import BundleError, CheckpointError, ExportError, VerificationError
from restyle_deploy.export import export_checkpoint, read_recipe
from restyle_deploy.graph.export import Graph
from restyle_deploy.models.restyle import RestyleModel, model_from_checkpoint
from restyle_deploy.runtime.session import Session, targets_from_images
from tests.bundles import add_engine
from tests.toy import write_toy_checkpoint

BUNDLE_FILES = {
    *("manifest.json", "encoder.onnx", "generator.onnx"),
    *("latent_avg.npy", "average_image.npy", "expectation.npz"),
}


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def stored_graph(bundle: Path, name: str, *, brighter: float = 0.0) -> Callable[[RestyleModel], Graph]:
    """Return a function that takes a graph of a bundle instead of exporting it once more."""
    model = onnx.load(bundle / f"{name}.onnx")
    for value in model.graph.initializer:
        if value.name.endswith("to_rgbs.3.bias"):
            value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value) + np.float32(brighter), value.name))
    return lambda _: Graph(model=model, inputs=(), outputs=())


@pytest.fixture
def quick_graphs(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("encoder", "generator"):
        monkeypatch.setattr(restyle_deploy.export, f"{name}_graph", stored_graph(toy_bundle, name))


# What is written


def test_bundle_holds_the_model(toy_checkpoint: Path, toy_bundle: Path) -> None:
    checkpoint = load_checkpoint(toy_checkpoint)
    model = model_from_checkpoint(checkpoint)
    bundle = open_bundle(toy_bundle)
    assert names_in(toy_bundle) == BUNDLE_FILES
    assert bundle.config == checkpoint.config
    assert bundle.checkpoint_sha256 == checkpoint.sha256
    np.testing.assert_array_equal(bundle.latent_avg, checkpoint.latent_avg.numpy())
    np.testing.assert_array_equal(bundle.average_image, model.average_image().numpy())
    assert bundle.engines == ()


def test_bundle_records_its_verification(toy_bundle: Path) -> None:
    record = open_bundle(toy_bundle).verification
    assert len(record["latent_errors"]) == len(record["image_errors"]) == record["steps"] == 3
    assert max(record["latent_errors"]) <= record["latent_tolerance"] == 1e-4
    assert max(record["image_errors"]) <= record["image_tolerance"] == 1e-3
    assert record["reference"] == f"torch {torch.__version__}"
    assert record["backend"] == "onnxruntime"
    assert "onnxruntime" in record["library_versions"]


@pytest.mark.slow
def test_a_cars_bundle_inverts_as_the_model_does(tmp_path: Path) -> None:
    options = {"encoder_type": "ResNetGradualStyleEncoder", "dataset_type": "cars_encode", "mapping_layers": 0}
    checkpoint = write_toy_checkpoint(tmp_path / "cars.pt", **options)
    parity = export_checkpoint(checkpoint, tmp_path / "cars")
    assert max(parity.latent_errors) < 1e-5
    model = model_from_checkpoint(load_checkpoint(checkpoint))
    images = np.random.RandomState(0).randint(0, 256, (3, 50, 70, 3)).astype(np.uint8)
    expected = model.invert(torch.from_numpy(targets_from_images(images, model.config)), steps=5)
    with Session.open(tmp_path / "cars") as session:
        result = session.invert(images, steps=5, every_step=True)
    assert result.images.shape == (5, 3, 3, 48, 64)
    np.testing.assert_allclose(result.latents, np.stack([step.latent for step in expected]), rtol=0, atol=1e-4)
    np.testing.assert_allclose(result.images, np.stack([step.image for step in expected]), rtol=0, atol=1e-3)


@pytest.mark.usefixtures("quick_graphs")
def test_stages_are_reported_in_order(toy_checkpoint: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    export_checkpoint(toy_checkpoint, tmp_path / "new" / "bundle", progress=stages.append)
    words = ("reading toy.pt", "exporting the encoder", "exporting the generator", "reference model", "the graphs")
    assert len(stages) == len(words)
    assert all(word in stage for word, stage in zip(words, stages, strict=True))
    assert names_in(tmp_path / "new") == {"bundle"}


# What is refused


@pytest.mark.usefixtures("quick_graphs")
def test_a_graph_that_computes_something_else_leaves_no_bundle(
    toy_checkpoint: Path, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brighter = stored_graph(toy_bundle, "generator", brighter=0.002)
    monkeypatch.setattr(restyle_deploy.export, "generator_graph", brighter)
    with pytest.raises(VerificationError, match=r"toy\.pt: differs from the reference model; largest error per step: "):
        export_checkpoint(toy_checkpoint, tmp_path / "bundle")
    assert names_in(tmp_path) == set()


@pytest.mark.usefixtures("quick_graphs")
@pytest.mark.parametrize("side", ["latents", "images"])
def test_both_tolerances_are_kept(
    side: str, toy_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = replace(verify.TOLERANCES["fp32"], **{side: 0.0})
    monkeypatch.setattr(verify, "TOLERANCES", {"fp32": strict})
    with pytest.raises(VerificationError, match=r"\(tolerance 0\)"):
        export_checkpoint(toy_checkpoint, tmp_path / "bundle")
    assert names_in(tmp_path) == set()


@pytest.mark.usefixtures("quick_graphs")
def test_a_failed_export_keeps_the_bundle_that_is_there(
    toy_checkpoint: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "TOLERANCES", {"fp32": verify.Tolerance(latents=0.0, images=0.0)})
    with pytest.raises(VerificationError, match="differs"):
        export_checkpoint(toy_checkpoint, bundle_copy, overwrite=True)
    assert open_bundle(bundle_copy).config.output_size == 64
    assert names_in(bundle_copy.parent) == {bundle_copy.name}


@pytest.mark.usefixtures("quick_graphs")
@pytest.mark.parametrize("stage", ["exporting the generator", "running the reference model", "running the graphs"])
def test_an_interrupted_export_leaves_nothing(stage: str, toy_checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(reported: str) -> None:
        if reported.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(toy_checkpoint, tmp_path / "bundle", progress=interrupt)
    assert names_in(tmp_path) == set()


def test_a_bundle_is_not_replaced_unasked(toy_checkpoint: Path, toy_bundle: Path) -> None:
    before = (toy_bundle / "manifest.json").stat().st_mtime_ns
    with pytest.raises(ExportError, match="exists already; add --overwrite"):
        export_checkpoint(toy_checkpoint, toy_bundle)
    assert (toy_bundle / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["file", "empty directory", "other directory", "directory with another manifest"])
def test_what_is_no_bundle_is_never_replaced(kind: str, toy_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    if kind == "file":
        output.write_text("text")
    else:
        output.mkdir()
        if kind != "empty directory":
            (output / "letter.txt").write_text("text")
        if kind == "directory with another manifest":
            (output / "manifest.json").write_text("{}")
    with pytest.raises(ExportError, match="is no bundle .* and is not replaced"):
        export_checkpoint(toy_checkpoint, output, overwrite=True)
    left = output if kind == "file" else output / "letter.txt"
    assert kind == "empty directory" or left.read_text() == "text"
    assert output.exists()


@pytest.fixture
def bundle_copy(toy_bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in toy_bundle.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.mark.usefixtures("quick_graphs")
@pytest.mark.parametrize("damage", ["encoder.onnx", "manifest.json"])
def test_a_damaged_bundle_can_be_replaced(damage: str, toy_checkpoint: Path, bundle_copy: Path) -> None:
    (bundle_copy / damage).write_bytes(b"damaged")
    with pytest.raises(BundleError, match="export the bundle again"):
        open_bundle(bundle_copy)
    export_checkpoint(toy_checkpoint, bundle_copy, overwrite=True)
    assert open_bundle(bundle_copy).config.output_size == 64
    assert names_in(bundle_copy.parent) == {bundle_copy.name}


@pytest.mark.usefixtures("quick_graphs")
def test_a_bundle_with_engines_can_be_replaced(toy_checkpoint: Path, bundle_copy: Path) -> None:
    add_engine(bundle_copy)
    export_checkpoint(toy_checkpoint, bundle_copy, overwrite=True)
    assert open_bundle(bundle_copy).engines == ()
    assert "engines" not in names_in(bundle_copy)


def test_a_checkpoint_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"bad\.pt: not a torch checkpoint"):
        export_checkpoint(tmp_path / "bad.pt", tmp_path / "bundle")
    assert names_in(tmp_path) == {"bad.pt"}


@pytest.mark.usefixtures("quick_graphs")
def test_a_model_that_overflows_leaves_no_bundle(toy_checkpoint: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = torch.load(toy_checkpoint, weights_only=True)
    content["state_dict"]["decoder.input.input"].fill_(3e38)
    torch.save(content, tmp_path / "huge.pt")
    with pytest.raises(VerificationError, match="the latent of image 0 is not finite after step 1"):
        export_checkpoint(tmp_path / "huge.pt", tmp_path / "bundle")
    assert names_in(tmp_path) == {"huge.pt"}


# Recipes


def test_a_recipe_wins_over_the_options(toy_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.toml"
    recipe.write_text('name = "toy"\n[model]\nencoder_type = "ResNetBackboneEncoder"\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match="missing: encoder.conv1.weight"):
        export_checkpoint(toy_checkpoint, tmp_path / "bundle", recipe=recipe)
    assert read_recipe(recipe) == {"encoder_type": "ResNetBackboneEncoder"}


@pytest.mark.usefixtures("quick_graphs")
def test_a_recipe_names_the_domain(toy_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.toml"
    recipe.write_text('[model]\ndomain = "toonify"\ngenerator_channels = {4=8, 8=8, 16=8, 32=8, 64=8}\n')
    export_checkpoint(toy_checkpoint, tmp_path / "bundle", recipe=recipe)
    assert open_bundle(tmp_path / "bundle").config.domain == "toonify"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"toy\.toml: not a readable recipe \(.*No such file"),
        (b"[model", r"toy\.toml: not a readable recipe"),
        (b"name = '\xff'", r"toy\.toml: not a readable recipe"),
        (b"name = 'toy'", r"toy\.toml: the recipe has no \[model\] table"),
        (b"model = 3", r"toy\.toml: the recipe has no \[model\] table"),
        (b"[model]\ncolour = 'red'", "unknown model fields colour; known are domain"),
        (b"[model]\ndomain = 'boats'", "domain is 'boats', expected one of faces"),
    ],
)
def test_an_impossible_recipe_is_refused(
    content: bytes | None, message: str, toy_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "toy.toml"
    if content is not None:
        recipe.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(toy_checkpoint, tmp_path / "bundle", recipe=recipe)
    assert not (tmp_path / "bundle").exists()
