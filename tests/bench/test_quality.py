import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from restyle_deploy.bench.figures import Aggregate, Gain
from restyle_deploy.bench.metrics import METRICS
from restyle_deploy.bench.quality import (
    LEAST_IMAGES,
    aggregate,
    bootstrap_interval,
    gain_between,
    gain_per_step,
    gains_of,
    settled_steps,
    worsening_steps,
)

MSE, PSNR = METRICS[0], METRICS[2]
NOTHING = Aggregate(mean=None, median=None, p5=None, p95=None, low=None, high=None, count=0)


def made_up_gain(*, from_steps: int, gain: float | None, width: float = 0.1, metric: str = "mse") -> Gain:
    low, high = (None, None) if gain is None else (gain - width / 2, gain + width / 2)
    return Gain(metric=metric, from_steps=from_steps, to_steps=from_steps + 1, gain=gain, low=low, high=high)


def test_mean_and_percentiles_are_those_of_the_values() -> None:
    found = aggregate(list(range(101)))
    assert (found.mean, found.median, found.p5, found.p95, found.count) == (50, 50, 5, 95, 101)


@pytest.mark.parametrize(("count", "tolerance"), [(5, 0.05), (8, 0.05), (60, 0.03)])
def test_interval_is_scipys_percentile_bootstrap_widened_for_few_values(count: int, tolerance: float) -> None:
    values = np.random.default_rng(1).exponential(size=count)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    factor = stats.t.ppf(0.975, count - 1) / stats.norm.ppf(0.975) * np.sqrt(count / (count - 1))
    mean = values.mean()
    bounds = [mean + (bound - mean) * factor for bound in (expected.low, expected.high)]
    assert bootstrap_interval(values) == pytest.approx(bounds, abs=tolerance * (bounds[1] - bounds[0]))


@pytest.mark.parametrize(("law", "mean", "least"), [("normal", 0.0, 0.91), ("exponential", 1.0, 0.85)])
@pytest.mark.parametrize("count", [LEAST_IMAGES, 8])
def test_interval_holds_the_true_mean_nearly_as_often_as_it_says(
    law: str, mean: float, least: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("restyle_deploy.bench.quality.RESAMPLES", 500)
    draws = getattr(np.random.default_rng(0), law)(size=(800, count))
    intervals = [bootstrap_interval(values) for values in draws]
    held = np.mean([low is not None and high is not None and low <= mean <= high for low, high in intervals])
    assert least <= held <= 0.97


@pytest.mark.parametrize("count", range(LEAST_IMAGES))
def test_of_few_values_there_is_no_interval(count: int) -> None:
    assert bootstrap_interval(np.arange(float(count))) == (None, None)
    assert bootstrap_interval(np.arange(float(LEAST_IMAGES)))[0] is not None


def test_interval_of_many_values_is_computed_in_pieces_and_that_of_the_normal_law() -> None:
    values = np.random.default_rng(3).normal(size=3000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 10)


def test_the_same_values_and_seed_give_the_same_interval() -> None:
    values = [0.1, 0.5, 0.2, 0.9, 0.3]
    assert aggregate(values) == aggregate(values, seed=0)
    assert aggregate(values).low != aggregate(values, seed=1).low or aggregate(values).high != aggregate(values).low


def test_one_value_has_no_interval() -> None:
    assert aggregate([0.5]) == Aggregate(mean=0.5, median=0.5, p5=0.5, p95=0.5, low=None, high=None, count=1)


@pytest.mark.parametrize("values", [[], [None], [float("nan"), None]])
def test_without_values_there_is_no_figure(values: list[float | None]) -> None:
    assert aggregate(values) == NOTHING


def test_missing_values_are_left_out() -> None:
    assert aggregate([None, 1.0, float("nan"), 3.0]) == aggregate([1.0, 3.0])


def test_infinite_values_leave_the_figures_that_they_do_not_reach() -> None:
    found = aggregate([20.0, 30.0, 40.0, float("inf")])
    assert found == Aggregate(mean=None, median=35.0, p5=21.5, p95=None, low=None, high=None, count=3)
    assert aggregate([float("inf")] * 3).median is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=LEAST_IMAGES, max_size=20))
def test_figures_are_in_order(values: list[float]) -> None:
    found = aggregate(values)
    assert found.mean is not None
    assert found.p5 is not None
    assert found.median is not None
    assert found.p95 is not None
    assert found.low is not None
    assert found.high is not None
    assert min(values) <= found.p5 <= found.median <= found.p95 <= max(values)
    rounding = 1e-9 * max(map(abs, values))
    assert found.low - rounding <= found.mean <= found.high + rounding


