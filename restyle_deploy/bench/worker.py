"""One configuration in a process of its own: its memory is its own, and if it dies, only its row does.

    python -m restyle_deploy.bench.worker JOB.json PART.json KEY

Writes what it measured, or why it could not, to PART.json. Prints a line "done total", in refinement steps, whenever
some are done; what the libraries print goes to stderr.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import IO

from restyle_deploy.bench.cell import measure_configuration
from restyle_deploy.bench.job import Job, read_job, write_job
from restyle_deploy.bench.process import cause_of_death, claim_stdout, describe_failure, offer_to_be_killed, shorten
from restyle_deploy.bench.report import ConfigurationResult, Part, read_part, write_part
from restyle_deploy.errors import BackendUnavailableError, ReportError, RestyleDeployError


def run_job(
    job: Job,
    key: str,
    *,
    part: Path,
    log: Path,
    seconds: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Part:
    """Measure a configuration in a process of its own and return its part, which is kept as a file.

    Args:
        job: what to measure.
        key: see `Part`.
        part: file of the result.
        log: file of what the process prints.
        seconds: after so long the process is ended; None for no limit.
        progress: told the refinement steps done and their total.
    Returns:
        The part; one that says why where the process died, failed or took too long.
    Raises:
        KeyboardInterrupt: Ctrl-C; the process is ended.
    """
    job_file = part.with_suffix(".job")
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "restyle_deploy.bench.worker", str(job_file), str(part), key]
    try:
        write_job(job, job_file)
        status, is_late = _run(command, log, seconds, progress)
    finally:
        job_file.unlink(missing_ok=True)
    try:
        return read_part(part)  # complete, even if the time was over while the process ended
    except ReportError:
        if is_late:
            return _failed(job, key, "the time budget ran out while it was measured", status="skipped")
        return _failed(job, key, cause_of_death(status, log))


def skipped_part(job: Job, key: str, reason: str) -> Part:
    """Return the part of a configuration that is not measured."""
    return _failed(job, key, reason, status="skipped")


def main(arguments: list[str]) -> None:
    """Measure one configuration."""
    job_file, part_file, key = arguments
    answers = claim_stdout()
    offer_to_be_killed()
    job = read_job(Path(job_file))
    try:
        metrics, result = measure_configuration(
            job, progress=lambda done, total: print(done, total, file=answers, flush=True)
        )
        part = Part(key=key, metrics=metrics, result=result)
    except BackendUnavailableError as error:
        part = _failed(job, key, shorten(str(error)), status="skipped")
    except RestyleDeployError as error:
        part = _failed(job, key, shorten(str(error)))
    except (MemoryError, RuntimeError) as error:  # the latter is how libraries tell most of their failures
        part = _failed(job, key, describe_failure(error))
    write_part(part, Path(part_file))


def _run(
    command: list[str], log: Path, seconds: float | None, progress: Callable[[int, int], None]
) -> tuple[int, bool]:
    """Run a process to its end, or for so many seconds; return its exit status, and whether it was too late."""
    is_late = False

    def end() -> None:
        nonlocal is_late
        is_late = True
        process.kill()

    timer = None if seconds is None else Timer(seconds, end)
    with (
        log.open("wb") as stderr,
        # In a session of its own: a Ctrl-C reaches this process, which then ends that one.
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace", start_new_session=True
        ) as process,
    ):
        try:  # at once: a Ctrl-C before would leave the process behind
            if timer:
                timer.start()
            assert process.stdout is not None
            _follow(process.stdout, progress)
            return process.wait(), is_late
        finally:
            if timer:
                timer.cancel()
            process.kill()


def _follow(lines: IO[str], progress: Callable[[int, int], None]) -> None:
    """Pass the progress on; other lines come from libraries that print before stdout is claimed."""
    for line in lines:
        if found := re.fullmatch(r"(\d+) (\d+)\n", line):
            progress(int(found[1]), int(found[2]))


def _failed(job: Job, key: str, reason: str, *, status: str = "failed") -> Part:
    result = ConfigurationResult(
        configuration=job.configuration, status="skipped" if status == "skipped" else "failed", reason=reason
    )
    return Part(key=key, metrics=(), result=result)


if __name__ == "__main__":
    main(sys.argv[1:])
