"""The large preset on 8 and 64 ranks, of which one at a time is real.

Widths are narrow; layers, experts, patches and all of the set-up are the preset's. The full size
and up to 4,096 ranks are in benchmarks/scaling.py.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from data_pipeline.shards import Corpus
from rank_pool import run_on_ranks
from small_run import build_small_corpus
from tsmoe.data.loader import DataConfig, TrainingBatches
from tsmoe.data.windows import training_windows
from tsmoe.engine import PlainEngineConfig
from tsmoe.engine.build import build_engine
from tsmoe.ranks import Ranks
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.run_config import RunConfig, resolve
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from fake_ranks import Collective, FakeRank, fake_rank, windows_of_all
from rank_mistakes import rank_mistakes

NARROW = (
    "model.d_model=64",
    "model.feed_forward.d_ff_expert=32",
    "model.feed_forward.d_ff_shared=64",
)


def large_config(world_size: int, expert_parallel_size: int) -> RunConfig:
    settings = [
        *NARROW,
        "training.device=cpu",
        "training.precision=fp32",
        "training.micro_batch_size=2",
        f"training.global_batch_size={2 * world_size}",
        f"engine.expert_parallel_size={expert_parallel_size}",
    ]
    return resolve("time_tracker_large", settings)


def be_ranks(
    ranks: Sequence[int],
    world_size: int,
    expert_parallel_size: int,
    be: Callable[[RunConfig, int, int], FakeRank] = fake_rank,
) -> list[FakeRank]:
    config = large_config(world_size, expert_parallel_size)
    return [run_on_ranks(be, config, rank, world_size, num_ranks=1)[0] for rank in ranks]


@pytest.fixture(scope="module")
def eight() -> list[FakeRank]:
    """All of 8 ranks, of which 4 share a set of experts."""
    return be_ranks(range(8), 8, 4)


def test_eight_ranks_fit_together(eight) -> None:
    assert rank_mistakes(eight, expert_parallel_size=4) == []


def test_each_rank_holds_its_share(eight) -> None:
    """8 experts over 4 ranks, twice; the optimizer of what is not an expert over all 8."""
    assert [rank.expert_ids[0] for rank in eight] == [(0, 1), (2, 3), (4, 5), (6, 7)] * 2
    assert {len(rank.expert_ids) for rank in eight} == {12}
    assert [sorted({len(part.members) for part in rank.partitions}) for rank in eight] == [
        [2, 8]
    ] * 8
    assert [sorted(rank.writes) for rank in eight] == [
        ["dense.safetensors", "experts-00000.safetensors"],
        ["experts-00001.safetensors"],
        ["experts-00002.safetensors"],
        ["experts-00003.safetensors"],
        *[[]] * 4,
    ]


def test_rows_are_exchanged_with_those_that_share_experts_only(eight) -> None:
    for rank in eight:
        first = rank.rank // 4 * 4
        exchanges = [call for call in rank.collectives if call.kind == "alltoall_base_"]
        counts = [call for call in exchanges if not call.send]
        rows = [call for call in exchanges if call.send]
        assert len(counts) == 12  # once a layer
        assert {call.members for call in exchanges} == {tuple(range(first, first + 4))}
        # 2 windows of 30 patches, each to 2 experts, there or back: none is dropped.
        assert {120 in (sum(c.send), sum(c.receive)) for c in rows} == {True}
        assert len(rows) % (12 * 2) == 0
        assert len(rows) >= 12 * 4  # there and back, and the gradients of both


def test_ranks_of_a_world_of_64_fit_together() -> None:
    ranks = be_ranks((0, 31, 63), 64, 8)
    assert rank_mistakes(ranks, expert_parallel_size=8) == []
    assert [rank.expert_ids[0] for rank in ranks] == [(0,), (7,), (7,)]
    assert ranks[2].sharing == tuple(range(56, 64))


def plain_loss(config: RunConfig) -> float:
    """Loss of the windows of a fake rank without ranks and DeepSpeed."""
    engine = build_engine(
        replace(config, engine=PlainEngineConfig()), Ranks(), prepare=prepare_pretraining
    )
    return training_step(
        engine,
        [windows_of_all(config)],
        step=0,
        lr=1e-3,
        balance_rate=0,
        objective=NextPatchObjective(
            error_unit=config.training.error_unit, target_clip=config.training.target_clip
        ),
        series_name=str,
    ).loss


def test_a_fake_rank_that_holds_all_experts_computes_the_real_loss() -> None:
    (rank,) = be_ranks((5,), 8, 1)
    (loss,) = run_on_ranks(plain_loss, large_config(8, 1), num_ranks=1)
    assert rank.loss == pytest.approx(loss, rel=1e-6)


# Mistakes are found: each of these would hang or train nonsense on a cluster.


def share_with_every_other_rank(config: RunConfig, rank: int, world_size: int) -> FakeRank:
    """Let ranks with the same experts be neighbours, which DeepSpeed can do too."""
    from deepspeed.utils import groups

    create = groups._create_expert_and_data_parallel
    groups._create_expert_and_data_parallel = partial(create, use_data_before_expert_parallel_=True)
    return fake_rank(config, rank, world_size)


def test_a_wrong_group_is_found() -> None:
    ranks = be_ranks((0, 5), 8, 4, share_with_every_other_rank)
    found = rank_mistakes(ranks, expert_parallel_size=4)
    assert "rank 0 shares experts with [0, 2, 4, 6]" in found
    assert "rank 5 shares experts with [1, 3, 5, 7]" in found
    assert "rank 5 made no group of [0, 1, 2, 3]" in found


def change_call(
    rank: FakeRank, number: int, change: Callable[[Collective], Collective]
) -> FakeRank:
    calls = list(rank.collectives)
    calls[number] = change(calls[number])
    return replace(rank, collectives=tuple(calls))


def lose_a_row(call: Collective) -> Collective:
    return replace(call, send=(call.send[0] - 1, *call.send[1:]))


MISTAKES: dict[str, tuple[Callable[[FakeRank], FakeRank], str]] = {
    "one call fewer": (
        lambda rank: replace(rank, collectives=rank.collectives[:-1]),
        "times: they hang",
    ),
    "a row fewer": (lambda rank: change_call(rank, 2, lose_a_row), "rows are sent and"),
    "another operation": (
        lambda rank: change_call(rank, 0, lambda call: replace(call, kind="broadcast_")),
        "allreduce_ .* meets broadcast_",
    ),
    "a group not made": (lambda rank: replace(rank, groups=rank.groups[1:]), "made no group of"),
    "too small a part of the optimizer": (
        lambda rank: replace(
            rank,
            partitions=(replace(rank.partitions[0], size=rank.partitions[0].size - 1),),
        ),
        "are not the",
    ),
    "experts of another rank": (
        lambda rank: replace(rank, expert_ids=((0, 1),) * 12),
        r"hold experts \[0, 0, 1, 1, ",
    ),
    "a writer too many": (
        lambda rank: replace(rank, writes={"dense.safetensors": ()}),
        "two ranks write the same file",
    ),
    "a writer too few": (lambda rank: replace(rank, writes={}), "nobody writes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_one_rank_is_found(eight, mistake) -> None:
    make, expected = MISTAKES[mistake]
    ranks = [*eight[:3], make(eight[3]), *eight[4:]]
    found = rank_mistakes(ranks, expert_parallel_size=4)
    assert any(re.search(expected, line) for line in found), found


# The order of windows.


@pytest.fixture(scope="module")
def batches_of(tmp_path_factory) -> Callable[[Ranks], TrainingBatches]:
    """Give a rank's micro-batches of 1 window; 128 windows are a step."""
    corpus = Corpus.open(build_small_corpus(tmp_path_factory.mktemp("small")))
    index = training_windows(corpus, window_length=80, patch_length=16, stride=1)

    def of(ranks: Ranks) -> TrainingBatches:
        sizes = {"global_batch_size": 128, "micro_batch_size": 1}
        return TrainingBatches(corpus, index, DataConfig(), seed=0, ranks=ranks, **sizes)

    return of


@pytest.mark.parametrize("world_size", [8, 64])
def test_ranks_together_see_the_windows_of_one(batches_of, world_size, monkeypatch) -> None:
    """Each window of two steps once, in the order of one rank, whatever the number of ranks."""
    monkeypatch.setattr("tsmoe.data.plan._WINDOWS_AT_A_TIME", 64)  # else 65,536 for each rank
    alone = batches_of(Ranks())
    ranks = [batches_of(Ranks(rank=rank, size=world_size)) for rank in range(world_size)]
    together = [batches[number] for number in range(256 // world_size) for batches in ranks]
    for place, batch in enumerate(together):
        expected = alone[place].values_BCL
        torch.testing.assert_close(batch.values_BCL, expected, rtol=0, atol=0, equal_nan=True)
    assert len({tuple(b.values_BCL.nan_to_num().flatten().tolist()) for b in together}) == 256
