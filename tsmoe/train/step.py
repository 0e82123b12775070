"""One optimizer step, from micro-batches to a report. Read this first.

Shapes: B windows, C variates, N patches, E routed experts, M expert layers; T tokens of a
micro-batch and G pairs of a window and a series in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.engine.protocol import Engine
from tsmoe.errors import TrainingError
from tsmoe.losses import LossTerms
from tsmoe.nn.matmul import exact_onednn_matmul
from tsmoe.nn.spans import NO_SERIES
from tsmoe.ranks import Ranks
from tsmoe.train.held_out import HeldOutForecasts
from tsmoe.train.not_finite import NotFiniteError
from tsmoe.train.objective import Objective
from tsmoe.train.telemetry import StepCost, StepTelemetry

# How many series an error names.
_SERIES_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step did, equal on every rank."""

    loss: float
    """Mean over all points that counted, of all ranks and micro-batches."""
    regulariser: float = 0.0
    """What was added to the loss, such as one that balances experts; 0 where there is none."""
    num_points: int
    """Recorded points of the batch that were forecast, each counted once."""
    num_tokens: int
    """Tokens of the batch that are of a series."""
    num_sequences: int
    """Windows times variates of the batch: what the model's operations are counted by."""
    grad_norm: float
    lr: float
    load_ME: Tensor
    """Decisions for each expert of each layer, over all ranks and micro-batches, int64."""
    margin_M: Tensor
    """Mean over decisions of how far the last chosen expert was ahead of the next, float64; NaN
    where every expert is chosen."""
    flags: tuple[int, ...]
    """The flags that the caller handed in, summed over ranks."""
    cost_before: StepCost | None
    """What the step before cost; None if that is not known or not measured."""


def training_step(
    engine: Engine,
    micro_batches: Sequence[WindowBatch],
    *,
    step: int,
    lr: float,
    balance_rate: float,
    objective: Objective,
    series_name: Callable[[int], str],
    flags: Sequence[bool] = (),
    telemetry: StepTelemetry | None = None,
) -> StepReport:
    """Do one step on this rank's micro-batches. Collective.

    The loss is the mean over the points of the *global* batch, so any number of ranks and
    micro-batches gives the same gradient; but for a regulariser, which is the mean of those of the
    micro-batches.

    Args:
        engine: holds the model.
        micro_batches: of this rank, on its device; equally many on every rank.
        step: number of the step, for errors and random numbers.
        lr: learning rate of the step.
        balance_rate: how far the load bias moves after it.
        objective: what is to be minimised.
        series_name: names a series of the corpus in an error.
        flags: small facts of this rank that all want to know; they ride on a sum made anyway.
        telemetry: measures the step; what the step before cost rides along.

    Raises:
        NotFiniteError: on all ranks, if loss or gradient is not finite; parameters, moments and
            load biases are those before the step, and no gradient is left.
        TrainingError: if no point of the batch is observed.
    """
    ranks = engine.ranks
    counts = ranks.sum(_counts(engine.model, micro_batches, objective, ranks.device))
    with exact_onednn_matmul(ranks.device):
        sums = _forward_and_backward(
            engine, micro_batches, objective, num_targets=counts[0], telemetry=telemetry
        )
    totals = _sum_over_ranks(ranks, counts, sums, flags=flags, telemetry=telemetry)
    if totals.num_targets == 0:
        raise TrainingError(
            f"step {step}: no point of the batch can be a target; check the corpus for gaps"
        )
    if not math.isfinite(totals.error):
        engine.discard()
        raise _not_finite("loss", step, ranks, micro_batches, sums.terms, series_name, totals)
    grad_norm = engine.update(lr=lr).grad_norm
    if not math.isfinite(grad_norm):
        raise _not_finite("gradient", step, ranks, micro_batches, sums.terms, series_name, totals)
    if balance_rate:
        load_ME = totals.load_ME.to(ranks.device)
        for router, load_E in zip(engine.model.routers(), load_ME, strict=True):
            router.balance.update(load_E, rate=balance_rate)
    return StepReport(
        loss=totals.error / totals.num_targets,
        regulariser=totals.regulariser,
        num_points=totals.num_points,
        num_tokens=totals.num_tokens,
        num_sequences=totals.num_sequences,
        grad_norm=grad_norm,
        lr=lr,
        load_ME=totals.load_ME,
        margin_M=totals.margin_M,
        flags=totals.flags,
        cost_before=totals.cost_before,
    )


