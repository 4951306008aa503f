from dataclasses import replace

from restyle_deploy.bench.markdown import markdown_from_report
from restyle_deploy.bench.report import Report


def test_decision_and_front_stand_open_and_the_rest_is_folded(report: Report) -> None:
    text = markdown_from_report(report)
    head, folded = text.split("<summary>All 30 rows</summary>")
    assert head.startswith("### demo-faces: quality against latency\n\n**openvino, 5 steps**: the best SSIM")
    assert [line.split(" | ")[:2] for line in head.splitlines() if line.startswith("| openvino")] == [
        ["| openvino", "3"],
        ["| openvino", "5"],
        ["| openvino", "10"],
        ["| openvino, bf16", "1"],
    ]
    assert "The front, beaten by no row in latency, images per second and quality together:" in head
    assert "reference/this" not in head
    assert "reference/this" in folded
    assert folded.count("<details>") == folded.count("</details>") - 1
    assert "- onnxruntime, cuda:0: failed: the process was killed by signal 9" in folded
    assert "- onnxruntime, cuda:0" not in head


def test_short_table_stands_open(report: Report) -> None:
    short = replace(report, configurations=report.configurations[:1], decision=None)
    text = markdown_from_report(short)
    assert text.count("<details>") == 1
    assert text.count("\n| onnxruntime |") == 5
    assert "front" not in text


def test_front_is_marked_in_a_short_table_too(report: Report) -> None:
    text = markdown_from_report(replace(report, configurations=report.configurations[3:5]))
    assert [line.split(" | ")[:2] for line in text.splitlines() if line.endswith("| yes |")] == [
        ["| openvino", "3"],
        ["| openvino", "5"],
        ["| openvino", "10"],
        ["| openvino, bf16", "1"],
    ]
    assert "front: beaten by no row in latency, images per second and quality together." in text


def test_all_rows_of_a_table_have_as_many_cells(report: Report) -> None:
    lines = [line for line in markdown_from_report(report).splitlines() if line.startswith("|")]
    wide = [line for line in lines if line.count(" | ") == lines[-1].count(" | ")]
    assert len(wide) == 32
    assert len({line.count(" | ") for line in lines}) == 2


def test_names_are_not_taken_for_markup(report: Report) -> None:
    odd = replace(report, bundle=replace(report.bundle, name="a|b<script>[x]*_`"), decision=None)
    assert markdown_from_report(odd).startswith("### a\\|b\\<script>\\[x]\\*\\_\\`: quality")


def test_nothing_that_fits_is_said(report: Report) -> None:
    assert report.decision is not None
    none = replace(report.decision, configuration=None, steps=None, reason="the fastest takes 30 ms")
    assert "**No configuration fits.** the fastest takes 30 ms" in markdown_from_report(replace(report, decision=none))
