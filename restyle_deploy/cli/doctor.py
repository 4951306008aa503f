"""The command `restyle-deploy doctor`."""

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from restyle_deploy.cli.options import json_option

if TYPE_CHECKING:
    from restyle_deploy.doctor import Diagnosis


@click.command()
@json_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Tell what is installed, what can run here, and how to mend the rest.

    Exits with 1 if no backend can run.

    Example: restyle-deploy doctor
    """
    from restyle_deploy.doctor import examine_installation

    diagnosis = examine_installation()
    click.echo(json.dumps(dataclasses.asdict(diagnosis), indent=2) if as_json else _format_diagnosis(diagnosis))
    context.exit(0 if diagnosis.usable else 1)


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
