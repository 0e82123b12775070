"""Forecasts are taken out on the first rank alone, where experts are spread over two."""

from pathlib import Path

import numpy as np

from rank_pool import run_on_ranks
from small_run import build_small_corpus, small_config
from tsmoe import ranks as ranks_module
from tsmoe.engine.build import build_engine
from tsmoe.train.held_out import HeldOutForecast, HeldOutForecasts
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.open_data import open_data, open_source
from tsmoe.train.run_config import RunConfig
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import validation_loss


def validate(config: RunConfig) -> tuple[float, float, list[HeldOutForecast]]:
    """Return the loss without and with a look at the forecasts, and what was seen of them."""
    ranks = ranks_module.start(timeout_seconds=30, device="cpu")
    engine = build_engine(config, ranks, prepare=prepare_pretraining)
    source = open_source(config, ranks)
    data = open_data(config, source, ranks, first_window=0, positions=None)
    objective = NextPatchObjective(error_unit="window", target_clip=10.0)
    show = HeldOutForecasts(source.item_id) if ranks.is_first else None
    plain = validation_loss(engine, data.validation, objective=objective)
    watched = validation_loss(engine, data.validation, objective=objective, show=show)
    return plain, watched, show.found if show is not None else []


def test_first_rank_shows_what_one_process_forecasts(tmp_path: Path) -> None:
    corpus = build_small_corpus(tmp_path)
    spread = {"engine": {"type": "deepspeed", "expert_parallel_size": 2}}
    (alone,) = run_on_ranks(validate, small_config(corpus), num_ranks=1)
    first, second = run_on_ranks(validate, small_config(corpus, spread))
    assert first[0] == first[1] == second[0] == second[1]
    assert second[2] == []
    assert first[2]
    for ours, theirs in zip(first[2], alone[2], strict=True):
        assert ours.name == theirs.name
        np.testing.assert_array_equal(ours.target_Q, theirs.target_Q)
        # Sums of other shapes: the last digits of float32.
        np.testing.assert_allclose(ours.forecast_Q, theirs.forecast_Q, rtol=1e-4, atol=1e-4)
