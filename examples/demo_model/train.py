"""Train the demo model from scratch and write a checkpoint in the official layout.

    python -m examples.demo_model.train ARCHIVE OUT.pt --minutes 100

Source: the loop is ReStyle's, arXiv:2104.02699; unlike there, encoder and generator start together from nothing.
"""

import copy
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.demo_model.losses import FeatureDistance, reconstruction_loss
from examples.demo_model.portraits import Portraits, augment, load_portraits, reduce_to_64
from restyle_deploy.files import replace_when_complete
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.models.encoders import ENCODERS
from restyle_deploy.models.generator import Generator

logger = logging.getLogger("train")

CONFIG = ModelConfig(
    encoder_type="BackboneEncoder",
    domain="custom",
    output_size=64,
    input_size=64,
    style_dim=128,
    mapping_layers=0,
    generator_channels={4: 128, 8: 128, 16: 96, 32: 64, 64: 48},
    encoder_widths=(32, 64, 96, 128),
    encoder_units=(1, 1, 1, 1),
)
# Share of the training time at which a phase ends.
ONE_STEP_END, JOINT_END = 0.28, 0.72
BATCH = 16
POOL = 160  # inversions under way, from which batches are drawn
CONTINUE = 0.64  # share of inversions that go on to another step
MAX_STEPS = 12
ENCODER_LEARNING_RATE = 2e-3
GENERATOR_LEARNING_RATE = 5e-3
WARM_UP_ITERATIONS = 60
EMA_DECAY = 0.998
W_NOISE = 0.05
W_WEIGHT = 1e-3
DELTA_WEIGHT = 1e-2


