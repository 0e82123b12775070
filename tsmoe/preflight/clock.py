"""Do the nodes agree what time it is? Logs and time limits are compared by it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from datetime import timedelta

from tsmoe.preflight.scene import Scene
from tsmoe.preflight.verdict import Check, Row, Told, Verdict

_ROUNDS = 3
_WARN_SECONDS, _FAIL_SECONDS = 1.0, 60.0


@dataclass(frozen=True, kw_only=True)
class ClockFinding:
    """The clock of a rank, read as soon as it heard the word of the first one."""

    times: list[float]
    """Seconds since 1970, of each round."""


def look(scene: Scene) -> ClockFinding:
    """Wait until all are there, and read the clock when the first rank says so."""
    meeting, times = scene.meeting, []
    for number in range(_ROUNDS):
        meeting.tell(f"clock/{number}/ready/{meeting.rank}", True)
        if meeting.is_first:
            ready = meeting.said(f"clock/{number}/ready", scene.node_leaders)
            meeting.gather(ready, scene.wait_seconds)
            meeting.tell(f"clock/{number}/go", True)
        # Not by `ask`, which looks from time to time only.
        meeting.store.wait([f"clock/{number}/go"], timedelta(seconds=scene.wait_seconds))
        times.append(time.time())
    return ClockFinding(times=times)


def judge(told: Told[ClockFinding]) -> list[Row]:
    """Compare each node with the first; the middle of the rounds counts, as some are late."""
    first = min(told.findings)
    ahead = {
        rank: statistics.median(
            here - there for here, there in zip(f.times, told.findings[first].times, strict=True)
        )
        for rank, f in told.findings.items()
    }
    rows = []
    for rank, seconds in ahead.items():
        if abs(seconds) > _WARN_SECONDS:
            word = "ahead of" if seconds > 0 else "behind"
            rows.append(
                told.row(
                    Verdict.FAIL if abs(seconds) > _FAIL_SECONDS else Verdict.WARN,
                    f"the clock of {told.places[rank].node} is {abs(seconds):.1f} s {word} that of "
                    f"{told.places[first].node}",
                    "let chrony or ntpd set it",
                )
            )
    if rows:
        return rows
    most = max(map(abs, ahead.values()))
    found = f"{len(ahead)} nodes within {most:.3f} s" if len(ahead) > 1 else "one node, one clock"
    return [told.row(Verdict.OK, found)]


CHECK = Check(name="clock", finding=ClockFinding, look=look, judge=judge, once_per_node=True)
