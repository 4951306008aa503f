from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.demo_model import train as training
from examples.demo_model.losses import FeatureDistance, reconstruction_loss
from examples.demo_model.portraits import Portraits, augment, load_portraits, reduce_to_64
from restyle_deploy.checkpoint import load_checkpoint
from restyle_deploy.models.restyle import model_from_checkpoint

SMALL = replace(
    training.CONFIG,
    style_dim=16,
    encoder_widths=(8, 8, 8, 8),
    generator_channels=dict.fromkeys((4, 8, 16, 32, 64), 8),
)


def random_portraits(count: int) -> Portraits:
    pixels = np.random.RandomState(0).randint(0, 256, (count, 128, 128)).astype(np.uint8)
    return Portraits(names=tuple(f"{index}.jpg" for index in range(count)), pixels=pixels)


def test_split_holds_out_200_by_person(shared_dir: Path) -> None:
    trained, held_out = load_portraits(shared_dir / "data" / "portraits.tar")
    assert len(held_out.names) == 200
    assert len(set(held_out.names)) == 200
    assert not set(trained.names) & set(held_out.names)
    assert 4000 < len(trained.names) < 4354 - 200 + 1
    assert trained.pixels.shape == (len(trained.names), 128, 128)


def test_split_keeps_a_person_on_one_side(shared_dir: Path) -> None:
    import csv
    import io
    import tarfile

    archive = shared_dir / "data" / "portraits.tar"
    trained, held_out = load_portraits(archive)
    with tarfile.open(archive) as tar:
        index, pairs = (
            list(csv.DictReader(io.StringIO(tar.extractfile(name).read().decode())))  # type: ignore[union-attr]
            for name in ("index.csv", "same_person.csv")
        )
    person = {row["file"]: (row["name"], row["born"]) for row in index if row["name"]}
    tiers = {row["file"]: row["tier"][0] for row in index}
    assert sorted(tiers[name] for name in held_out.names) == ["A"] * 100 + ["B"] * 100
    held_out_persons = {person[name] for name in held_out.names if name in person}
    assert not held_out_persons & {person[name] for name in trained.names if name in person}
    trained_names, held_out_names = set(trained.names), set(held_out.names)
    for pair in pairs:
        files = {pair["gpo_file"], pair["voteview_file"]}
        assert not (files & trained_names and files & held_out_names)


def test_augment_keeps_shape_and_range() -> None:
    images = augment(torch.from_numpy(random_portraits(5).pixels), torch.Generator().manual_seed(0))
    assert images.shape == (5, 1, 64, 64)
    assert images.abs().max() <= 1


def test_reduce_to_64_takes_means() -> None:
    pixels = np.zeros((1, 128, 128), np.uint8)
    pixels[0, :2, :2] = [[0, 255], [255, 0]]
    reduced = reduce_to_64(pixels)
    assert reduced.shape == (1, 1, 64, 64)
    assert reduced[0, 0, 0, 0].item() == pytest.approx(0)
    assert reduced[0, 0, 0, 1].item() == -1


def test_loss_is_zero_for_equal_images_and_grows_with_distance() -> None:
    distance = FeatureDistance()
    target = torch.from_numpy(np.random.RandomState(0).rand(2, 1, 64, 64).astype(np.float32))
    losses = [reconstruction_loss(target + shift, target, distance).item() for shift in (0.0, 0.1, 0.3)]
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[0] < losses[1] < losses[2]


def test_checkpoint_is_official_and_three_channels_equal_the_grey_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks = training.create_networks(SMALL)
    networks.encoder.eval()
    training.write_checkpoint(networks, config=SMALL, path=tmp_path / "small.pt")
    model = model_from_checkpoint(load_checkpoint(tmp_path / "small.pt"))
    latent = torch.randn(2, SMALL.n_styles, SMALL.style_dim)
    with torch.no_grad():
        image, _ = model.generate(latent)
        grey = networks.generator(latent)
        residual = model.encode(grey.expand(-1, 3, -1, -1), grey.expand(-1, 3, -1, -1), torch.zeros_like(latent))
        expected = networks.encode(grey, grey)
    torch.testing.assert_close(image, grey.expand(-1, 3, -1, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(residual, expected, rtol=1e-4, atol=1e-5)


def test_resuming_restores_the_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CONFIG", SMALL)
    torch.manual_seed(0)
    networks = training.create_networks(SMALL)
    networks.latent_avg += 1
    training.write_checkpoint(networks, config=SMALL, path=tmp_path / "small.pt")
    resumed = training.networks_from_checkpoint(tmp_path / "small.pt")
    images = reduce_to_64(random_portraits(2).pixels)
    assert training.measure(resumed, images, steps=2) == training.measure(networks, images, steps=2)


def biases_of_heads(networks: training.Networks) -> torch.Tensor:
    state = networks.encoder.state_dict()
    return torch.stack([state[f"styles.{index}.linear.bias"].clone() for index in range(SMALL.n_styles)])


def test_centring_moves_the_same_mean_of_both_networks_to_their_average() -> None:
    torch.manual_seed(0)
    live, average = training.create_networks(SMALL), training.create_networks(SMALL)
    images = torch.randn(4, 1, 64, 64)
    before = [biases_of_heads(networks) for networks in (live, average)]
    training.centre_latent_avg(live, average, images)
    assert torch.equal(live.latent_avg, average.latent_avg)
    assert live.latent_avg.abs().max() > 0
    for old, networks in zip(before, (live, average), strict=True):
        torch.testing.assert_close(networks.latent_avg[0], old - biases_of_heads(networks))


def test_training_runs_all_phases_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CONFIG", SMALL)
    monkeypatch.setattr(torch, "compile", lambda module: module)
    times = iter(np.linspace(0, 60, 25).tolist() + [60.0] * 10)
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    saved: list[training.Networks] = []
    portraits = random_portraits(20)
    networks = training.train(portraits, random_portraits(3), minutes=1, save=saved.append)
    assert len(saved) >= 5
    errors = training.measure(networks, reduce_to_64(portraits.pixels), steps=2)
    assert len(errors) == 2
    assert np.isfinite(errors).all()
