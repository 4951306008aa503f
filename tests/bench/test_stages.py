from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from restyle_deploy.bench import stages
from restyle_deploy.bench.stages import (
    STAGES,
    measure_image_stages,
    measure_session_stages,
    ordered_stages,
    stages_from_timings,
)
from restyle_deploy.errors import ImageError
from tests.bench.fakes import FakeClock
from tests.pictures import write_picture


@dataclass(frozen=True, kw_only=True)
class MadeUpTimings:
    """What a session that was opened for timing tells."""

    upload_ms: float
    encoder_ms: tuple[float, ...]
    generator_ms: tuple[float, ...]
    download_ms: float
    total_ms: float


def timings(factor: float) -> MadeUpTimings:
    return MadeUpTimings(
        upload_ms=1 * factor,
        encoder_ms=(2 * factor, 3 * factor),
        generator_ms=(10 * factor, 20 * factor),
        download_ms=4 * factor,
        total_ms=40 * factor,
    )


def test_stages_of_a_session_are_medians_and_sums_over_steps() -> None:
    found = stages_from_timings([timings(1), timings(9), timings(2)])
    assert found == {"upload": 2, "encoder": 10, "generator": 60, "download": 8}


def test_warmup_is_left_out() -> None:
    factors = iter((100, 1, 1, 3))
    found = measure_session_stages(lambda: timings(next(factors)), warmup=1, repeats=3)
    assert found["upload"] == 1


def test_a_session_not_opened_for_timing_is_told() -> None:
    with pytest.raises(ValueError, match="open the session with timing_enabled=True"):
        measure_session_stages(lambda: None)


def test_stages_around_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To read, to resize and to write an image takes its time, of a clock that stands still but for these."""
    clock = FakeClock()
    calls: list[str] = []

    def slow_down(name: str, seconds: float) -> None:
        real = getattr(stages, name)

        def slowed(*arguments: object) -> object:
            clock.seconds += seconds
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(stages, name, slowed)

    slow_down("load_image", 0.007)
    slow_down("resize_image", 0.002)
    slow_down("save_image", 0.03)
    files = [write_picture(tmp_path / "a.png"), write_picture(tmp_path / "b.jpg")]
    images = np.zeros((3, 3, 32, 32), np.float32)
    found = measure_image_stages(files, images, input_shape=(16, 16), warmup=1, repeats=4, clock=clock)
    assert found == pytest.approx({"decode": 21, "preprocess": 6, "encode": 90})  # of three images
    assert [calls.count(name) for name in ("load_image", "resize_image", "save_image")] == [3 * 6, 3 * 5, 3 * 5]
    assert sorted(tmp_path.iterdir()) == files  # what was written is elsewhere, and gone


def test_real_files_take_time(tmp_path: Path) -> None:
    found = measure_image_stages(
        [write_picture(tmp_path / "a.png")], np.zeros((1, 3, 64, 64), np.float32), input_shape=(16, 16), repeats=2
    )
    assert min(found.values()) > 0


def test_nothing_to_measure_is_refused(tmp_path: Path) -> None:
    image = np.zeros((1, 3, 32, 32), np.float32)
    with pytest.raises(ValueError, match="got 0 files and 1 images"):
        measure_image_stages([], image, input_shape=(16, 16))
    with pytest.raises(ValueError, match="got 1 files and 0 images"):
        measure_image_stages([tmp_path / "a.png"], image[:0], input_shape=(16, 16))


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"bad\.png: empty file"):
        measure_image_stages([tmp_path / "bad.png"], np.zeros((1, 3, 8, 8), np.float32), input_shape=(8, 8))


def test_stages_are_in_the_order_in_which_an_image_passes_them() -> None:
    joined = ordered_stages({"decode": 1, "preprocess": 2, "encode": 3}, stages_from_timings([timings(1)]))
    assert tuple(joined) == STAGES
    assert tuple(ordered_stages({"encode": 1, "decode": 2})) == ("decode", "encode")
