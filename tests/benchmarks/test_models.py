"""Models of the speed table: where they come from and what they are fed."""

import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import models
from benchmarks.contenders import CONTENDERS, ModelFiles
from benchmarks.models import build_engines, load_inputs, prepare_model
from restyle_deploy.errors import BackendUnavailableError

WEIGHTS = """
import shutil, sys
shutil.copyfile({source!r}, sys.argv[2])
"""


@pytest.fixture
def golden(toy_checkpoint: Path, tmp_path: Path) -> Path:
    """A golden directory whose rule for weights is to copy the toy checkpoint."""
    folder = tmp_path / "golden"
    folder.mkdir()
    (folder / "weights.py").write_text(WEIGHTS.format(source=str(toy_checkpoint)))
    (folder / "e4e_church_256.json").write_text("{}")
    np.savez(folder / "e4e_church_256.npz", input=np.arange(2 * 3, dtype=np.uint8).reshape(1, 1, 2, 3))
    return folder


def test_demo_is_copied_once(tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project_root)
    files = prepare_model("demo", None, tmp_path, lambda text: None)
    assert (files.bundle, files.checkpoint) == (tmp_path / "demo", None)
    (files.bundle / "mark").write_text("")
    prepare_model("demo", None, tmp_path, lambda text: None)
    assert (files.bundle / "mark").is_file()


@pytest.mark.slow
def test_golden_model_is_made_once(golden: Path, tmp_path: Path) -> None:
    work, told = tmp_path / "work", list[str]()
    work.mkdir()
    files = prepare_model("256", golden, work, told.append)
    assert (files.bundle / "manifest.json").is_file()
    assert files.checkpoint == work / "256.pt"
    assert told == ["256: writing the checkpoint", "256: exporting"]
    prepare_model("256", golden, work, told.append)
    assert len(told) == 2


def test_golden_model_needs_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model 512 needs the golden directory"):
        prepare_model("512", None, tmp_path, lambda text: None)


def test_inputs_are_mirrored_and_repeated(golden: Path) -> None:
    images = load_inputs("256", golden, (1, 2), 3)
    assert images[:, 0, :, 0].tolist() == [[0, 3], [3, 0], [0, 3]]
    assert images.flags.c_contiguous


def test_demo_is_fed_with_photos(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project_root)
    images = load_inputs("demo", None, (64, 64), 4)
    assert images.shape == (4, 64, 64, 3)
    assert len({image.tobytes() for image in images}) == 4


def test_each_engine_is_built_once_and_refusals_are_told(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, told = list[Any](), list[str]()

    def build(function: Any, *arguments: Any) -> None:
        built.append(arguments)
        if arguments[2] == "bf16":
            raise BackendUnavailableError("no bf16 here")

    monkeypatch.setattr(models, "_run_apart", build)
    shutil.copytree(toy_bundle, tmp_path / "toy")
    files = ModelFiles(name="toy", bundle=tmp_path / "toy")
    chosen = [
        CONTENDERS[name]
        for name in ("torch", "onnxruntime-plain", "openvino-bf16", "onnxruntime", "onnxruntime-preview")
    ]
    refused = build_engines(files, chosen, 2, told.append)
    assert refused == {"openvino-bf16": "no bf16 here"}
    assert built == [
        (files.bundle, "onnxruntime", "fp32", 2, "cpu", True),
        (files.bundle, "openvino", "bf16", 2, "cpu", True),
    ]
    assert told == ["toy: building onnxruntime fp32", "toy: building openvino bf16", "toy: no bf16 here"]


def test_a_library_that_dies_is_a_refusal(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(function: Any, *arguments: Any) -> None:
        assert arguments[3:] == (None, "cuda:0", False)
        raise BrokenProcessPool("a process ended abruptly")

    monkeypatch.setattr(models, "_run_apart", die)
    files = ModelFiles(name="toy", bundle=toy_bundle)
    told = list[str]()
    refused = build_engines(files, [CONTENDERS["onnxruntime"]], None, told.append, device="cuda:0", tune=False)
    assert refused == {"onnxruntime": "a process ended abruptly"}
    assert told == ["toy: building onnxruntime fp32", "toy: a process ended abruptly"]
