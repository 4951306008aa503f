"""Which configuration and step count to deploy: the Pareto front, a latency budget, and quality not to fall below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from restyle_deploy.bench.figures import Aggregate, MetricFacts
from restyle_deploy.bench.quality import LEAST_IMAGES, bootstrap_interval, least_difference
from restyle_deploy.bench.report import Configuration, ConfigurationResult, Decision, Report, Row
from restyle_deploy.bench.sweep import LEAST_GROWTH
from restyle_deploy.bench.tables import count_steps
from restyle_deploy.bundle import Bundle
from restyle_deploy.errors import ReportError
from restyle_deploy.runtime.deployment import Deployment

# Quality is judged by the first of these that was measured, unless a minimum names another.
JUDGED_BY = ("lpips", "ms_ssim", "ssim", "psnr_db", "mse")
# Of a call's latency, what a budget limits; and how sure one is that it is not above the bound that is held against it.
BUDGET_QUANTILE = 0.95
CONFIDENCE = 0.95
# Fewer calls than this have no upper bound of their 95th percentile: the slowest is below it at 0.95^58, above 5 %.
LEAST_CALLS = math.ceil(math.log(1 - CONFIDENCE) / math.log(BUDGET_QUANTILE))
# Fewer calls than this have none beyond their 95th percentile: it is drawn between the two slowest.
LEAST_CALLS_OF_P95 = 20


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One configuration at one step count, with the figures that it is chosen by.

    Attributes:
        result, row: as the report has them.
        judged: the row that has the quality: the same one, or that of another batch where this one's was not counted,
            as in a sweep; the images of a batch do not change each other's result.
        quality: of the metric that judges.
    """

    result: ConfigurationResult
    row: Row
    judged: Row
    quality: Aggregate

    @property
    def key(self) -> tuple[str, int]:
        """Name of the configuration, and steps."""
        return self.result.configuration.name, self.row.steps

    @property
    def p95_ms(self) -> float:
        """95th percentile of the calls that were measured."""
        return self.row.latency.p95_ms

    @property
    def calls(self) -> int:
        """Number of the calls that were measured."""
        return len(self.row.latency.samples_ms)

    @property
    def bound_ms(self) -> float:
        """What a budget is held against; see `upper_p95_ms`."""
        return upper_p95_ms(self.row.latency.samples_ms)


def decide(report: Report, *, budget_ms: float | None, minimums: Mapping[str, float]) -> Decision:
    """Choose among all rows that were measured.

    A budget limits the 95th percentile of a call, by its upper bound: see `upper_p95_ms`. Where there is one, the best
    quality wins among what meets budget and minimums; of rows whose difference the images do not tell, the highest
    throughput (or within `LEAST_GROWTH` of it), and of those the least latency: a batch is as large as brings
    something. With minimums alone, the least latency wins; without either, the best quality, and of rows that the
    images do not tell apart the least latency.

    Args:
        report: its own `decision` is not read.
        budget_ms: latency of one call; None for no limit.
        minimums: by metric, of the mean; a maximum where lower is better.
    Raises:
        ReportError: a minimum's metric is unknown or was not measured.
    """
    metric = judging_metric(report.metrics, minimums)
    candidates = list(_candidates(report, metric))
    pareto = tuple(candidate.key for candidate in pareto_front(candidates, metric))
    fitting = [each for each in candidates if budget_ms is None or each.bound_ms <= budget_ms]
    good = [each for each in fitting if _meets(each.judged, minimums, report.metrics)]
    wanted = _describe_wish(budget_ms, minimums, report.metrics)
    notes = list(_unjudged(report, candidates, metric, minimums))
    if not good:
        reason = f"nothing meets {wanted}: {_nearest(candidates, fitting, budget_ms)}"
        chosen = None
    else:
        if budget_ms is not None or not minimums:
            good = _best_by_quality(good, metric)
        if budget_ms is not None:
            good = _best_by_throughput(good)
        chosen = min(good, key=lambda each: (each.p95_ms, each.row.steps))
        left_out = sum(result.status != "ok" for result in report.configurations)
        reason = _describe_choice(chosen, metric, wanted, len(candidates), left_out)
        notes += _doubts(chosen, budget_ms, report.settings.image_count)
    return Decision(
        configuration=chosen.key[0] if chosen else None,
        steps=chosen.key[1] if chosen else None,
        budget_ms=budget_ms,
        minimums=dict(minimums),
        reason="; ".join([reason, *notes]),
        pareto=pareto,
    )


def upper_p95_ms(samples_ms: Sequence[float]) -> float:
    """Return what the 95th percentile of all calls is not above, with 95 % confidence, or the slowest of few calls.

    The percentile of few samples lies as often above as below that of all calls: it is no limit that holds. The bound
    is the lowest of the sorted samples that at least 95 % of all samples of this size have above the true percentile,
    whatever their distribution: an order statistic, by the binomial law (Hahn and Meeker 1991, Statistical Intervals,
    section 5.2). Of less than `LEAST_CALLS` calls not even the slowest is one; it is taken nevertheless, since no
    sample says more, and of 20 calls it is one 64 times of 100.
    """
    ordered, held = sorted(samples_ms), 0.0
    for below, sample in enumerate(ordered):
        held += _share_with(below, len(ordered))
        if held >= CONFIDENCE:
            return sample
    return ordered[-1]


