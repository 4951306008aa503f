import json
import os
import re
import shutil
from pathlib import Path

import pytest

from restyle_deploy.bundle import open_bundle
from restyle_deploy.engines import EngineRecord
from restyle_deploy.files import sha256_of_file
from tests.bundles import PLAN, add_engine, edit_manifest
from tests.cli.conftest import Run


def test_bundle_is_described(run: Run, toy_bundle: Path) -> None:
    result = run("inspect", toy_bundle)
    assert result.exit_code == 0
    bundle = open_bundle(toy_bundle)
    config = bundle.config
    lines = dict(re.split(r": +", line.strip(), maxsplit=1) for line in result.stdout.splitlines() if ": " in line)
    assert lines["bundle"] == str(toy_bundle)
    assert lines["domain"] == config.domain
    assert lines["image"] == f"{config.image_shape[1]}×{config.image_shape[0]} px"
    assert lines["encoder input"] == f"{config.input_shape[1]}×{config.input_shape[0]} px"
    assert lines["styles"] == f"{config.n_styles} × {config.style_dim}"
    assert lines["checkpoint sha256"] == bundle.checkpoint_sha256
    assert lines["engines"] == "none"
    assert lines["steps"] == "3"


def test_json_describes_the_graphs(run: Run, toy_bundle: Path) -> None:
    result = run("inspect", toy_bundle, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    config = open_bundle(toy_bundle).config
    latent = {"name": "latent", "dtype": "float32", "shape": ["N", config.n_styles, config.style_dim]}
    image = {"name": "image", "dtype": "float32", "shape": ["N", 3, *config.image_shape]}
    assert facts["format_version"] == 1
    assert facts["model"]["encoder_type"] == config.encoder_type
    assert facts["model"]["encoder_widths"] == list(config.encoder_widths)
    assert latent in facts["graphs"]["encoder"]["inputs"]
    assert facts["graphs"]["generator"]["inputs"] == [latent]
    assert facts["graphs"]["generator"]["outputs"][0] == image
    assert facts["graphs"]["encoder"]["file"] == "encoder.onnx"
    assert facts["graphs"]["encoder"]["bytes"] == (toy_bundle / "encoder.onnx").stat().st_size
    assert facts["engines"] == []
    assert facts["verification"] == json.loads((toy_bundle / "manifest.json").read_text())["verification"]


def test_engines_and_their_plans_are_described(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    wholes = {"whole generator": {"exported": 4.0, "planned": 3.0}}
    timed = {**PLAN, "measurements": {**PLAN["measurements"], **wholes}}
    versions = {"onnxruntime": "1.2", "other": "3"}
    engine = add_engine(bundle, roles=("target",), library_versions=versions, processor="Abacus", plan=timed)
    size = sum(path.stat().st_size for path in engine.directory.iterdir())
    plan = {**PLAN, "origin": "table", "measurements": {}, "seconds": 0}
    add_engine(bundle, precision="bf16", batch=1, plan=plan)
    result = run("inspect", bundle)
    assert result.exit_code == 0
    lines = [line.strip() for line in result.stdout.splitlines()]
    first, second = lines.index("onnxruntime-cpu-fp32"), lines.index("onnxruntime-cpu-bf16")
    described = [
        dict(re.split(r": +", line, maxsplit=1) for line in part if ": " in line)
        for part in (
            lines[first:second],
            lines[second : lines.index("verification")],
        )
    ]
    assert described[0] == {
        "backend": "onnxruntime",
        "device": "cpu",
        "precision": "fp32",
        "batch": "any",
        "libraries": "onnxruntime 1.2, other 3",
        "processor": "Abacus",
        "graphs": "target, encoder, generator",
        "files": f"6, {size / 1e6:.1f} MB, hashed: unchanged since the build",
        "verified": "yes",
        "plan": "tuned, measured for 3.5 s",
        "whole graphs": "whole generator exported 4.00, planned 3.00 ms",
        "generator.up.64": "polyphase  polyphase 1.25*, transposed 2.50 ms",
        "encoder.input": "split",
    }
    assert (described[1]["batch"], described[1]["plan"]) == ("1", "table")
    assert described[1]["generator.up.64"] == "polyphase"


def test_json_describes_the_engines(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    engine = add_engine(bundle, roles=("target", "preview"))
    facts = json.loads(run("inspect", bundle, "--json").stdout)
    assert facts["engines"] == json.loads((bundle / "manifest.json").read_text())["engines"]
    (described,) = facts["engines"]
    assert described["plan"] == PLAN
    assert described["files"] == dict(engine.files)
    assert set(described["graphs"]) == {"encoder", "generator", "target", "preview"}


def test_damaged_engine_is_shown_beside_the_others(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    add_engine(bundle)
    add_engine(bundle, precision="bf16")
    edit_manifest(bundle, lambda manifest: manifest["engines"][0]["plan"].pop("origin"))
    result = run("inspect", bundle)
    assert result.exit_code == 0
    assert re.search(r"engines/onnxruntime-cpu-fp32: KeyError: 'origin'; build it again", result.stdout)
    assert "\n  onnxruntime-cpu-bf16\n" in result.stdout
    facts = json.loads(run("inspect", bundle, "--json").stdout)
    assert [engine["precision"] for engine in facts["engines"]] == ["bf16"]
    assert facts["damaged_engines"] == [
        {
            "name": "engines/onnxruntime-cpu-fp32",
            "key": ["onnxruntime", "cpu", "fp32"],
            "reason": "KeyError: 'origin'",
        }
    ]


@pytest.mark.parametrize("how", ["missing", "changed"])
def test_engine_whose_files_are_not_as_built_is_shown(run: Run, toy_bundle: Path, tmp_path: Path, how: str) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    engine = add_engine(bundle)
    if how == "missing":
        shutil.rmtree(engine.directory)
        names = list(engine.files)
    else:
        names = ["encoder.onnx"]
        os.truncate(engine.directory / names[0], 1000)
    line = f"{how.upper()} {', '.join(names)}; build it again"
    result = run("inspect", bundle)
    assert result.exit_code == 0
    assert re.search(rf"^    files: +{re.escape(line)}$", result.stdout, re.MULTILINE)
    changes = {"missing": [], "changed": [], how: names}
    assert json.loads(run("inspect", bundle, "--json").stdout)["engine_files"] == {engine.directory.name: changes}
    layers = run("inspect", bundle, "--layers")
    assert layers.stdout == (
        f"{engine.directory.name}: files: {line}; layers are told as they were when it was built\n"
    )
    facts = json.loads(run("inspect", bundle, "--layers", "--json").stdout)
    assert facts == {engine.directory.name: {"files": changes}}


LAYERS = [
    {
        "name": "decoder.conv1/Conv_1 + decoder.conv1/mul",
        "type": "CaskConvolution",
        "precision": "FP16",
        "format": "Channel major FP16 format where channel % 8 == 0",
        "shapes": [[1, 64, 4, 4]],
        "model_layers": ["decoder.conv1"],
    }
]


def add_layers(bundle: Path, engine: EngineRecord, content: str) -> Path:
    """Put a file about the generator's layers beside an engine, with a hash that fits."""
    path = engine.directory / "generator.layers.json"
    path.write_text(content, encoding="utf-8")
    digest = sha256_of_file(path)
    edit_manifest(bundle, lambda manifest: manifest["engines"][0]["files"].update({path.name: digest}))
    return path


def test_layers_are_listed(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    assert run("inspect", bundle, "--layers").stdout == "no engine\n"
    engine = add_engine(bundle)
    heading = "onnxruntime-cpu-fp32: its backend tells no layers\n"
    assert run("inspect", bundle, "--layers").stdout == heading
    add_layers(bundle, engine, json.dumps({"of": "engine", "layers": LAYERS}))
    lines = run("inspect", bundle, "--layers").stdout.splitlines()
    assert lines[0] == "onnxruntime-cpu-fp32 generator, 1 layer, as the engine runs them"
    assert re.split(r" {2,}", lines[1].strip()) == [
        *(LAYERS[0][name] for name in ("name", "type", "precision", "format")),
        "1×64×4×4",
    ]
    fused = [{**LAYERS[0], "name": "fused_1", "model_layers": ["decoder.conv1", "decoder.convs.0"]}]
    add_layers(bundle, engine, json.dumps({"of": "engine", "layers": fused}))
    (_, line) = run("inspect", bundle, "--layers").stdout.splitlines()
    assert line.endswith("  decoder.conv1, decoder.convs.0")
    add_layers(bundle, engine, json.dumps({"of": "engine", "layers": LAYERS}))
    facts = json.loads(run("inspect", bundle, "--layers", "--json").stdout)
    unchanged: dict[str, list[str]] = {"missing": [], "changed": []}
    layers = {"of": "engine", "layers": LAYERS}
    assert facts == {"onnxruntime-cpu-fp32": {"generator": layers, "files": unchanged}}


def test_layers_of_a_changed_engine_are_told_to_be_former_ones(run: Run, toy_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    engine = add_engine(bundle)
    add_layers(bundle, engine, json.dumps({"of": "network", "layers": [*LAYERS, {**LAYERS[0], "format": None}]}))
    os.truncate(engine.directory / "encoder.onnx", 1000)
    lines = run("inspect", bundle, "--layers").stdout.splitlines()
    assert lines[0].startswith("onnxruntime-cpu-fp32: files: CHANGED encoder.onnx; build it again; ")
    assert lines[1].startswith("onnxruntime-cpu-fp32 generator, 2 layers, as parsed")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1,2]",
        "[" * 100_000,
        "{}",
        '{"of": "engine"}',
        '{"of": [], "layers": []}',
        '{"of": "abacus", "layers": []}',
        '{"of": "engine", "layers": {}}',
        '{"of": "engine", "layers": [3]}',
        *(
            json.dumps({"of": "engine", "layers": [{**LAYERS[0], **change}]})
            for change in ({"name": None}, {"format": 3}, {"shapes": [3]}, {"model_layers": [None]})
        ),
    ],
    ids=lambda content: content[:60],
)
def test_damaged_layers_are_one_line(run: Run, toy_bundle: Path, tmp_path: Path, content: str) -> None:
    bundle = shutil.copytree(toy_bundle, tmp_path / "bundle")
    path = add_layers(bundle, add_engine(bundle), content)
    result = run("inspect", bundle, "--layers")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(
        rf"Error: {re.escape(str(path))}: holds no layers \(.*\); build the engine again\n", result.stderr
    )
