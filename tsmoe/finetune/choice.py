"""Choose the weights to hand over: learned ones, mixed with those of the start, or the start."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tsmoe.checkpoint.layout import step_folder
from tsmoe.checkpoint.package import model_from_checkpoint
from tsmoe.checkpoint.resume import open_checkpoint
from tsmoe.errors import TrainingError
from tsmoe.finetune.config import FinetuneRun
from tsmoe.finetune.guard import Guard
from tsmoe.finetune.low_rank import insert_low_rank, merge_low_rank
from tsmoe.finetune.start import Start
from tsmoe.models.time_tracker import TimeTracker

logger = logging.getLogger(__name__)

SHARES = (0.25, 0.5, 0.75)

Validate = Callable[[TimeTracker], float]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is handed over."""

    model: TimeTracker
    is_start: bool
    """Whether it is the start as it was, as nothing learned is better on validation."""
    step: int | None
    """Steps after which the learned weights were best; None if there are none that count."""
    share: float
    """Of the learned weights in the mixture with those of the start."""
    errors_by_share: dict[float, float]
    """Validation errors of the mixtures; empty where nothing was mixed."""
    verdict: str
    """One line for people."""


def choose(
    run: FinetuneRun,
    start: Start | None,
    guard: Guard,
    validate: Validate,
    *,
    failure: str | None,
) -> Choice:
    """Choose by validation; a process by itself calls it.

    Args:
        validate: gives the validation error of a whole model.
        failure: why training ended before its time, if it did.

    Raises:
        TrainingError: if training from scratch brought nothing that can be used.
    """
    early = "" if failure is None else f"; training broke off: {failure}"
    if start is None:
        step = _step_from_scratch(run, guard, early)
        model, error = _learned(run, step), guard.errors[step]
        verdict = f"best after step {step}: validation MSE {error:.4f}{early}"
        if step == 0:
            verdict = (
                "nothing learned is better on validation than the shortcut it began with (MSE "
                f"{error:.4f}), so the package holds that; a lower optimizer.lr or a smaller model "
                f"may help{early}"
            )
        return Choice(
            model=model, is_start=False, step=step, share=1.0, errors_by_share={}, verdict=verdict
        )
    best = guard.best_step
    assert guard.start_error is not None, "measured before the first step"
    if best is not None:
        model, share, error, errors = _mixed(run, start, best, guard.errors[best], validate)
        if error < guard.start_error:
            mixed = "" if share == 1 else f", {share:.0%} of the way there from the start"
            verdict = (
                f"best after step {best}{mixed}: validation MSE {error:.4f}, "
                f"{guard.start_error:.4f} at the start{early}"
            )
            if best == 0:
                verdict = (
                    "nothing learned is better on validation than the linear shortcut as it was "
                    f"fitted (MSE {error:.4f}, {guard.start_error:.4f} at the start), so the "
                    f"package holds that{early}"
                )
            return Choice(
                model=model,
                is_start=False,
                step=best,
                share=share,
                errors_by_share=errors,
                verdict=verdict,
            )
    lowest = min((e for at, e in guard.errors.items() if at > 0), default=math.inf)
    found = f"{lowest:.4f}" if math.isfinite(lowest) else "not a finite number"
    verdict = (
        f"nothing learned is better than the start on validation (MSE {guard.start_error:.4f}, "
        f"best of fine-tuning {found}), so the package holds the start as it was; a lower "
        f"optimizer.lr or fewer trainable weights may help{early}"
    )
    return Choice(
        model=start.build(),
        is_start=True,
        step=best,
        share=0.0,
        errors_by_share={},
        verdict=verdict,
    )


def _step_from_scratch(run: FinetuneRun, guard: Guard, early: str) -> int:
    step = guard.best_step
    if step == 0:  # which counts where a shortcut was fitted
        return step
    if step is None or guard.errors[step] >= guard.errors[0]:
        raise TrainingError(
            f"{run.run}: nothing learned from scratch is better on validation than the random "
            f"weights it began with (MSE {guard.errors.get(0, math.nan):.4f}); lower "
            f"optimizer.lr{early}"
        )
    return step


def _mixed(
    run: FinetuneRun, start: Start, step: int, error: float, validate: Validate
) -> tuple[TimeTracker, float, float, dict[float, float]]:
    """Mix the learned weights with the start's, by the share that validates best.

    Between two models that one training joins the error has a valley, and its bottom is where
    neither has what is peculiar to its data. Source: WiSE-FT (arXiv 2109.01903). Ours: the share is
    chosen on validation.
    """
    learned = _learned(run, step)
    if not run.config.stopping.mixes_with_start or step == 0:
        return learned, 1.0, error, {}
    errors = {share: validate(_mixture(learned, start, share)) for share in SHARES}
    errors = {share: e if math.isfinite(e) else math.inf for share, e in errors.items()}
    errors[1.0] = error
    share = min(errors, key=errors.__getitem__)
    found = ", ".join(f"{share:.0%} {error:.4f}" for share, error in errors.items())
    logger.info("validation MSE by share of the learned weights: %s", found)
    return _mixture(learned, start, share), share, errors[share], errors


def _learned(run: FinetuneRun, step: int) -> TimeTracker:
    """Read the checkpoint of a step, with additions of low rank merged."""
    checkpoint, meta = open_checkpoint(Path(run.run) / "checkpoints" / step_folder(step))
    trainable = run.config.trainable
    add = partial(insert_low_rank, config=trainable.low_rank, seed=run.seed)
    prepare = add if trainable.trains == "low_rank" else None
    model = model_from_checkpoint(checkpoint, meta, prepare=prepare)
    assert isinstance(model, TimeTracker), "a run of this stage holds no other"
    merge_low_rank(model)
    return model.requires_grad_(True).eval()


@torch.no_grad()
def _mixture(learned: TimeTracker, start: Start, share: float) -> TimeTracker:
    """Return weights on the line between two.

    What the start does not know is the learned, but for a shortcut, which started at zero.
    """
    if share == 1:
        return learned
    mixture = copy.deepcopy(learned)
    for name, parameter in mixture.named_parameters():
        if name in start.state:
            parameter.copy_(torch.lerp(start.state[name].to(parameter), parameter, share))
        elif name.startswith("shortcut."):
            parameter.mul_(share)
    return mixture
