import pytest

from restyle_deploy.bench.machine import MachineCounters, MachineWatch
from restyle_deploy.bench.measure import Latency, WarmupRule, measure_latencies, step_latency_from
from tests.bench.fakes import FakeClock


def test_figures_of_a_latency_are_written_out() -> None:
    latency = Latency(warmup_ms=(9.0, 2.0), samples_ms=tuple(float(value) for value in range(101)))
    written = step_latency_from(latency)
    assert (written.median_ms, written.p90_ms, written.p95_ms, written.p99_ms, written.iqr_ms) == (50, 90, 95, 99, 50)
    assert written.first_call_ms == 9
    assert (written.warmup_ms, written.samples_ms) == (latency.warmup_ms, latency.samples_ms)


def test_first_call_is_left_open_without_a_warmup() -> None:
    assert step_latency_from(Latency(warmup_ms=(), samples_ms=(1.0,) * 5)).first_call_ms is None


def test_reasons_are_joined() -> None:
    assert step_latency_from(Latency(warmup_ms=(), samples_ms=(2.0,) * 5)).reason is None
    latency = Latency(warmup_ms=(1.0, 2.0, 4.0), samples_ms=(1.0, 2.0), is_warmed_up=False)
    written = step_latency_from(latency)
    assert written.unstable
    assert written.reason == (
        "the warm-up had not settled after 3 calls; too few calls to tell how much they vary: 2 (at least 5)"
    )


def test_cells_are_measured_warmed_up_and_judged_by_the_machine() -> None:
    clock = FakeClock()
    busy = iter((0.0, 30.0))  # by others: far more than this measurement lasts

    def read() -> MachineCounters:
        return MachineCounters(busy_s=next(busy), stolen_s=0.0, own_s=0.0, quota_s=None)

    told: list[int] = []
    found = measure_latencies(
        {steps: clock.call_taking(900, 100 * steps) for steps in (1, 2)},
        warmup=WarmupRule(window=1),
        repeats=5,
        watch=MachineWatch(clock=clock, read=read),
        clock=clock,
        after_call=told.append,
    )
    assert [found[steps].median_ms for steps in (1, 2)] == pytest.approx([100, 200])
    assert [found[steps].first_call_ms for steps in (1, 2)] == pytest.approx([900, 900])
    assert found[1].reason is not None
    assert "other processes used" in found[1].reason
    assert len(told) == sum(len(each.samples_ms) + len(each.warmup_ms) for each in found.values())
