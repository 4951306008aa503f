"""One refinement step, the loop around it, and how a model takes a checkpoint's weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from restyle_deploy.checkpoint import Checkpoint, config_from_options, load_checkpoint
from restyle_deploy.errors import CheckpointError
from restyle_deploy.models.encoders import ENCODERS
from restyle_deploy.models.restyle import RestyleModel, model_from_checkpoint
from tests.toy import toy_checkpoint_content, toy_model, write_toy_checkpoint

CARS = "cars_encode"


@pytest.mark.parametrize("case", ["e4e_church_256", "psp_cars_512", "psp_ffhq_1024"])
def test_names_and_shapes_are_those_of_the_official_checkpoints(case: str, shared_dir: Path) -> None:
    path = shared_dir / "golden" / f"{case}.json"
    if not path.is_file():
        pytest.skip(f"the reference outputs are not here: {path}")
    official = json.loads(path.read_text(encoding="utf-8"))
    mapping_layers = sum(key.startswith("decoder.style.") and key.endswith(".weight") for key in official["shapes"])
    assert mapping_layers == 8
    with torch.device("meta"):
        model = RestyleModel(config_from_options(official["opts"], mapping_layers=mapping_layers, overrides={}))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == official["shapes"]
    assert list(model.latent_avg.shape) == official["latent_avg_shape"]


@pytest.mark.parametrize("dataset_type", ["ffhq_encode", CARS])
@pytest.mark.parametrize("encoder_type", ENCODERS)
def test_every_type_takes_its_checkpoint(encoder_type: str, dataset_type: str, tmp_path: Path) -> None:
    path = write_toy_checkpoint(tmp_path / "toy.pt", encoder_type=encoder_type, dataset_type=dataset_type)
    model = model_from_checkpoint(load_checkpoint(path))
    expected = toy_model(encoder_type=encoder_type, dataset_type=dataset_type)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    target = torch.rand(1, 3, *model.config.input_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for found, step in zip(model.invert(target, steps=2), expected.invert(target, steps=2), strict=True):
        assert torch.equal(found.latent, step.latent)
        assert torch.equal(found.image, step.image)


def test_only_the_mapping_network_may_be_absent(tmp_path: Path) -> None:
    with_mapping, without = (
        write_toy_checkpoint(tmp_path / f"{layers}.pt", mapping_layers=layers) for layers in (2, 0)
    )
    assert load_checkpoint(with_mapping).config.mapping_layers == 2
    assert load_checkpoint(without).config.mapping_layers == 0
    assert "decoder.style.1.weight" not in model_from_checkpoint(load_checkpoint(without)).state_dict()


def test_all_problems_with_the_weights_are_in_one_message(tmp_path: Path) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights["encoder.extra"] = weights.pop("encoder.styles.3.linear.weight")
        weights["decoder.conv1.conv.blur.kernel"] = weights.pop("decoder.noises.noise_0")
        weights["decoder.input.input"] = torch.zeros(1, 8, 4, 5)
        weights["decoder.convs.0.activate.bias"] = torch.zeros(9)
        weights["encoder.input_layer.1.num_batches_tracked"] = torch.zeros(())

    message = problems_after(damage, tmp_path)
    assert "\n" not in message
    for part in (
        "2 missing: encoder.styles.3.linear.weight, decoder.noises.noise_0",
        "2 unexpected: encoder.extra, decoder.conv1.conv.blur.kernel",
        "3 of another shape or type: ",
        "decoder.input.input (got float32 [1, 8, 4, 5], expected float32 [1, 8, 4, 4])",
        "decoder.convs.0.activate.bias (got float32 [9], expected float32 [8])",
        "encoder.input_layer.1.num_batches_tracked (got float32 [], expected int64 [])",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("removed", "problem"),
    [
        ("decoder.style.2.", "2 missing: decoder.style.2.weight, decoder.style.2.bias"),
        ("decoder.style.1.weight", "1 missing: decoder.style.1.weight"),
        ("decoder.style.3.bias", "1 missing: decoder.style.3.bias"),
        ("decoder.to_rgb1.bias", "1 missing: decoder.to_rgb1.bias"),
    ],
)
def test_a_hole_in_the_weights_is_named(removed: str, problem: str, tmp_path: Path) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        for key in [key for key in weights if key.startswith(removed)]:
            del weights[key]

    assert problems_after(damage, tmp_path, mapping_layers=3).endswith(f"; {problem}")


def problems_after(damage: Callable[[dict[str, Tensor]], None], directory: Path, **options: Any) -> str:
    content = toy_checkpoint_content(**options)
    damage(content["state_dict"])
    torch.save(content, directory / "damaged.pt")
    checkpoint = load_checkpoint(directory / "damaged.pt")
    with pytest.raises(CheckpointError, match=r"damaged\.pt: the weights do not fit the architecture") as caught:
        model_from_checkpoint(checkpoint)
    return str(caught.value)


def test_an_unknown_encoder_type_is_refused(toy_checkpoint: Path) -> None:
    checkpoint: Checkpoint = load_checkpoint(toy_checkpoint, overrides={"encoder_type": "Pix2Style"})
    with pytest.raises(CheckpointError, match="encoder_type is 'Pix2Style', expected one of BackboneEncoder"):
        model_from_checkpoint(checkpoint)


@pytest.mark.parametrize("dataset_type", ["ffhq_encode", CARS])
def test_images_are_cropped_and_pooled_as_upstream_does(dataset_type: str) -> None:
    model = toy_model(dataset_type=dataset_type)
    latent = model.latent_avg[None]
    whole = model.decoder(latent)
    pooled = functional.adaptive_avg_pool2d(whole, (32, 32))
    cars = dataset_type == CARS
    image, current = model.generate(latent)
    torch.testing.assert_close(image, whole[:, :, 8:56] if cars else whole)
    torch.testing.assert_close(current, pooled[:, :, 4:28] if cars else pooled)
    torch.testing.assert_close(model.average_image(), current[0])


def test_the_residual_is_added_to_the_latent() -> None:
    model = toy_model()
    target, current = (torch.full((2, 3, 32, 32), value) for value in (0.5, -0.5))
    latent = torch.full((2, 10, 16), 3.0)
    expected = model.encoder(torch.cat([target, current], dim=1)) + 3
    torch.testing.assert_close(model.encode(target, current, latent), expected)


def test_each_step_starts_where_the_last_one_ended() -> None:
    model = toy_model(dataset_type=CARS)
    target = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    results = model.invert(target, steps=3)
    assert len(results) == 3
    current, latent = model.average_image().repeat(2, 1, 1, 1), model.latent_avg.repeat(2, 1, 1)
    for result in results:
        latent = model.encoder(torch.cat([target, current], dim=1)) + latent
        image = model.decoder(latent)[:, :, 8:56]
        current = functional.avg_pool2d(image, 2)
        torch.testing.assert_close(result.latent, latent)
        torch.testing.assert_close(result.image, image)
        torch.testing.assert_close(result.current, current)
    assert (results[0].latent - results[1].latent).abs().mean() > 0.01
