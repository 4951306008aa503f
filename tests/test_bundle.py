import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restyle_deploy.bundle import (
    AVERAGE_IMAGE,
    EXPECTATION,
    FORMAT_VERSION,
    GRAPHS,
    LATENT_AVG,
    MANIFEST,
    check_graphs,
    open_bundle,
    read_bundle,
    write_manifest,
    write_verification,
)
from restyle_deploy.errors import BundleError
from restyle_deploy.files import sha256_of_file
from restyle_deploy.model_config import ModelConfig, graph_specs
from tests.bundles import add_engine, edit_manifest, replace_array, replace_file

FILES = ("encoder.onnx", "generator.onnx", LATENT_AVG, AVERAGE_IMAGE, EXPECTATION)


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to change."""
    return shutil.copytree(toy_bundle, tmp_path / "bundle")


def record_of_file(manifest: Any, name: str) -> Any:
    records = (*manifest["graphs"].values(), *manifest["arrays"].values())
    return next(record for record in records if record["file"] == name)


def test_bundle_is_read(toy_bundle: Path) -> None:
    bundle = open_bundle(str(toy_bundle))
    config = bundle.config
    assert bundle.path == toy_bundle
    assert set(bundle.graphs) == set(GRAPHS)
    for name, (inputs, outputs) in graph_specs(config).items():
        graph = bundle.graphs[name]
        assert (graph.path, graph.inputs, graph.outputs) == (toy_bundle / f"{name}.onnx", inputs, outputs)
        assert graph.sha256 == sha256_of_file(graph.path)
    assert bundle.latent_avg.shape == (config.n_styles, config.style_dim)
    assert bundle.average_image.shape == (3, *config.input_shape)
    assert bundle.expectation == toy_bundle / EXPECTATION
    assert bundle.engines == ()
    assert len(bundle.checkpoint_sha256) == 64
    assert bundle.verification["steps"] == 3


def test_manifest_is_read_as_it_was_written(bundle: Path) -> None:
    before = open_bundle(bundle)
    config = replace(before.config, encoder_units=(1, 2, 3, 4), mapping_layers=0, encoder_type="GradualStyleEncoder")
    write_manifest(bundle, config=config, checkpoint_sha256="ab" * 32)
    assert open_bundle(bundle).verification == {}
    write_verification(bundle, {"steps": 7})
    after = open_bundle(bundle)
    assert after.config == config
    assert asdict(after.config) == asdict(config)
    assert after.checkpoint_sha256 == "ab" * 32
    assert after.verification == {"steps": 7}
    assert after.graphs == before.graphs
    np.testing.assert_array_equal(after.latent_avg, before.latent_avg)
    assert json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["format_version"] == FORMAT_VERSION


def test_bundle_can_be_moved_and_linked(bundle: Path, tmp_path: Path) -> None:
    moved = bundle.rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(moved)
    assert open_bundle(moved).config == open_bundle(tmp_path / "link").config


def test_missing_bundle_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle .*restyle-deploy export CHECKPOINT -o"):
        open_bundle(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    for name, reason in (("file", "a file, and a bundle is a directory"), (".", r"manifest\.json is missing")):
        with pytest.raises(BundleError, match=rf"no bundle \({reason}\); make one: .* CHECKPOINT -o DIRECTORY$"):
            open_bundle(tmp_path / name)
    with pytest.raises(BundleError, match=r"CHECKPOINT -o '.*/with space'$"):
        open_bundle(tmp_path / "with space")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"format_version": 1', b"[" * 100_000])
def test_manifest_that_is_not_json_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json: not JSON"):
        open_bundle(bundle)


@pytest.mark.parametrize("content", ["[]", "null", "1", '"text"', "{}"])
def test_manifest_that_is_no_object_of_ours_is_refused(bundle: Path, content: str) -> None:
    (bundle / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match="format_version is None, this release reads 1"):
        open_bundle(bundle)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_unknown_format_version_is_refused(bundle: Path, version: object) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(format_version=version))
    with pytest.raises(BundleError, match=f"format_version is {re.escape(repr(version))}, this release reads 1"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_changed_file_is_refused(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[-1] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{re.escape(name)}: changed since the export"):
        open_bundle(bundle)


def test_graphs_are_hashed_only_when_they_are_to_be_checked(bundle: Path) -> None:
    before = read_bundle(bundle)
    check_graphs(before)
    (bundle / "encoder.onnx").write_bytes(b"changed")
    (bundle / "generator.onnx").unlink()
    after = read_bundle(bundle)
    assert after.graphs == before.graphs
    for check in (check_graphs, lambda opened: open_bundle(opened.path)):
        with pytest.raises(BundleError, match="generator.onnx: missing; export the bundle again"):
            check(after)


def test_engines_are_not_hashed_when_a_bundle_is_opened(bundle: Path) -> None:
    shutil.rmtree(add_engine(bundle).directory)
    assert len(open_bundle(bundle).engines) == 1


def test_new_manifest_has_no_engines(bundle: Path) -> None:
    add_engine(bundle)
    opened = open_bundle(bundle)
    write_verification(bundle, {"steps": 7})
    assert open_bundle(bundle).engines == opened.engines
    write_manifest(bundle, config=opened.config, checkpoint_sha256="ab" * 32)
    assert open_bundle(bundle).engines == ()


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{re.escape(name)}: missing"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("stated", ["../outside", "sub/../../outside", "{folder}/outside"])
def test_path_outside_the_directory_is_refused(bundle: Path, name: str, stated: str) -> None:
    shutil.copy(bundle / name, bundle.parent / "outside")
    stated = stated.format(folder=bundle.parent)
    edit_manifest(bundle, lambda manifest: record_of_file(manifest, name).update(file=stated))
    with pytest.raises(BundleError, match=f"{re.escape(stated)} lies outside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_link_out_of_the_directory_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    outside = (bundle / name).rename(tmp_path / "outside")
    (bundle / name).symlink_to(outside)
    with pytest.raises(BundleError, match=f"{re.escape(name)} lies outside the bundle"):
        open_bundle(bundle)


def test_directory_in_place_of_a_file_is_refused(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: record_of_file(manifest, LATENT_AVG).update(file="."))
    with pytest.raises(BundleError, match="missing; export the bundle again"):
        open_bundle(bundle)


def paths_of_values(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the keys that lead to each value of the manifest that a reader needs."""
    if not isinstance(value, dict):
        return [path]
    return [path, *(deeper for key, inner in value.items() for deeper in paths_of_values(inner, (*path, key)))]


