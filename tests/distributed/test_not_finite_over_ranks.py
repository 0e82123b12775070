"""A bad step is skipped or rolled back on all ranks alike, and a later resume knows of it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

from rank_pool import run_on_ranks
from small_run import Settings, build_small_corpus, one_step, small_config, start_engine
from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.layout import LATEST_FILE, read_meta, step_folder
from tsmoe.engine.protocol import Engine, UpdateReport
from tsmoe.errors import TrainingError
from tsmoe.train.data_course import DataCourse
from tsmoe.train.loop import pretrain
from tsmoe.train.run_config import RunConfig

STEPS, EVERY, BAD_STEP, BATCH = 8, 2, 3, 16


def deepspeed(zero_stage: int, *, offloads_optimizer: bool = False) -> Settings:
    return {
        "engine": {
            "type": "deepspeed",
            "expert_parallel_size": 2,
            "zero_stage": zero_stage,
            "offloads_optimizer": offloads_optimizer,
        }
    }


ENGINES: dict[str, Settings] = {
    "plain": {"engine": {"type": "plain"}},
    "zero_1": deepspeed(1),
    "zero_2_offloaded": deepspeed(2, offloads_optimizer=True),
    "zero_3": deepspeed(3),
}
ACTIONS = ("skip", "roll_back")
CASES = [(engine, action) for engine in ENGINES for action in ACTIONS]


@contextmanager
def bad_windows(first_window: int) -> Iterator[None]:
    """Spoil the windows of one step on the second rank: a function of the windows, as in life."""
    real = DataCourse.next_micro_batches

    def next_micro_batches(self: DataCourse, step: int) -> list[WindowBatch]:
        batches = real(self, step)
        if self.windows_seen - BATCH == first_window and self._ranks.rank == 1:
            batches[-1].values_BCL[0] = torch.nan
        return batches

    with mock.patch.object(DataCourse, "next_micro_batches", next_micro_batches):
        yield


def pretrain_over_bad_windows(configs: list[RunConfig]) -> list[str | None]:
    """On a rank: one run after the other; return the errors that they ended with."""
    errors: list[str | None] = []
    for config in configs:
        with bad_windows(BAD_STEP * BATCH):
            try:
                pretrain(config)
                errors.append(None)
            except TrainingError as error:
                errors.append(str(error))
    return errors


@dataclass(frozen=True)
class Runs:
    folder: Path
    errors: dict[str, str | None]

    def lines(self, name: str) -> list[dict]:
        return list(
            map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        )

    def losses(self, name: str) -> dict[int, float]:
        return {v["step"]: v["loss/train"] for v in self.lines(name) if "loss/train" in v}

    def meta(self, name: str, step: int):
        return read_meta(self.folder / name / "checkpoints" / step_folder(step))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("not-finite")
    corpus = build_small_corpus(folder)

    def config(name: str, engine: str, action: str, every: int = EVERY) -> RunConfig:
        training = {"steps": STEPS, "on_not_finite": action}
        checkpoint = {"every_steps": every, "keep": STEPS}
        layer = {"training": training, "checkpoint": checkpoint, "run": str(folder / name)}
        return small_config(corpus, layer, ENGINES[engine])

    names = {f"{engine}-{action}": (engine, action) for engine, action in CASES}
    begun = {name: config(name, *case) for name, case in names.items()}
    # Nothing to go back to, and nothing that may be done.
    begun["no checkpoint"] = config("no checkpoint", "plain", "roll_back", every=STEPS)
    begun["stop"] = config("stop", "zero_1", "stop")
    (errors, _) = run_on_ranks(pretrain_over_bad_windows, list(begun.values()), time_limit=200)
    again = {}
    for name, case in names.items():
        # As killed before the bad step showed for the first time, and after it was dealt with.
        for step in (2, 4):
            copy = f"{name} from {step}"
            _copy_as_of(folder / name, folder / copy, step)
            again[copy] = config(copy, *case)
    run_on_ranks(pretrain_over_bad_windows, list(again.values()), time_limit=300)
    return Runs(folder, dict(zip(begun, errors, strict=True)))


def _copy_as_of(run: Path, copy: Path, step: int) -> None:
    shutil.copytree(run, copy)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(copy / "checkpoints" / step_folder(later), ignore_errors=True)
    (copy / "checkpoints" / LATEST_FILE).write_text(step_folder(step))
    (copy / "DONE").unlink()


@pytest.mark.parametrize(("engine", "action"), CASES)
def test_run_goes_on_and_a_resume_has_the_same_losses(runs, engine, action) -> None:
    name = f"{engine}-{action}"
    assert runs.errors[name] is None
    assert (runs.folder / name / "DONE").read_text() == f"{STEPS}\n"
    losses = runs.losses(name)
    steps = set(range(STEPS)) - ({BAD_STEP} if action == "skip" else set())
    assert losses.keys() == steps
    for step in (2, 4):
        assert runs.losses(f"{name} from {step}") == losses, step
        found, expected = (runs.meta(n, STEPS) for n in (f"{name} from {step}", name))
        assert found.not_finite == expected.not_finite
        assert [file.sha256 for file in found.files] == [file.sha256 for file in expected.files]


@pytest.mark.parametrize(("engine", "action"), CASES)
def test_what_was_not_learned_from_is_written_down(runs, engine, action) -> None:
    name = f"{engine}-{action}"
    (line,) = [line for line in runs.lines(name) if "not_finite" in line]
    event = line["not_finite"]
    begin = BAD_STEP if action == "skip" else EVERY
    assert line["step"] == begin
    assert event["windows"] == [begin * BATCH, (BAD_STEP + 1) * BATCH]
    assert (event["step"], event["what"], event["action"]) == (BAD_STEP, "loss", action)
    assert len(event["series"]) == 1
    meta = runs.meta(name, STEPS)
    assert meta.not_finite == [event]
    assert meta.updates == STEPS - (action == "skip")
    redone = 0 if action == "skip" else BAD_STEP + 1 - EVERY
    assert meta.windows_seen == (STEPS + redone) * BATCH


def test_engines_agree_on_what_follows(runs) -> None:
    for action in ACTIONS:
        expected = runs.losses(f"plain-{action}")
        for engine in ENGINES:
            found = runs.losses(f"{engine}-{action}")
            assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-6)


def test_both_actions_are_the_same_up_to_the_step_that_is_gone_back_to(runs) -> None:
    skipped, rolled = (runs.losses(f"plain-{action}") for action in ACTIONS)
    assert [skipped[step] for step in range(EVERY)] == [rolled[step] for step in range(EVERY)]
    assert skipped[EVERY] != rolled[EVERY]


def test_roll_back_without_a_checkpoint_and_stop_end_the_run(runs) -> None:
    assert "no checkpoint was saved before" in runs.errors["no checkpoint"]
    assert "checkpoint.every_steps (8)" in runs.errors["no checkpoint"]
    assert "step 3: the loss is not finite; nothing was updated" in runs.errors["stop"]
    assert not (runs.folder / "stop" / "DONE").exists()


def steps_around_a_discarded_one(configs: list[RunConfig]) -> list[tuple[bool, float, float]]:
    """Do steps 0 and 2 with a gradient, a finite one, thrown away between them, and without."""
    return [_steps_around_a_discarded_one(config) for config in configs]


def _steps_around_a_discarded_one(config: RunConfig) -> tuple[bool, float, float]:
    norms = []
    for has_discarded in (True, False):
        engine = start_engine(config)
        one_step(config, engine, 0)
        if has_discarded:
            before = _whole_state(engine)

            def discard(*, lr: float, engine: Engine = engine) -> UpdateReport:
                engine.discard()
                return UpdateReport(grad_norm=1.0)

            biases = [router.balance.bias_E.clone() for router in engine.model.routers()]
            with mock.patch.object(engine, "update", discard):
                one_step(config, engine, 1)
            for router, bias_E in zip(engine.model.routers(), biases, strict=True):
                router.balance.bias_E.copy_(bias_E)
            after = _whole_state(engine)
            is_same = all(torch.equal(before[key], after[key]) for key in before)
        norms.append(one_step(config, engine, 2).grad_norm)
    return is_same, *norms


def _whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    return {key: value for file in engine.snapshot().values() for key, value in file.items()}


def test_discarded_gradient_that_was_finite_leaves_no_trace(runs) -> None:
    corpus = runs.folder / "corpus"
    accumulates = {"training": {"micro_batch_size": 4}}
    configs = [small_config(corpus, ENGINES[engine], accumulates) for engine in ENGINES]
    for of_rank in run_on_ranks(steps_around_a_discarded_one, configs, time_limit=120):
        for engine, (is_same, found, expected) in zip(ENGINES, of_rank, strict=True):
            assert is_same, engine
            assert found == expected, engine
