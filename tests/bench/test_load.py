import numpy as np
import pytest

from restyle_deploy.bench.load import draw_arrivals, measure_load, rates_from_samples, sustained_rate
from tests.bench.fakes import FakeClock


def test_arrivals_are_those_of_a_poisson_process() -> None:
    arrivals = np.array(draw_arrivals(50, 200))
    assert len(arrivals) == pytest.approx(10_000, rel=0.03)
    gaps = np.diff(arrivals)
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(gaps.std(), rel=0.03)  # exponential gaps: both are 1 / rate
    assert arrivals[-1] < 200


def test_same_seed_same_arrivals() -> None:
    assert draw_arrivals(5, 10, seed=3) == draw_arrivals(5, 10, seed=3) != draw_arrivals(5, 10, seed=4)


def test_there_is_at_least_one_arrival() -> None:
    assert draw_arrivals(1e-6, 1) == (0.0,)


@pytest.mark.parametrize(("rate", "seconds"), [(0, 1), (-1, 1), (1, 0), (float("nan"), 1)])
def test_nothing_to_draw_is_refused(rate: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="both must be above 0"):
        draw_arrivals(rate, seconds)


def test_light_load_has_the_latency_of_a_call() -> None:
    clock = FakeClock()
    point = measure_load(clock.call_taking(10), rate_per_s=0.1, seconds=1000, clock=clock, sleep=clock.sleep)
    assert point.p50_ms == pytest.approx(10, rel=0.01)
    assert point.achieved_per_s == pytest.approx(0.1, rel=0.2)
    assert (point.dropped, len(point.samples_ms)) == (0, len(draw_arrivals(0.1, 1000)))


def test_a_stall_counts_for_all_calls_that_it_delays() -> None:
    """One call of a second among calls of 1 ms: a closed loop would tell of one slow call, here all arrivals wait."""
    clock = FakeClock()
    run = clock.call_taking(*[1] * 100, 1000, 1)
    point = measure_load(run, rate_per_s=100, seconds=5, clock=clock, sleep=clock.sleep)
    arrivals = draw_arrivals(100, 5)
    stalled = arrivals[100]
    waiting = [index for index, arrival in enumerate(arrivals) if stalled < arrival < stalled + 0.9]
    assert len(waiting) > 70
    for index in waiting:
        left_ms = (stalled + 1 - arrivals[index]) * 1e3
        assert point.samples_ms[index] > left_ms
    assert point.p90_ms > 500
    assert point.p50_ms == pytest.approx(1, abs=0.1)


def test_latency_under_load_is_that_of_the_queue() -> None:
    """Poisson arrivals at a server of constant time S and utilisation u wait u S / (2 (1 - u)) on average (M/D/1)."""
    clock = FakeClock()
    point = measure_load(clock.call_taking(10), rate_per_s=70, seconds=600, clock=clock, sleep=clock.sleep)
    utilisation = 0.7
    expected_ms = 10 + 10 * utilisation / (2 * (1 - utilisation))
    assert np.mean(point.samples_ms) == pytest.approx(expected_ms, rel=0.05)
    assert point.p50_ms < point.p90_ms < point.p95_ms < point.p99_ms


def test_overload_ends_and_its_percentiles_count_those_dropped() -> None:
    clock = FakeClock()
    begin = clock.seconds
    point = measure_load(
        clock.call_taking(100), rate_per_s=20, seconds=10, patience_s=2, clock=clock, sleep=clock.sleep
    )
    assert clock.seconds - begin == pytest.approx(12, abs=0.2)
    assert point.achieved_per_s == pytest.approx(10, rel=0.02)
    arrivals = draw_arrivals(20, 10)
    assert len(point.samples_ms) + point.dropped == len(arrivals)
    assert point.dropped > 40
    waited_ms = [(clock.seconds - begin - arrival) * 1e3 for arrival in arrivals[-point.dropped :]]
    assert point.p90_ms == pytest.approx(np.percentile([*point.samples_ms, *waited_ms], 90), abs=0.01)


def test_waiting_sleeps_first_and_asks_the_time_at_the_end() -> None:
    clock = FakeClock()
    measure_load(clock.call_taking(1), rate_per_s=0.05, seconds=100, clock=clock, sleep=clock.sleep)
    assert max(clock.slept_s) > 1
    assert 0.0 in clock.slept_s


def test_rates_are_shares_of_what_is_done_in_a_second() -> None:
    assert rates_from_samples((20, 20), (0.5, 0.9)) == (25, 45)


def test_a_slow_call_counts_for_the_rate_that_is_kept_up() -> None:
    """Nine calls of 10 ms and one of 110 ms take 200 ms: 50 a second, where the median alone tells of 100."""
    samples_ms = [*[10.0] * 9, 110.0]
    assert sustained_rate(samples_ms) == pytest.approx(50)
    clock = FakeClock()
    (rate,) = rates_from_samples(samples_ms, (0.9,))
    call = clock.call_taking(*samples_ms * 200)
    point = measure_load(call, rate_per_s=rate, seconds=40, clock=clock, sleep=clock.sleep)
    assert rate == pytest.approx(45)
    assert point.dropped == 0


def test_real_clock_and_sleep_are_the_default() -> None:
    calls: list[int] = []
    point = measure_load(lambda: calls.append(1), rate_per_s=100, seconds=0.1)
    assert len(calls) == len(point.samples_ms) == len(draw_arrivals(100, 0.1))
