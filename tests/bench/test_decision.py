"""Which row is chosen, and why."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from restyle_deploy.bench.decision import LEAST_CALLS, decide, deployment_of, judging_metric, upper_p95_ms
from restyle_deploy.bench.figures import MetricFacts
from restyle_deploy.bench.report import Configuration, ConfigurationResult, Decision, Report, Row
from restyle_deploy.bundle import Bundle
from restyle_deploy.errors import ReportError
from restyle_deploy.runtime.deployment import Deployment
from tests.bench.reports import METRICS, made_up_aggregate, made_up_latency

BY_NAME = {metric.name: metric for metric in METRICS}
FAST, SLOW = Configuration(backend="onnxruntime"), Configuration(backend="openvino")

Make = Callable[..., Report]


def row(ms: float, quality: float | None, *, steps: int = 1, batch: int = 1, images: int = 5) -> Row:
    """Return a row whose images' PSNR lie evenly about `quality`, 0.1 dB to each side."""
    spread = np.linspace(-0.1, 0.1, images) if images > 1 else np.zeros(1)
    values = {} if quality is None else {"psnr_db": quality + spread}
    return Row(
        steps=steps,
        latency=replace(made_up_latency(ms, 0.0, seed=0), unstable=False, reason=None),
        throughput=1e3 * batch / ms,
        quality={name: made_up_aggregate(column) for name, column in values.items()},
        per_image={name: tuple(map(float, column)) for name, column in values.items()},
    )


@pytest.fixture
def make(report: Report) -> Make:
    """Return a function that makes a report of configurations and their rows; PSNR is its only metric."""

    def make(*results: tuple[Configuration, list[Row]]) -> Report:
        return replace(
            report,
            decision=None,
            metrics=(BY_NAME["psnr_db"],),
            configurations=tuple(
                ConfigurationResult(configuration=configuration, status="ok", rows=tuple(rows))
                for configuration, rows in results
            ),
        )

    return make


def chosen(report: Report, *, budget_ms: float | None = None, **minimums: float) -> tuple[str | None, int | None]:
    decision = decide(report, budget_ms=budget_ms, minimums=minimums)
    return decision.configuration, decision.steps


def test_best_quality_within_the_budget_wins(make: Make) -> None:
    report = make(
        (FAST, [row(5, 15, steps=1), row(9, 18, steps=2), row(13, 19, steps=3)]),
        (SLOW, [row(7, 17, steps=1), row(11, 18.5, steps=2)]),
    )
    assert chosen(report, budget_ms=10) == (FAST.name, 2)
    assert chosen(report, budget_ms=12) == (SLOW.name, 2)
    assert chosen(report, budget_ms=100) == (FAST.name, 3)
    assert chosen(report) == (FAST.name, 3)


def test_least_latency_with_enough_quality_wins(make: Make) -> None:
    report = make((FAST, [row(5, 15, steps=1), row(9, 18, steps=2)]), (SLOW, [row(7, 17.5, steps=1)]))
    assert chosen(report, psnr_db=17) == (SLOW.name, 1)
    assert chosen(report, psnr_db=17.8) == (FAST.name, 2)


def test_budget_and_minimum_go_together(make: Make) -> None:
    report = make((FAST, [row(5, 15, steps=1), row(9, 18, steps=2)]))
    assert chosen(report, budget_ms=10, psnr_db=17) == (FAST.name, 2)
    decision = decide(report, budget_ms=6, minimums={"psnr_db": 17})
    assert (decision.configuration, decision.steps) == (None, None)
    assert decision.reason == (
        "nothing meets 6 ms (95th percentile of a call) and PSNR (dB) at least 17 dB: "
        "none of the rows within the budget has the quality (1)"
    )


def test_of_what_the_images_do_not_tell_apart_the_faster_wins(make: Make) -> None:
    noisy = row(9, 18, steps=2)
    noisy = replace(noisy, per_image={"psnr_db": (20.0, 16.0, 20.0, 17.0, 18.0)})
    assert chosen(make((FAST, [row(5, 17.9, steps=1), noisy])), budget_ms=20) == (FAST.name, 1)
    assert chosen(make((FAST, [row(5, 17.9, steps=1), row(9, 18, steps=2)])), budget_ms=20) == (FAST.name, 2)


def test_of_one_image_any_difference_counts(make: Make) -> None:
    report = make((FAST, [row(5, 17.9, steps=1, images=1), row(9, 18, steps=2, images=1)]))
    assert chosen(report) == (FAST.name, 2)


@pytest.mark.parametrize("images", [1, 5])
def test_last_bits_of_a_backend_do_not_decide(make: Make, images: int) -> None:
    report = make((FAST, [row(5, 18, images=images)]), (SLOW, [row(9, 18.000001, images=images)]))
    assert chosen(report, budget_ms=20) == (FAST.name, 1)
    assert chosen(report) == (FAST.name, 1)


