"""What two reports must have in common for their figures to be compared, and what is only to be known."""

import re
from collections.abc import Callable, Iterator

from restyle_deploy.bench.environment import Environment
from restyle_deploy.bench.figures import MetricFacts
from restyle_deploy.bench.report import ConfigurationResult, Report

# What figures depend on besides the software, whose versions are what one compares. The name of the bundle's directory
# is not among them: its checkpoint's hash says which model it is.
SAME_MACHINE = ("cpu", "logical_cores", "usable_cores", "governor")
SAME_BUNDLE = ("domain", "output_size", "checkpoint_sha256")
_MODEL = re.compile(r"SHA-256 [0-9a-f]+")


def unlike_environments(first: Report, second: Report) -> list[str]:
    """Return each fact of machine and bundle that differs, with both values: reports of such are not compared.

    Of the platform, system, its first two numbers and the architecture count; of a GPU's driver, its branch.
    """
    one, other = first.environment, second.environment
    pairs: list[tuple[str, object, object]] = [("platform", _system_of(one.platform), _system_of(other.platform))]
    pairs += [(name, getattr(one, name), getattr(other, name)) for name in SAME_MACHINE]
    pairs += [("gpus", _gpu_facts(one), _gpu_facts(other))]
    pairs += [(f"bundle {name}", getattr(first.bundle, name), getattr(second.bundle, name)) for name in SAME_BUNDLE]
    return [f"{name} {_text(before)} and {_text(after)}" for name, before, after in pairs if before != after]


def notes_of_environments(first: Report, second: Report) -> list[str]:
    """Return what differs between machines that count as one: the system's build, a driver's patch level."""
    one, other = first.environment, second.environment
    pairs: list[tuple[str, str, str, Callable[[str], object]]] = [
        ("platform", one.platform, other.platform, _system_of)
    ]
    pairs += [
        ("GPU driver", gpu.driver, other_gpu.driver, _branch_of)
        for gpu, other_gpu in zip(one.gpus, other.gpus, strict=False)
    ]
    found = [
        f"{name} {before} and {after}"
        for name, before, after, what_counts in pairs
        if before != after and what_counts(before) == what_counts(after)
    ]
    return list(dict.fromkeys(found))


def unlike_images(first: Report, second: Report) -> str | None:
    """Return why quality is not compared at all; None where it was counted over the same images."""
    if first.settings.image_names != second.settings.image_names:
        return "the reports are of different images"
    hashes = (first.settings.images_sha256, second.settings.images_sha256)
    if None not in hashes and hashes[0] != hashes[1]:
        return "the images have the same names, but are others"
    return None


def comparable_metrics(first: Report, second: Report) -> list[MetricFacts]:
    """Return the metrics that both counted in the same way over the same images, in the second's order."""
    if unlike_images(first, second) is not None:
        return []
    before = {metric.name: metric for metric in first.metrics if metric.missing is None}
    return [
        metric
        for metric in second.metrics
        if metric.missing is None and metric.name in before and unlike_metrics(before[metric.name], metric) is None
    ]


def lost_metrics(first: Report, second: Report) -> dict[str, str]:
    """Return, by name, why the second report lacks a metric that the first one has."""
    after = {metric.name: metric.missing for metric in second.metrics}
    before = [metric.name for metric in first.metrics if metric.missing is None]
    lost = {name: after.get(name, "not asked for") for name in before}
    return {name: why for name, why in lost.items() if why is not None}


def unlike_metrics(first: MetricFacts, second: MetricFacts) -> str | None:
    """Return in what one metric differs between two reports so that its figures cannot be compared; None: in nothing.

    Definitions and sources are prose, which is reworded. Where one of the reports does not record what the figures
    depend on, as older ones, the hash of a model counts that the source names.
    """
    if first.depends_on and second.depends_on:
        names = sorted({*first.depends_on, *second.depends_on})
        pairs = [(name, first.depends_on.get(name), second.depends_on.get(name)) for name in names]
        unlike = [f"{name} {_text(before)} and {_text(after)}" for name, before, after in pairs if before != after]
        return ", ".join(unlike) or None
    models = [_MODEL.findall(metric.source) for metric in (first, second)]
    return None if models[0] == models[1] else f"its model: {_text(models[0])} and {_text(models[1])}"


def notes_of_quality(first: Report, second: Report) -> list[str]:
    """Return what is not compared of quality, and what is without being recorded well enough to be sure."""
    why = unlike_images(first, second)
    lost = lost_metrics(first, second)
    before = {metric.name: metric for metric in first.metrics if metric.missing is None}
    notes = [
        f"{before[name].label} is not compared: the second report lacks it ({reason})" for name, reason in lost.items()
    ]
    if why is not None:
        return [f"quality is not compared: {why}", *notes]
    if None in (first.settings.images_sha256, second.settings.images_sha256):
        notes.append("not both reports record a hash of their images: they are taken to be the same by their names")
    for metric in second.metrics:
        if metric.missing is None and metric.name in before:
            notes += _notes_of_metric(before[metric.name], metric)
    return notes


def shared_reference(first: ConfigurationResult, second: ConfigurationResult) -> str | None:
    """Return the reference model's library where both were measured beside the same one, its version and threads too.

    A reference that itself became faster or slower would be taken for the opposite change of what was measured.
    """
    if first.against is None or second.against is None or first.against.reference != second.against.reference:
        return None
    return str(first.against.reference["library"])


def notes_of_references(first: Report, second: Report) -> list[str]:
    """Return the reference models that differ, so that the times are compared by themselves."""
    references = [
        {result.configuration.name: result.against for result in report.configurations} for report in (first, second)
    ]
    found = []
    for name in references[0].keys() & references[1].keys():
        one, other = (by_name[name] for by_name in references)
        if one is not None and other is not None and one.reference != other.reference:
            pair = f"{_text(one.reference)}, and {_text(other.reference)}"
            found.append(f"ratios are of the times by themselves: the reference models differ: {pair}")
    return sorted(set(found))


def _notes_of_metric(first: MetricFacts, second: MetricFacts) -> Iterator[str]:
    unlike = unlike_metrics(first, second)
    if unlike is not None:
        yield f"{second.label} is not compared, it differs in {unlike}"
    elif bool(first.depends_on) != bool(second.depends_on):
        which = "second" if first.depends_on else "first"
        yield f"{second.label}: the {which} report does not record what its model is given; both name the same model"


def _system_of(platform: str) -> tuple[str, ...]:
    """Return system and first two numbers of a platform, and its architecture: not the kernel's build nor libc."""
    system = re.match(r"[A-Za-z]+-?(\d+(\.\d+)?)?", platform)
    architecture = re.search(r"x86_64|amd64|arm64|aarch64|i\d86", platform, re.IGNORECASE)
    return tuple(found[0] for found in (system, architecture) if found is not None)


def _branch_of(driver: str) -> str:
    return driver.partition(".")[0]


def _gpu_facts(environment: Environment) -> list[dict[str, object]]:
    return [{**vars(gpu), "driver": _branch_of(gpu.driver)} for gpu in environment.gpus]


def _text(value: object) -> str:
    """Return a fact as it is read."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(_text, value)) or "none"
    return str(value)
