"""The portraits archive: split by person, and augmentation."""

import csv
import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

NATIVE_SIZE = 128
HELD_OUT_COUNT = 200


@dataclass(frozen=True, kw_only=True)
class Portraits:
    """Grey portraits: `names` and `pixels` uint8 [N, 128, 128] in the same order."""

    names: tuple[str, ...]
    pixels: NDArray[np.uint8]


def load_portraits(archive: Path) -> tuple[Portraits, Portraits]:
    """Read the archive and return (training, held out): 200 files held out by person, half from each tier.

    Files of one person (pairs in `same_person.csv`, or the same name and year of birth) stay on one side; of a person
    held out, one file is measured and the others are left out of both sides.
    """
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        contents = {name: file.read() for name, file in files.items() if file is not None}
    index = _read_csv(contents["index.csv"])
    persons = _group_by_person(index, _read_csv(contents["same_person.csv"]))
    held_out = _choose_held_out(index, persons)
    excluded = {persons[name] for name in held_out}
    training = [row["file"] for row in index if persons[row["file"]] not in excluded]
    return _decode(contents, training), _decode(contents, held_out)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return 64 px training images: flipped, and in most cases turned, scaled, shifted and relit.

    Args:
        pixels: uint8 [N, 128, 128].
    Returns:
        float32 [N, 1, 64, 64] in [-1, 1].
    """
    count = pixels.shape[0]

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit * active

    active = (torch.rand(count, generator=generator) < 0.85).float()
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    angle, scale = uniform(np.pi * 5 / 180), torch.exp(uniform(0.08))
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift_x, shift_y = uniform(0.09), uniform(0.09)
    matrix = torch.stack(
        [torch.stack([cos * flip, -sin, shift_x], dim=1), torch.stack([sin * flip, cos, shift_y], dim=1)], dim=1
    )
    images = pixels[:, None].float() / 127.5 - 1
    grid = functional.affine_grid(matrix, [count, 1, NATIVE_SIZE, NATIVE_SIZE], align_corners=False)
    images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    images = functional.avg_pool2d(images, 2)
    ramp = torch.linspace(-1, 1, images.shape[-1])
    light = uniform(0.12)[:, None, None, None] + uniform(0.12)[:, None, None, None] * ramp
    light = light + uniform(0.08)[:, None, None, None] * ramp[:, None]
    return (images * torch.exp(uniform(0.2))[:, None, None, None] + light).clamp(-1, 1)


def reduce_to_64(pixels: NDArray[np.uint8]) -> Tensor:
    """Return the images as they are measured: 2×2 means, float32 [N, 1, 64, 64] in [-1, 1]."""
    return functional.avg_pool2d(torch.from_numpy(pixels)[:, None].float(), 2) / 127.5 - 1


def _read_csv(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode())))


def _group_by_person(index: list[dict[str, str]], pairs: list[dict[str, str]]) -> dict[str, str]:
    """Return for each file the name of one file that stands for its person."""
    parent = {row["file"]: row["file"] for row in index}

    def find(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    def join(names: Iterable[str]) -> None:
        roots = [find(name) for name in names]
        for root in roots[1:]:
            parent[root] = roots[0]

    for pair in pairs:
        join(name for name in (pair["gpo_file"], pair["voteview_file"]) if name in parent)
    first_of: dict[tuple[str, str], str] = {}
    for row in (row for row in index if row["name"]):
        join((first_of.setdefault((row["name"], row["born"]), row["file"]), row["file"]))
    return {name: find(name) for name in parent}


def _choose_held_out(index: list[dict[str, str]], persons: dict[str, str]) -> list[str]:
    order = np.random.RandomState(0).permutation(len(index))
    chosen: dict[str, str] = {}
    counts = {"A": 0, "B": 0}
    for row in (index[i] for i in order):
        tier, person = row["tier"][0], persons[row["file"]]
        if counts[tier] < HELD_OUT_COUNT // 2 and person not in chosen:
            chosen[person] = row["file"]
            counts[tier] += 1
    return sorted(chosen.values())


def _decode(contents: dict[str, bytes], names: list[str]) -> Portraits:
    pixels = [np.asarray(Image.open(io.BytesIO(contents[f"faces128/{name}"])).convert("L")) for name in names]
    return Portraits(names=tuple(names), pixels=np.stack(pixels))
