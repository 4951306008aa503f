"""Batch normalisation after a convolution."""

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restyle_deploy.graph.rewrites.fold_batchnorm import fold_batchnorm
from tests.graph_models import GraphMaker, check_rewrite, exported, operators


def normalized_convolution(
    *,
    channels: tuple[int, int] = (3, 4),
    size: tuple[int, int] = (6, 5),
    stride: int = 1,
    bias: bool = False,
    transposed: bool = False,
    second_user: bool = False,
    seed: int = 0,
) -> ir.Model:
    """Return a convolution and the normalisation of its result."""
    maker = GraphMaker(seed)
    x = maker.input("x", channels[0], *size)
    weight = maker.weight(*(channels if transposed else channels[::-1]), 3, 3)
    biases = [maker.weight(channels[1])] if bias else []
    op_type = "ConvTranspose" if transposed else "Conv"
    y = maker.node(op_type, x, weight, *biases, pads=(1, 0, 1, 2), strides=(stride, stride))
    others = [maker.node("Neg", y)] if second_user else []
    return maker.model(maker.batchnorm(y, channels[1]), *others)


@settings(max_examples=20)
@given(
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_computes_the_same(
    channels: tuple[int, int], size: tuple[int, int], stride: int, bias: bool, transposed: bool, seed: int
) -> None:
    model = normalized_convolution(
        channels=channels, size=size, stride=stride, bias=bias, transposed=transposed, seed=seed
    )
    rewritten = check_rewrite(fold_batchnorm, model)
    assert operators(rewritten) == {"ConvTranspose" if transposed else "Conv": 1}


def test_a_convolution_that_others_read_stays() -> None:
    model = normalized_convolution(second_user=True)
    assert operators(check_rewrite(fold_batchnorm, model)) == operators(model)


@pytest.mark.parametrize("name", ["encoder", "generator"])
def test_exported_graphs_have_nothing_to_fold(name: str) -> None:
    model = exported(name)
    rewritten = check_rewrite(fold_batchnorm, model)
    assert operators(rewritten) == operators(model)