@dataclass(frozen=True, kw_only=True)
class _PassSums:
    """What the micro-batches of this rank gave."""

    error: Tensor
    """float64, a scalar: the sum of all point errors."""
    load_ME: Tensor
    margin_M: Tensor
    """float64: the sum over decisions."""
    regulariser: Tensor
    """float64, a scalar: this rank's share of what is added to the mean error."""
    terms: list[LossTerms]
    """Detached, of each micro-batch."""


def _forward_and_backward(
    engine: Engine,
    micro_batches: Sequence[WindowBatch],
    objective: Objective,
    *,
    num_targets: Tensor,
    telemetry: StepTelemetry | None,
) -> _PassSums:
    """Pass each micro-batch forward and backward; nothing here waits for the device."""
    ranks = engine.ranks
    # Engines average over ranks; the sum over ranks is wanted. Without targets all errors are 0.
    weight = (ranks.size / num_targets.clamp(min=1)).float()
    error_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    load_ME = _no_load(engine.model, ranks.device)
    margin_M = torch.zeros(len(load_ME), dtype=torch.float64, device=ranks.device)
    terms: list[LossTerms] = []
    regulariser = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for number, batch in enumerate(micro_batches):
        is_last = number == len(micro_batches) - 1
        if telemetry is not None:
            telemetry.forward_begins()
        output = engine.forward(batch, last_micro_batch=is_last)
        term = objective.loss(engine.model, output, batch, ranks=ranks)
        loss = term.error_B.sum() * weight
        if term.regulariser is not None:
            # A mean of its own already: over ranks a sum is wanted, over micro-batches the mean.
            share = term.regulariser / len(micro_batches)
            loss = loss + share * ranks.size
            regulariser += share.detach()
        engine.backward(loss, last_micro_batch=is_last)
        if telemetry is not None:
            telemetry.backward_ended()
        error_sum += term.error_B.detach().sum(dtype=torch.float64)
        for layer, routing in enumerate(output.routings):
            load_ME[layer] += routing.load_E
            decisions = routing.load_E.sum()
            # Without decisions there is no margin, which must not spoil that of other ranks.
            margin_M[layer] += torch.where(decisions > 0, routing.margin * decisions, 0)
        terms.append(replace(term, error_B=term.error_B.detach(), regulariser=None))
    return _PassSums(
        error=error_sum,
        load_ME=load_ME,
        margin_M=margin_M,
        regulariser=regulariser,
        terms=terms,
    )


@dataclass(frozen=True, kw_only=True)
class _Totals:
    """What all ranks' micro-batches gave together, on the host; see `StepReport`."""

    num_targets: int
    num_points: int
    num_tokens: int
    num_sequences: int
    error: float
    regulariser: float
    load_ME: Tensor
    margin_M: Tensor
    flags: tuple[int, ...]
    cost_before: StepCost | None


def _sum_over_ranks(
    ranks: Ranks,
    counts: Tensor,
    sums: _PassSums,
    *,
    flags: Sequence[bool],
    telemetry: StepTelemetry | None,
) -> _Totals:
    """Sum all that a step wants to know in one exchange, and wait for it: the only such wait."""
    riding = telemetry.of_step_before() if telemetry is not None else []
    extra = torch.tensor([*map(float, flags), *riding], dtype=torch.float64)
    # float64 keeps counts exact.
    own = torch.stack((sums.error, sums.regulariser))
    parts = (own, sums.load_ME.flatten().double(), sums.margin_M,
             extra.to(ranks.device))  # fmt: skip
    summed = ranks.sum(torch.cat(parts))
    on_host = torch.cat((counts, summed)).cpu()
    numbers, (error, regulariser), load, margin_M, extra = on_host.split(
        [len(counts), *map(len, parts)]
    )
    num_targets, num_points, num_tokens, num_sequences = map(int, numbers)
    load_ME = load.long().reshape(sums.load_ME.shape)
    return _Totals(
        num_targets=num_targets,
        num_points=num_points,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        error=error.item(),
        regulariser=regulariser.item(),
        load_ME=load_ME,
        margin_M=margin_M / load_ME.sum(-1),
        flags=tuple(map(int, extra[: len(flags)])),
        cost_before=None if telemetry is None else telemetry.read(extra[len(flags) :].tolist()),
    )


