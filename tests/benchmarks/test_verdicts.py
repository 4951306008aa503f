"""Goals: what reaches them, and how that is said."""

import pytest

from benchmarks.verdicts import Verdict, format_verdict


@pytest.mark.parametrize(
    ("verdict", "line"),
    [
        (Verdict(goal="ratio", figure=10, least=10), "pass: ratio: 10, goal at least 10"),
        (Verdict(goal="ratio", figure=9.99, least=10), "FAIL: ratio: 9.99, goal at least 10"),
        (Verdict(goal="host", figure=99.5, most=100, unit="µs"), "pass: host: 99.5 µs, goal at most 100 µs"),
        (Verdict(goal="host", figure=101, most=100), "FAIL: host: 101, goal at most 100"),
        (Verdict(goal="error", figure=0.0123, most=0.02), "pass: error: 0.012, goal at most 0.02"),
        (Verdict(goal="both", figure=2, least=1, most=3), "pass: both: 2, goal at least 1 and at most 3"),
        (Verdict(goal="growth", figure=0, most=0), "pass: growth: 0, goal at most 0"),
        (Verdict(goal="gone", figure=None, most=1), "FAIL: gone: not measured, goal at most 1"),
        (Verdict(goal="odd", figure=float("nan"), most=1), "FAIL: odd: nan, goal at most 1"),
        (Verdict(goal="PSNR", figure=float("inf"), least=45), "pass: PSNR: inf, goal at least 45"),
    ],
)
def test_a_verdict_is_one_line(verdict: Verdict, line: str) -> None:
    assert format_verdict(verdict) == line
