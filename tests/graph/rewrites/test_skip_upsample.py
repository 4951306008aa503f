"""Skip upsampling as a transposed convolution."""

import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from restyle_deploy.graph.rewrites.skip_upsample import skip_upsample
from restyle_deploy.models.generator import BLUR_PADS, SKIP_PADS
from tests.graph_models import GraphMaker, check_nothing_changes, check_rewrite, exported, layers_with, operators

SKIP_LAYERS = {f"decoder.to_rgbs.{index}" for index in range(4)}


def upsampling(
    *,
    size: tuple[int, int] = (5, 7),
    kernel_size: tuple[int, int] = (4, 4),
    channels: int = 3,
    up: int = 2,
    down: int = 1,
    pads: tuple[int, ...] = SKIP_PADS,
    constant: bool = True,
    seed: int = 0,
) -> ir.Model:
    """Return a graph of one upsampling, with a filter that no flip or transposition leaves as it is."""
    maker = GraphMaker(seed)
    x = maker.input("x", channels, *size)
    kernel = maker.weight(*kernel_size)
    kernel = kernel if constant else maker.node("Mul", kernel, maker.input("factor", batch=1))
    return maker.model(maker.filter(x, kernel, channels=channels, up=up, down=down, pads=pads))


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel_size=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    up=st.integers(2, 3),
    channels=st.integers(1, 4),
    pads=st.tuples(*[st.integers(-1, 3)] * 4),
    seed=st.integers(0, 99),
)
def test_computes_the_same(
    size: tuple[int, int], kernel_size: tuple[int, int], up: int, channels: int, pads: tuple[int, ...], seed: int
) -> None:
    padded = [size[axis] * up + pads[axis] + pads[axis + 2] for axis in (0, 1)]
    assume(all(extent >= taps for extent, taps in zip(padded, kernel_size, strict=True)))
    assume(all(pad + extent * up >= 0 for pad, extent in zip(pads, size * 2, strict=True)))
    late = [taps - 1 - pad for taps, pad in zip(kernel_size, pads[:2], strict=True)]
    left_out = [taps - up - pad for taps, pad in zip(kernel_size, pads[2:], strict=True)]
    model = upsampling(size=size, kernel_size=kernel_size, channels=channels, up=up, pads=pads, seed=seed)
    rewritten = check_rewrite(skip_upsample, model)
    assert operators(rewritten) == {"ConvTranspose" if min(*late, *left_out) >= 0 else "UpFirDn2d": 1}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(upsampling(constant=False), id="computed filter"),
        pytest.param(upsampling(down=2), id="downsampling"),
        pytest.param(upsampling(up=1, pads=BLUR_PADS), id="no upsampling"),
        pytest.param(upsampling(pads=(4, 2, 1, 1)), id="begins before the first sample"),
        pytest.param(upsampling(pads=(2, 2, 1, 3)), id="ends after the last sample"),
    ],
)
def test_what_is_no_transposed_convolution_stays(model: ir.Model) -> None:
    check_nothing_changes(skip_upsample, model)


@pytest.mark.parametrize("dataset_type", ["ffhq_encode", "cars_encode"])
def test_generator_has_no_skip_node_left(dataset_type: str) -> None:
    model = exported("generator", dataset_type=dataset_type)
    assert layers_with(model, "UpFirDn2d") > SKIP_LAYERS
    rewritten = check_rewrite(skip_upsample, model)
    assert layers_with(rewritten, "UpFirDn2d") == layers_with(model, "UpFirDn2d") - SKIP_LAYERS
    assert layers_with(rewritten, "ConvTranspose") == layers_with(model, "ConvTranspose") | SKIP_LAYERS


def test_only_the_named_layers_change() -> None:
    model = exported("generator")
    before = layers_with(model, "UpFirDn2d")
    skip_upsample(model, layers=["decoder.to_rgbs.1", "no such layer"])
    assert layers_with(model, "UpFirDn2d") == before - {"decoder.to_rgbs.1"}
