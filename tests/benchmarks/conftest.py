"""The toy model as a model of the speed table, and rows that are made up."""

from pathlib import Path

import pytest

from benchmarks.cells import Row
from benchmarks.contenders import ModelFiles
from restyle_deploy.bench.comparison import Difference, Ratio


@pytest.fixture(scope="session")
def toy_files(toy_bundle: Path) -> ModelFiles:
    return ModelFiles(name="toy", bundle=toy_bundle)


@pytest.fixture
def rows() -> tuple[Row, ...]:
    """The baseline, the reference, an approximate one and one that could not run."""

    def row(name: str, ms: float, **changes: object) -> Row:
        facts: dict[str, object] = {
            "contender": name,
            "label": f"{name} label",
            "is_approximate": False,
            "samples_ms": (ms, ms + 1, ms + 2),
            "baseline_ms": (200.0, 201.0, 202.0),
            "ratio": Ratio(median=200 / ms, lower_quartile=190 / ms, upper_quartile=210 / ms),
            "first_call_ms": 2 * ms,
            "import_s": 0.5,
            "open_s": 0.25,
            "base_mib": 50.0,
            "open_peak_mib": 150.0,
            "run_peak_mib": 125.0,
            "difference": Difference(psnr_db=100.0, latent_error=1e-6),
            **changes,
        }
        return Row(**facts)  # type: ignore[arg-type]

    return (
        row("upstream", 200.0),
        row("torch", 100.0, difference=None),
        row(
            "onnxruntime-preview",
            20.0,
            is_approximate=True,
            difference=Difference(psnr_db=31.5, latent_error=0.02),
        ),
        Row(contender="openvino-bf16", label="bf16", is_approximate=True, reason="no bf16 | here"),
    )
