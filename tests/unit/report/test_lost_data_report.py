"""What a report says of data that a run did not learn from."""

import json
from pathlib import Path
from typing import Any

import pytest

from status_run import step_line, write_run
from tsmoe.report.history import read_run
from tsmoe.report.page import page
from tsmoe.report.summary import summarise

SKIPPED = {"step": 3, "what": "loss", "series": ["sea/<b>1</b>"], "action": "skip",
           "windows": [96, 128]}  # fmt: skip
ROLLED_BACK = SKIPPED | {"step": 7, "what": "gradient", "series": [], "action": "roll_back",
                         "to": 5, "windows": [160, 256]}  # fmt: skip


def report_of(run: Path) -> tuple[dict[str, Any], str]:
    history = read_run(run)
    summary = summarise(history)
    return summary, page(history, summary, {})


def recorded(step: int) -> dict[str, Any]:
    line = step_line(step)
    del line["speed/of_step_before"]
    return line


def run_with(tmp_path: Path, *events: dict[str, Any]) -> Path:
    lines = [recorded(step) for step in range(4)]
    lines += [{"step": event.get("step", 0), "not_finite": event} for event in events]
    return write_run(tmp_path / "run", lines=lines)


def test_steps_that_were_not_finite_are_listed_with_windows_and_series(tmp_path) -> None:
    summary, text = report_of(run_with(tmp_path, SKIPPED, ROLLED_BACK))
    assert summary["not_finite"] == [SKIPPED | {"to": None}, ROLLED_BACK]
    for words in ("not learned from: 2 step(s).", "<td>96 to 127</td>", "roll back to step 5",
                  "sea/&lt;b&gt;1&lt;/b&gt;", "<td>160 to 255</td>"):  # fmt: skip
        assert words in text


def test_only_the_newest_of_very_many_are_shown(tmp_path) -> None:
    summary, text = report_of(run_with(tmp_path, *(SKIPPED | {"step": n} for n in range(100))))
    assert len(summary["not_finite"]) == 100
    assert "100 step(s). The first 36 are left out." in text
    assert text.count("<td>skip</td>") == 64


@pytest.mark.parametrize("event", [{}, [], SKIPPED | {"windows": [1]}, SKIPPED | {"series": None}])
def test_event_that_was_altered_is_left_out_and_counted(tmp_path, event) -> None:
    run = write_run(
        tmp_path / "run", lines=[recorded(0), {"step": 0, "not_finite": event}, recorded(1)]
    )
    summary, text = report_of(run)
    assert summary["not_finite"] == []
    assert any(line.startswith("1 line(s)") for line in summary["missing"])
    assert "not learned from" not in text


def test_bad_shards_are_listed_with_the_reason(tmp_path) -> None:
    run = run_with(tmp_path)
    shard = {"shard": 5, "file": "part-00005.arrow", "points": 12_000, "step": 3,
             "reason": "sha256 is <another>"}  # fmt: skip
    (run / "quarantine.json").write_text(json.dumps({"shards": [shard, {"file": "half.arrow"}]}))
    summary, text = report_of(run)
    assert summary["lost_shards"] == [shard, {"file": "half.arrow"}]
    for words in ("without 2 bad shard(s)", "part-00005.arrow", "12,000", "half.arrow",
                  "sha256 is &lt;another&gt;"):  # fmt: skip
        assert words in text


def test_run_that_lost_nothing_says_nothing_of_it(tmp_path) -> None:
    summary, text = report_of(run_with(tmp_path))
    assert summary["not_finite"] == summary["lost_shards"] == []
    assert "bad shard" not in text
    assert "not learned from" not in text
