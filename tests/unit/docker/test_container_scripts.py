"""The scripts of the image: a stop reaches every rank, and health means that steps are written."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

DOCKER = Path(__file__).resolve().parents[3] / "docker"

# A launcher that passes no signal on. With a code it ends after its rank, without at once.
LAUNCHER = """#!{python}
import signal, subprocess, sys
folder, rank, *codes = sys.argv[1:]
if codes:
    signal.signal(signal.SIGTERM, lambda *_: None)
subprocess.Popen([sys.executable, "-S", rank, folder]).wait()
sys.exit(int(codes[0]))
"""
RANK = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    time.sleep(0.3)
    sys.exit((folder / "rank_saved").touch())
signal.signal(signal.SIGTERM, save)
(folder / "rank_started").touch()
signal.pause()
"""


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder that is first on PATH, for what the scripts start."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def enter(*words: str) -> tuple[str, int]:
    """Return what the entry point printed for these words, and its exit code."""
    done = subprocess.run([DOCKER / "container-entry", *words], capture_output=True, text=True)
    return done.stdout, done.returncode


def test_words_go_to_tsmoe_unless_they_name_a_program(programs) -> None:
    for name in ("tsmoe", "tensorboard", "deepspeed"):
        program(programs, name, f'#!/bin/sh\necho "{name} got: $*"\nexit 7\n')
    assert enter("pretrain", "tiny", "run=a b") == ("tsmoe got: pretrain tiny run=a b\n", 7)
    assert enter() == ("tsmoe got: \n", 7)
    assert enter("tensorboard", "--logdir", "x") == ("tensorboard got: --logdir x\n", 7)
    assert enter("deepspeed", "--module", "tsmoe") == ("deepspeed got: --module tsmoe\n", 7)


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < limit, f"{path.name} did not come"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "codes", "ends_with"),
    [
        (signal.SIGTERM, ["9"], 9),
        (signal.SIGINT, ["9"], 9),
        (signal.SIGTERM, [], 128 + signal.SIGTERM),  # as the deepspeed program does
    ],
)
def test_a_stop_reaches_the_ranks_and_waits_for_them(
    programs, tmp_path, number, codes, ends_with
) -> None:
    program(programs, "deepspeed", LAUNCHER.format(python=sys.executable))
    rank = program(tmp_path, "rank.py", RANK)
    words = ["deepspeed", str(tmp_path), str(rank), *codes]
    entry = subprocess.Popen(
        [DOCKER / "container-entry", *words],
        # A shell cannot trap what was ignored when it began, as SIGINT is in background jobs.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(tmp_path / "rank_started")
        entry.send_signal(number)
        assert entry.wait(timeout=10) == ends_with  # the launcher's own exit code
    finally:
        entry.kill()
    assert (tmp_path / "rank_saved").exists()


@pytest.fixture
def health(programs, tmp_path, monkeypatch) -> Callable[..., tuple[int, str]]:
    """Ask for the health of a machine on which processes with these command lines run."""
    program(programs, "tsmoe", "#!/bin/sh\necho tsmoe starts\n")
    monkeypatch.setenv("HEALTH_SECONDS", "100")
    monkeypatch.chdir(tmp_path)

    def ask(*lines: list[str]) -> tuple[int, str]:
        for number, line in enumerate(lines, start=1):
            process = tmp_path / "proc" / str(number)
            process.mkdir(parents=True, exist_ok=True)
            (process / "cmdline").write_bytes(b"".join(f"{word}\0".encode() for word in line))
        command = [DOCKER / "container-health", tmp_path / "proc"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout

    return ask


def write_step(run: Path, *, seconds_ago: float) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").touch()
    then = time.time() - seconds_ago
    os.utime(run / "metrics.jsonl", (then, then))


TRAINING = ["python", "-m", "tsmoe", "pretrain", "tiny", "run=runs/my first"]
RUN = Path(TRAINING[-1].removeprefix("run="))


def test_without_training_it_is_healthy_if_the_program_starts(health, programs) -> None:
    assert health(["tensorboard", "--logdir", "runs"]) == (0, "tsmoe starts\n")
    program(programs, "tsmoe", "#!/bin/sh\nexit 1\n")
    assert health(["tensorboard", "--logdir", "runs"])[0] == 1


def test_a_run_that_writes_no_step_is_ill_until_it_does(health) -> None:
    assert health(TRAINING)[0] == 0  # not yet at its first step
    write_step(RUN, seconds_ago=150)
    code, said = health(TRAINING)
    assert code == 1
    assert said.startswith(f"{RUN}: no step for 15")
    write_step(RUN, seconds_ago=50)
    assert health(TRAINING)[0] == 0


def test_one_stalled_run_of_two_is_seen_and_a_done_one_is_not_stalled(health) -> None:
    other = [*TRAINING[:-1], "run=runs/a_second"]
    write_step(RUN, seconds_ago=150)
    write_step(Path("runs/a_second"), seconds_ago=1)
    assert health(TRAINING, other)[0] == 1
    (RUN / "DONE").touch()
    assert health(TRAINING, other)[0] == 0
