"""The loop adds next to nothing to the runs of its graphs."""

from pathlib import Path

import pytest

from benchmarks.loop_overhead import measure_loop_overhead
from benchmarks.models import load_inputs

STEPS, ROUNDS = 5, 30
MOST = 1.3


@pytest.mark.slow
def test_demo_inversion_takes_little_more_than_its_runs(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project_root)
    images = load_inputs("demo", None, (64, 64), 1)
    ratio = measure_loop_overhead(Path("engines/demo-faces"), images, steps=STEPS, rounds=ROUNDS, threads=1)
    assert ratio.median <= MOST, ratio
