"""The command `restyle-deploy doctor`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from restyle_deploy.cli.options import json_option

if TYPE_CHECKING:
    from restyle_deploy.doctor import Diagnosis
    from restyle_deploy.gpu_checks import GpuReport


@click.command()
@click.option("--gpu", is_flag=True, help="Try kernels, the loop and engines on the first GPU; takes minutes.")
@click.option(
    "--bundle",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --gpu: run this bundle's graphs, and build engines of them in a temporary copy.",
)
@json_option
@click.pass_context
def doctor(context: click.Context, gpu: bool, bundle: Path | None, as_json: bool) -> None:
    """Tell what is installed, what can run here, and how to mend the rest.

    Exits with 1 if no backend can run. With --gpu: compiles our kernels for the GPU, compares them with torch and
    Pillow, runs compute-sanitizer on them where it is installed, tries the loop on the device, builds and verifies
    engines in each way, prints what came of it as the row for the table in docs/gpu.md, and exits with 1 if a check
    failed or there is no GPU.

    Example: restyle-deploy doctor

    Example: restyle-deploy doctor --gpu --bundle engines/demo-faces
    """
    if bundle is not None and not gpu:
        raise click.UsageError("--bundle goes with --gpu")
    if gpu:
        from restyle_deploy.gpu_checks import run_gpu_checks

        report = run_gpu_checks(bundle, progress=lambda name: click.echo(f"{name} …", err=True))
        click.echo(json.dumps(dataclasses.asdict(report), indent=2) if as_json else _format_report(report))
        context.exit(0 if report.is_sound else 1)
    from restyle_deploy.doctor import examine_installation

    diagnosis = examine_installation()
    click.echo(json.dumps(dataclasses.asdict(diagnosis), indent=2) if as_json else _format_diagnosis(diagnosis))
    context.exit(0 if diagnosis.usable else 1)


def _format_report(report: "GpuReport") -> str:
    outcomes = [f"  {name}: {outcome.status}: {outcome.detail}" for name, outcome in report.outcomes.items()]
    return "\n".join([f"{report.gpu.name}, {report.gpu.arch}", *outcomes, "", report.as_table_row()])


def _format_diagnosis(diagnosis: "Diagnosis") -> str:
    backends = {
        backend.name: backend.problem or f"runs on {', '.join(backend.devices)}" for backend in diagnosis.backends
    }
    jobs = {}
    for job in diagnosis.jobs:
        jobs[job.name] = f"needs {', '.join(job.missing)}" if job.missing else "ready"
        if job.remedy is not None:
            jobs[job.name] += f"; run: {job.remedy}"
    sections = {
        "Installation": {
            "restyle-deploy": diagnosis.version,
            "python": f"{diagnosis.python} ({diagnosis.executable})",
            "platform": diagnosis.platform,
        },
        "Packages": {name: version or "not installed" for name, version in diagnosis.packages.items()},
        "Backends": backends,
        "Jobs": jobs,
    }
    width = max(len(name) for rows in sections.values() for name in rows)
    return "\n\n".join(
        "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])
        for title, rows in sections.items()
    )
