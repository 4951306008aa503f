import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("onnxruntime")

from benchmarks.onnxruntime_settings import AS_BUILT, list_settings, main


def test_all_settings_are_measured_and_stored(toy_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "settings.json"
    result = CliRunner().invoke(main, [str(toy_bundle), "--rounds", "2", "-o", str(output)], catch_exceptions=False)
    assert result.exit_code == 0
    content = json.loads(output.read_text(encoding="utf-8"))
    assert set(content["settings"]) == set(list_settings())
    assert content["settings"][AS_BUILT]["ratio"] == {"median": 1.0, "lower_quartile": 1.0, "upper_quartile": 1.0}
    assert all(len(row["latency"]["samples_ms"]) == 2 for row in content["settings"].values())
    assert set(content["opening_seconds"]) == {"exported", "rewritten", "engine"}
    assert content["environment"]["packages"]["onnxruntime"]
    assert all(name in result.stdout for name in content["settings"])