def _share_with(below: int, count: int) -> float:
    """Return the share of sets of `count` samples with so many below the true percentile; by logarithms, for large."""
    ways = math.lgamma(count + 1) - math.lgamma(below + 1) - math.lgamma(count - below + 1)
    return math.exp(ways + below * math.log(BUDGET_QUANTILE) + (count - below) * math.log(1 - BUDGET_QUANTILE))


def deployment_of(report: Report, bundle: Bundle) -> Deployment:
    """Return what `Session.open` is told to run the configuration that was chosen; `report.decision` has one."""
    assert report.decision is not None
    assert report.decision.steps is not None
    results = {result.configuration.name: result.configuration for result in report.configurations}
    chosen = results[str(report.decision.configuration)]
    return Deployment(
        bundle=bundle.path,
        backend=chosen.backend,
        device=chosen.device,
        precision=chosen.precision,
        plain=chosen.plan == "plain",
        preview_steps=chosen.preview_steps,
        threads=chosen.threads,
        max_batch=chosen.batch,
        steps=report.decision.steps,
    )


def pareto_front(candidates: Sequence[Candidate], metric: MetricFacts) -> list[Candidate]:
    """Return those that no other beats in latency, throughput and quality together, by rising latency.

    Quality counts with the decimals worth showing: backends differ in the last bits, of which nobody sees anything.
    """
    sign = 1 if metric.higher_is_better else -1

    def merits(each: Candidate) -> tuple[float, float, float]:
        assert each.quality.mean is not None
        return -each.row.latency.median_ms, each.row.throughput, sign * round(each.quality.mean, metric.decimals)

    points = [(merits(each), each) for each in candidates]
    front = [
        each
        for own, each in points
        if not any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for other, _ in points)
    ]
    return sorted(front, key=lambda each: each.row.latency.median_ms)


def judging_metric(metrics: Sequence[MetricFacts], minimums: Mapping[str, float]) -> MetricFacts:
    """Return the metric that tells which of two rows is better: a minimum's, else the first of `JUDGED_BY`.

    Raises:
        ReportError: a minimum's metric is unknown or was not measured, or none was.
    """
    known = {metric.name: metric for metric in metrics}
    for name in minimums:
        if name not in known:
            raise ReportError(f"no metric {name!r}; measured are {', '.join(known) or 'none'}")
        if known[name].missing is not None:
            raise ReportError(f"metric {name} was not measured: {known[name].missing}")
    measured = [name for name in (*minimums, *JUDGED_BY, *known) if name in known and known[name].missing is None]
    if not measured:
        raise ReportError("no metric was measured: there is no quality to decide by")
    return known[measured[0]]


def _candidates(report: Report, metric: MetricFacts) -> Iterator[Candidate]:
    rows = [(result, row) for result in report.configurations if result.status == "ok" for row in result.rows]
    judged: dict[tuple[Configuration, int], Row] = {}
    for result, row in rows:
        if metric.name in row.quality:
            judged.setdefault(_whatever_batch(result, row), row)
    for result, row in rows:
        other = row if metric.name in row.quality else judged.get(_whatever_batch(result, row))
        if other is not None and other.quality[metric.name].mean is not None:
            yield Candidate(result=result, row=row, judged=other, quality=other.quality[metric.name])


def _whatever_batch(result: ConfigurationResult, row: Row) -> tuple[Configuration, int]:
    return replace(result.configuration, batch=1), row.steps


def _meets(row: Row, minimums: Mapping[str, float], metrics: Sequence[MetricFacts]) -> bool:
    higher_is_better = {metric.name: metric.higher_is_better for metric in metrics}
    for name, limit in minimums.items():
        mean = _mean_of(row, name)
        if mean is None or (mean < limit if higher_is_better[name] else mean > limit):
            return False
    return True


def _mean_of(row: Row, metric: str) -> float | None:
    return row.quality[metric].mean if metric in row.quality else None


def _best_by_quality(good: Sequence[Candidate], metric: MetricFacts) -> list[Candidate]:
    """Return those whose quality cannot be told from the best one's."""
    best = (max if metric.higher_is_better else min)(good, key=lambda each: each.quality.mean or 0.0)
    return [each for each in good if not _is_worse(each, best, metric)]


def _best_by_throughput(good: Sequence[Candidate]) -> list[Candidate]:
    best = max(each.row.throughput for each in good)
    return [each for each in good if each.row.throughput * (1 + LEAST_GROWTH) >= best]


