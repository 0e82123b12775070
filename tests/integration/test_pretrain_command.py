"""`tsmoe pretrain` as a user calls it: runs that are killed, stopped, wrong, or on two ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from small_run import SMALL, build_small_corpus
from tsmoe.__main__ import main
from tsmoe.checkpoint import saver as saver_module
from tsmoe.config import merge_layers
from tsmoe.inference import Forecaster

STEPS, EVERY, VALIDATE = 60, 10, 20
TIMEOUT = 120
LONG = {
    # Dropout, so that the random numbers of a step must be the same after a restart.
    "model": {"dropout": 0.1},
    "training": {"steps": STEPS, "validate_every_steps": VALIDATE},
    "checkpoint": {"every_steps": EVERY},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return build_small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def config_file(corpus, tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "small.yaml", corpus)


def write_config(path: Path, corpus: Path) -> Path:
    settings = merge_layers(SMALL, LONG, {"corpus": str(corpus)})
    path.write_text(yaml.safe_dump(settings))
    return path


def command(config_file: Path, run: Path, *settings: str) -> list[str]:
    return [sys.executable, "-m", "tsmoe", "pretrain", str(config_file), f"run={run}", *settings]


def run_to_the_end(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=TIMEOUT, env=launch_environment()
    )


def launch_environment() -> dict[str, str]:
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def stop_once_saved(arguments: list[str], run: Path, number: signal.Signals) -> tuple[int, str]:
    """Send a signal as soon as there is a checkpoint; return the exit code and the log."""
    process = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, env=launch_environment()
    )
    try:
        wait_until(lambda: (run / "checkpoints" / "latest").exists(), process)
        process.send_signal(number)
        _, log = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return process.returncode, log


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not is_so():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def recorded(run: Path) -> list[dict]:
    """Lines of metrics.jsonl, without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("speed/")}
        for line in lines
    ]


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "undisturbed"
    ended = run_to_the_end(command(config_file, run))
    assert ended.returncode == 0, ended.stderr
    return run


@pytest.mark.launch
def test_run_leaves_config_metrics_tensorboard_checkpoints_and_a_marker(undisturbed) -> None:
    names = {path.name for path in undisturbed.iterdir()} - {".lock"}
    assert names == {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "DONE"}
    assert (undisturbed / "DONE").read_text() == f"{STEPS}\n"
    saved = {path.name for path in (undisturbed / "checkpoints").iterdir()}
    assert saved == {"latest", f"step_{STEPS - EVERY:08}", f"step_{STEPS:08}"}
    assert list((undisturbed / "tensorboard").iterdir())
    config = yaml.safe_load((undisturbed / "config.yaml").read_text())
    assert config["training"]["steps"] == STEPS
    assert config["model"]["head"] == {"type": "point"}  # a default, resolved
    lines = recorded(undisturbed)
    assert [line["step"] for line in lines if "loss/train" in line] == list(range(STEPS))
    validation = [line["loss/validation"] for line in lines if "loss/validation" in line]
    assert len(validation) == STEPS // VALIDATE
    assert validation[-1] < validation[0]


@pytest.mark.launch
def test_finished_run_says_that_it_is_done(config_file, undisturbed, caplog) -> None:
    before = recorded(undisturbed)
    with caplog.at_level("INFO"):
        assert main(["pretrain", str(config_file), f"run={undisturbed}"]) == 0
    assert f"is done: step {STEPS} of {STEPS}" in caplog.text
    assert recorded(undisturbed) == before
    assert (undisturbed / "DONE").exists()


@pytest.mark.launch
def test_killed_run_goes_on_as_if_nothing_had_happened(config_file, undisturbed, tmp_path) -> None:
    run = tmp_path / "killed"
    code, _ = stop_once_saved(command(config_file, run), run, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (run / "DONE").exists()
    assert len(recorded(run)) < len(recorded(undisturbed))
    ended = run_to_the_end(command(config_file, run))
    assert ended.returncode == 0, ended.stderr
    assert "going on from" in ended.stderr
    assert recorded(run) == recorded(undisturbed)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.launch
def test_stopped_run_saves_and_goes_on(config_file, undisturbed, tmp_path) -> None:
    run = tmp_path / "stopped"
    code, log = stop_once_saved(command(config_file, run), run, signal.SIGTERM)
    assert code == 75, log
    step = int((run / "REQUEUE").read_text())
    assert f"stopped on request after saving at step {step} of {STEPS}" in log
    assert EVERY <= step < STEPS
    assert (run / "checkpoints" / "latest").read_text() == f"step_{step:08}"
    ended = run_to_the_end(command(config_file, run))
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in run.iterdir()} >= {"DONE"}
    assert not (run / "REQUEUE").exists()
    assert recorded(run) == recorded(undisturbed)


