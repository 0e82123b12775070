"""`tsmoe preflight` as a user calls it: on two ranks with all well, and with faults made for it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rank_pool import run_on_ranks
from small_run import SMALL, build_small_corpus, small_config
from tsmoe.__main__ import main
from tsmoe.config import merge_layers
from tsmoe.preflight import course as course_module
from tsmoe.preflight.course import Course
from tsmoe.preflight.meeting import Meeting
from tsmoe.preflight.network import JOIN
from tsmoe.preflight.scene import PreflightOptions, Scene
from tsmoe.ranks import stop

TIMEOUT = 240
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return build_small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def config_file(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(merge_layers(SMALL, {"corpus": str(corpus)})))
    return path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_rank(rank: int, port: int, *arguments: str, **options: Any) -> subprocess.Popen:
    """Start a rank of two by hand, on a node of its own as far as it knows."""
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLURMD_NODENAME": f"n{rank + 1}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(options.pop("code", REPOSITORY)),
        "TSMOE_EXIT_CODE_FILE": str(options.pop("told", os.devnull)),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tsmoe", "preflight", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, output, errors


def rows_of(results: dict[str, Any], check: str) -> list[dict[str, str]]:
    return [row for row in results["rows"] if row["check"] == check]


@pytest.mark.launch
def test_two_sound_ranks_of_the_deepspeed_launcher_pass(config_file, tmp_path) -> None:
    out, run = tmp_path / "out.json", tmp_path / "run"
    launcher = Path(sys.executable).with_name("deepspeed")
    done = subprocess.run(
        [
            str(launcher), "--num_accelerators", "2", "--master_port", str(free_port()),
            "--module", "tsmoe", "preflight", str(config_file), f"run={run}",
            "engine.type=deepspeed", "engine.expert_parallel_size=2", "--json", str(out),
        ],
        capture_output=True, text=True, timeout=TIMEOUT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    # A machine that others use too may well be uneven.
    verdicts = {row["check"]: row["verdict"] for row in results["rows"]}
    uneven = ("compute", "cores and memory")
    assert {v for check, v in verdicts.items() if check not in uneven} == {"ok"}, results["rows"]
    assert results["world_size"] == 2
    assert list(results["nodes"].values()) == ["0-1"]
    findings = results["findings"]
    for rank in ("0", "1"):
        network = findings["network"][rank]
        assert network["ranks"] == 2
        assert min(network["all_reduce"] + network["all_to_all"] + network["pair_speeds"]) > 0
        assert findings["expert groups"][rank]["ranks"] == 2
        assert findings["training step"][rank]["seconds"] > 0
        assert findings["training step"][rank]["peak_bytes"] > 2**27
    losses = [findings["training step"][rank]["loss"] for rank in "01"]
    assert losses[0] == losses[1]
    assert 0 < losses[0] < 10
    for row in results["rows"]:
        assert row["check"] in done.stdout
    assert "2 of 2 ranks on 1 node" in done.stdout
    assert not run.exists()


@pytest.mark.launch
def test_other_code_folder_and_settings_of_one_node_are_found(config_file, tmp_path) -> None:
    """One start with many faults: what needs no sound run is checked all the same."""
    corpus = build_small_corpus(tmp_path / "cut")
    shard = next(corpus.glob("part-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    code = tmp_path / "code"
    for package in ("tsmoe", "data_pipeline", "launcher"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / package, code / package, ignore=ignored)
    with (code / "tsmoe" / "losses.py").open("a") as source:
        source.write("# a hot fix\n")
    port, out = free_port(), tmp_path / "out.json"
    settings = [str(config_file), "run=runs/here", f"corpus={corpus}", "--json", str(out)]
    processes = []
    for rank in range(2):
        # A folder of its own, as with a disk that is local to the node.
        folder = tmp_path / f"disk{rank}"
        folder.mkdir()
        options: dict[str, Any] = {"cwd": folder} | ({"code": code} if rank else {})
        options["told"] = tmp_path / "exit_code"
        processes.append(start_rank(rank, port, *settings, **options))
    (first, output, errors), (second, other_output, _) = map(ended, processes)
    assert (first, second) == (3, 3), errors
    assert (tmp_path / "exit_code").read_text() == "3"  # launchers in between make 1 of it
    assert other_output == ""
    results = json.loads(out.read_text())
    (software,) = rows_of(results, "software")
    assert software["verdict"] == "fail"
    assert f"({code / 'tsmoe'}) on n2 (rank 1)" in software["found"]
    (folder_row,) = rows_of(results, "run folder")
    assert f"n2 (rank 1) does not see in {tmp_path / 'disk0'}/runs/here" in folder_row["found"]
    assert str(tmp_path / "disk1") in folder_row["found"]
    (data,) = rows_of(results, "corpus")
    assert data["verdict"] == "fail"
    assert shard.name in data["found"]
    assert "n1 (rank 0), n2 (rank 1)" in data["found"]
    (engine,) = rows_of(results, "engine")
    assert (engine["verdict"], engine["found"]) == ("skip", "not checked: it needs software")
    assert rows_of(results, "network")[0]["verdict"] == "ok"
    assert "preflight: 3 failed" in output
    assert "2 ranks on 2 nodes" in output
    assert not any((tmp_path / "disk0").iterdir())


@pytest.mark.launch
def test_rank_that_does_not_come_is_named_in_time_and_by_signal(config_file, tmp_path) -> None:
    late = start_rank(
        0, free_port(), str(config_file), f"run={tmp_path / 'run'}", "--timeout-seconds", "8"
    )
    # Started as a node's wrapper starts it, with the signal blocked.
    waiting = start_rank(
        0, free_port(), str(config_file), f"run={tmp_path / 'run'}", "--timeout-seconds", "600",
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}),
    )  # fmt: skip
    code, output, errors = ended(late)
    assert code == 3, errors
    assert "1 of 2 ranks did not come: rank 1; there are n1 (rank 0)" in output
    assert "not checked: it needs world" in output
    waiting.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    code, output, errors = ended(waiting)
    assert code == 3, errors
    assert time.monotonic() - begun < 60
    assert "asked to stop during: waiting for all ranks" in output


def course_with(seconds: float, look: Callable[[Scene], Any], folder: Path) -> dict[str, Any]:
    """Join the ranks, then have them look. For `run_on_ranks`."""
    course_module.CHECKS = (JOIN, replace(JOIN, name="trap", look=look, needs=()), JOIN)
    meeting = Meeting.open(timeout_seconds=30)
    options = PreflightOptions(cache=folder, timeout_seconds=seconds)
    report = Course(meeting, options).run(small_config(folder))
    meeting.tell(f"left/{meeting.rank}", True)
    meeting.gather(meeting.said("left", range(2)), 30)
    stop()
    return {
        "rows": [(row.check, row.verdict.value, row.found) for row in report.rows],
        "is_stuck": report.is_stuck,
    }


def leave_the_other_waiting(scene: Scene) -> None:
    """Rank 1 sleeps while rank 0 waits for it."""
    if scene.rank == 1:
        scene.doing = "a deep sleep"
        time.sleep(60)
    scene.doing = "a barrier"
    scene.ranks.barrier()


def fail_alone(scene: Scene) -> None:
    """Rank 1 gives up, so that rank 0 waits in vain."""
    if scene.rank == 1:
        raise OSError("no such device")
    scene.ranks.barrier()


def test_hang_is_told_with_what_each_rank_was_at(tmp_path) -> None:
    first, second = run_on_ranks(course_with, 3.0, leave_the_other_waiting, tmp_path)
    assert second["is_stuck"]
    texts = [found for check, verdict, found in first["rows"] if check == "trap"]
    assert any("(rank 1) did not end in 3 s: a deep sleep" in text for text in texts), texts
    assert any("(rank 0)" in text and "a barrier" in text for text in texts), texts
    # Nothing more was begun.
    assert [check for check, *_ in first["rows"]].count("joining") == 1


def test_error_of_one_rank_does_not_hang_the_others(tmp_path) -> None:
    first, _ = run_on_ranks(course_with, 3.0, fail_alone, tmp_path)
    texts = [found for check, verdict, found in first["rows"] if verdict == "fail"]
    assert any("(rank 1): OSError: no such device" in text for text in texts), texts


def test_one_process_passes_and_prints_json(config_file, tmp_path, capsys) -> None:
    arguments = ["preflight", str(config_file), f"run={tmp_path / 'run'}", "--json", "-"]
    assert main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert {row["verdict"] for row in results["rows"]} <= {"ok", "warn"}
    assert rows_of(results, "training step")[0]["verdict"] == "ok"


def test_failure_exits_with_3_and_mistakes_with_2(config_file, tmp_path, capsys) -> None:
    run = f"run={tmp_path / 'run'}"
    arguments = ["preflight", str(config_file), run, "--minimum-free-gib", "1e9"]
    assert main([*arguments, f"corpus={tmp_path / 'nowhere'}"]) == 3
    output = capsys.readouterr().out
    assert "1e+09 GiB shall be left" in output
    assert f"{tmp_path / 'nowhere'}: no such folder" in output
    for wrong, words in (
        ("training.stepz=5", "training.stepz is not a known key"),
        ("training.micro_batch_size=5", "global_batch_size (16)"),
    ):
        assert main([*arguments, wrong]) == 2
        assert words in capsys.readouterr().err
    assert main([*arguments[:-1], "nan"]) == 2
    assert "--minimum-free-gib must be a finite number" in capsys.readouterr().err
