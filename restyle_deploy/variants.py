"""What differs between domains: the one table. A new domain is one row here."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The geometry of a domain.

    Attributes:
        name: what recipes, manifests and messages call it.
        dataset_types: the values of the checkpoint's `dataset_type` option that mean this domain.
        row_margin: share of the generator's rows that is cut at the top, and as much at the bottom;
            the encoder sees the same part, so its input loses the same share of rows.
    """

    name: str
    dataset_types: tuple[str, ...]
    row_margin: Fraction = Fraction(0)

    def crop_rows(self, size: int) -> tuple[int, int]:
        """Return the first row that is kept of a square of `size` rows, and the first that is not any more."""
        margin = self.row_margin * size
        if margin.denominator != 1:
            raise ValueError(f"domain {self.name}: {self.row_margin} of {size} rows is not a whole number")
        return int(margin), size - int(margin)


# `dataset_type` values: configs/data_configs.py of the official repository.
# Any other value is a user's own domain, which upstream treats as a square without a crop.
_ROWS = (
    Variant(name="faces", dataset_types=("ffhq_encode",)),
    Variant(name="cars", dataset_types=("cars_encode",), row_margin=Fraction(1, 8)),
    Variant(name="churches", dataset_types=("church_encode",)),
    Variant(name="horses", dataset_types=("horse_encode",)),
    Variant(name="animals", dataset_types=("afhq_wild_encode",)),
    Variant(name="toonify", dataset_types=("toonify",)),
    Variant(name="custom", dataset_types=()),
)
VARIANTS: Mapping[str, Variant] = MappingProxyType({row.name: row for row in _ROWS})


def variant_from_dataset_type(dataset_type: str) -> Variant:
    """Return the domain that a checkpoint's `dataset_type` means; `custom` for a type that is not in the table."""
    return next((row for row in _ROWS if dataset_type in row.dataset_types), VARIANTS["custom"])
