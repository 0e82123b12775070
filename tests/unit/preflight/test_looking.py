"""What single checks read from a machine, and how pairs and names are made."""

import itertools
import json
import threading
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from torch.distributed import HashStore

from small_run import build_small_corpus, small_config, start_engine
from tsmoe.preflight import course as course_module
from tsmoe.preflight import folder
from tsmoe.preflight.course import Course, judge_answers, judge_settings
from tsmoe.preflight.gpu import processes_of_others
from tsmoe.preflight.host import memory_limit
from tsmoe.preflight.meeting import Meeting
from tsmoe.preflight.network import rounds_of_pairs
from tsmoe.preflight.scene import PreflightOptions, Scene
from tsmoe.preflight.software import source_hash
from tsmoe.preflight.table import as_json, as_table, summary
from tsmoe.preflight.verdict import Place, Row, Verdict, spans, where, worst
from tsmoe.preflight.world import CHECK as WORLD
from tsmoe.preflight.world import WorldFinding

PLACES = {rank: Place(node=f"n{rank // 2 + 1}") for rank in range(6)}


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_every_pair_meets_once_and_nobody_is_in_two_places(count) -> None:
    rounds = rounds_of_pairs(count)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == list(itertools.combinations(range(count), 2))
    for pairs in rounds:
        busy = [member for pair in pairs for member in pair]
        assert len(busy) == len(set(busy))


def test_ranks_are_named_by_nodes_and_spans() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert where([0, 1, 3], PLACES) == "n1, n2 (rank 3)"
    many = {rank: Place(node=f"n{rank}") for rank in range(10)}
    assert where(range(10), many).endswith("n5 (rank 5) and 4 more nodes")


def test_own_process_is_not_one_of_others() -> None:
    listing = "GPU-a, 10, 500\nGPU-b, 11, 600\nGPU-a, 12, 700\n"
    assert processes_of_others(listing, "GPU-a", 10) == ["12 (700 MiB)"]
    assert processes_of_others(listing, "GPU-b", 11) == []
    # In a container numbers are others: one of those listed is this process.
    assert len(processes_of_others(listing, "GPU-a", 1)) == 1
    assert processes_of_others("", "GPU-a", 10) == []


