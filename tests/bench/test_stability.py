import numpy as np
import pytest

from restyle_deploy.bench.machine import GpuRecord, MachineRecord
from restyle_deploy.bench.stability import (
    MOST_SHIFT,
    drift_between_halves,
    find_instabilities,
    spread_between_runs,
)
from restyle_deploy.latency import Latency

IDLE_GPU = GpuRecord(
    lowest_sm_mhz=1200,
    highest_sm_mhz=1980,
    lowest_memory_mhz=2619,
    highest_temperature_c=88,
    highest_power_w=650.0,
    limits=(),
    processes=1,
    readings=9,
)


def reasons_of(*samples_ms: float) -> str:
    return "; ".join(find_instabilities(Latency(warmup_ms=(), samples_ms=samples_ms)))


def machine(**changes: object) -> MachineRecord:
    idle = {"seconds": 10.0, "cores": 4, "other_cores": 0.3, "stolen_cores": 0.0, "quota_share": 0.0, "gpu": IDLE_GPU}
    return MachineRecord(**{**idle, **changes})  # type: ignore[arg-type]


def test_steady_calls_are_stable() -> None:
    assert reasons_of(100, 101, 100, 99, 100, 100) == ""


def test_wide_quartiles_are_told() -> None:
    assert "interquartile range 12% of the median (10% at most)" in reasons_of(80, 106, 94, 100, 120)


def test_one_late_call_of_many_is_no_reason() -> None:
    assert reasons_of(*[100] * 20, 500, *[100] * 20) == ""


@pytest.mark.parametrize(("factor", "change"), [(1.04, "4.0% slower"), (0.95, "5.0% faster")])
def test_drift_is_told(factor: float, change: str) -> None:
    assert f"the later half of the calls was {change} than the earlier" in reasons_of(*[100] * 10, *[100 * factor] * 10)


def test_slow_rise_is_a_drift() -> None:
    assert drift_between_halves(tuple(100 + index for index in range(20))) == pytest.approx(10 / 104.5)


def test_few_calls_are_told() -> None:
    assert reasons_of(100, 100, 100, 100) == "too few calls to tell how much they vary: 4 (at least 5)"


def test_calls_without_a_duration_are_told() -> None:
    assert reasons_of(0, 0, 1, 1, 1) == "a call took no time that the clock can tell"


def test_warmup_that_did_not_settle_is_told() -> None:
    latency = Latency(warmup_ms=(9.0, 8.0), samples_ms=(1.0,) * 5, is_warmed_up=False)
    assert find_instabilities(latency) == ("the warm-up had not settled after 2 calls",)


def test_scatter_is_told_by_what_it_does_to_the_median() -> None:
    scattered = tuple(np.random.default_rng(0).normal(100, 5, 10))
    assert "another run's median may differ by" in reasons_of(*scattered)
    many = tuple(np.random.default_rng(0).normal(100, 5, 100))
    assert spread_between_runs(many) < MOST_SHIFT < spread_between_runs(scattered)


def test_spread_tells_how_far_two_runs_are_apart() -> None:
    """Of 2000 pairs of runs with normal scatter, 95 % lie within the spread that one of them tells, on average."""
    random = np.random.default_rng(0)
    runs = random.normal(100, 4, (2000, 2, 15))
    medians = np.median(runs, axis=2)
    apart = np.abs(medians[:, 0] - medians[:, 1]) / 100
    told = np.mean([spread_between_runs(tuple(run)) for run in runs[:, 0]])
    assert 0.93 < np.mean(apart < told) < 0.985


@pytest.mark.parametrize("scatter", [0.002, 0.01, 0.02, 0.03, 0.05, 0.1])
@pytest.mark.parametrize("shape", ["normal", "skewed", "growing slower"])
def test_two_runs_agree_or_one_says_that_it_is_unstable(scatter: float, shape: str) -> None:
    """The rule of the whole: fewer than 5 of 100 pairs differ by more than 3 % while both runs are called stable.

    A machine that grows slower as it warms does so by up to a fifth in a run, and not alike in both.
    """
    random = np.random.default_rng(1)
    wrong = 0
    for _ in range(100):
        pair = []
        for _ in range(2):
            samples = random.normal(1, scatter, 10) if shape != "skewed" else 1 + random.exponential(scatter, 10)
            if shape == "growing slower":
                samples *= 1 + random.uniform(0, 0.2) * np.linspace(0, 1, 10)
            pair.append(Latency(warmup_ms=(), samples_ms=tuple(samples * 50)))
        first, second = (latency.median_ms for latency in pair)
        differs = abs(first - second) / min(first, second) > MOST_SHIFT
        wrong += differs and not any(find_instabilities(latency) for latency in pair)
    assert wrong < 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"other_cores": 0.6}, "other processes used 0.60 of 4 cores (0.40 at most)"),
        ({"stolen_cores": 0.5}, "the hypervisor took away 0.50 of 4 cores (0.40 at most)"),
        ({"quota_share": 0.25}, "the container's CPU quota held it back 25% of the time (1% at most)"),
        (
            {"gpu": GpuRecord(**{**vars(IDLE_GPU), "limits": ("power limit", "thermal slowdown by the hardware")})},
            "the GPU was throttled: thermal slowdown by the hardware, up to 88 °C, 1200 to 1980 MHz",
        ),
    ],
)
def test_disturbances_of_the_machine_are_told(changes: dict[str, object], reason: str) -> None:
    steady = Latency(warmup_ms=(), samples_ms=(1.0,) * 5)
    assert find_instabilities(steady, machine(**changes)) == (reason,)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gpu": None},
        {"other_cores": None, "stolen_cores": None, "quota_share": None},
        {"gpu": GpuRecord(**{**vars(IDLE_GPU), "limits": None})},
        {"gpu": GpuRecord(**{**vars(IDLE_GPU), "limits": ("power limit",)})},
    ],
)
def test_an_idle_machine_is_no_reason(changes: dict[str, object]) -> None:
    assert find_instabilities(Latency(warmup_ms=(), samples_ms=(1.0,) * 5), machine(**changes)) == ()
