"""The facts that determine a model's architecture; read from a checkpoint's options, stored in a bundle's manifest."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from restyle_deploy.tensors import BATCH, TensorSpec
from restyle_deploy.variants import VARIANTS, Variant

OFFICIAL_STYLE_DIM = 512
OFFICIAL_INPUT_SIZE = 256
OFFICIAL_MAPPING_LAYERS = 8
OFFICIAL_WIDTHS = (64, 128, 256, 512)


def official_generator_channels(output_size: int) -> dict[int, int]:
    """Return the feature maps per resolution of upstream's generator with `channel_multiplier=2`."""
    return {2**exponent: min(512, 2 ** (15 - exponent)) for exponent in range(2, output_size.bit_length())}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that the architecture depends on.

    Attributes:
        encoder_type: a key of `models.encoders.ENCODERS`.
        domain: a key of `variants.VARIANTS`.
        output_size: side of the square that the generator renders, before the domain's crop.
        input_size: width of the encoder's input; upstream: 256.
        style_dim: length of one style; upstream: 512.
        mapping_layers: layers of the mapping network in the checkpoint; 0 when it is absent.
        generator_channels: feature maps at each resolution from 4 to `output_size`.
        encoder_widths: feature maps of the encoder's four stages.
        encoder_units: blocks of the encoder's four stages; empty for the type's official depth.
    """

    encoder_type: str
    domain: str
    output_size: int
    input_size: int = OFFICIAL_INPUT_SIZE
    style_dim: int = OFFICIAL_STYLE_DIM
    mapping_layers: int = OFFICIAL_MAPPING_LAYERS
    generator_channels: Mapping[int, int] = field(default_factory=dict)
    encoder_widths: tuple[int, ...] = OFFICIAL_WIDTHS
    encoder_units: tuple[int, ...] = ()

    @property
    def variant(self) -> Variant:
        """The domain's row of the table."""
        return VARIANTS[self.domain]

    @property
    def n_styles(self) -> int:
        """Styles of a W+ code: 18 at 1024 px."""
        return 2 * (self.output_size.bit_length() - 1) - 2

    @property
    def input_shape(self) -> tuple[int, int]:
        """Height and width of the encoder's input, and of the pooled image."""
        first, end = self.variant.crop_rows(self.input_size)
        return end - first, self.input_size

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the rendered image after the domain's crop."""
        first, end = self.variant.crop_rows(self.output_size)
        return end - first, self.output_size


def graph_specs(config: ModelConfig) -> dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]:
    """Return (inputs, outputs) of the graphs `encoder` and `generator`; all float32, the batch is free."""

    def spec(name: str, *sizes: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=(BATCH, *sizes))

    latent = (config.n_styles, config.style_dim)
    target, current = (spec(name, 3, *config.input_shape) for name in ("target", "current"))
    return {
        "encoder": ((target, current, spec("latent", *latent)), (spec("latent_out", *latent),)),
        "generator": ((spec("latent", *latent),), (spec("image", 3, *config.image_shape), current)),
    }
