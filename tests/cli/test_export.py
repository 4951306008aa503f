import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from restyle_deploy import export as export_module
from restyle_deploy.bundle import open_bundle
from restyle_deploy.verify import Parity
from tests.cli.conftest import Run


def entries(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def assert_one_line_error(result: Any, message: str) -> None:
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search(rf"^Error: .*{message}.*\n\Z", result.stderr, re.MULTILINE), result.stderr


@pytest.mark.slow
def test_checkpoint_becomes_a_verified_bundle(run: Run, toy_checkpoint: Path, toy_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "toy"
    result = run("export", toy_checkpoint, "-o", output)
    assert result.exit_code == 0
    assert re.fullmatch(
        rf"{re.escape(str(output))}: verified; largest difference from the reference model: "
        r"latents \d\.\de-\d\d, images \d\.\de-\d\d\n",
        result.stdout,
    )
    assert result.stderr.splitlines() == [
        f"reading {toy_checkpoint.name} …",
        "exporting the encoder …",
        "exporting the generator …",
        "running the reference model for 3 steps …",
        "running the graphs for 3 steps …",
    ]
    assert entries(tmp_path / "new") == {"toy"}
    bundle, other = open_bundle(output), open_bundle(toy_bundle)
    assert (bundle.config, bundle.checkpoint_sha256) == (other.config, other.checkpoint_sha256)
    np.testing.assert_array_equal(bundle.latent_avg, other.latent_avg)
    assert run("verify", output).exit_code == 0


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace the export by a function that writes down its arguments."""
    calls: list[tuple[Any, ...]] = []

    def export(checkpoint: Path, output: Path, *, progress: Callable[[str], None], **options: Any) -> Parity:
        calls.append((checkpoint, output, options))
        progress("a stage")
        return Parity(latent_errors=(1e-6, 2e-6), image_errors=(3e-5, 2e-5))

    monkeypatch.setattr(export_module, "export_checkpoint", export)
    return calls


def test_json_holds_the_errors(run: Run, quick_export: list[tuple[Any, ...]]) -> None:
    result = run("export", "model.pt", "-o", "out", "--json")
    assert result.exit_code == 0
    assert result.stderr == "a stage …\n"
    facts = json.loads(result.stdout)
    assert facts["bundle"] == "out"
    assert facts["verification"]["latent_errors"] == [1e-6, 2e-6]
    assert facts["verification"]["image_errors"] == [3e-5, 2e-5]


def test_options_reach_the_export(run: Run, quick_export: list[tuple[Any, ...]]) -> None:
    run("export", "model.pt", "-o", "out", "--recipe", "recipe.toml", "--overwrite")
    run("export", "model.pt", "-o", "out")
    assert quick_export == [
        (Path("model.pt"), Path("out"), {"recipe": Path("recipe.toml"), "overwrite": True}),
        (Path("model.pt"), Path("out"), {"recipe": None, "overwrite": False}),
    ]


def test_bundle_that_is_there_is_kept(run: Run, toy_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert_one_line_error(run("export", toy_checkpoint, "-o", tmp_path / "out"), "exists already; add --overwrite")
    assert entries(tmp_path / "out") == set()


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
def test_unreadable_checkpoint_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "in").mkdir()
    if content is not None:
        (tmp_path / "in" / "model.pt").write_bytes(content)
    assert_one_line_error(run("export", tmp_path / "in" / "model.pt", "-o", tmp_path / "out"), r"model\.pt")
    assert entries(tmp_path) == {"in"}


def test_unreadable_recipe_is_one_line(run: Run, toy_checkpoint: Path, tmp_path: Path) -> None:
    result = run("export", toy_checkpoint, "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.toml")
    assert_one_line_error(result, r"recipe\.toml: not a readable recipe")
    assert entries(tmp_path) == set()


def test_missing_libraries_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def find_some(name: str) -> Any:
        return None if name in ("torch", "onnxscript") else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_some)
    message = r"torch, onnxscript, .*not installed.*pip install 'restyle-deploy\[export\]'"
    assert_one_line_error(run("export", "model.pt", "-o", "out"), message)
