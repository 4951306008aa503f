"""The exported graphs against the torch model, at several batches, and what they are made of."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from restyle_deploy.errors import ExportError
from restyle_deploy.graph.export import Graph, encoder_graph, generator_graph
from restyle_deploy.model_config import graph_specs
from restyle_deploy.models.encoders import ENCODERS
from restyle_deploy.models.restyle import RestyleModel
from restyle_deploy.tensors import TensorSpec
from tests.toy import toy_model

DATASET_TYPES = ("ffhq_encode", "cars_encode")
BATCHES = (1, 3, 8)
TOLERANCE = 1e-5
Arrays = Mapping[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def model() -> RestyleModel:
    return toy_model(dataset_type="cars_encode")


@pytest.fixture(scope="module")
def generator(model: RestyleModel) -> Graph:
    return generator_graph(model)


@pytest.fixture(scope="module")
def encoder(model: RestyleModel) -> Graph:
    return encoder_graph(model)


def random_inputs(specs: tuple[TensorSpec, ...], batch: int) -> dict[str, NDArray[np.float32]]:
    random = np.random.RandomState(batch)
    return {spec.name: random.uniform(-1, 1, spec.concrete_shape(batch)).astype(np.float32) for spec in specs}


def run_graph(session: ort.InferenceSession, graph: Graph, inputs: Arrays) -> Arrays:
    names = [spec.name for spec in graph.outputs]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def assert_close(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=TOLERANCE, err_msg=name)


def check_against_model(graph: Graph, method: Any) -> None:
    """Compare each batch with the torch model, and with its images one by one."""
    session = ort.InferenceSession(graph.model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in BATCHES:
        inputs = random_inputs(graph.inputs, batch)
        found = run_graph(session, graph, inputs)
        outputs = method(*map(torch.from_numpy, inputs.values()))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        names = [spec.name for spec in graph.outputs]
        assert_close(found, {name: output.numpy() for name, output in zip(names, outputs, strict=True)})
        singles = [
            run_graph(session, graph, {name: array[index : index + 1] for name, array in inputs.items()})
            for index in range(batch)
        ]
        assert_close(found, {name: np.concatenate([single[name] for single in singles]) for name in names})


@pytest.mark.slow
@pytest.mark.parametrize("dataset_type", DATASET_TYPES)
@pytest.mark.parametrize("encoder_type", ENCODERS)
def test_encoder_of_every_type_computes_what_the_model_computes(encoder_type: str, dataset_type: str) -> None:
    model = toy_model(encoder_type=encoder_type, dataset_type=dataset_type)
    check_against_model(encoder_graph(model), model.encode)


def test_encoder_computes_what_the_model_computes(model: RestyleModel, encoder: Graph) -> None:
    check_against_model(encoder, model.encode)


def test_generator_computes_what_the_model_computes(model: RestyleModel, generator: Graph) -> None:
    check_against_model(generator, model.generate)


@pytest.mark.slow
@pytest.mark.parametrize("output_size", [32, 128])
def test_generator_of_another_size_computes_what_the_model_computes(output_size: int) -> None:
    model = toy_model(output_size=output_size)
    check_against_model(generator_graph(model), model.generate)


@pytest.mark.parametrize("name", ["encoder", "generator"])
def test_border_is_as_announced_and_the_batch_is_free(name: str, request: pytest.FixtureRequest) -> None:
    graph: Graph = request.getfixturevalue(name)
    model: RestyleModel = request.getfixturevalue("model")
    assert (graph.inputs, graph.outputs) == graph_specs(model.config)[name]
    for specs, values in ((graph.inputs, graph.model.graph.input), (graph.outputs, graph.model.graph.output)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for spec, value in zip(specs, values, strict=True):
            tensor = value.type.tensor_type
            assert tensor.elem_type == onnx.TensorProto.FLOAT
            assert tuple(size.dim_param or size.dim_value for size in tensor.shape.dim) == spec.shape


def test_specs_are_the_contract(model: RestyleModel) -> None:
    specs = graph_specs(model.config)
    shapes = {name: [{spec.name: spec.shape for spec in side} for side in sides] for name, sides in specs.items()}
    images, latent = ("N", 3, 24, 32), ("N", 10, 16)
    assert shapes == {
        "encoder": [{"target": images, "current": images, "latent": latent}, {"latent_out": latent}],
        "generator": [{"latent": latent}, {"image": ("N", 3, 48, 64), "current": images}],
    }


def test_custom_operators_are_nodes_with_bodies(generator: Graph) -> None:
    nodes = Counter(node.op_type for node in generator.model.graph.node if node.domain == "restyle_deploy")
    # One activation per styled layer (4, then two at 8, 16, 32 and 64 px); a blur and a skip per resolution above 4.
    assert nodes == {"FusedBiasAct": 9, "UpFirDn2d": 8}
    bodies = {function.name for function in generator.model.functions if function.domain == "restyle_deploy"}
    assert bodies == set(nodes)
    attributes = {
        (attribute.name, tuple(attribute.ints))
        for node in generator.model.graph.node
        if node.op_type == "UpFirDn2d"
        for attribute in node.attribute
        if attribute.name in ("up", "down", "pads")
    }
    assert attributes == {
        *(("up", (1, 1)), ("up", (2, 2)), ("down", (1, 1))),
        *(("pads", (1, 1, 1, 1)), ("pads", (2, 2, 1, 1))),
    }


def test_opsets_are_declared(encoder: Graph, generator: Graph) -> None:
    for graph in (encoder, generator):
        onnx.checker.check_model(graph.model, full_check=True)
    opsets = {opset.domain: opset.version for opset in generator.model.opset_import}
    assert opsets[""] >= 20
    assert opsets["restyle_deploy"] == 1
    assert {opset.domain: opset.version for opset in encoder.model.opset_import}[""] >= 20
    assert not encoder.model.functions


def test_weights_are_constants_without_arithmetic(generator: Graph) -> None:
    """Scaling and demodulation of weights are folded: every remaining operation depends on the latent."""
    computed = {"latent"}
    for node in generator.model.graph.node:
        assert node.op_type == "Constant" or computed & set(node.input), f"{node.op_type} {node.name} is constant"
        if node.op_type != "Constant":
            computed |= set(node.output)


def test_styles_of_zero_keep_the_epsilon_of_the_demodulation() -> None:
    """The exporter's optimiser drops what it takes for an added zero; then zero styles would give no numbers."""
    model = toy_model()
    for name, bias in model.decoder.named_parameters():
        if name.endswith("modulation.bias"):
            bias.zero_()
    graph = generator_graph(model)
    latent = random_inputs(graph.inputs, 3)["latent"]
    latent[0], latent[1, 3], latent[2, 4:6] = 0, 0, 1e-6
    session = ort.InferenceSession(graph.model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = run_graph(session, graph, {"latent": latent})
    image, current = model.generate(torch.from_numpy(latent))
    assert image.isfinite().all()
    assert_close(found, {"image": image.numpy(), "current": current.numpy()})


def test_an_exporter_that_gives_nothing_is_an_error(model: RestyleModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    with pytest.raises(ExportError, match="encoder: the exporter returned nothing"):
        encoder_graph(model)


def test_export_is_silent(model: RestyleModel, capfd: pytest.CaptureFixture[str]) -> None:
    encoder_graph(model)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