def test_batch_is_as_large_as_brings_something_within_the_budget(make: Make) -> None:
    results = [
        (replace(FAST, batch=batch), [row(ms, 18, batch=batch)]) for batch, ms in ((1, 5), (2, 6), (4, 8), (8, 15.8))
    ]
    report = make(*results)
    assert chosen(report, budget_ms=20) == ("onnxruntime-cpu-fp32-engine-b4", 1)  # 8 brings one per cent more
    assert chosen(report, budget_ms=7) == ("onnxruntime-cpu-fp32-engine-b2", 1)
    assert chosen(report, psnr_db=17) == ("onnxruntime-cpu-fp32-engine-b1", 1)


def test_quality_of_a_swept_batch_is_that_of_another(make: Make) -> None:
    swept = replace(FAST, batch=8)
    report = make((FAST, [row(5, 18, steps=1), row(9, 19, steps=2)]), (swept, [row(10, None, steps=2, batch=8)]))
    assert chosen(report, budget_ms=12) == (swept.name, 2)
    decision = decide(report, budget_ms=12, minimums={})
    assert "PSNR (dB) 19.00 dB" in decision.reason
    assert (swept.name, 2) in decision.pareto
    assert chosen(make((SLOW, [row(5, 18)]), (swept, [row(1, None, batch=8)])), budget_ms=12) == (SLOW.name, 1)


def test_front_holds_what_nothing_beats(make: Make) -> None:
    report = make(
        (FAST, [row(5, 15, steps=1), row(9, 18, steps=2)]),
        (SLOW, [row(6, 14, steps=1), row(12, 18.5, steps=2), row(20, 18.5, steps=3)]),
        (replace(FAST, batch=4), [row(16, 15, steps=1, batch=4)]),
    )
    batch = "onnxruntime-cpu-fp32-engine-b4"
    found = decide(report, budget_ms=None, minimums={}).pareto
    assert found == ((FAST.name, 1), (FAST.name, 2), (SLOW.name, 2), (batch, 1))


def test_lower_is_better_where_the_metric_says_so(report: Report) -> None:
    limit = report.configurations[0].rows[2].quality["mse"].mean
    assert limit is not None
    decision = decide(report, budget_ms=None, minimums={"mse": limit})
    assert decision.steps is not None
    assert "MSE at most" in decision.reason
    best = decide(report, budget_ms=None, minimums={"mse": 0.0})
    assert best.configuration is None
    assert "none of the rows measured has the quality (30)" in best.reason


def test_reason_tells_how_many_configurations_were_not_measured(report: Report) -> None:
    assert "chosen of 30 rows (2 configurations failed or skipped) for no limits" in (
        decide(report, budget_ms=None, minimums={}).reason
    )


def test_rows_without_a_metric_that_decides_are_told(make: Make) -> None:
    """As where it failed in one configuration."""
    report = make((FAST, [row(5, 15, steps=1), row(9, 18, steps=2)]), (SLOW, [row(4, None), row(7, None, steps=2)]))
    decision = decide(report, budget_ms=None, minimums={})
    assert (decision.configuration, decision.steps) == (FAST.name, 2)
    told = f"; 2 rows without PSNR (dB) left out: {SLOW.name} (steps 1, 2)"
    assert told in decision.reason
    assert told in decide(report, budget_ms=1, minimums={}).reason
    similar = {"ssim": made_up_aggregate(np.full(5, 0.9))}
    first, second = report.configurations[0].rows
    rows = (first, replace(second, quality={**second.quality, **similar}))
    report = replace(make((FAST, list(rows)), (SLOW, [row(4, 17)])), metrics=(BY_NAME["psnr_db"], BY_NAME["ssim"]))
    decision = decide(report, budget_ms=None, minimums={"psnr_db": 10, "ssim": 0.5})
    assert (decision.configuration, decision.steps) == (FAST.name, 2)
    assert f"; 2 rows without SSIM left out: {FAST.name} (steps 1), {SLOW.name} (steps 1)" in decision.reason
    assert " left out" not in decide(report, budget_ms=None, minimums={"psnr_db": 10}).reason


def test_failed_configurations_are_no_candidates(report: Report) -> None:
    failed = replace(report, configurations=report.configurations[-2:])
    decision = decide(failed, budget_ms=20, minimums={})
    assert decision.configuration is None
    assert "no row was measured" in decision.reason


def test_reason_names_the_fastest_where_the_budget_is_too_small(make: Make) -> None:
    decision = decide(make((FAST, [row(5, 15)])), budget_ms=1, minimums={})
    assert decision.reason.endswith(
        f"the fastest row is {FAST.name} with 1 step: 5 ms, the slowest of 20 calls (a bound of the p95 takes 59)"
    )


