"""Small rules of training that no loss curve would show to be broken."""

from types import SimpleNamespace

import torch

from tsmoe.batch import WindowBatch
from tsmoe.engine.optimizer import OptimizerConfig, parameter_groups
from tsmoe.ranks import Ranks
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import validation_loss


def test_weight_decay_is_on_matrices_only(make_model) -> None:
    model = make_model()
    prepare_pretraining(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = (
        {names[id(parameter)] for parameter in group["params"]}
        for group in parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    )
    assert any(name.endswith("experts.down_weight") for name in decayed)
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert {name for name in plain if "clusters" in name} == {
        name for name in names.values() if "clusters" in name
    }
    # All that is trained is in one of them; the resting biases between variates are in none.
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert decayed | plain == trained
    assert not decayed & plain


def test_validation_drops_nothing_and_training_goes_on_with_dropout(make_model) -> None:
    model = make_model(dropout=0.5).train()
    length = model.config.window_length
    values_BCL = torch.randn(4, 1, length, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    is_true = torch.ones_like(values_BCL, dtype=torch.bool)
    batch = WindowBatch(
        values_BCL=values_BCL,
        observed_BCL=is_true,
        is_target_BCL=is_true,
        series_ids_B=torch.zeros(4, dtype=torch.int64),
    )
    engine = SimpleNamespace(model=model, ranks=Ranks())
    losses = {
        validation_loss(
            engine, [batch], objective=NextPatchObjective(error_unit="window", target_clip=10.0)
        )
        for _ in range(3)
    }
    assert len(losses) == 1
    assert model.training
