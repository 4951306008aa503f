"""What follows every rewrite: constants folded, nothing unused left, each weight once in the file."""

import onnx_ir as ir
from onnx_ir.passes.common import (
    DeduplicateHashedInitializersPass,
    IdentityEliminationPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)
from onnxscript.optimizer import fold_constants

# Constants of any size are folded: what is computed from weights alone is computed once.
FOLDING_LIMIT = 2**31


def tidy(model: ir.Model) -> ir.Model:
    """Fold constants, and remove unused nodes, functions and initialisers and second copies of an initialiser."""
    fold_constants(model, input_size_limit=FOLDING_LIMIT, output_size_limit=FOLDING_LIMIT)
    for change in (
        IdentityEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        DeduplicateHashedInitializersPass(),
        TopologicalSortPass(),
    ):
        change(model)
    return model
