"""Batch normalisation as a product and a sum."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from restyle_deploy.graph.rewrites.split_batchnorm import split_batchnorm
from tests.graph_models import GraphMaker, check_nothing_changes, check_rewrite, exported, operators


def normalization(
    *, sizes: tuple[int, ...] = (4, 5), epsilon: float | None = 1e-3, computed_mean: bool = False
) -> ir.Model:
    maker = GraphMaker()
    x = maker.input("x", 3, *sizes)
    mean = maker.node("Mul", maker.weight(3), maker.input("factor", batch=1)) if computed_mean else None
    return maker.model(maker.batchnorm(x, 3, mean=mean, epsilon=epsilon))


@pytest.mark.parametrize("changes", [{}, {"epsilon": None}, {"sizes": ()}, {"sizes": (7,)}])
def test_computes_the_same(changes: dict[str, Any]) -> None:
    rewritten = check_rewrite(split_batchnorm, normalization(**changes))
    assert operators(rewritten) == {"Mul": 1, "Add": 1}


def test_small_and_large_variances_are_of_order_one_in_the_constants() -> None:
    maker = GraphMaker()
    x, variance = maker.input("x", 2, 3, 3), maker.constant([1e-9, 1e9])
    scale, shift, mean = maker.constant([1e-4, 1e4]), maker.constant([1, 1]), maker.constant([0, 1e4])
    y = maker.node("BatchNormalization", x, scale, shift, mean, variance, layer="bn", epsilon=1e-12)
    rewritten = check_rewrite(split_batchnorm, maker.model(y))
    for node in rewritten.graph:
        constant = node.inputs[1]
        assert constant is not None
        assert constant.const_value is not None
        assert np.abs(constant.const_value.numpy()).min() > 0.1
        assert np.abs(constant.const_value.numpy()).max() < 1e4


def test_computed_parameters_stay() -> None:
    check_nothing_changes(split_batchnorm, normalization(computed_mean=True))


def test_unknown_rank_stays() -> None:
    model = normalization()
    model.graph.inputs[0].shape = None
    check_nothing_changes(split_batchnorm, model)


def test_encoder_has_no_normalization_left() -> None:
    model = exported("encoder")
    assert operators(model)["BatchNormalization"] == 4
    assert operators(check_rewrite(split_batchnorm, model))["BatchNormalization"] == 0