def test_memory_limit_is_the_least_of_the_groups_above(tmp_path) -> None:
    inner = tmp_path / "slurm" / "job_1"
    inner.mkdir(parents=True)
    (tmp_path / "slurm" / "memory.max").write_text("4000\n")
    (inner / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path, "0::/slurm/job_1\n") == 4000
    (inner / "memory.max").write_text("3000\n")
    assert memory_limit(tmp_path, "0::/slurm/job_1\n") == 3000
    assert memory_limit(tmp_path, "0::/other\n") is None
    version_1 = tmp_path / "memory" / "job"
    version_1.mkdir(parents=True)
    (version_1 / "memory.limit_in_bytes").write_text("2000\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory_limit(tmp_path, "4:memory:/job\n3:cpu,cpuacct:/job\n") == 2000


def test_source_hash_sees_content_and_names_but_not_places(tmp_path) -> None:
    for copy in ("a", "b"):
        (tmp_path / copy / "pack").mkdir(parents=True)
        (tmp_path / copy / "pack" / "one.py").write_text("x = 1\n")
    one, other = tmp_path / "a" / "pack", tmp_path / "b" / "pack"
    assert source_hash([one]) == source_hash([other])
    (other / "notes.txt").write_text("no source")
    assert source_hash([one]) == source_hash([other])
    (other / "one.py").write_text("x = 2\n")
    assert source_hash([one]) != source_hash([other])
    (other / "one.py").rename(other / "two.py")
    (other / "two.py").write_text("x = 1\n")
    assert source_hash([one]) != source_hash([other])


def test_disk_is_reckoned_for_the_checkpoints_still_to_come(tmp_path) -> None:
    settings = {"training": {"steps": 100}, "checkpoint": {"every_steps": 10, "keep": 2}}
    config = small_config(tmp_path, settings)
    one = folder.needed_bytes(config, tmp_path) // 3  # two are kept while a third is written
    assert 300_000 < one < 3_000_000
    (tmp_path / "step_00000010").mkdir()
    (tmp_path / "step_00000010" / "dense").write_bytes(bytes(one))
    assert folder.needed_bytes(config, tmp_path) == 2 * one
    milestones = small_config(
        tmp_path, settings, {"checkpoint": {"milestone_every_steps": 25}}
    )  # saved at 50 and 100
    assert folder.needed_bytes(milestones, tmp_path) == 4 * one
    short = small_config(tmp_path, settings, {"training": {"steps": 5}})
    assert folder.needed_bytes(short, tmp_path / "none") == 2 * one


def test_reckoned_state_is_what_an_engine_saves(tmp_path) -> None:
    config = small_config(build_small_corpus(tmp_path), {"training": {"steps": 1}})
    reckoned = folder.needed_bytes(config, tmp_path / "none") / 2
    files = start_engine(config).snapshot().values()
    saved = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    assert saved == pytest.approx(reckoned, rel=0.01)  # and load biases


# Answers of ranks, before they are judged.

FINE = {"found": {"world_size": 6, "local_rank": 0, "local_world_size": None}}


def test_silence_errors_and_hangs_are_told_in_place_of_findings() -> None:
    answers = {
        0: FINE, 1: {"hangs": "all-reduce of 4 MiB"}, 2: {"error": "OSError: no"},
        3: {"error": "OSError: no"}, 4: {"hangs": "all-reduce of 4 MiB"},
    }  # fmt: skip
    rows = judge_answers(WORLD, list(range(6)), answers, PLACES, 20)
    assert {row.verdict for row in rows} == {Verdict.FAIL}
    assert [row.found for row in rows] == [
        "no word of n3 (rank 5) within 20 s",
        "n2: OSError: no",
        "n1 (rank 1), n3 (rank 4) did not end in 20 s: all-reduce of 4 MiB",
    ]


def test_settings_that_differ_or_are_wrong_on_one_rank_are_told() -> None:
    hellos = {rank: {"settings": "ab" * 32, "is_wrong": False} for rank in PLACES}
    (row,) = judge_settings(hellos, PLACES)
    assert row.verdict is Verdict.OK
    hellos[4] = {"settings": "cd" * 32, "is_wrong": False}
    (row,) = judge_settings(hellos, PLACES)
    assert row.verdict is Verdict.FAIL
    assert "settings differ: abababababab on n1, n2, n3 (rank 5); cdcdcdcdcdcd on n3" in row.found
    hellos[4] = {"settings": "my.yaml: no such file", "is_wrong": True}
    (row,) = judge_settings(hellos, PLACES)
    assert row.found == "n3 (rank 4): my.yaml: no such file"


def small_course(tmp_path: Path, *, seconds: float = 30) -> tuple[Course, Meeting]:
    meeting = Meeting(HashStore())
    options = PreflightOptions(cache=tmp_path / "cache", timeout_seconds=seconds)
    return Course(meeting, options), meeting


def test_check_that_hangs_is_named_and_ends_the_course(tmp_path, monkeypatch) -> None:
    release = threading.Event()

    def hang(scene: Scene) -> WorldFinding:
        scene.doing = "a read that does not return"
        release.wait(30)
        return WorldFinding(world_size=1, local_rank=0, local_world_size=None)

    monkeypatch.setattr(course_module, "CHECKS", (replace(WORLD, look=hang), WORLD))
    course, _ = small_course(tmp_path, seconds=0.2)
    report = course.run(small_config(tmp_path))
    release.set()
    assert report.is_stuck
    assert report.exit_code == 3
    assert [row.verdict for row in report.rows] == [Verdict.OK, Verdict.FAIL]
    assert "did not end in 0.2 s: a read that does not return" in report.rows[-1].found


def test_run_that_is_there_is_left_as_it_was(tmp_path, monkeypatch) -> None:
    run = tmp_path / "deep" / "run"
    monkeypatch.setattr(course_module, "CHECKS", (folder.CHECK,))
    config = small_config(tmp_path, {"run": str(run)})
    course, _ = small_course(tmp_path)
    report = course.run(config)
    assert [row.verdict for row in report.rows] == [Verdict.OK] * 3, report.rows
    assert not (tmp_path / "deep").exists()
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert small_course(tmp_path)[0].run(config).exit_code == 0
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_run_folder_that_cannot_be_written_fails(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(course_module, "CHECKS", (folder.CHECK,))
    course, _ = small_course(tmp_path)
    report = course.run(small_config(tmp_path, {"run": str(tmp_path / "file" / "run")}))
    (bad,) = [row for row in report.rows if row.verdict is Verdict.FAIL]
    assert bad.check == "run folder"
    assert "cannot write to" in bad.found
    assert "Not a directory" in bad.found


def test_table_and_json_hold_every_row(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(course_module, "CHECKS", (WORLD,))
    course, _ = small_course(tmp_path)
    report = course.run(small_config(tmp_path))
    report.rows.append(
        Row(check="disk", verdict=Verdict.FAIL, found="[bold]full[/bold]", advice="tidy")
    )
    text = StringIO()
    Console(file=text, width=200).print(as_table(report))
    for row in report.rows:
        for word in (row.check, row.verdict, row.found, row.advice):
            assert word in text.getvalue()
    assert summary(report).startswith("preflight: 1 failed; 1 of 1 rank on 1 node")
    numbers = json.loads(json.dumps(as_json(report)))
    assert numbers["verdict"] == "fail" == worst(report.rows)
    assert numbers["findings"]["world"]["0"]["world_size"] == 1
    assert [row["check"] for row in numbers["rows"]] == ["settings", "world", "disk"]
