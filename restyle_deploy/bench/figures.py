"""What a report's figures are made of: plain values without behaviour, so that each measurement may import them."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepLatency:
    """The latency of one call at one step count, with its figures written out.

    Attributes:
        median_ms, p90_ms, p95_ms, p99_ms: of the samples.
        iqr_ms: interquartile range of the samples.
        unstable: the samples are not to be relied on.
        reason: why they are not; `None` where they are.
        first_call_ms: the very first call, which may compile or allocate; `None` where it was not seen apart.
        samples_ms: all measured calls, in their order.
        warmup_ms: the calls before them, which are in no figure.
    """

    median_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    iqr_ms: float
    unstable: bool
    reason: str | None = None
    first_call_ms: float | None = None
    samples_ms: tuple[float, ...]
    warmup_ms: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadPoint:
    """Latency under load: calls that arrive at random (Poisson), whether or not the former ones are done.

    Attributes:
        rate_per_s: arrivals asked for.
        achieved_per_s: calls finished per second.
        p50_ms, p90_ms, p95_ms, p99_ms: from the intended arrival to the end, so that waiting counts; lower bounds if
            any call was dropped.
        samples_ms: of all calls that were finished, in their order.
        dropped: calls that were not taken any more when the time was over.
    """

    rate_per_s: float
    achieved_per_s: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    samples_ms: tuple[float, ...]
    dropped: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The most memory that a configuration's process held.

    Attributes:
        peak_host_bytes: resident.
        peak_device_bytes: of the GPU; `None` where there is none, or it cannot be found out.
    """

    peak_host_bytes: int
    peak_device_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class MetricFacts:
    """A quality metric as a report describes it.

    Attributes:
        name: key of `Row.quality` and `Row.per_image`.
        label, unit: for tables and charts; the unit is "" for a pure number.
        decimals: that are worth showing.
        higher_is_better: the direction of improvement.
        lowest, highest: the range; `None` where it is unbounded.
        definition, source: what is computed, and who defined it.
        missing: why it could not run; `None` where it did.
        depends_on: what the figures depend on besides: hashes of models, and what these are given. Figures of unlike
            ones cannot be compared.
    """

    name: str
    label: str
    unit: str
    decimals: int
    higher_is_better: bool
    lowest: float | None
    highest: float | None
    definition: str
    source: str
    missing: str | None = None
    depends_on: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """A metric over all images; a figure that is infinite or missing is `None`.

    Attributes:
        mean, median, p5, p95: of the images (5th and 95th percentile).
        low, high: bootstrap interval of the mean, 95 %; `None` for few images, of which one cannot tell.
        count: images with a finite value.
    """

    mean: float | None
    median: float | None
    p5: float | None
    p95: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What more steps bring: the mean over the images of the paired improvement, positive where it is one.

    Attributes:
        metric: its name.
        from_steps, to_steps: neighbouring step counts.
        gain: mean improvement; `None` where it is infinite or missing.
        low, high: its bootstrap interval, 95 %; `None` for few images.
    """

    metric: str
    from_steps: int
    to_steps: int
    gain: float | None
    low: float | None
    high: float | None