def test_reason_says_what_was_chosen_and_for_what(make: Make) -> None:
    steady = row(5, 15)
    assert decide(make((FAST, [steady])), budget_ms=10, minimums={"psnr_db": 12}).reason == (
        f"{FAST.name} with 1 step: p95 5 ms, 200 images/s, PSNR (dB) 15.00 dB; chosen of 1 row for "
        "10 ms (95th percentile of a call) and PSNR (dB) at least 12 dB; the budget is met by 5 ms, the slowest of "
        "20 calls (a bound of the p95 takes 59)"
    )
    shaky = replace(steady, latency=replace(steady.latency, unstable=True, reason="a busy machine"))
    assert decide(make((FAST, [shaky])), budget_ms=10, minimums={}).reason.endswith("is unstable: measure again")


def timed(*samples_ms: float) -> Row:
    """Return a row of these calls, with their p95 as the report has it."""
    steady = row(5, 18)
    p95_ms = float(np.percentile(samples_ms, 95))
    return replace(steady, latency=replace(steady.latency, samples_ms=samples_ms, p95_ms=p95_ms))


def test_budget_is_held_against_the_upper_bound_of_the_percentile(make: Make) -> None:
    few, many = timed(*[5.0] * 19, 9.0), timed(*[5.0] * 93, *[6.0] * 5, 8.0, 50.0)
    assert few.latency.p95_ms < 6
    assert chosen(make((FAST, [few])), budget_ms=8) == (None, None)
    assert chosen(make((FAST, [few])), budget_ms=9) == (FAST.name, 1)
    assert chosen(make((FAST, [many])), budget_ms=7) == (None, None)
    decision = decide(make((FAST, [many])), budget_ms=8, minimums={})
    assert decision.reason.endswith(
        "; the budget is met by 8 ms, the upper bound of the p95 by 100 calls (95% confidence)"
    )


def test_upper_bound_is_above_the_percentile_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    true_ms = float(-np.log(0.05))
    for calls, least in ((20, 0.60), (LEAST_CALLS, 0.94), (200, 0.94)):
        draws = generator.exponential(size=(1000, calls))
        assert least <= np.mean([upper_p95_ms(samples.tolist()) >= true_ms for samples in draws]) <= 0.98
    assert upper_p95_ms([1.0] * 20_000 + [2.0] * 500) == 1.0


def test_reason_doubts_a_percentile_of_few_calls_and_the_quality_of_few_images(make: Make) -> None:
    report = make((FAST, [timed(5.0, 5.0, 6.0)]))
    assert decide(report, budget_ms=None, minimums={}).reason.endswith(
        "; 3 calls tell no 95th percentile (20 at least)"
    )
    report = replace(report, settings=replace(report.settings, image_count=4))
    assert decide(report, budget_ms=6, minimums={}).reason.endswith(
        "; the budget is met by 6 ms, the slowest of 3 calls (a bound of the p95 takes 59); "
        "means decide: fewer than 5 images do not tell rows apart"
    )
    assert "6 ms, the only call" in decide(make((FAST, [timed(6.0)])), budget_ms=6, minimums={}).reason


def test_first_metric_that_was_measured_judges_unless_a_minimum_names_one() -> None:
    assert judging_metric(METRICS, {}).name == "ssim"
    assert judging_metric(METRICS, {"psnr_db": 20}).name == "psnr_db"
    other = MetricFacts(**{**vars(BY_NAME["mse"]), "name": "identity"})
    assert judging_metric([BY_NAME["lpips"], other], {}).name == "identity"


@pytest.mark.parametrize(
    ("metrics", "minimums", "reason"),
    [
        (METRICS, {"fid": 1.0}, "no metric 'fid'; measured are mse, psnr_db, ssim, lpips"),
        (METRICS, {"lpips": 0.3}, "metric lpips was not measured: no weights of the backbone"),
        ((BY_NAME["lpips"],), {}, "no metric was measured"),
        ((), {}, "no metric was measured"),
    ],
)
def test_nothing_is_judged_by_what_was_not_measured(
    metrics: tuple[MetricFacts, ...], minimums: dict[str, float], reason: str
) -> None:
    with pytest.raises(ReportError, match=reason):
        judging_metric(metrics, minimums)


def test_choice_is_what_a_session_is_told(make: Make, bundle: Bundle) -> None:
    configuration = Configuration(
        backend="openvino", precision="bf16", plan="plain", preview_steps=True, batch=4, threads=2
    )
    report = make((configuration, [row(5, 18, steps=3)]))
    report = replace(report, decision=decide(report, budget_ms=None, minimums={}))
    assert isinstance(report.decision, Decision)
    assert deployment_of(report, bundle) == Deployment(
        bundle=Path(bundle.path),
        backend="openvino",
        device="cpu",
        precision="bf16",
        plain=True,
        preview_steps=True,
        threads=2,
        max_batch=4,
        steps=3,
    )
