"""Every rewrite on graphs of the official sizes, whose weights follow a fixed rule."""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from restyle_deploy.checkpoint import load_checkpoint
from restyle_deploy.graph.export import encoder_graph, generator_graph
from restyle_deploy.graph.rewrites.constant_weights import constant_weights
from restyle_deploy.graph.rewrites.depthwise_filter import depthwise_filter, separable_filter
from restyle_deploy.graph.rewrites.fold_batchnorm import fold_batchnorm
from restyle_deploy.graph.rewrites.fuse_epilogue import fuse_epilogue
from restyle_deploy.graph.rewrites.leading_batchnorm import leading_batchnorm
from restyle_deploy.graph.rewrites.merge_heads import merge_heads
from restyle_deploy.graph.rewrites.merged_upsampling import merged_upsampling
from restyle_deploy.graph.rewrites.normalize_styles import normalize_styles
from restyle_deploy.graph.rewrites.phase_upsampling import phase_upsampling
from restyle_deploy.graph.rewrites.polyphase_upsampling import polyphase_upsampling
from restyle_deploy.graph.rewrites.scale_constants import scale_constants
from restyle_deploy.graph.rewrites.skip_upsample import skip_upsample
from restyle_deploy.graph.rewrites.split_batchnorm import split_batchnorm
from restyle_deploy.graph.rewrites.target_features import TARGET, target_graph, target_once
from restyle_deploy.graph.rewrites.tidy import tidy
from restyle_deploy.graph.rewrites.winograd import winograd
from restyle_deploy.models.restyle import model_from_checkpoint
from tests.golden import CASES, open_case
from tests.graph_models import Arrays, assert_equal_in_range, operators, random_inputs

pytestmark = pytest.mark.slow

LOGGER = logging.getLogger(__name__)
Rewrite = Callable[[ir.Model], ir.Model]
GENERATOR_REWRITES = (
    scale_constants,
    depthwise_filter,
    separable_filter,
    merged_upsampling,
    phase_upsampling,
    polyphase_upsampling,
    skip_upsample,
    winograd,
    fuse_epilogue,
    normalize_styles,
)
ENCODER_REWRITES = (leading_batchnorm, merge_heads, target_once, winograd, split_batchnorm)
# The exporter leaves them nothing to do; they must not do anything else.
IDLE_REWRITES = (constant_weights, fold_batchnorm)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An exported graph on the disk, and what it computes for one random input."""

    graph: Path
    inputs: Arrays
    outputs: Arrays


@pytest.fixture(scope="module", params=CASES)
def references(
    request: pytest.FixtureRequest, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Reference]]:
    """One case at a time, one of its graphs at a time in memory."""
    directory = tmp_path_factory.mktemp(request.param)
    with open_case(request.param, shared_dir, directory) as case:
        model = model_from_checkpoint(load_checkpoint(case.checkpoint))
        for name, export in (("encoder", encoder_graph), ("generator", generator_graph)):
            onnx.save(export(model).model, directory / f"{name}.onnx")
        del model, export
        gc.collect()
        yield {name: reference_from_graph(directory / f"{name}.onnx") for name in ("encoder", "generator")}


def reference_from_graph(path: Path) -> Reference:
    inputs = random_inputs(ir.load(path), batch=1)
    return Reference(graph=path, inputs=inputs, outputs=run_file(path, inputs))


def run_file(path: Path, inputs: Arrays) -> Arrays:
    """Run a model from its file, so that its weights are in memory once."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def save_with_data(model: ir.Model, directory: Path, name: str) -> Path:
    """Save a model with its weights in a file beside it: a serialised message ends at 2 GB."""
    ir.save(model, directory / f"{name}.onnx", external_data=f"{name}.data")
    return directory / f"{name}.onnx"


def check_rewrite(rewrite: Rewrite, reference: Reference, directory: Path) -> None:
    """Rewrite a graph, run it, and compare it with the exported one, relative to the range."""
    begin = time.perf_counter()
    model = ir.load(reference.graph)
    before, inputs = operators(model), dict(reference.inputs)
    target = target_graph(model) if rewrite is target_once else None
    if target is not None:
        features = run_file(save_with_data(target, directory, "target"), {TARGET: inputs.pop(TARGET)})
        inputs |= features
    rewrite(model)
    is_changed = operators(model) != before
    needs_batchnorm = rewrite in (leading_batchnorm, split_batchnorm)
    assert is_changed == (rewrite is not tidy and (not needs_batchnorm or "BatchNormalization" in before))
    if not is_changed and rewrite is not tidy:
        return
    path = save_with_data(model, directory, "rewritten")
    del model
    gc.collect()
    found = run_file(path, inputs)
    errors = {
        name: np.abs(found[name] - array).max() / np.abs(array).max() for name, array in reference.outputs.items()
    }
    text = ", ".join(f"{name} {error:.1g}" for name, error in errors.items())
    LOGGER.info("%s: relative errors %s, %.1f s", getattr(rewrite, "__name__", ""), text, time.perf_counter() - begin)
    assert_equal_in_range(found, reference.outputs)


@pytest.mark.parametrize("rewrite", [*GENERATOR_REWRITES, tidy])
def test_generator_computes_the_same(rewrite: Rewrite, references: dict[str, Reference], tmp_path: Path) -> None:
    check_rewrite(rewrite, references["generator"], tmp_path)


@pytest.mark.parametrize("rewrite", [*ENCODER_REWRITES, tidy])
def test_encoder_computes_the_same(rewrite: Rewrite, references: dict[str, Reference], tmp_path: Path) -> None:
    check_rewrite(rewrite, references["encoder"], tmp_path)


@pytest.mark.parametrize("rewrite", IDLE_REWRITES)
@pytest.mark.parametrize("name", ["encoder", "generator"])
def test_exported_graphs_need_no_help(rewrite: Rewrite, name: str, references: dict[str, Reference]) -> None:
    model = ir.load(references[name].graph)
    before = operators(model)
    assert operators(rewrite(model)) == before
