"""Whether a goal is reached: a figure and the limit that it has to keep."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A goal, with the limit on one side or the other.

    Attributes:
        goal: in a few words.
        figure: None where it was not measured.
        least, most: what the figure must not fall below, or exceed.
        unit: after figure and limit.
    """

    goal: str
    figure: float | None
    least: float | None = None
    most: float | None = None
    unit: str = ""

    @property
    def is_reached(self) -> bool:
        """Whether the figure is known and within its limits."""
        if self.figure is None or self.figure != self.figure:  # NaN is within no limits
            return False
        return (self.least is None or self.figure >= self.least) and (self.most is None or self.figure <= self.most)


def format_verdict(verdict: Verdict) -> str:
    """Return a line that says pass or FAIL."""
    unit = f" {verdict.unit}" if verdict.unit else ""
    figure = "not measured" if verdict.figure is None else f"{_format(verdict.figure)}{unit}"
    bounds = (("at least", verdict.least), ("at most", verdict.most))
    limits = " and ".join(f"{word} {_format(limit)}{unit}" for word, limit in bounds if limit is not None)
    return f"{'pass' if verdict.is_reached else 'FAIL'}: {verdict.goal}: {figure}, goal {limits}"


def _format(figure: float) -> str:
    return f"{figure:.2g}" if 0 < abs(figure) < 0.1 else f"{figure:.2f}".rstrip("0").rstrip(".")
