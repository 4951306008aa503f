"""The FIR filter as depthwise convolutions."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from restyle_deploy.graph.rewrites.depthwise_filter import depthwise_filter, separable_filter
from tests.graph_models import GraphMaker, check_nothing_changes, check_rewrite, exported, layers_with, operators

BLUR_LAYERS = {f"decoder.convs.{index}.conv" for index in range(0, 8, 2)}
REWRITES = pytest.mark.parametrize("rewrite", [depthwise_filter, separable_filter])
Rewrite = Callable[..., ir.Model]


def filtering(
    *,
    size: tuple[int, int] = (6, 7),
    kernel_size: tuple[int, int] = (4, 4),
    channels: int = 3,
    up: int = 1,
    down: int = 1,
    pads: tuple[int, ...] = (1, 1, 1, 1),
    separable: bool = False,
    constant: bool = True,
    seed: int = 0,
) -> ir.Model:
    """Return a graph of one filter that no flip or transposition leaves as it is."""
    maker = GraphMaker(seed)
    x = maker.input("x", channels, *size)
    random = np.random.RandomState(seed)
    kernel = random.standard_normal(kernel_size)
    if separable:
        kernel = np.outer(*(random.standard_normal(taps) for taps in kernel_size))
    taps = maker.constant(kernel)
    taps = taps if constant else maker.node("Mul", taps, maker.input("factor", batch=1))
    return maker.model(maker.filter(x, taps, channels=channels, up=up, down=down, pads=pads))


@settings(max_examples=50)
@given(
    rewrite=st.sampled_from([depthwise_filter, separable_filter]),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel_size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    down=st.integers(1, 3),
    channels=st.integers(1, 4),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    separable=st.booleans(),
    seed=st.integers(0, 99),
)
def test_computes_the_same(
    rewrite: Rewrite,
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    down: int,
    channels: int,
    pads: tuple[int, ...],
    separable: bool,
    seed: int,
) -> None:
    padded = [size[axis] + pads[axis] + pads[axis + 2] for axis in (0, 1)]
    assume(all(extent >= taps for extent, taps in zip(padded, kernel_size, strict=True)))
    model = filtering(
        size=size,
        kernel_size=kernel_size,
        channels=channels,
        down=down,
        pads=pads,
        separable=separable,
        seed=seed,
    )
    two_passes = rewrite is separable_filter and (separable or 1 in kernel_size)
    assert operators(check_rewrite(rewrite, model)) == {"Conv": 2 if two_passes else 1}


def test_the_two_passes_have_one_axis_each() -> None:
    model = separable_filter(filtering(kernel_size=(3, 4), separable=True))
    shapes = [tuple(node.inputs[1].shape or ()) for node in model.graph if node.inputs[1] is not None]
    assert shapes == [(3, 1, 3, 1), (3, 1, 1, 4)]


@REWRITES
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(filtering(constant=False), id="computed filter"),
        pytest.param(filtering(up=2), id="upsampling"),
        pytest.param(filtering(pads=(1, 1, -1, 1)), id="cropping"),
    ],
)
def test_what_is_no_padded_convolution_stays(rewrite: Rewrite, model: ir.Model) -> None:
    check_nothing_changes(rewrite, model)


@REWRITES
@pytest.mark.parametrize("dataset_type", ["ffhq_encode", "cars_encode"])
def test_generator_has_no_blur_node_left(rewrite: Rewrite, dataset_type: str) -> None:
    model = exported("generator", dataset_type=dataset_type)
    assert layers_with(model, "UpFirDn2d") > BLUR_LAYERS
    rewritten = check_rewrite(rewrite, model)
    assert layers_with(rewritten, "UpFirDn2d") == layers_with(model, "UpFirDn2d") - BLUR_LAYERS
    assert layers_with(rewritten, "Conv") == layers_with(model, "Conv") | BLUR_LAYERS
    passes = 2 if rewrite is separable_filter else 1
    assert operators(rewritten)["Conv"] == operators(model)["Conv"] + passes * len(BLUR_LAYERS)


@REWRITES
def test_only_the_named_layers_change(rewrite: Rewrite) -> None:
    model = exported("generator")
    before = layers_with(model, "UpFirDn2d")
    rewrite(model, layers=["decoder.convs.2.conv", "no such layer"])
    assert layers_with(model, "UpFirDn2d") == before - {"decoder.convs.2.conv"}
