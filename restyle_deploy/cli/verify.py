"""The command `restyle-deploy verify`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from restyle_deploy.cli.options import bundle_argument, json_option, session_options

if TYPE_CHECKING:
    from restyle_deploy.verify import EngineState, EngineSurvey, Parity
    from restyle_deploy.verify_drift import Verification
    from restyle_deploy.verify_layers import LayerSearch

_CAUSES = {
    "stored": "the reference differs from the stored results too: the graphs or those results changed after the export",
    "step": "the step itself: it differs from the reference's state too",
    "feedback": "feedback: each step keeps to the tolerance from the reference's state, and what is left adds up",
}
# As `verify_reference.REFERENCES`, and `NO_REFERENCE`.
_REFERENCES = ("onnxruntime", "torch", "none")


class _Verify(click.Command):
    """Adds the tolerances to the help, from their one table, which only the help imports."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from restyle_deploy.backends.base import EXACT_PRECISION
        from restyle_deploy.verify import TOLERANCES

        with formatter.section("Tolerances, absolute"):
            rows = TOLERANCES.items()
            formatter.write_dl([(name, f"latents {row.latents:g}, images {row.images:g}") for name, row in rows])
        formatter.write_paragraph()
        formatter.write_text(
            "Where the largest latent is beyond ±1, the tolerance of latents is multiplied by it, of all precisions "
            f"but {EXACT_PRECISION}, as their rounding is a share of the value."
        )


@click.command(cls=_Verify)
@bundle_argument
@session_options
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Steps to take. Fewer than the bundle has stored results of are raised to these.",
    show_default="those that are stored",
)
@click.option(
    "--reference",
    type=click.Choice(_REFERENCES),
    help="What is computed beside it in float32: the exported graphs by ONNX Runtime without optimisations, the torch "
    "model, or nothing, so that the stored results are all that is compared.",
    show_default="the first that is installed",
)
@click.option("--layers", is_flag=True, help="Compare the layers even where all is within tolerance.")
@json_option
def verify(
    bundle: Path,
    backend: str,
    device: str,
    threads: int | None,
    precision: str,
    plain: bool,
    steps: int | None,
    reference: str | None,
    layers: bool,
    as_json: bool,
) -> None:
    """Check BUNDLE's files against their hashes, and its results against those of the reference model.

    One engine is run, that for --backend, --device and --precision, or the exported graphs where there is none. Of the
    other engines it tells which nobody has verified, and the last line says what was run and what was not.

    Each step is compared twice: freely running, where errors feed back, and from the reference's state, which shows
    the step's own error. Where a step by itself differs, the layers are compared, and the first that differs is named.

    Exits with 1 if a file has changed, if an engine's record is damaged, or if latents or images differ by more than
    the precision's tolerance, below.

    Example: restyle-deploy verify engines/demo-faces --backend openvino
    """
    from restyle_deploy.bundle import read_bundle
    from restyle_deploy.verify import check_survey, survey_engines
    from restyle_deploy.verify_drift import check_verification, verify_drift

    if reference == "none" and (steps or layers):
        raise click.UsageError("--steps and --layers need a reference; leave --reference none out")
    verification = verify_drift(
        bundle,
        backend=backend,
        device=device,
        threads=threads,
        precision=precision,
        plain=plain,
        steps=steps,
        reference=reference,
        layers=layers,
    )
    survey = survey_engines(read_bundle(bundle), backend=backend, device=device, precision=precision, plain=plain)
    is_sound = verification.is_within_tolerance and not survey.damaged
    if as_json:
        click.echo(json.dumps({**verification.as_json(), "ok": is_sound, **survey.as_json()}, indent=2))
    else:
        lines = [_line_of_files(survey), *_lines_of(verification), *map(_line_of_engine, _to_be_told(survey))]
        lines.append(f"{bundle}: ok; {_what_was_run(survey)}" if is_sound else _what_was_run(survey))
        click.echo("\n".join(lines))
    check_verification(verification, str(bundle))
    check_survey(survey, str(bundle))


def _line_of_files(survey: EngineSurvey) -> str:
    return "files: unchanged" + ("; those of damaged engines are not checked" if survey.damaged else "")


def _to_be_told(survey: EngineSurvey) -> list[EngineState]:
    return [engine for engine in survey.engines if engine.reason is not None]


def _line_of_engine(engine: EngineState) -> str:
    """Return why an engine is not verified or damaged, and what to do."""
    if engine.state == "damaged":
        return f"engine {engine.name}: DAMAGED: {engine.reason}; build it again{_after_colon(engine.command)}"
    return (
        f"engine {engine.name}: NOT VERIFIED when it was built: {engine.reason}; "
        f"where it can run{_after_colon(engine.command)}"
    )


def _after_colon(command: str | None) -> str:
    return "" if command is None else f": {command}"


def _what_was_run(survey: EngineSurvey) -> str:
    graphs = "the exported graphs" if survey.run is None else f"engine {survey.run}"
    left = [f"{engine.name} ({engine.state})" for engine in survey.engines if engine.state != "run"]
    others = f"; not run: {', '.join(left)}" if left else ""
    return f"run: {graphs}, by {survey.backend} on {survey.device} in {survey.precision}{others}"


def _lines_of(verification: Verification) -> Iterator[str]:
    for step in range(len(verification.stored.latent_errors)):
        yield f"step {step + 1}: from the stored results: {_errors(verification.stored, step)}"
    drift = verification.drift
    if drift is not None:
        own = drift.stored
        yield (
            f"reference: {drift.reference}; from the stored results: "
            f"latents {max(own.latent_errors):.1e}, images {max(own.image_errors):.1e}"
        )
        for step in range(len(drift.running.latent_errors)):
            running, forced = _errors(drift.running, step), _errors(drift.forced, step)
            yield f"step {step + 1}: running freely: {running}; from the reference's state: {forced}"
    first = verification.first_exceeding
    if first is not None:
        yield (
            f"first beyond its tolerance: step {first.step}, {first.output}: "
            f"{first.error:.2g}, tolerance {first.tolerance:g}"
        )
    if verification.cause is not None:
        yield f"cause: {_CAUSES[verification.cause]}"
    for search in verification.layers:
        yield _line_of(search)
    for note in verification.notes:
        yield f"note: {note}"


def _errors(parity: Parity, step: int) -> str:
    text = f"latents {parity.latent_errors[step]:.1e}, images {parity.image_errors[step]:.1e}"
    return f"{text}, current {parity.current_errors[step]:.1e}" if parity.current_errors else text


def _line_of(search: LayerSearch) -> str:
    what = f"{search.graph}: {search.compared} outputs of layers compared, in {search.tested}"
    if search.first is None:
        most = (
            f", the largest difference is {search.largest.error:.1e} in {search.largest.layer}"
            if search.largest
            else ""
        )
        return f"{what}: all within {search.tolerance:g} of their largest value{most}"
    found = search.first
    before = f"; the outputs before it are merged away: {', '.join(found.merged)}" if found.merged else ""
    return (
        f"{what}: the first that differs is that of {found.layer} ({found.op_type}, {found.node}): "
        f"by {found.error:.2g} of its largest value {found.largest:.3g}, tolerance {search.tolerance:g}{before}"
    )
