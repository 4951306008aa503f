"""The table of domains."""

import pytest

from restyle_deploy.variants import VARIANTS, variant_from_dataset_type


@pytest.mark.parametrize(
    ("dataset_type", "name"),
    [
        ("ffhq_encode", "faces"),
        ("cars_encode", "cars"),
        ("church_encode", "churches"),
        ("horse_encode", "horses"),
        ("afhq_wild_encode", "animals"),
        ("toonify", "toonify"),
        ("my_cats_encode", "custom"),
        ("", "custom"),
    ],
)
def test_a_dataset_type_means_a_domain(dataset_type: str, name: str) -> None:
    assert variant_from_dataset_type(dataset_type) is VARIANTS[name]


def test_no_two_rows_share_a_dataset_type() -> None:
    dataset_types = [dataset_type for row in VARIANTS.values() for dataset_type in row.dataset_types]
    assert len(set(dataset_types)) == len(dataset_types)
    assert all(row.name == name for name, row in VARIANTS.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_only_cars_lose_rows(name: str) -> None:
    assert VARIANTS[name].crop_rows(512) == ((64, 448) if name == "cars" else (0, 512))


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="domain cars: 1/8 of 100 rows is not a whole number"):
        VARIANTS["cars"].crop_rows(100)
