"""The benchmark: quality over all images and latency, for each step count."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restyle_deploy.bench.charts import draw_charts
from restyle_deploy.bench.comparison import Against, ComparedRow, Exact, ExactRow, Ratio, ratio_from_samples
from restyle_deploy.bench.environment import describe_environment
from restyle_deploy.bench.inversions import StepResults, count_steps, measure_inversions
from restyle_deploy.bench.libraries import REFERENCES, require_bench_libraries, require_reference_libraries
from restyle_deploy.bench.measure import Latency, measure_interleaved, step_latency_from
from restyle_deploy.bench.quality import Quality
from restyle_deploy.bench.reference import TorchReference, check_reference, open_torch_reference
from restyle_deploy.bench.report import BundleFacts, NamedQuality, Report, Row, Settings, write_report
from restyle_deploy.bundle import Bundle
from restyle_deploy.errors import ReportError
from restyle_deploy.model_config import ModelConfig
from restyle_deploy.runtime.images import normalize_images, resize_image
from restyle_deploy.runtime.session import Session
from restyle_deploy.verify import Parity, check_parity, compare_with_expectation, load_expectation

REPORT_NAME = "report.json"

Cell = tuple[str, int]  # who is called, and its step count
MEASURED, EXACT, AGAINST = "session", "exact", "against"


def run_bench(
    session: Session,
    images: Sequence[tuple[str, NDArray[np.uint8]]],
    output: Path,
    *,
    steps: Sequence[int],
    warmup: int = 2,
    repeats: int = 10,
    progress: Callable[[int, int], None] | None = None,
    strip_count: int = 8,
    exact: Session | None = None,
    against: str | None = None,
) -> Report:
    """Measure quality and latency for each step count; write report.json, the charts and the strips.

    Quality is counted over all images at the encoder's input size, where upstream's loss counts it. Latency is that of
    a whole `session.invert` call at batch 1, its input ready in memory as float32, the step counts in turn. What an
    approximate session is compared with, and the reference model, take their turns in the same rounds.

    Args:
        session: an opened bundle.
        images: names and uint8 [H, W, 3] of any size. Names are unique and fit for files, as `ImageInput.stem` is.
        output: folder for `report.json`, `quality-latency.png`, `.svg` and `strips/NAME.png`; created when missing.
        steps: step counts, each at least 1 and given once; sorted here.
        warmup: calls per step count before the measured ones.
        repeats: measured calls per step count.
        progress: told the refinement steps done and their total.
        strip_count: strips are drawn for the first so many images.
        exact: an exact session of the same bundle and backend; given if and only if `session` is approximate.
        against: one of `libraries.REFERENCES`: also measure the reference model, rebuilt from the bundle.
    Raises:
        ValueError: no images or step counts, or unusable ones; or `exact` is missing, approximate or not wanted.
        VerificationError: the (exact) session does not compute what the reference model does; nothing is measured then.
        ReportError: `output` cannot be written.
        BackendUnavailableError: the `bench` extra is not installed, or what `against` needs.
        BundleError: the reference model cannot be rebuilt.
    """
    require_bench_libraries()
    if against is not None:
        require_reference_libraries()
    steps = _check_steps(steps)
    _check_names([name for name, _ in images])
    _check_sessions(session, exact, against)
    _prepare_folder(output)
    parity = _check_parity(exact or session)
    environment = describe_environment()
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    targets = _targets_from_images(images, session.bundle.config)
    names = [name for name, _ in images]
    with _open_contenders(session, exact, against) as contenders:
        inverted = len(targets) * sum(count_steps(each, steps) for each in (session, exact) if each)
        tick = _counter(progress, inverted + (warmup + repeats) * sum(steps) * len(contenders))
        results = measure_inversions(
            session, targets, names, output, steps=steps, exact=exact, strip_count=strip_count, tick=tick
        )
        latencies = measure_interleaved(
            {
                (who, count): partial(contender.invert, targets[:1], steps=count)
                for who, contender in contenders.items()
                for count in steps
            },
            warmup=warmup,
            repeats=repeats,
            after_call=lambda cell: tick(cell[1]),
        )
        descriptions = {who: contender.describe() for who, contender in contenders.items()}
    report = Report(
        created=created,
        environment=environment,
        bundle=_facts_of_bundle(session.bundle),
        session=descriptions[MEASURED],
        parity=parity.as_json(),
        settings=Settings(batch=1, warmup=warmup, repeats=repeats, image_count=len(images), steps=steps),
        rows=tuple(_row(count, latencies[MEASURED, count], results[count].quality, names) for count in steps),
        against=_against(descriptions, latencies, steps),
        exact=_exact(descriptions, latencies, results),
    )
    write_report(report, output / REPORT_NAME)
    draw_charts(output / REPORT_NAME, output)
    return report


def _check_sessions(session: Session, exact: Session | None, against: str | None) -> None:
    if against is not None and against not in REFERENCES:
        raise ValueError(f"against is {against!r}, expected one of {', '.join(REFERENCES)}")
    if session.is_approximate != (exact is not None):
        raise ValueError(
            "the session is approximate: pass an exact session of the same bundle and backend as `exact`"
            if exact is None
            else "the session is exact: it is compared with no other session"
        )
    if exact is not None and exact.is_approximate:
        raise ValueError("the session passed as `exact` is approximate")


def _check_parity(session: Session) -> Parity:
    parity = compare_with_expectation(session, load_expectation(session.bundle.expectation))
    check_parity(parity, session.bundle.path.name)
    return parity


@contextmanager
def _open_contenders(
    session: Session, exact: Session | None, against: str | None
) -> Iterator[dict[str, Session | TorchReference]]:
    """Yield all that is measured, by `MEASURED`, `EXACT` and `AGAINST`; the reference model is opened and checked."""
    contenders: dict[str, Session | TorchReference] = {MEASURED: session}
    if exact is not None:
        contenders[EXACT] = exact
    if against is None:
        yield contenders
        return
    with open_torch_reference(session.bundle, threads=session.describe()["threads"]) as reference:
        check_reference(reference, exact or session)
        yield {**contenders, AGAINST: reference}


def _check_steps(steps: Sequence[int]) -> tuple[int, ...]:
    if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
        raise ValueError(f"step counts are {list(steps)}, expected at least one, each 1 or more and given once")
    return tuple(sorted(steps))


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("no images, expected at least one")
    unusable = sorted({name for name in names if Path(f"{name}.png").stem != name or names.count(name) > 1})
    if unusable:
        raise ValueError(f"image names that are not unique file names: {', '.join(map(repr, unusable))}")


def _prepare_folder(output: Path) -> None:
    """Create the folder and try to write to it: better now than after minutes of measuring."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ReportError(f"{output}: no folder that can be written to: {error.strerror}") from error