def _is_worse(each: Candidate, best: Candidate, metric: MetricFacts) -> bool:
    """Whether the images tell that a row is worse than another: the interval (95 %) of the paired difference says so.

    Of fewer than `LEAST_IMAGES` images there is no interval: their means decide. A mean difference below the decimals
    worth showing never counts: two backends' last bits may differ the same way in every image.
    """
    pairs = zip(each.judged.per_image[metric.name], best.judged.per_image[metric.name], strict=True)
    sign = 1 if metric.higher_is_better else -1
    losses = np.array([sign * (better - own) for own, better in pairs if own is not None and better is not None])
    if not losses.size or losses.mean() < least_difference(metric.decimals):
        return False
    low, _ = bootstrap_interval(losses)
    return low is None or low > 0


def _describe_wish(budget_ms: float | None, minimums: Mapping[str, float], metrics: Sequence[MetricFacts]) -> str:
    facts = {metric.name: metric for metric in metrics}
    wishes = [] if budget_ms is None else [f"{budget_ms:g} ms (95th percentile of a call)"]
    for name, limit in minimums.items():
        relation = "at least" if facts[name].higher_is_better else "at most"
        wishes.append(f"{facts[name].label} {relation} {limit:g}{_unit(facts[name])}")
    return " and ".join(wishes) or "no limits"


def _describe_choice(chosen: Candidate, metric: MetricFacts, wanted: str, count: int, left_out: int) -> str:
    name, steps = chosen.key
    quality = f"{metric.label} {chosen.quality.mean:.{metric.decimals}f}{_unit(metric)}"
    figures = f"p95 {chosen.p95_ms:.3g} ms, {chosen.row.throughput:.3g} images/s, {quality}"
    without = f" ({left_out} configuration{'s' * (left_out != 1)} failed or skipped)" if left_out else ""
    return f"{name} with {count_steps(steps)}: {figures}; chosen of {_count_rows(count)}{without} for {wanted}"


def _unjudged(
    report: Report, candidates: Sequence[Candidate], metric: MetricFacts, minimums: Mapping[str, float]
) -> Iterator[str]:
    """Yield which measured rows have no figure of a metric that decides, as where it failed while it measured."""
    judged = {each.key: each.judged for each in candidates}
    results = [result for result in report.configurations if result.status == "ok"]
    measured = [(result.configuration.name, row.steps) for result in results for row in result.rows]
    lacking = {metric.name: [key for key in measured if key not in judged]}
    for name in minimums:
        lacking.setdefault(name, [key for key, row in judged.items() if _mean_of(row, name) is None])
    labels = {each.name: each.label for each in report.metrics}
    for name, keys in lacking.items():
        if keys:
            yield f"{_count_rows(len(keys))} without {labels[name]} left out: {_list_rows(keys)}"


def _list_rows(keys: Sequence[tuple[str, int]]) -> str:
    """Return "onnxruntime-cpu-fp32-engine-b1 (steps 1, 2)" and so on."""
    steps: dict[str, list[str]] = {}
    for name, count in keys:
        steps.setdefault(name, []).append(str(count))
    return ", ".join(f"{name} (steps {', '.join(counts)})" for name, counts in steps.items())


def _doubts(chosen: Candidate, budget_ms: float | None, image_count: int) -> Iterator[str]:
    """Yield what the choice rests on, and what is to be doubted of it."""
    if budget_ms is not None:
        yield f"the budget is met by {_describe_bound(chosen)}"
    elif chosen.calls < LEAST_CALLS_OF_P95:
        yield f"{chosen.calls} call{'s' * (chosen.calls != 1)} tell no 95th percentile ({LEAST_CALLS_OF_P95} at least)"
    if image_count < LEAST_IMAGES:
        yield f"means decide: fewer than {LEAST_IMAGES} images do not tell rows apart"
    if chosen.row.latency.unstable:
        yield "its latency is unstable: measure again"


def _describe_bound(candidate: Candidate) -> str:
    calls, bound = candidate.calls, f"{candidate.bound_ms:.3g} ms"
    if calls >= LEAST_CALLS:
        return f"{bound}, the upper bound of the p95 by {calls} calls ({CONFIDENCE:.0%} confidence)"
    few = f"the slowest of {calls} calls" if calls > 1 else "the only call"
    return f"{bound}, {few} (a bound of the p95 takes {LEAST_CALLS})"


def _nearest(candidates: Sequence[Candidate], fitting: Sequence[Candidate], budget_ms: float | None) -> str:
    if not candidates:
        return "no row was measured"
    if not fitting:
        fastest = min(candidates, key=lambda each: each.bound_ms)
        name, steps = fastest.key
        return f"the fastest row is {name} with {count_steps(steps)}: {_describe_bound(fastest)}"
    where = "within the budget" if budget_ms is not None else "measured"
    return f"none of the rows {where} has the quality ({len(fitting)})"


def _count_rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def _unit(metric: MetricFacts) -> str:
    return f" {metric.unit}" if metric.unit else ""
