"""Up-convolution in three forms: one merged kernel, four phases of one convolution, four small convolutions."""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restyle_deploy.graph.rewrites.merged_upsampling import merged_upsampling
from restyle_deploy.graph.rewrites.phase_upsampling import phase_upsampling
from restyle_deploy.graph.rewrites.polyphase_upsampling import polyphase_upsampling
from tests.graph_models import (
    GraphMaker,
    check_nothing_changes,
    check_rewrite,
    exported,
    layers_with,
    operators,
    up_convolution,
)

Rewrite = Callable[..., ir.Model]

BLUR_LAYERS = {f"decoder.convs.{index}.conv" for index in range(0, 8, 2)}
# Rewrite -> the operators that take the place of a transposed convolution and its filter.
OPERATORS: dict[Rewrite, dict[str, int]] = {
    merged_upsampling: {"ConvTranspose": 1},
    polyphase_upsampling: {"Conv": 1, "DepthToSpace": 1},
    phase_upsampling: {"Conv": 5, "Concat": 1, "Reshape": 3, "Transpose": 2},
}
each_rewrite = pytest.mark.parametrize("rewrite", OPERATORS)


@each_rewrite
@settings(max_examples=30)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_computes_the_same(rewrite: Rewrite, size: tuple[int, int], channels: tuple[int, int], seed: int) -> None:
    rewritten = check_rewrite(rewrite, up_convolution(size=size, channels=channels, seed=seed))
    assert operators(rewritten) == OPERATORS[rewrite]


@each_rewrite
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"pads": (0, 0, 0, 0)}, id="other padding of the filter"),
        pytest.param({"pads": (2, 1, 1, 1)}, id="uneven padding of the filter"),
        pytest.param({"kernel_size": (3, 3)}, id="smaller filter"),
        pytest.param({"up": 2}, id="filter with upsampling"),
        pytest.param({"down": 2}, id="filter with downsampling"),
        pytest.param({"strides": (1, 1)}, id="convolution without upsampling"),
        pytest.param({"convolution_pads": (1, 1, 1, 1)}, id="padded convolution"),
        pytest.param({"output_padding": (1, 1)}, id="longer convolution"),
        pytest.param({"dilations": (2, 2)}, id="dilated convolution"),
        pytest.param({"size": (6, 6), "weight_size": 5}, id="larger weight"),
        pytest.param({"channels": (4, 4), "group": 2}, id="grouped convolution"),
        pytest.param({"bias": True}, id="biased convolution"),
        pytest.param({"computed_kernel": True}, id="computed filter"),
        pytest.param({"computed_weight": True}, id="computed weight"),
        pytest.param({"second_user": True}, id="convolution that is read twice"),
    ],
)
def test_other_up_convolutions_stay(rewrite: Rewrite, changes: dict[str, Any]) -> None:
    check_nothing_changes(rewrite, up_convolution(**changes))


@each_rewrite
def test_a_filter_of_an_input_stays(rewrite: Rewrite) -> None:
    maker = GraphMaker()
    x = maker.input("x", 3, 6, 6)
    check_nothing_changes(rewrite, maker.model(maker.filter(x, maker.weight(4, 4), channels=3, pads=(1, 1, 1, 1))))


@each_rewrite
@pytest.mark.parametrize("dataset_type", ["ffhq_encode", "cars_encode"])
def test_generator_has_no_blur_node_left(rewrite: Rewrite, dataset_type: str) -> None:
    model = exported("generator", dataset_type=dataset_type)
    assert layers_with(model, "UpFirDn2d") > BLUR_LAYERS
    rewritten = check_rewrite(rewrite, model)
    assert layers_with(rewritten, "UpFirDn2d") == layers_with(model, "UpFirDn2d") - BLUR_LAYERS
    expected = BLUR_LAYERS if "ConvTranspose" in OPERATORS[rewrite] else set()
    assert layers_with(rewritten, "ConvTranspose") == expected


@each_rewrite
def test_only_the_named_layers_change(rewrite: Rewrite) -> None:
    model = exported("generator")
    before: ir.Model = model.clone()
    rewrite(model, layers=["decoder.convs.2.conv", "no such layer"])
    assert layers_with(model, "UpFirDn2d") == layers_with(before, "UpFirDn2d") - {"decoder.convs.2.conv"}
