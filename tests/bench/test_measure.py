from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restyle_deploy.bench.measure import Latency, measure_interleaved, step_latency_from


class FakeClock:
    """Stands still but for what the calls add."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def call_taking(self, *durations_ms: float) -> Callable[[], None]:
        """Return a call that takes these durations, one after the other, and then the last for ever."""
        left = list(durations_ms)

        def run() -> None:
            self.seconds += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

        return run


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
    assert (latency.median_ms, latency.p95_ms, latency.iqr_ms) == (50, 95, 50)


@pytest.mark.parametrize(
    ("samples", "unstable"),
    [((100, 100, 100, 100, 500), False), ((94, 95, 100, 105, 106), False), ((80, 94, 100, 106, 120), True)],
)
def test_unstable_above_a_tenth_of_the_median(samples: tuple[float, ...], unstable: bool) -> None:
    assert Latency(warmup_ms=(), samples_ms=samples).is_unstable is unstable


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50))
def test_figures_lie_within_the_samples(samples: list[float]) -> None:
    latency = Latency(warmup_ms=(), samples_ms=tuple(samples))
    tolerance = 1e-9 * max(samples)
    assert min(samples) - tolerance <= latency.median_ms <= latency.p95_ms + tolerance
    assert latency.p95_ms <= max(samples) + tolerance
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


def test_the_report_after_a_call_is_not_timed() -> None:
    clock = FakeClock()

    def waste(_: str) -> None:
        clock.seconds += 60

    latencies = measure_interleaved({"a": clock.call_taking(5)}, warmup=0, repeats=2, clock=clock, after_call=waste)
    assert latencies["a"].samples_ms == pytest.approx((5, 5))


@pytest.mark.parametrize(("warmup", "repeats"), [(-1, 1), (0, 0)])
def test_too_few_calls_are_refused(warmup: int, repeats: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1 call, 0 and 1"):
        measure_interleaved({"a": lambda: None}, warmup=warmup, repeats=repeats)


def test_nothing_to_run_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 calls"):
        measure_interleaved({}, warmup=0, repeats=1)


def test_figures_of_a_latency_are_written_out() -> None:
    latency = Latency(warmup_ms=(9.0,), samples_ms=(1.0, 2.0, 3.0))
    written = step_latency_from(latency)
    assert (written.median_ms, written.iqr_ms, written.unstable) == (2.0, 1.0, True)
    assert (written.warmup_ms, written.samples_ms) == ((9.0,), (1.0, 2.0, 3.0))
