import pytest
from hypothesis import given
from hypothesis import strategies as st

from restyle_deploy.latency import Latency, WarmupRule, measure_interleaved
from tests.bench.fakes import FakeClock


def test_warmup_is_kept_apart() -> None:
    clock = FakeClock()
    latency = measure_interleaved({"a": clock.call_taking(500, 80, 10, 12, 11)}, warmup=2, repeats=3, clock=clock)["a"]
    assert latency.warmup_ms == pytest.approx((500, 80))
    assert latency.samples_ms == pytest.approx((10, 12, 11))
    assert latency.median_ms == pytest.approx(11)


def test_real_clock_is_the_default() -> None:
    assert measure_interleaved({"a": lambda: None}, warmup=0, repeats=1)["a"].samples_ms[0] >= 0


def test_figures_of_known_samples() -> None:
    latency = Latency(warmup_ms=(), samples_ms=tuple(float(value) for value in range(100, -1, -1)))
    assert (latency.median_ms, latency.percentile_ms(99), latency.iqr_ms) == (50, 99, 50)


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50))
def test_figures_lie_within_the_samples(samples: list[float]) -> None:
    latency = Latency(warmup_ms=(), samples_ms=tuple(samples))
    tolerance = 1e-9 * max(samples)
    assert min(samples) - tolerance <= latency.median_ms <= latency.percentile_ms(95) + tolerance
    assert latency.percentile_ms(95) <= max(samples) + tolerance
    assert -tolerance <= latency.iqr_ms <= max(samples) - min(samples) + tolerance


def test_interleaved_rotates_over_the_cells() -> None:
    clock = FakeClock()
    order: list[str] = []
    runs = {"a": clock.call_taking(1), "b": clock.call_taking(2), "c": clock.call_taking(3)}
    latencies = measure_interleaved(runs, warmup=1, repeats=2, clock=clock, after_call=order.append)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert list(latencies) == ["a", "b", "c"]
    assert [latency.samples_ms for latency in latencies.values()] == [
        pytest.approx((duration, duration)) for duration in (1, 2, 3)
    ]


def test_a_slow_spell_hits_all_cells_alike() -> None:
    clock = FakeClock()
    runs = {name: clock.call_taking(10, 10, 30, 30, 10) for name in "abc"}
    latencies = measure_interleaved(runs, warmup=0, repeats=8, clock=clock)
    assert len({round(latency.median_ms, 6) for latency in latencies.values()}) == 1


@pytest.mark.parametrize(("warmup", "repeats"), [(-1, 1), (0, 0)])
def test_too_few_calls_are_refused(warmup: int, repeats: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1 call, 0 and 1"):
        measure_interleaved({"a": lambda: None}, warmup=warmup, repeats=repeats)


def test_nothing_to_run_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 calls"):
        measure_interleaved({}, warmup=0, repeats=1)


def test_warmup_ends_when_two_windows_agree() -> None:
    clock = FakeClock()
    falling = (900, 300, 100, 50, 30, 20, 15, 12, 11, 10)
    rule = WarmupRule(window=3, tolerance=0.05)
    latency = measure_interleaved({"a": clock.call_taking(*falling)}, warmup=rule, repeats=2, clock=clock)["a"]
    # The tenth call is the first of 10 ms; the windows of calls 9 to 11 and 12 to 14 are the first whose medians agree.
    assert len(latency.warmup_ms) == 14
    assert latency.is_warmed_up
    assert latency.samples_ms == pytest.approx((10, 10))


def test_one_disturbed_call_does_not_prolong_the_warmup() -> None:
    clock = FakeClock()
    run = clock.call_taking(10, 10, 10, 80, 10)
    latency = measure_interleaved({"a": run}, warmup=WarmupRule(window=3), repeats=1, clock=clock)["a"]
    assert len(latency.warmup_ms) == 6


def test_each_cell_warms_up_by_itself() -> None:
    clock = FakeClock()
    order: list[str] = []
    slow_start = clock.call_taking(*(100 - 10 * index for index in range(9)), 10)
    runs = {"steady": clock.call_taking(10), "falling": slow_start}
    rule = WarmupRule(window=2)
    latencies = measure_interleaved(runs, warmup=rule, repeats=1, clock=clock, after_call=order.append)
    assert len(latencies["steady"].warmup_ms) == 4
    assert len(latencies["falling"].warmup_ms) == 13
    assert set(order[-3:-2]) == {"falling"}  # alone at the end of its warm-up; then both are measured
    assert set(order[-2:]) == {"falling", "steady"}


def test_warmup_that_never_settles_is_told() -> None:
    clock = FakeClock()
    growing = clock.call_taking(*(1.5**index for index in range(30)))
    rule = WarmupRule(window=2, most_calls=12)
    latency = measure_interleaved({"a": growing}, warmup=rule, repeats=1, clock=clock)["a"]
    assert len(latency.warmup_ms) == 12
    assert not latency.is_warmed_up


@pytest.mark.parametrize(
    ("times_ms", "over", "settled"),
    [
        ((20_000, 20_000), False, True),  # over the time, but fewer calls than the least
        ((20_000, 20_000, 20_000), True, True),  # three slow calls: the last two agree
        ((40_000, 20_000, 10_000), True, False),
        ((90_000, 10_000, 10_100), True, True),
        ((10, 10, 10), False, True),  # quick calls: two whole windows are asked for
        ((10,), False, False),
    ],
)
def test_slow_calls_are_judged_by_fewer(times_ms: tuple[float, ...], over: bool, settled: bool) -> None:
    rule = WarmupRule(most_seconds=30)
    assert (rule.is_over(times_ms), rule.is_settled(times_ms)) == (over, settled)
