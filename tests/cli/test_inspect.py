import json
import re
from pathlib import Path

from restyle_deploy.bundle import open_bundle
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