def _targets_from_images(images: Sequence[tuple[str, NDArray[np.uint8]]], config: ModelConfig) -> NDArray[np.float32]:
    return normalize_images(np.stack([resize_image(image, config.input_shape) for _, image in images]))


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """Return a function that adds refinement steps and tells `progress` the sum."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return add


def _facts_of_bundle(bundle: Bundle) -> BundleFacts:
    return BundleFacts(
        name=bundle.path.resolve().name,
        domain=bundle.config.domain,
        output_size=bundle.config.output_size,
        checkpoint_sha256=bundle.checkpoint_sha256,
    )


def _row(steps: int, latency: Latency, quality: Quality, names: Sequence[str]) -> Row:
    return Row(
        steps=steps,
        latency=step_latency_from(latency),
        quality=quality.mean,
        images=tuple(
            NamedQuality(name=name, quality=image) for name, image in zip(names, quality.per_image, strict=True)
        ),
    )


def _against(
    descriptions: Mapping[str, dict[str, Any]], latencies: Mapping[Cell, Latency], steps: tuple[int, ...]
) -> Against | None:
    if AGAINST not in descriptions:
        return None
    return Against(
        reference=descriptions[AGAINST],
        rows=tuple(
            ComparedRow(
                steps=count,
                latency=step_latency_from(latencies[AGAINST, count]),
                ratio=_ratio(latencies, AGAINST, count),
            )
            for count in steps
        ),
    )


def _exact(
    descriptions: Mapping[str, dict[str, Any]], latencies: Mapping[Cell, Latency], results: Mapping[int, StepResults]
) -> Exact | None:
    if EXACT not in descriptions:
        return None
    rows = []
    for count, result in results.items():
        assert result.exact_quality is not None
        assert result.difference is not None
        rows.append(
            ExactRow(
                steps=count,
                latency=step_latency_from(latencies[EXACT, count]),
                ratio=_ratio(latencies, EXACT, count),
                quality=result.exact_quality.mean,
                difference=result.difference,
            )
        )
    return Exact(session=descriptions[EXACT], rows=tuple(rows))


def _ratio(latencies: Mapping[Cell, Latency], who: str, steps: int) -> Ratio:
    return ratio_from_samples(latencies[who, steps].samples_ms, latencies[MEASURED, steps].samples_ms)
