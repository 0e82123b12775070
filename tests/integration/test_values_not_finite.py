"""Training on numbers that are not finite, or too large to be squared."""

import numpy as np
import pytest
import torch
import yaml
from test_pretrain_command import recorded, told, write_config

import finetune_run
from small_run import build_small_corpus
from tsmoe.__main__ import main
from tsmoe.checkpoint.resume import newest_checkpoint
from tsmoe.config import merge_layers
from tsmoe.errors import TrainingError
from tsmoe.finetune.loop import TableWork
from tsmoe.heads.point import PointHead
from tsmoe.train import loop


def test_loss_that_is_not_finite_names_step_and_series_and_updates_nothing(
    tmp_path, capsys, monkeypatch
) -> None:
    config_file = write_config(tmp_path / "small.yaml", build_small_corpus(tmp_path / "small"))
    begun = tmp_path / "begun"
    assert main(["pretrain", str(config_file), f"run={begun}", "training.steps=2"]) == 0
    bad_series = 3
    state: dict[str, torch.Tensor] = {}
    real_step = loop.training_step

    def step_with_a_bad_series(engine, micro_batches, **settings):
        state.update({k: v.clone() for k, v in engine.model.state_dict().items()})
        if settings["step"] == 5:
            for batch in micro_batches:
                batch.series_ids_B[0] = bad_series

            def point_errors(self, prediction_BCNPK, target_BCNP):
                errors = real_errors(self, prediction_BCNPK, target_BCNP)
                return torch.cat((errors[:1] * float("nan"), errors[1:]))

            real_errors = PointHead.point_errors
            monkeypatch.setattr(PointHead, "point_errors", point_errors)
        try:
            return real_step(engine, micro_batches, **settings)
        except TrainingError:
            for name, value in engine.model.state_dict().items():
                assert torch.equal(value, state[name]), name
            raise

    monkeypatch.setattr(loop, "training_step", step_with_a_bad_series)
    code, message = told(capsys, str(config_file), f"run={begun}", "training.steps=8")
    assert code == 1
    assert "step 5: the loss is not finite; nothing was updated" in message
    assert "with a loss that is not finite: " in message
    assert "tsmoe data inspect" in message
    assert not (begun / "DONE").exists()
    assert (begun / "checkpoints" / "latest").read_text() == "step_00000002"
    assert [line["step"] for line in recorded(begun) if "loss/train" in line] == list(range(5))


def test_huge_values_do_not_spoil_the_numbers(tmp_path, capsys) -> None:
    """1e38 is a float32, but its square is not."""
    corpus = build_small_corpus(tmp_path / "huge", spike=1e38)
    config_file = write_config(tmp_path / "huge.yaml", corpus)
    run = tmp_path / "run"
    code, message = told(capsys, str(config_file), f"run={run}", "training.steps=6")
    assert code == 0, message
    for line in recorded(run):
        numbers = [value for value in line.values() if isinstance(value, float)]
        assert np.isfinite(numbers).all(), line


@pytest.fixture
def finetuning(tmp_path) -> list[str]:
    """Return the words of a fine-tuning run."""
    table = finetune_run.write_table(tmp_path / "table.csv")
    package = finetune_run.write_package(tmp_path / "package")
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(merge_layers(finetune_run.SMALL, {"run": "unused"})))
    return ["finetune", str(path), f"run={tmp_path / 'run'}", f"model={package}", f"data={table}"]


def test_fine_tuning_skips_a_bad_step_where_it_is_told_to(
    finetuning, tmp_path, monkeypatch
) -> None:
    real = TableWork.micro_batches

    def micro_batches(self, step, ranks):
        batches = real(self, step, ranks)
        if step == 2:
            batches[0].values_BCL[:] = torch.nan
        return batches

    monkeypatch.setattr(TableWork, "micro_batches", micro_batches)
    assert main([*finetuning, "training.on_not_finite=skip"]) == 0
    lines = recorded(tmp_path / "run")
    assert [line["step"] for line in lines if "loss/train" in line] == [0, 1, 3, 4, 5]
    (event,) = [line["not_finite"] for line in lines if "not_finite" in line]
    assert (event["step"], event["action"], event["windows"]) == (2, "skip", [32, 48])
    assert set(event["series"]) <= {"a", "b", "c", "hour"}
    _, meta = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert (meta.step, meta.updates, meta.not_finite) == (6, 5, [event])


def test_fine_tuning_refuses_to_roll_back(finetuning, tmp_path, capsys) -> None:
    assert main([*finetuning, "training.on_not_finite=roll_back"]) == 2
    assert "on_not_finite is roll_back, but a fine-tuning run" in capsys.readouterr().err
    tasks = ["finetune", "patch_moe_imputation", "data=none", "run=none"]
    assert main([*tasks, "training.on_not_finite=roll_back"]) == 2
    assert "use stop or skip" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
