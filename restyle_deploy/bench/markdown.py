"""The report as Markdown for a pull request: what was decided, the points that count, and the rest folded away."""

from collections.abc import Sequence

from restyle_deploy.bench.report import Report
from restyle_deploy.bench.series import labels_of, unsaid_words
from restyle_deploy.bench.tables import FRONT, FRONT_MEANING, NOTHING, Cell, count_steps, front_of, notes_of, table_of

MAX_OPEN_ROWS = 12  # longer tables are folded


def markdown_from_report(report: Report) -> str:
    """Return Markdown as GitHub and GitLab show it: a heading, the decision, the table, notes and the environment.

    Where a decision has a Pareto front, a column marks its rows; they come first where the table has more than 12 rows,
    which is folded then.
    """
    table = table_of(report)
    lines = [f"### {_escape(report.bundle.name)}: quality against latency", ""]
    lines += [*_decision_lines(report), _subtitle(report), ""]
    front = front_of(report)
    best = [row for row, key in zip(table.rows, table.keys, strict=True) if key in front]
    if best and len(table.rows) > MAX_OPEN_ROWS:
        lines += [f"The {FRONT}, {FRONT_MEANING}:", "", *_table(table.headers[:-1], best), ""]
    everything = _table(table.headers, table.rows)
    if len(table.rows) > MAX_OPEN_ROWS:
        lines += _fold(f"All {len(table.rows)} rows", everything)
    else:
        lines += [*everything, "", *([f"{FRONT}: {FRONT_MEANING}.", ""] if front else [])]
    notes = [f"- {_escape(note)}" for note in notes_of(report)]
    lines += [*notes, ""] if notes else []
    return "\n".join([*lines, *_fold("Environment", _environment(report))]).rstrip() + "\n"


def _decision_lines(report: Report) -> list[str]:
    decision = report.decision
    if decision is None:
        return []
    if decision.configuration is None:
        return [f"**No configuration fits.** {_escape(decision.reason)}", ""]
    labels = labels_of([result.configuration for result in report.configurations])
    label = labels.get(decision.configuration, decision.configuration)
    steps = count_steps(decision.steps or 0)
    return [f"**{_escape(label)}, {steps}**: {_escape(decision.reason)}", ""]


def _subtitle(report: Report) -> str:
    settings = report.settings
    unsaid = unsaid_words([result.configuration for result in report.configurations])
    figures = f"Median of {settings.repeats} calls; mean of {settings.image_count} images."
    return _escape(f"{unsaid}. {figures} {report.environment.cpu}.")


def _table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Return a table without empty columns, words flush left and figures flush right."""
    filled = [column for column in range(len(headers)) if any(row[column] is not NOTHING for row in rows)]
    marks = ["---" if column == 0 else "--:" for column in filled]
    texts = [[_escape(row[column].text) for column in filled] for row in rows]
    lines = [[_escape(headers[column]) for column in filled], marks, *texts]
    return [f"| {' | '.join(line)} |" for line in lines]


def _fold(title: str, lines: Sequence[str]) -> list[str]:
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>", ""]


def _environment(report: Report) -> list[str]:
    machine = report.environment
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    return [
        f"- {_escape(machine.cpu)}, {machine.usable_cores} of {machine.logical_cores} cores",
        *(f"- {_escape(gpu.name)}, driver {gpu.driver}" for gpu in machine.gpus),
        f"- {_escape(machine.platform)}, Python {machine.python}",
        f"- {_escape(packages)}",
        f"- commit {machine.commit or 'unknown'}, {report.created}",
        f"- checkpoint {report.bundle.checkpoint_sha256}",
    ]


def _escape(text: str) -> str:
    """Return the text so that it neither ends a cell nor begins a tag, a link or emphasis."""
    for character in "\\|<[*_`":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")
