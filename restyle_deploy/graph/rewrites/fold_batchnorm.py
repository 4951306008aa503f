"""Batch normalisation after a convolution, folded into it: 4 of design §5."""

import onnx_ir as ir
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_conv_transpose_rule


def fold_batchnorm(model: ir.Model) -> ir.Model:
    """Fold each batch normalisation into the convolution whose result it alone reads.

    The exporter does so already; this serves graphs that come from elsewhere. The rules are onnxscript's.
    """
    rewrite(model, pattern_rewrite_rules=[fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_conv_transpose_rule])
    return model