def required_paths() -> list[tuple[str, ...]]:
    config = ModelConfig(encoder_type="BackboneEncoder", domain="faces", output_size=64)
    sections = ("model", "graphs", "arrays", "engines", "verification", "checkpoint_sha256")
    graphs = {name: dict.fromkeys(("file", "sha256", "inputs", "outputs")) for name in GRAPHS}
    arrays = {name: dict.fromkeys(("file", "sha256")) for name in (LATENT_AVG, AVERAGE_IMAGE, EXPECTATION)}
    manifest = dict.fromkeys(sections) | {"model": dict.fromkeys(asdict(config)), "graphs": graphs, "arrays": arrays}
    return paths_of_values(manifest)[1:]


@pytest.mark.parametrize("path", required_paths(), ids="/".join)
def test_missing_key_is_refused(bundle: Path, path: tuple[str, ...]) -> None:
    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    edit_manifest(bundle, change)
    with pytest.raises(BundleError, match=rf"manifest\.json: damaged \(.*{re.escape(path[-1])}"):
        open_bundle(bundle)


def setting(*path: str, to: object) -> Callable[[Any], None]:
    def change(manifest: Any) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = to

    return change


WRONG_VALUES = {
    "model": setting("model", to=[]),
    "domain": setting("model", "domain", to="boats"),
    "output size": setting("model", "output_size", to="64"),
    "input size": setting("model", "input_size", to=32.0),
    "style dim": setting("model", "style_dim", to=None),
    "widths": setting("model", "encoder_widths", to=7),
    "channels": setting("model", "generator_channels", to={"four": 8}),
    "more in the model": setting("model", "depth", to=3),
    "checkpoint hash": setting("checkpoint_sha256", to=5),
    "graphs": setting("graphs", to=["encoder", "generator"]),
    "graph": setting("graphs", "encoder", to="encoder.onnx"),
    "graph file": setting("graphs", "encoder", "file", to=3),
    "graph hash": setting("graphs", "encoder", "sha256", to=3),
    "inputs": setting("graphs", "generator", "inputs", to=None),
    "no inputs": setting("graphs", "generator", "inputs", to=[]),
    "other inputs": setting(
        "graphs", "generator", "inputs", to=[{"name": "latent", "dtype": "float16", "shape": ["N", 10, 16]}]
    ),
    "arrays": setting("arrays", to=None),
    "null byte": setting("arrays", EXPECTATION, "file", to="a\0b"),
    "engines": setting("engines", to={}),
    "verification": setting("verification", to=[]),
}


@pytest.mark.parametrize("change", WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_wrong_values_are_refused(bundle: Path, change: Callable[[Any], None]) -> None:
    edit_manifest(bundle, change)
    with pytest.raises(BundleError, match=r"manifest\.json: damaged .*export the bundle again"):
        open_bundle(bundle)


def test_graph_that_does_not_fit_the_model_is_refused(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["graphs"]["encoder"]["inputs"].reverse())
    with pytest.raises(BundleError, match="inputs or outputs of the encoder do not fit the model"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", [LATENT_AVG, AVERAGE_IMAGE])
def test_array_of_another_shape_or_type_is_refused(bundle: Path, name: str) -> None:
    array = np.load(bundle / name)
    for wrong in (array[..., :-1], array[None], array.astype(np.float64), array.astype(">f4")):
        replace_array(bundle, name, wrong)
        with pytest.raises(BundleError, match=rf"{re.escape(name)}: got .* expected float32 \["):
            open_bundle(bundle)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY"])
def test_file_that_is_no_array_is_refused(bundle: Path, content: bytes) -> None:
    replace_file(bundle, LATENT_AVG, content)
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(bundle)


def test_pickled_array_is_not_executed(bundle: Path) -> None:
    replace_array(bundle, LATENT_AVG, np.array([print], dtype=object))
    with pytest.raises(BundleError, match="allow_pickle=False"):
        open_bundle(bundle)


def test_arrays_of_any_layout_come_out_contiguous(bundle: Path) -> None:
    array = open_bundle(bundle).average_image
    replace_array(bundle, AVERAGE_IMAGE, np.asfortranarray(array))
    read = open_bundle(bundle).average_image
    assert read.flags.c_contiguous
    np.testing.assert_array_equal(read, array)
