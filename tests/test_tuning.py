import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from restyle_deploy.tuning import Conditions, KeptTimes, read_refused, read_times, write_times

CONDITIONS = Conditions(
    backend="fake", device="cpu", precision="fp32", threads=2, library_versions={"fake": "1.0"}, processor="Abacus"
)
TIMES = {"skip 1→1 to 3×8×8": {"node": 2.5, "transposed": 0.75}}
FILE = Path("engines") / "tuning.json"


def entry(**changes: Any) -> dict[str, Any]:
    return {"conditions": {"backend": "fake"}, "times": TIMES, **changes}


def test_times_are_kept(tmp_path: Path) -> None:
    assert read_times(tmp_path, CONDITIONS) == {}
    write_times(tmp_path, CONDITIONS, TIMES)
    assert read_times(tmp_path, CONDITIONS) == TIMES
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["tuning.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "other"},
        {"device": "gpu:0"},
        {"precision": "bf16"},
        {"threads": 1},
        {"library_versions": {"fake": "1.1"}},
        {"library_versions": {"fake": "1.0", "more": "1.0"}},
        {"processor": "Slide rule"},
    ],
    ids=str,
)
def test_other_conditions_are_apart(tmp_path: Path, change: Mapping[str, Any]) -> None:
    others = replace(CONDITIONS, **change)
    write_times(tmp_path, CONDITIONS, TIMES)
    assert read_times(tmp_path, others) == {}
    write_times(tmp_path, others, {"a": {"b": 1.0}})
    assert read_times(tmp_path, CONDITIONS) == TIMES
    assert read_times(tmp_path, others) == {"a": {"b": 1.0}}


def test_times_of_the_same_conditions_are_replaced(tmp_path: Path) -> None:
    write_times(tmp_path, CONDITIONS, {"a": {"b": 1.0}})
    write_times(tmp_path, CONDITIONS, TIMES)
    assert read_times(tmp_path, CONDITIONS) == TIMES
    assert len(json.loads((tmp_path / FILE).read_text(encoding="utf-8"))["entries"]) == 1


def test_versions_may_be_any_mapping(tmp_path: Path) -> None:
    conditions = replace(CONDITIONS, library_versions=MappingProxyType({"fake": "1.0"}))
    write_times(tmp_path, conditions, TIMES)
    assert read_times(tmp_path, CONDITIONS) == TIMES


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        json.dumps({"format_version": 1}).encode(),
        json.dumps({"format_version": 1, "entries": None}).encode(),
        json.dumps({"format_version": 1, "entries": [1]}).encode(),
        json.dumps({"format_version": 1, "entries": [entry(times=[])]}).encode(),
        json.dumps({"format_version": 1, "entries": [entry(times={"a": [1.0]})]}).encode(),
    ],
    ids=repr,
)
def test_damaged_file_counts_as_absent(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / FILE).write_bytes(content)
    assert read_times(tmp_path, CONDITIONS) == {}
    assert "damaged" in caplog.text
    write_times(tmp_path, CONDITIONS, TIMES)
    assert read_times(tmp_path, CONDITIONS) == TIMES


@pytest.mark.parametrize("time_ms", [0.0, -1.0, "1", True, None, float("nan")], ids=repr)
def test_entry_with_a_bad_time_is_left_out(tmp_path: Path, time_ms: object) -> None:
    write_times(tmp_path, CONDITIONS, TIMES)
    content = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    content["entries"][0]["times"] = {"a": {"b": time_ms}}
    (tmp_path / FILE).write_text(json.dumps(content), encoding="utf-8")
    assert read_times(tmp_path, CONDITIONS) == {}


def test_file_of_another_format_is_left_out(tmp_path: Path) -> None:
    write_times(tmp_path, CONDITIONS, TIMES)
    content = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    (tmp_path / FILE).write_text(json.dumps({**content, "format_version": 2}), encoding="utf-8")
    assert read_times(tmp_path, CONDITIONS) == {}


def test_refused_choices_are_kept_apart(tmp_path: Path) -> None:
    assert read_refused(tmp_path, CONDITIONS) == {}
    write_times(tmp_path, CONDITIONS, TIMES, refused={"skip 1→1 to 3×8×8": ("merged",)})
    assert read_refused(tmp_path, CONDITIONS) == {"skip 1→1 to 3×8×8": ("merged",)}
    assert read_times(tmp_path, CONDITIONS) == TIMES
    assert read_refused(tmp_path, replace(CONDITIONS, threads=1)) == {}
    (tmp_path / FILE).write_text(json.dumps({"format_version": 1, "entries": [entry(refused={"a": [1]})]}))
    assert read_times(tmp_path, CONDITIONS) == {}
    assert read_refused(tmp_path, CONDITIONS) == {}


def test_what_is_tried_again_takes_the_place_of_what_was_kept(tmp_path: Path) -> None:
    kept = KeptTimes(tmp_path, CONDITIONS)
    kept.update({"a": {"node": 1.0}, "b": {"node": 2.0}}, {"a": ["merged"], "b": ["merged"]})
    assert kept.tried("a") == {"node", "merged"}
    kept.update({"a": {"node": 3.0}}, {})
    again = KeptTimes(tmp_path, CONDITIONS)
    for each in (kept, again):
        assert (each.tried("a"), each.tried("b"), each.tried("c")) == ({"node"}, {"node", "merged"}, set())
        assert each.times == {"a": {"node": 3.0}, "b": {"node": 2.0}}
