"""What DeepSpeed 0.19.8 and accelerate get wrong unless they are told otherwise.

Each test fails without the cure in `tsmoe.engine` that it is about.
"""

import os
import time
from pathlib import Path

import pytest
import torch

from rank_pool import run_on_ranks
from small_run import (
    StepsRun,
    build_small_corpus,
    one_step,
    run_steps,
    small_config,
    start_engine,
    step_batches,
)
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.config import merge_layers
from tsmoe.engine import deepspeed_moe
from tsmoe.engine.build import build_engine
from tsmoe.engine.deepspeed_engine import initialise_deepspeed
from tsmoe.engine.protocol import Engine
from tsmoe.errors import ConfigError, TrainingError
from tsmoe.models import build_model
from tsmoe.moe.experts import Experts
from tsmoe.ranks import Ranks
from tsmoe.train.run_config import RunConfig
from tsmoe.train.stages import prepare_pretraining

SPREAD = {"engine": {"type": "deepspeed", "expert_parallel_size": 2}}
WHOLE = {"engine": {"type": "deepspeed", "expert_parallel_size": 1}}
BF16 = {"training": {"precision": "bf16"}}
OFFLOADED = {"engine": {"offloads_optimizer": True}}
SLICED = {"engine": {"zero_stage": 3}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return build_small_corpus(tmp_path_factory.mktemp("small"))


# Compilers and timeouts.


def start_without_a_compiler(config: RunConfig, folder: str) -> tuple[list[str], str]:
    os.environ["PATH"] = folder
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    engine = start_engine(config)
    one_step(config, engine, 0)
    return os.listdir(folder), type(engine._zero.optimizer).__module__


def test_deepspeed_engine_compiles_nothing(corpus, tmp_path) -> None:
    """Without the cure: 'Unable to JIT load the deepspeed_shm_comm op', or 85 s of compiling."""
    config = small_config(corpus, SPREAD)
    for files, optimizer_module in run_on_ranks(start_without_a_compiler, config, str(tmp_path)):
        assert files == []
        assert optimizer_module.startswith("torch.optim")


def wait_for_a_lost_rank(config: RunConfig, over: str) -> tuple[float, str]:
    """Rank 1 takes no part in an exchange of experts; how long does rank 0 wait, and for what."""
    ranks = ranks_module.start(timeout_seconds=60, device="cpu")
    initialise_deepspeed(ranks, timeout_seconds=3)
    engine = build_engine(config, ranks, prepare=prepare_pretraining)
    experts = next(m for m in engine.model.modules() if isinstance(m, Experts))
    begun = time.monotonic()
    if not ranks.is_first:
        while not Path(over).exists() and time.monotonic() < begun + 15:
            time.sleep(0.05)
        return 0.0, ""
    try:
        experts.ranks.start_all_to_all(torch.ones(2), send=[1, 1], receive=[1, 1]).wait()
    except RuntimeError as error:
        return time.monotonic() - begun, str(error)
    finally:
        Path(over).touch()
    return time.monotonic() - begun, "no error"


def test_expert_groups_keep_the_timeout(corpus, tmp_path) -> None:
    """Without the cure groups that DeepSpeed makes wait for 30 minutes."""
    config = small_config(corpus, SPREAD, {"training": {"timeout_seconds": 3}})
    over = str(tmp_path / "over")
    waited, error = run_on_ranks(wait_for_a_lost_rank, config, over, time_limit=30)[0]
    assert "imed out" in error
    assert 2 < waited < 10


def start_where_accelerate_is_blind(config: RunConfig) -> str:
    ranks = ranks_module.start(device="cpu")
    for name in ("LOCAL_RANK", "WORLD_SIZE"):  # all that accelerate goes by
        del os.environ[name]
    try:
        build_engine(config, ranks, prepare=prepare_pretraining)
    except ConfigError as error:
        return str(error)
    return "no error"


def test_plain_engine_refuses_when_accelerate_sees_other_processes(corpus) -> None:
    for error in run_on_ranks(start_where_accelerate_is_blind, small_config(corpus)):
        assert "accelerate sees 1 process" in error
        assert "the launcher started 2" in error


def count_exchanges(config: RunConfig) -> int:
    """Count the exchanges of gradients in a step of two passes."""
    engine = start_engine(config)
    count = 0

    def exchange(_: object, bucket: torch.distributed.GradBucket):
        nonlocal count
        count += 1
        summed = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return summed.then(lambda done: done.value()[0] / engine.ranks.size)

    one_step(config, engine, 0)  # buckets are laid out anew after the first
    engine._wrapped.register_comm_hook(None, exchange)
    one_step(config, engine, 1)
    return count


def test_plain_engine_exchanges_gradients_once_a_step(corpus) -> None:
    config = small_config(corpus, {"training": {"micro_batch_size": 4}})
    assert run_on_ranks(count_exchanges, config) == [1, 1]


def refusal_of_marked_experts(config: RunConfig) -> str:
    """Start stage 3 with the experts of stages 1 and 2."""
    deepspeed_moe.SlicedExperts = deepspeed_moe.DeepSpeedExperts  # type: ignore[misc]
    try:
        start_engine(config)
    except AssertionError as error:
        return str(error)
    return "no error"


def test_stage_3_still_refuses_deepspeeds_own_expert_class(corpus) -> None:
    """Once it does not, `SlicedExperts` may go."""
    (refusal,) = run_on_ranks(
        refusal_of_marked_experts, small_config(corpus, WHOLE, SLICED), num_ranks=1
    )
    assert "Native DeepSpeed MoE is not supported with ZeRO Stage 3" in refusal


# bf16.


def bf16_facts(config: RunConfig) -> tuple[StepsRun, dict[str, list[str]], list[float]]:
    run = run_steps(config)
    engine = start_engine(config)
    dtypes = {
        "parameters": sorted({str(p.dtype) for p in engine.model.parameters()}),
        "buffers": sorted({str(b.dtype) for b in engine.model.buffers()}),
    }
    # Near 0.3, neighbouring bf16 numbers are 2e-3 apart.
    balance = engine.model.routers()[0].balance
    balance.bias_E.fill_(0.3)
    balance.update(torch.tensor([0, 9, 9, 9]), rate=5e-4)
    return run, dtypes, balance.bias_E.tolist()


@pytest.fixture(scope="module")
def bf16_ranks(corpus):
    return run_on_ranks(bf16_facts, small_config(corpus, SPREAD, BF16))


def test_bf16_stays_near_fp32(bf16_ranks, corpus) -> None:
    (twin,) = run_on_ranks(run_steps, small_config(corpus), num_ranks=1)
    for run, _, _ in bf16_ranks:
        # 8 bits of mantissa: 0.4 % for each rounding; gradients of both ranks and of all experts
        # enter the norm, which a lost half would lower by 10 % and more.
        assert run.losses == pytest.approx(twin.losses, rel=0.02)
        assert run.grad_norms == pytest.approx(twin.grad_norms, rel=0.05)
    assert torch.equal(bf16_ranks[0][0].bias_ME, bf16_ranks[1][0].bias_ME)


def test_bf16_leaves_load_biases_in_float32(bf16_ranks) -> None:
    for _, dtypes, bias_E in bf16_ranks:
        assert dtypes == {"parameters": ["torch.bfloat16"], "buffers": ["torch.float32"]}
        assert bias_E == pytest.approx([0.3005, 0.2995, 0.2995, 0.2995], abs=1e-7)


def test_bf16_snapshot_holds_float32_masters(bf16_ranks) -> None:
    dense = bf16_ranks[0][0].snapshot["dense.safetensors"]
    value = dense["value/embed.values.weight"]
    assert value.dtype == torch.float32
    assert not torch.equal(value, value.bfloat16().float())


# Ranks that are not alike.

ONE_PASS = {"training": {"micro_batch_size": 16}}
BIASES = {"balanced": [0.0, 0.0, 0.0, 0.0], "first rank idle": [0.0, 0.0, 9.0, 9.0]}


def uneven_steps(configs: list[RunConfig]) -> list[dict[str, tuple[float, float]]]:
    """Do two steps with 13 windows on the first rank and 3 on the second.

    Returns:
        For each config and load bias: the loss of the second step, in which the first one shows,
        and the norm of the first gradient.
    """
    found = []
    for config in configs:
        found.append({})
        for name, bias_E in BIASES.items():
            engine = start_engine(config)
            for router in engine.model.routers():
                router.balance.bias_E.copy_(torch.tensor(bias_E))
            (batch,) = step_batches(small_config(Path(config.corpus), ONE_PASS), Ranks(), 0)
            if engine.ranks.size == 2:
                batch = part(batch, slice(13) if engine.ranks.is_first else slice(13, None))
            first, second = (one_step(config, engine, i, micro_batches=[batch]) for i in range(2))
            found[-1][name] = second.loss, first.grad_norm
    return found


def part(batch: WindowBatch, windows: slice) -> WindowBatch:
    fields = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
    return WindowBatch(**{name: tensor[windows] for name, tensor in fields.items()})


def test_ranks_with_unequal_batches_weigh_by_points(corpus) -> None:
    ((alone,),) = run_on_ranks(uneven_steps, [small_config(corpus, ONE_PASS)], num_ranks=1)
    engines = (SPREAD, WHOLE, merge_layers(SPREAD, SLICED), merge_layers(WHOLE, SLICED), {})
    configs = [small_config(corpus, engine) for engine in engines]
    for of_rank in run_on_ranks(uneven_steps, configs):
        for of_engine in of_rank:
            for name, numbers in of_engine.items():
                assert numbers == pytest.approx(alone[name], rel=1e-5), name


def steps_over_a_bad_gradient(configs: list[RunConfig]) -> list[tuple[str, bool]]:
    """Put an infinity into the gradient of one rank; return errors and whether weights stayed."""
    return [step_over_a_bad_gradient(config) for config in configs]


def step_over_a_bad_gradient(config: RunConfig) -> tuple[str, bool]:
    engine = start_engine(config)
    one_step(config, engine, 0)
    state = whole_state(engine)
    if not engine.ranks.is_first:
        weight = engine.model.embed.values.weight
        weight.register_hook(lambda gradient: gradient * float("inf"))
    try:
        one_step(config, engine, 1)
        error = "no error"
    except TrainingError as caught:
        error = str(caught)
    is_same = all(torch.equal(state[k], v) for k, v in whole_state(engine).items())
    return error, is_same


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """What this rank would write: stage 3 leaves nothing whole in the model."""
    return {key: value for file in engine.snapshot().values() for key, value in file.items()}


def test_gradient_that_is_not_finite_stops_before_the_update(corpus) -> None:
    engines = (
        SPREAD,
        merge_layers(SPREAD, BF16),
        merge_layers(SPREAD, OFFLOADED, BF16),
        merge_layers(SPREAD, OFFLOADED),
        merge_layers(SPREAD, SLICED),
        merge_layers(WHOLE, SLICED, OFFLOADED, BF16),
        {},
    )
    configs = [small_config(corpus, engine) for engine in engines]
    for of_rank in run_on_ranks(steps_over_a_bad_gradient, configs):
        for error, is_same in of_rank:
            assert "step 1: the gradient is not finite; nothing was updated" in error
            assert is_same


# Names.


def test_no_name_outside_the_experts_holds_the_word_expert(corpus) -> None:
    """DeepSpeed sorts checkpoints by that word."""
    model = build_model(small_config(corpus).model)
    names = list(model.state_dict())
    assert [n for n in names if ".experts." in n]
    assert [n for n in names if "expert" in n.replace(".experts.", ".")] == []
    inside = [name for name, _ in model.named_modules() if "expert" in name]
    assert all(name.endswith(".experts") for name in inside)