@pytest.mark.launch
def test_deepspeed_launcher_trains_on_two_ranks_and_export_makes_a_package(
    config_file, tmp_path
) -> None:
    run, package, steps = tmp_path / "spread", tmp_path / "package", 10
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = command(
        config_file, run, "engine.type=deepspeed", "engine.expert_parallel_size=2",
        f"training.steps={steps}",
    )[2:]  # fmt: skip
    launcher = Path(sys.executable).with_name("deepspeed")
    options = ["--num_accelerators", "2", "--master_port", str(port), "--module"]
    ended = run_to_the_end([str(launcher), *options, *arguments])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (run / "DONE").read_text() == f"{steps}\n"
    files = {path.name for path in (run / "checkpoints" / f"step_{steps:08}").iterdir()}
    assert files == {
        "dense.safetensors", "experts-00000.safetensors", "experts-00001.safetensors", "meta.json"
    }  # fmt: skip
    assert main(["export", str(run), str(package)]) == 0
    forecaster = Forecaster.load(package)
    assert forecaster.card["step"] == steps
    assert forecaster.card["windows_seen"] == steps * 16
    assert forecaster.card["metrics"].keys() == {"loss/train", "loss/validation"}
    assert 0 < forecaster.card["training_hours"] < 1
    curve = forecaster.card["validation_loss"]
    assert list(curve.values())[-1] == forecaster.card["metrics"]["loss/validation"]
    assert list(map(int, curve)) == sorted(map(int, curve))
    wave = np.sin(2 * np.pi * np.arange(64, dtype=np.float32) / 12)
    forecast = forecaster.forecast(100 + 5 * wave[None], 40).mean_BCQ
    assert forecast.shape == (1, 1, 40)
    assert np.all((forecast > 80) & (forecast < 120))
    # Fine-tuning starts from the run whose experts lie in two files as from the package.
    table = tmp_path / "table.csv"
    rows = np.arange(600, dtype=np.float32)[:, None]
    np.savetxt(table, np.sin(rows / [3, 5]), delimiter=",", header="a,b", comments="")
    results = []
    for start in (run, run / "checkpoints" / f"step_{steps:08}", package):
        tuned = tmp_path / f"tuned_{len(results)}"
        words = [f"model={start}", f"data={table}", f"run={tuned}", "training.steps=2"]
        assert main(["finetune", "full", *words, "table.prediction_length=8"]) == 0
        results.append(json.loads((tuned / "result.json").read_text()))
    assert results[0] == results[1] == results[2]


# Mistakes, told in one line; nothing is left in the run folder.


def told(capsys, *arguments: str) -> tuple[int, str]:
    code = main(["pretrain", *arguments])
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return code, message


@pytest.mark.launch
def test_one_process_trains_under_deepspeed_without_a_launcher(config_file, tmp_path) -> None:
    settings = ["engine.type=deepspeed", "training.steps=2"]
    environment = {
        name: value
        for name, value in launch_environment().items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    done = subprocess.run(
        command(config_file, tmp_path / "run", *settings),
        capture_output=True, text=True, timeout=TIMEOUT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "DONE").read_text() == "2\n"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["training.stepz=5"], ["training.stepz is not a known key", "did you mean steps?"]),
        (["model.head.type=bar"], ["model.head", "bar"]),
        (["training.steps"], ["'training.steps' is not a setting", "KEY=VALUE"]),
        (["training.steps=0"], ["steps (0) must be at least 1"]),
        (
            ["engine.type=deepspeed", "engine.expert_parallel_size=2"],
            ["engine.expert_parallel_size (2) must divide the number of ranks (1)"],
        ),
        (["training.micro_batch_size=5"], ["global_batch_size (16)", "micro_batch_size (5)"]),
        (["engine.type=deepspeed", "engine.zero_stage=0"], ["zero_stage is 0", "use 1"]),
    ],
    ids=str,
)
def test_mistakes_in_the_settings_exit_with_2(
    config_file, tmp_path, capsys, settings, words
) -> None:
    code, message = told(capsys, str(config_file), f"run={tmp_path / 'run'}", *settings)
    assert code == 2
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


