"""Up-convolution as four small convolutions, interleaved."""

from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restyle_deploy.graph.rewrites.phase_upsampling import phase_upsampling
from tests.graph_models import check_nothing_changes, check_rewrite, exported, layers_with, operators, up_convolution

BLUR_LAYERS = {f"decoder.convs.{index}.conv" for index in range(0, 8, 2)}


@settings(max_examples=30)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_computes_the_same(size: tuple[int, int], channels: tuple[int, int], seed: int) -> None:
    rewritten = check_rewrite(phase_upsampling, up_convolution(size=size, channels=channels, seed=seed))
    assert operators(rewritten) == {"Conv": 5, "Concat": 1, "Reshape": 3, "Transpose": 2}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"pads": (0, 0, 0, 0)}, id="other padding of the filter"),
        pytest.param({"bias": True}, id="biased convolution"),
        pytest.param({"computed_weight": True}, id="computed weight"),
        pytest.param({"second_user": True}, id="convolution that is read twice"),
    ],
)
def test_other_up_convolutions_stay(changes: dict[str, Any]) -> None:
    check_nothing_changes(phase_upsampling, up_convolution(**changes))


@pytest.mark.parametrize("dataset_type", ["ffhq_encode", "cars_encode"])
def test_generator_has_no_blur_node_left(dataset_type: str) -> None:
    model = exported("generator", dataset_type=dataset_type)
    rewritten = check_rewrite(phase_upsampling, model)
    assert layers_with(rewritten, "UpFirDn2d") == layers_with(model, "UpFirDn2d") - BLUR_LAYERS
    assert layers_with(rewritten, "ConvTranspose") == set()


def test_only_the_named_layers_change() -> None:
    model = exported("generator")
    before: ir.Model = model.clone()
    phase_upsampling(model, layers=["decoder.convs.2.conv", "no such layer"])
    assert layers_with(model, "UpFirDn2d") == layers_with(before, "UpFirDn2d") - {"decoder.convs.2.conv"}
