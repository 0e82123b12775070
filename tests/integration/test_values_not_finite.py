"""Training on numbers that are not finite, or too large to be squared."""

import numpy as np
import torch
from test_pretrain_command import recorded, told, write_config

from small_run import build_small_corpus
from tsmoe.__main__ import main
from tsmoe.errors import TrainingError
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
