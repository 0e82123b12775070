"""`engine.wire_precision` reaches the exchange of rows, and only that."""

from pathlib import Path

import pytest

from rank_pool import run_on_ranks
from small_run import build_small_corpus, run_steps, small_config
from tsmoe.errors import ConfigError

SPREAD = {"engine": {"type": "deepspeed", "expert_parallel_size": 2}}
WHOLE = {"engine": {"type": "deepspeed", "expert_parallel_size": 1}}
BF16_WIRE = {"engine": {"wire_precision": "bf16"}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return build_small_corpus(tmp_path_factory.mktemp("small"))


def losses_of(*configs) -> list[list[float]]:
    """On a rank: train with each configuration."""
    return [run_steps(config).losses for config in configs]


def test_rows_are_rounded_between_ranks_and_nowhere_else(corpus) -> None:
    configs = [
        small_config(corpus, layout, *wire)
        for layout in (SPREAD, WHOLE)
        for wire in ((), (BF16_WIRE,))
    ]
    for exact, rounded, whole, whole_rounded in run_on_ranks(losses_of, *configs):
        assert whole == whole_rounded  # nothing travels
        assert exact != rounded
        # Rows are rounded to 8 bits, 4e-3; the loss is a mean over thousands of them.
        assert rounded == pytest.approx(exact, rel=4e-3)


def test_another_precision_is_refused(corpus) -> None:
    with pytest.raises(ConfigError, match="wire_precision"):
        small_config(corpus, SPREAD, {"engine": {"wire_precision": "fp8"}})
