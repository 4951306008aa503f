"""The recipes of the official checkpoints name what exists, and nothing twice."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from restyle_deploy.model_config import ModelConfig
from restyle_deploy.variants import VARIANTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = sorted((Path(__file__).parents[1] / "export").glob("*.toml"))
KEYS = {"name", "description", "checkpoint", "source", "licence", "model"}


def read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_there_is_one_recipe_per_official_checkpoint() -> None:
    assert [path.stem for path in RECIPES] == [
        *("e4e-afhq-wild", "e4e-cars", "e4e-church", "e4e-ffhq", "e4e-horse"),
        *("psp-afhq-wild", "psp-cars", "psp-church", "psp-ffhq", "psp-toonify"),
    ]
    assert len({read(path)["checkpoint"] for path in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_describes_an_official_model(path: Path) -> None:
    recipe = read(path)
    family, domain = path.stem.split("-", 1)
    faces = domain in ("ffhq", "toonify")
    assert set(recipe) == KEYS
    assert recipe["name"] == path.stem
    assert recipe["checkpoint"].startswith(f"restyle_{family}_{domain.replace('-', '_')}")
    assert recipe["model"].keys() <= {field.name for field in fields(ModelConfig)}
    assert ("Progressive" in recipe["model"]["encoder_type"]) == (family == "e4e")
    assert recipe["model"]["encoder_type"].startswith("ResNet") != faces


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_and_checkpoint_name_the_same_domain(path: Path) -> None:
    recipe = read(path)
    config = ModelConfig(**recipe["model"])
    dataset_type = recipe["checkpoint"].removesuffix(".pt").split("_", 2)[2]
    assert dataset_type in VARIANTS[config.domain].dataset_types
    assert config.image_shape == ((384, 512) if config.domain == "cars" else (config.output_size, config.output_size))