def test_experts_that_cannot_be_spread_evenly_name_both_numbers(
    config_file, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, message = told(
        capsys, str(config_file), f"run={tmp_path / 'run'}", "engine.type=deepspeed",
        "engine.expert_parallel_size=3", "training.global_batch_size=24",
    )  # fmt: skip
    assert code == 2
    assert (
        "engine.expert_parallel_size (3) must divide model.feed_forward.num_experts (4)" in message
    )


def test_unknown_preset_lists_the_known_ones(tmp_path, capsys) -> None:
    code, message = told(capsys, "no_such_preset")
    assert code == 2
    assert "'no_such_preset' is no preset" in message
    assert "time_tracker_tiny" in message
    code, message = told(capsys, str(tmp_path / "none.yaml"))
    assert code == 2
    assert "none.yaml: no such file" in message


def test_missing_corpus_exits_with_3(config_file, tmp_path, capsys) -> None:
    code, message = told(
        capsys, str(config_file), f"run={tmp_path / 'run'}", f"corpus={tmp_path / 'nowhere'}"
    )
    assert code == 3
    assert "nowhere" in message


def test_altered_shard_is_found_before_training(config_file, tmp_path, capsys) -> None:
    corpus = build_small_corpus(tmp_path / "altered")
    shard = next(corpus.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    settings = [str(config_file), f"run={tmp_path / 'run'}", f"corpus={corpus}"]
    code, message = told(capsys, *settings)
    assert code == 3
    assert shard.name in message
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture
def begun(config_file, tmp_path) -> Path:
    """A run of two steps."""
    run = tmp_path / "begun"
    assert main(["pretrain", str(config_file), f"run={run}", "training.steps=2"]) == 0
    return run


def test_run_folder_of_another_model_corpus_or_seed_is_refused(
    config_file, begun, tmp_path, capsys
) -> None:
    before = recorded(begun)
    code, message = told(capsys, str(config_file), f"run={begun}", "model.num_layers=3")
    assert code == 3
    assert "model.num_layers is 2 there and 3 here" in message
    other = build_small_corpus(tmp_path / "other", spike=7.0)
    code, message = told(capsys, str(config_file), f"run={begun}", f"corpus={other}")
    assert code == 3
    assert "fingerprint" in message
    code, message = told(capsys, str(config_file), f"run={begun}", "seed=5")
    assert code == 3
    assert "trained with seed=0, but seed is 5" in message
    code, message = told(capsys, str(config_file), f"run={begun}", "data.window_stride=3")
    assert code == 3
    assert "data.window_stride=1" in message
    assert recorded(begun) == before


def test_full_disk_at_the_end_is_an_error_and_keeps_the_run(
    config_file, begun, capsys, monkeypatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver_module, "write_tensors", no_space)
    code, message = told(capsys, str(config_file), f"run={begun}", "training.steps=4")
    assert code == 3
    assert "last checkpoint could not be saved" in message
    assert (begun / "checkpoints" / "latest").read_text() == "step_00000002"
    monkeypatch.undo()
    assert told(capsys, str(config_file), f"run={begun}", "training.steps=4")[0] == 0
    assert (begun / "DONE").read_text() == "4\n"


def test_resume_replaces_the_recorded_steps_at_once(config_file, begun) -> None:
    """A kill while the file is cut back must not lose what was recorded."""
    with (begun / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 2, "loss/tr')  # what a kill leaves
    before = (begun / "metrics.jsonl").read_text()
    os.link(begun / "metrics.jsonl", begun / "as_it_was")
    assert main(["pretrain", str(config_file), f"run={begun}", "training.steps=3"]) == 0
    assert (begun / "as_it_was").read_text() == before
    assert [line["step"] for line in recorded(begun) if "loss/train" in line] == [0, 1, 2]


def test_signals_are_held_until_the_last_checkpoint_is_whole(
    config_file, tmp_path, monkeypatch
) -> None:
    """A launcher may send SIGTERM more than once."""
    handlers = []
    close = saver_module.CheckpointSaver.close

    def watched_close(self, **settings: bool) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))
        close(self, **settings)

    monkeypatch.setattr(saver_module.CheckpointSaver, "close", watched_close)
    assert main(["pretrain", str(config_file), f"run={tmp_path}", "training.steps=1"]) == 0
    assert handlers
    assert signal.SIG_DFL not in handlers
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