def _counts(
    model: Any,  # as the objective takes it
    micro_batches: Sequence[WindowBatch],
    objective: Objective,
    device: torch.device,
) -> Tensor:
    """Count this rank's targets, points, tokens and sequences, as float64."""
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in micro_batches:
        counts += objective.count(model, batch).as_tensor(device)
    return counts


@torch.no_grad()
def validation_loss(
    engine: Engine,
    batches: Sequence[WindowBatch],
    *,
    objective: Objective,
    show: HeldOutForecasts | None = None,
) -> float:
    """Return the mean loss over the points of all ranks' batches. Collective.

    Args:
        engine: holds the model.
        batches: of this rank; as many as any other rank's.
        objective: what the loss is.
        show: takes some forecasts of this rank out; the ranks need not agree on it.
    """
    ranks = engine.ranks
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    engine.model.eval()
    for batch in batches:
        # Not engine.forward: an engine's forward prepares a backward pass that will not come.
        with exact_onednn_matmul(ranks.device):
            output = engine.model(**engine.model.arguments(batch))
        if show is not None:
            show.see(engine.model, batch, output)
        term = objective.loss(engine.model, output, batch, ranks=ranks)
        sums += torch.stack((term.error_B.sum(dtype=torch.float64), term.count_B.sum().double()))
    engine.model.train()
    error, count = ranks.sum(sums).tolist()
    return error / count if count else float("nan")


def _no_load(model: Any, device: torch.device) -> Tensor:
    biases = [router.balance.bias_E for router in model.routers()]
    num_experts = len(biases[0]) if biases else 0
    return torch.zeros(len(biases), num_experts, dtype=torch.int64, device=device)


def _mean_errors(batch: WindowBatch, term: LossTerms) -> tuple[Tensor, Tensor]:
    """Return number and mean error of each series, once for each window that it has a part in."""
    if batch.series_BCN is None:
        return batch.series_ids_B, term.error_B / term.count_B.clamp(min=1)
    assert term.error_BCN is not None, "who packs windows tells of tokens"
    assert term.count_BCN is not None
    window_BCN = torch.arange(batch.num_windows, device=batch.series_BCN.device)[:, None, None]
    keys_BCN2 = torch.stack((window_BCN.expand_as(batch.series_BCN), batch.series_BCN), dim=-1)
    keys_G2, group_T = keys_BCN2.flatten(0, 2).unique(dim=0, return_inverse=True)
    zeros_G = torch.zeros(len(keys_G2), device=keys_G2.device)
    error_G = zeros_G.index_add(0, group_T, term.error_BCN.flatten())
    count_G = zeros_G.index_add(0, group_T, term.count_BCN.flatten().float())
    is_series_G = keys_G2[:, 1] != NO_SERIES
    return keys_G2[is_series_G, 1], (error_G / count_G.clamp(min=1))[is_series_G]


def _not_finite(
    what: str,
    step: int,
    ranks: Ranks,
    micro_batches: Sequence[WindowBatch],
    terms: Sequence[LossTerms],
    series_name: Callable[[int], str],
    totals: _Totals,
) -> NotFiniteError:
    """Name the series to look at: those with a bad loss, else those with the largest."""
    pairs = [_mean_errors(*pair) for pair in zip(micro_batches, terms, strict=True)]
    ids, errors = (torch.cat(column) for column in zip(*pairs, strict=True))
    is_bad = ~errors.isfinite()
    worst = is_bad.nonzero()[:, 0] if is_bad.any() else errors.argsort(descending=True)
    local = list(dict.fromkeys(series_name(int(i)) for i in ids[worst[:_SERIES_NAMED]]))
    all_bad = ranks.gather((bool(is_bad.any()), local))
    names = [n for bad, found in all_bad if bad for n in found]
    names = names or [n for _, found in all_bad for n in found]
    cause = (
        "with a loss that is not finite"
        if any(bad for bad, _ in all_bad)
        else "with the largest loss"
    )
    names = names[:_SERIES_NAMED]
    message = (
        f"step {step}: the {what} is not finite; nothing was updated; series {cause}: "
        f"{', '.join(names)}; look at them with `tsmoe data inspect`, lower optimizer.lr, or "
        "set training.on_not_finite=skip or roll_back and resume from the last checkpoint"
    )
    return NotFiniteError(message, step=step, what=what, series=names, flags=totals.flags)