@pytest.mark.parametrize(("metric", "expected"), [(MSE, -0.25), (PSNR, 0.25)])
def test_a_gain_is_positive_where_the_metric_improves(metric: object, expected: float) -> None:
    assert metric in METRICS
    chosen = next(known for known in METRICS if known == metric)
    gain = gain_between([1.0, 2.0], [1.5, 2.0], metric=chosen, from_steps=1, to_steps=3)
    assert gain.gain == pytest.approx(expected)
    assert (gain.metric, gain.from_steps, gain.to_steps) == (chosen.name, 1, 3)


def test_a_gain_is_paired_so_that_unlike_images_do_not_widen_its_interval() -> None:
    before = np.linspace(0.1, 10, 40)
    paired = gain_between(before, before - 0.05, metric=MSE, from_steps=1, to_steps=2)
    assert (paired.gain, paired.low, paired.high) == pytest.approx((0.05, 0.05, 0.05))
    assert aggregate(before).high != pytest.approx(aggregate(before).low, abs=1)


def test_a_gain_leaves_out_images_without_a_value() -> None:
    gain = gain_between([1.0, None, 3.0], [0.5, 0.1, None], metric=MSE, from_steps=1, to_steps=2)
    assert gain == Gain(metric="mse", from_steps=1, to_steps=2, gain=0.5, low=None, high=None)


def test_from_infinite_to_infinite_there_is_no_gain_and_to_infinite_it_has_no_figure() -> None:
    infinite = float("inf")
    assert gain_between([infinite, 1.0], [infinite, 2.0], metric=PSNR, from_steps=1, to_steps=2).gain == 0.5
    assert gain_between([1.0, 1.0], [infinite, 2.0], metric=PSNR, from_steps=1, to_steps=2).gain is None


def test_gains_are_between_neighbouring_step_counts_of_each_metric() -> None:
    per_image = {
        5: {"mse": (0.1, 0.1), "psnr_db": (16.0, 16.0)},
        1: {"mse": (0.4, 0.4), "psnr_db": (10.0, 10.0)},
        2: {"mse": (0.2, 0.2)},
    }
    gains = gains_of(per_image, (MSE, PSNR))
    assert [(gain.metric, gain.from_steps, gain.to_steps) for gain in gains] == [("mse", 1, 2), ("mse", 2, 5)]
    assert [gain.gain for gain in gains] == pytest.approx([0.2, 0.1])


def test_gain_per_step_is_divided_by_the_steps_that_it_takes() -> None:
    gain = Gain(metric="mse", from_steps=5, to_steps=10, gain=0.5, low=0.25, high=None)
    assert gain_per_step(gain) == Gain(metric="mse", from_steps=5, to_steps=10, gain=0.1, low=0.05, high=None)
    assert gain_per_step(made_up_gain(from_steps=1, gain=None)).gain is None


def test_steps_are_settled_where_no_later_gain_is_above_the_width_of_its_interval() -> None:
    gains = [
        made_up_gain(from_steps=5, gain=0.01),
        made_up_gain(from_steps=1, gain=0.5),
        made_up_gain(from_steps=2, gain=0.09),
        made_up_gain(from_steps=1, gain=0.5, metric="ssim"),
        made_up_gain(from_steps=1, gain=-0.5, metric="lpips"),
        made_up_gain(from_steps=1, gain=None, metric="psnr_db"),
        made_up_gain(from_steps=2, gain=0.0, width=0.0, metric="psnr_db"),
    ]
    assert settled_steps(gains) == {"mse": 2, "lpips": 1, "psnr_db": 2}


def test_steps_are_not_settled_before_a_later_gain_or_one_that_cannot_be_told() -> None:
    later = [made_up_gain(from_steps=steps, gain=gain) for steps, gain in ((1, 0.05), (2, 0.5), (3, 0.02))]
    assert settled_steps(later) == {"mse": 3}
    assert settled_steps([*later, made_up_gain(from_steps=4, gain=0.5)]) == {}
    assert settled_steps([*later, made_up_gain(from_steps=4, gain=None)]) == {}


def worsening(*pairs: tuple[int, float], width: float = 0.1) -> dict[str, int]:
    return worsening_steps([made_up_gain(from_steps=steps, gain=gain, width=width) for steps, gain in pairs], METRICS)


def test_steps_are_told_from_which_on_more_make_it_worse() -> None:
    assert worsening((1, 0.5), (2, 0.02), (3, -0.3), (5, 0.01)) == {"mse": 3}
    assert worsening((1, 0.5), (2, -0.3), (3, -0.3)) == {"mse": 2}
    assert worsening((1, 0.5), (2, -0.04)) == {}  # its interval holds 0
    assert worsening((1, -0.5), (2, 0.3)) == {}
    assert worsening((1, -0.5), (2, 0.3), (3, -0.3)) == {"mse": 3}
    assert worsening((1, -1e-9), width=0.0) == {}  # nobody sees it
    assert worsening_steps([made_up_gain(from_steps=1, gain=None)], METRICS) == {}
    assert worsening_steps([made_up_gain(from_steps=1, gain=-1.0, metric="other")], METRICS) == {}
