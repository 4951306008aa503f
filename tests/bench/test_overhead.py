"""What measuring adds to a measured call: less than 1 % of one of 5 ms, that is less than 50 microseconds."""

import sys
import time
from types import FrameType

from restyle_deploy.bench.gpu_monitor import GpuMonitor, GpuReading
from restyle_deploy.bench.load import measure_load
from restyle_deploy.bench.machine import MachineCounters, MachineWatch
from restyle_deploy.bench.measure import WarmupRule, measure_interleaved, measure_latencies
from tests.bench.fakes import FakeClock, FakeNvml

CALL_MS = 5.0
MOST = 0.01
# Far more than asking the time takes; see `test_the_real_clock_is_cheap`.
CLOCK_COST_S = 20e-6


class SlowCounters:
    """Counters whose reading takes a second of the fake clock."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock

    def __call__(self) -> MachineCounters:
        self._clock.seconds += 1
        return MachineCounters(busy_s=0, stolen_s=0, own_s=0, quota_s=None)


class SlowMonitor(GpuMonitor):
    """A GPU whose reading takes a second of the fake clock."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(FakeNvml("0000:01:00.0"), "0000:01:00.0")
        self._clock = clock

    def read(self) -> GpuReading:
        self._clock.seconds += 1
        return super().read()


def test_a_call_of_known_duration_is_measured_within_one_percent() -> None:
    """All that the harness does besides takes whole seconds of this clock: none of it may be in the times."""
    clock = FakeClock(cost_s=CLOCK_COST_S)

    def draw_progress(_: int) -> None:
        clock.seconds += 1

    found = measure_latencies(
        {steps: clock.call_taking(CALL_MS) for steps in (1, 2, 3)},
        warmup=WarmupRule(),
        repeats=20,
        watch=MachineWatch(gpu=SlowMonitor(clock), interval_s=0, clock=clock, read=SlowCounters(clock)),
        clock=clock,
        after_call=draw_progress,
    )
    for latency in found.values():
        for sample_ms in (*latency.warmup_ms, *latency.samples_ms, latency.median_ms, latency.p99_ms):
            assert CALL_MS <= sample_ms <= CALL_MS * (1 + MOST)


def test_latency_under_light_load_is_within_one_percent() -> None:
    clock = FakeClock(cost_s=CLOCK_COST_S / 4)
    point = measure_load(clock.call_taking(CALL_MS), rate_per_s=0.05, seconds=600, clock=clock, sleep=clock.sleep)
    # Waiting ends up to one turn of its loop late, which counts as latency.
    assert CALL_MS <= point.p50_ms <= CALL_MS * (1 + MOST) + FakeClock.TURN_S * 1e3


def test_nothing_but_the_call_runs_between_two_readings_of_the_clock() -> None:
    """Counted by the interpreter: no function of the harness is entered in the timed span."""
    entered: list[str] = []
    spans: list[list[str]] = []

    def clock() -> float:
        return time.perf_counter()

    def run() -> None:
        entered.append("in the call")

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is clock.__code__:
            spans.append([])
        elif event in ("call", "c_call") and spans:
            spans[-1].append(frame.f_code.co_name if event == "call" else getattr(argument, "__name__", "?"))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        measure_interleaved({"a": run}, warmup=0, repeats=3, clock=clock)
    finally:
        sys.setprofile(before)
    timed = spans[0::2]
    assert len(timed) == 3
    assert timed == [["perf_counter", "run", "append"]] * 3


def test_the_real_clock_is_cheap() -> None:
    """The quickest of many empty calls, as the machine may be busy with other things."""
    samples = measure_interleaved({"a": lambda: None}, warmup=0, repeats=2000)["a"].samples_ms
    assert min(samples) < CALL_MS * MOST
    assert min(samples) * 1e-3 < CLOCK_COST_S