@dataclass(kw_only=True)
class Networks:
    """A pair that is trained, or the moving average of one. `latent_avg` is [1, n_styles, style_dim]."""

    encoder: nn.Module
    generator: Generator
    latent_avg: Tensor

    def encode(self, target: Tensor, current: Tensor) -> Tensor:
        """Return the residual [N, n_styles, style_dim] for grey images [N, 1, 64, 64]."""
        pair = torch.cat([target.expand(-1, 3, -1, -1), current.expand(-1, 3, -1, -1)], dim=1)
        residual: Tensor = self.encoder(pair.contiguous(memory_format=torch.channels_last))
        return residual

    def start(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the average latent and its image, repeated."""
        with torch.no_grad():
            image = self.generator(self.latent_avg)
        return self.latent_avg.repeat(count, 1, 1), image.repeat(count, 1, 1, 1)


class InversionPool:
    """Inversions under way: batches are drawn from it, take one step, and go on or start over with a new portrait.

    One step with gradients serves inversions of every age, so that late steps are trained without extra passes.
    """

    def __init__(self, pixels: Tensor, networks: Networks, random: torch.Generator) -> None:
        self._pixels, self._random = pixels, random
        self.target = torch.empty(POOL, 1, 64, 64)
        self.latent, self.current = networks.start(POOL)
        self.age = torch.zeros(POOL, dtype=torch.long)
        self._restart(torch.arange(POOL), networks)

    def draw(self) -> Tensor:
        """Return the indices of a batch."""
        return torch.randperm(POOL, generator=self._random)[:BATCH]

    def put(self, chosen: Tensor, latent: Tensor, current: Tensor, networks: Networks, *, share: float) -> None:
        """Store the results of a step; a `share` of the inversions goes on, the others start over."""
        self.latent[chosen], self.current[chosen] = latent, current
        self.age[chosen] += 1
        ends = torch.rand(len(chosen), generator=self._random) >= share
        self._restart(chosen[ends | (self.age[chosen] >= MAX_STEPS)], networks)

    def restart_all(self, networks: Networks) -> None:
        """Start every inversion over (after the average latent has moved)."""
        self._restart(torch.arange(POOL), networks)

    def _restart(self, indices: Tensor, networks: Networks) -> None:
        if len(indices) == 0:
            return
        portraits = torch.randint(len(self._pixels), (len(indices),), generator=self._random)
        self.target[indices] = augment(self._pixels[portraits], self._random)
        self.latent[indices], self.current[indices] = networks.start(len(indices))
        self.age[indices] = 0


def train(
    training: Portraits,
    held_out: Portraits,
    *,
    minutes: float,
    save: Callable[[Networks], None],
    resumed: Networks | None = None,
    start_at: float = 0.0,
) -> Networks:
    """Train for `minutes` of wall-clock time and return the moving average of the weights.

    Args:
        training: portraits to learn from.
        held_out: portraits that are only measured, for the log.
        minutes: wall-clock time of what is left of the schedule.
        save: called with the moving average at each report.
        resumed: networks to go on with, instead of new ones.
        start_at: share of the schedule that counts as done.
    """
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    live = resumed or create_networks(CONFIG)
    average = copy.deepcopy(live)
    render = torch.compile(live.generator)  # fuses the element-wise passes, which take most of the time on a CPU
    distance = FeatureDistance()
    optimizer = torch.optim.Adam(
        [
            {"params": live.encoder.parameters(), "peak": ENCODER_LEARNING_RATE},
            {"params": live.generator.parameters(), "peak": GENERATOR_LEARNING_RATE},
        ],
        betas=(0.9, 0.99),
    )
    pool = InversionPool(torch.from_numpy(training.pixels), live, random)
    held_out_images = reduce_to_64(held_out.pixels)
    begin = time.monotonic()
    phase = "one step" if start_at < ONE_STEP_END else "joint"
    iteration, next_report = 0, start_at + 0.05
    while (progress := start_at + (1 - start_at) * (time.monotonic() - begin) / (60 * minutes)) < 1:
        if phase == "one step" and progress > ONE_STEP_END:
            phase = "joint"
            centre_latent_avg(live, average, pool.target)
            pool.restart_all(live)
        if phase == "joint" and progress > JOINT_END:
            phase = "encoder only"
            live.generator.load_state_dict(average.generator.state_dict())
            live.generator.requires_grad_(False)
        factor = (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2) * min(1, (iteration + 1) / WARM_UP_ITERATIONS)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        run_iteration(live, render, pool, optimizer, distance, one_step=phase == "one step")
        update_average(average, live, iteration)
        iteration += 1
        if progress > next_report:
            next_report += 0.1
            errors = " ".join(f"{error:.4f}" for error in measure(average, held_out_images, steps=5))
            logger.info("%4.0f %% %s, iteration %d, held-out MSE by step: %s", 100 * progress, phase, iteration, errors)
            save(average)
    return average


def create_networks(config: ModelConfig) -> Networks:
    """Create both networks with random weights; the generator renders grey images."""
    generator = Generator(
        output_size=config.output_size,
        style_dim=config.style_dim,
        channels=config.generator_channels,
        mapping_layers=0,
        image_channels=1,
    )
    encoder = ENCODERS[config.encoder_type](config)
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this overload
    return Networks(encoder=encoder, generator=generator, latent_avg=torch.zeros(1, config.n_styles, config.style_dim))


def networks_from_checkpoint(path: Path) -> Networks:
    """Return the networks of a checkpoint that `write_checkpoint` wrote."""
    content = torch.load(path, weights_only=True)
    networks = create_networks(CONFIG)
    networks.latent_avg = content["latent_avg"][None]
    state = content["state_dict"]
    grey = networks.generator.state_dict()
    for key, value in grey.items():
        stored = state[f"decoder.{key}"]
        value.copy_(stored if stored.shape == value.shape else stored.narrow(1, 0, 1))
    networks.encoder.load_state_dict({key: state[f"encoder.{key}"] for key in networks.encoder.state_dict()})
    return networks


def run_iteration(
    live: Networks,
    render: Callable[[Tensor], Tensor],
    pool: InversionPool,
    optimizer: torch.optim.Optimizer,
    distance: FeatureDistance,
    *,
    one_step: bool,
) -> None:
    """Take one step of a batch of inversions and one optimiser step."""
    chosen = pool.draw()
    target, latent, current = pool.target[chosen], pool.latent[chosen], pool.current[chosen]
    delta = live.encode(target, current)
    latent = latent + delta
    rms = latent.detach().square().mean().sqrt()
    noisy = latent + W_NOISE * rms * torch.randn_like(latent) if one_step else latent
    image = render(noisy)
    loss = reconstruction_loss(image, target, distance)
    loss = loss + W_WEIGHT * (latent - live.latent_avg).square().mean()
    later = (pool.age[chosen] > 0).float()[:, None, None]
    loss = loss + DELTA_WEIGHT * (later * delta.square()).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    nn.utils.clip_grad_norm_(trained, 5.0)
    optimizer.step()
    share = 0.0 if one_step else CONTINUE
    pool.put(chosen, latent.detach(), image.detach(), live, share=share)


def update_average(average: Networks, live: Networks, iteration: int) -> None:
    """Move the averaged weights towards the live ones; quickly at first, when there is little to remember."""
    weight = 1 - min(EMA_DECAY, (iteration + 1) / (iteration + 10))
    for moving, module in ((average.encoder, live.encoder), (average.generator, live.generator)):
        for kept, new in zip(moving.state_dict().values(), module.state_dict().values(), strict=True):
            if kept.is_floating_point():
                kept.lerp_(new, weight)
            else:
                kept.copy_(new)


@torch.no_grad()
def centre_latent_avg(live: Networks, average: Networks, target: Tensor) -> None:
    """Move the mean of the first step's result into the average latent, and out of the heads' biases.

    Both networks move by the same mean: the moving average of the weights only fits one average latent.
    """
    _, current = average.start(len(target))
    average.encoder.eval()
    mean = average.encode(target, current).mean(dim=0)  # [S, D]
    average.encoder.train()
    for networks in (live, average):
        networks.latent_avg = networks.latent_avg + mean
        for head, shift in zip(networks.encoder.get_submodule("styles").children(), mean, strict=True):
            head.get_submodule("linear").bias -= shift


@torch.no_grad()
def measure(networks: Networks, images: Tensor, *, steps: int) -> list[float]:
    """Return the mean squared error on [-1, 1] after each step, over all images [N, 1, 64, 64]."""
    networks.encoder.eval()
    totals = [0.0] * steps
    for target in images.split(50):
        latent, current = networks.start(len(target))
        for step in range(steps):
            latent = latent + networks.encode(target, current)
            current = networks.generator(latent)
            totals[step] += functional.mse_loss(current, target).item() * len(target) / len(images)
    networks.encoder.train()
    return totals


def write_checkpoint(networks: Networks, *, config: ModelConfig, path: Path) -> None:
    """Write the official layout; the grey generator becomes one of three equal channels, which is exact."""
    decoder = networks.generator.state_dict()
    for key in [key for key in decoder if "to_rgb" in key]:
        if key.endswith(".conv.weight"):
            decoder[key] = decoder[key].repeat(1, 3, 1, 1, 1)
        elif key.endswith(".bias") and "modulation" not in key:
            decoder[key] = decoder[key].repeat(1, 3, 1, 1)
    state = {f"encoder.{key}": value.contiguous() for key, value in networks.encoder.state_dict().items()}
    state |= {f"decoder.{key}": value.contiguous() for key, value in decoder.items()}
    options = {
        "encoder_type": config.encoder_type,
        "dataset_type": "demo_faces",
        "output_size": config.output_size,
        "input_size": config.input_size,
        "style_dim": config.style_dim,
        "generator_channels": dict(config.generator_channels),
        "encoder_widths": list(config.encoder_widths),
        "encoder_units": list(config.encoder_units),
    }
    with replace_when_complete(path) as temporary:
        torch.save({"state_dict": state, "latent_avg": networks.latent_avg[0], "opts": options}, temporary)


@click.command(help=__doc__)
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--minutes", default=100.0, show_default=True, help="Training time on this machine.")
@click.option("--resume", type=click.Path(exists=True, path_type=Path), help="Go on with a checkpoint of this script.")
@click.option("--start-at", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="Share of the schedule done.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(archive: Path, output: Path, minutes: float, resume: Path | None, start_at: float, threads: int) -> None:
    """Train, measure on the portraits held out, and write the checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(threads)
    training, held_out = load_portraits(archive)
    networks = train(
        training,
        held_out,
        minutes=minutes,
        save=partial(write_checkpoint, config=CONFIG, path=output),
        resumed=networks_from_checkpoint(resume) if resume else None,
        start_at=start_at,
    )
    write_checkpoint(networks, config=CONFIG, path=output)
    errors = measure(networks, reduce_to_64(held_out.pixels), steps=10)
    click.echo(json.dumps({"minutes": minutes, "held_out_mse": errors}))


if __name__ == "__main__":
    main()
