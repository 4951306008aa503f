import subprocess
import sys

import pytest

from restyle_deploy.bench.libraries import require_bench_libraries, require_reference_libraries
from restyle_deploy.errors import BackendUnavailableError


def test_installed_libraries_pass() -> None:
    require_bench_libraries()
    require_reference_libraries()


def test_missing_libraries_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        BackendUnavailableError, match=r"scikit-image and matplotlib.*pip install 'restyle-deploy\[bench\]'"
    ):
        require_bench_libraries()


def test_missing_torch_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailableError, match=r"model needs torch, .*pip install 'restyle-deploy\[export\]'"):
        require_reference_libraries()


def test_the_package_imports_without_heavy_libraries() -> None:
    blocked = ["torch", "onnx", "onnxruntime", "matplotlib", "skimage", "scipy", "click"]
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import restyle_deploy.bench.run"
    subprocess.run([sys.executable, "-c", program], check=True)
