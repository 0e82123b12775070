"""What became of the starts of runs that were killed, counted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

PHASES = {"step": 0.3, "save": 0.25, "load": 0.25, "evaluation": 0.2}
"""Share of the kills by what the run is doing."""
Hashes = dict[int, dict[str, str] | None]
"""Of the files of each visible checkpoint, by step; None for one that is not whole."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run, up to its kill or its own end."""

    run: int
    first_step: int | None
    """First step that was done; None if there was none."""
    seconds_to_first_step: float | None
    reached: int
    """Steps on record when all processes were gone."""


@dataclass(frozen=True, kw_only=True)
class Kill(Start):
    """A start that was killed."""

    wanted: str
    """Phase that was to be hit."""
    phase: str
    """Phase that was seen just before."""
    killed: list[str]
    after_seconds: float
    """From the start to the kill."""
    steps_after: int
    """Steps that survivors still recorded."""
    seconds_to_end: float
    """From the kill until no process was left."""
    orphans: int
    """Processes that did not end by themselves."""
    newest_whole: int
    """Step of the newest checkpoint then; 0 if there was none."""
    damaged: list[int]
    """Visible checkpoints that are not whole, or not those of the undisturbed run."""


@dataclass(frozen=True, kw_only=True)
class Completion(Start):
    """The last start of a run, which came through or was given up."""

    is_lost: bool
    loss_difference: float | None = None
    """Largest, from the undisturbed run; None where it is lost."""
    has_equal_record: bool = False
    """Whether all that metrics.jsonl says, but for times, is what the undisturbed run says."""
    has_equal_checkpoint: bool = False


def choose_phase(kills: Sequence[Kill], generator: random.Random) -> str:
    """Draw one of the phases that are furthest behind their share."""
    counts = Counter(kill.phase for kill in kills)
    behind = {phase: counts[phase] / share for phase, share in PHASES.items()}
    fewest = min(behind.values())
    return generator.choice([phase for phase, value in behind.items() if value <= fewest + 4])


def whole_checkpoints(found: Hashes, undisturbed: Hashes) -> tuple[int, list[int]]:
    """Return the newest step with the bytes of the undisturbed run (0: none), and those without."""
    whole = [step for step, files in found.items() if files and files == undisturbed.get(step)]
    return max(whole, default=0), [step for step in found if step not in whole]


def restarts(starts: Sequence[Kill | Completion]) -> list[dict[str, int]]:
    """List the starts after a kill that did steps: from which one, and how many again.

    Args:
        starts: of one run, in order.
    """
    found = []
    reached, newest_whole = 0, 0
    for start in starts:
        if start.first_step is not None:
            if reached:
                found.append({
                    "first_step": start.first_step,
                    "newest_whole": newest_whole,
                    "redone": reached - start.first_step,
                })  # fmt: skip
            reached = 0
        # A start that was killed while loading has perhaps cut the record back already.
        reached = max(reached, start.reached)
        if isinstance(start, Kill):
            newest_whole = start.newest_whole
    return found


def summary(
    kills: Sequence[Kill], completions: Sequence[Completion], *, failures: int, save_every: int
) -> dict[str, Any]:
    """Count what happened in all runs."""
    starts: list[Kill | Completion] = [*kills, *completions]
    again = []
    for run in sorted({start.run for start in starts}):
        again += restarts([start for start in starts if start.run == run])
    by_victim = {
        name: [kill.seconds_to_end for kill in kills if " + ".join(kill.killed) == name]
        for name in sorted({" + ".join(kill.killed) for kill in kills})
    }
    to_first_step = [start.seconds_to_first_step for start in starts]
    whole = [run for run in completions if not run.is_lost]
    return {
        "kills": len(kills),
        "by_phase": dict(Counter(kill.phase for kill in kills)),
        "by_victim": {name: len(seconds) for name, seconds in by_victim.items()},
        "runs_completed": len(whole),
        "runs_lost": len(completions) - len(whole),
        "starts_that_failed_by_themselves": failures,
        "orphans": sum(kill.orphans for kill in kills),
        "most_steps_done_after_a_kill": max((kill.steps_after for kill in kills), default=0),
        "visible_checkpoints_that_were_damaged": sum(len(kill.damaged) for kill in kills),
        "restarts_that_did_steps": len(again),
        "restarts_not_from_the_newest_whole_checkpoint": sum(
            restart["first_step"] != restart["newest_whole"] for restart in again
        ),
        "checkpoint_interval": save_every,
        "most_steps_redone": max((restart["redone"] for restart in again), default=0),
        "restarts_by_steps_redone": dict(sorted(Counter(r["redone"] for r in again).items())),
        "seconds_until_all_ended": spread([kill.seconds_to_end for kill in kills]),
        "seconds_until_all_ended_by_victim": {n: spread(s) for n, s in by_victim.items()},
        "seconds_from_start_to_first_step": spread([s for s in to_first_step if s is not None]),
        "largest_loss_difference": max(
            (run.loss_difference for run in whole if run.loss_difference is not None), default=None
        ),
        "runs_with_equal_records": sum(run.has_equal_record for run in whole),
        "runs_with_equal_last_checkpoint": sum(run.has_equal_checkpoint for run in whole),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return how many there are, their median and the longest."""
    if not seconds:
        return {"count": 0}
    longest, middle = max(seconds), median(seconds)
    return {"count": len(seconds), "median": round(middle, 2), "max": round(longest, 2)}
