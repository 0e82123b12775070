"""Kill -9 ranks of a two-rank run at random moments, start it again, and look for damage.

Each start of the run is killed while it loads, steps, saves or validates; the moments are found by
watching its folder. What counts: whether all processes end by themselves, whether a start goes on
from anything but the newest whole checkpoint, the steps done twice, and whether a run that came
through in the end recorded the very losses and saved the very bytes of one that was left alone.
State lies in --out, so that the same command goes on where it was cut.

    python benchmarks/rank_kills.py --kills 100 --out runs/rank_kills
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from kill_counts import Completion, Kill, Start, choose_phase, summary, whole_checkpoints
from record import record
from runs import corpus as build_corpus
from small_runs import largest_loss_difference, pretrain_by_deepspeed, recorded, small_settings
from watched_run import Launch, RunWatch, checkpoint_hashes, sweep

STEPS, SAVE_EVERY, VALIDATE_EVERY = 60, 10, 8
VICTIMS = {"rank 0": 0.3, "rank 1": 0.3, "both ranks": 0.1, "launcher": 0.15, "all": 0.15}
"""How often each is killed; DeepSpeed's launcher of this node, or what a power cut takes."""
# A start takes some 15 s here; ranks that do not heed SIGTERM are killed after 30 s each.
START_LIMIT_SECONDS, END_LIMIT_SECONDS = 240.0, 90.0
# A moment in a phase is drawn from so many seconds after it was first seen.
_DELAY_SECONDS = {"step": 0.15, "save": 0.12, "evaluation": 0.1}
_USUAL_LOAD_SECONDS = 12.0
_FAILURES_OF_A_LOST_RUN = 3


class Campaign:
    """Runs that are killed, with all state in a folder."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        """Make the folder, or go on with what is there."""
        self.folder, self._seed = folder.resolve(), seed
        self._logs = self.folder / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self.kills = [Kill(**line) for line in self._read("kills")]
        self.completions = [Completion(**line) for line in self._read("completions")]
        self.failures = self._read("failures")
        self._corpus = self.folder / "corpus"
        if not (self._corpus / "manifest.json").exists():
            build_corpus(self._corpus)
        self._undisturbed = self.folder / "undisturbed"
        if not (self._undisturbed / "DONE").exists():
            sweep(self._undisturbed)
            with self._launch(self._undisturbed) as launch:
                launch.wait_for(lambda: False, seconds=START_LIMIT_SECONDS)
            if not (self._undisturbed / "DONE").exists():
                raise SystemExit(f"the undisturbed run failed: see the last of {self._logs}")
        self._hashes = checkpoint_hashes(self._undisturbed)

    def go_on(self, num_kills: int) -> None:
        """Kill until there are that many, then let the last run come through."""
        sweep(self._run)  # what a start left that was cut with this script
        while len(self.kills) < num_kills or self._run.exists():
            generator = random.Random(f"{self._seed}/{self._num_starts}")
            phase = choose_phase(self.kills, generator)
            self._start(phase if len(self.kills) < num_kills else None, generator)

    def figures(self) -> dict[str, Any]:
        """Sum up what has happened so far."""
        return summary(
            self.kills, self.completions, failures=len(self.failures), save_every=SAVE_EVERY
        )

    @property
    def _run(self) -> Path:
        return self.folder / f"run_{len(self.completions):04}"

    @property
    def _num_starts(self) -> int:
        return len(self.kills) + len(self.completions) + len(self.failures)

    def _start(self, wanted: str | None, generator: random.Random) -> None:
        """Start the run, and kill it in a phase unless it comes through before."""
        run = self._run
        watch = RunWatch(run, validate_every_steps=VALIDATE_EVERY)
        before = watch.last_step + 1
        victim = generator.choices([*VICTIMS], [*VICTIMS.values()])[0]
        with self._launch(run) as launch:
            if wanted is None or not self._wait_for_moment(launch, watch, wanted, generator):
                launch.look_on(watch, seconds=START_LIMIT_SECONDS)
                self._ended(launch, watch)
                return
            phase, seen, killed_at = watch.phase(), watch.last_step, time.monotonic()
            killed = launch.kill(victim)
            seconds_to_end, orphans = launch.wait_until_gone(seconds=END_LIMIT_SECONDS)
        watch.look()
        newest_whole, damaged = whole_checkpoints(checkpoint_hashes(run), self._hashes)
        kill = Kill(
            **self._figures_of(launch, watch, before), wanted=wanted, phase=phase,
            killed=sorted(killed), after_seconds=round(killed_at - launch.begun, 2),
            steps_after=max(0, watch.last_step - seen), seconds_to_end=round(seconds_to_end, 2),
            orphans=orphans, newest_whole=newest_whole, damaged=damaged,
        )  # fmt: skip
        self.kills.append(kill)
        self._write("kills", asdict(kill))

    def _wait_for_moment(
        self, launch: Launch, watch: RunWatch, wanted: str, generator: random.Random
    ) -> bool:
        """Wait until the run does what is wanted; False if it has ended before."""
        if wanted == "load":
            times = [s for kill in self.kills if (s := kill.seconds_to_first_step) is not None]
            usual = median(times[-9:]) if times else _USUAL_LOAD_SECONDS
            launch.look_on(watch, seconds=generator.uniform(0.05, 1) * usual)
            return not launch.has_ended
        if not launch.wait_for(watch.has_begun, seconds=START_LIMIT_SECONDS):
            return False
        last = watch.last_step + generator.randint(1, SAVE_EVERY * (2 if wanted == "step" else 1))

        def is_there() -> bool:
            phase = watch.phase()
            return watch.last_step >= last and wanted in (phase, "step")

        if not launch.wait_for(is_there, seconds=START_LIMIT_SECONDS):
            return False
        time.sleep(generator.uniform(0, _DELAY_SECONDS[wanted]))
        return not launch.has_ended

    def _ended(self, launch: Launch, watch: RunWatch) -> None:
        """Note a start that was not killed: the run came through, or something failed."""
        run, start = self._run, Start(**self._figures_of(launch, watch, 0))
        if launch.exit_code == 0 and (run / "DONE").exists():
            completion = Completion(**asdict(start), is_lost=False, **self._differences(run))
        else:
            failure = asdict(start) | {
                "exit_code": launch.exit_code, "log": self._log(self._num_starts).name
            }  # fmt: skip
            self.failures.append(failure)
            self._write("failures", failure)
            if sum(f["run"] == start.run for f in self.failures) < _FAILURES_OF_A_LOST_RUN:
                return
            completion = Completion(**asdict(start), is_lost=True)
        self.completions.append(completion)
        self._write("completions", asdict(completion))
        if completion.has_equal_record and completion.has_equal_checkpoint:
            shutil.rmtree(run)  # else it stays, to be looked at

    def _differences(self, run: Path) -> dict[str, Any]:
        """Compare a run that came through with the one that was left alone."""
        lines, expected = recorded(run), recorded(self._undisturbed)
        last = checkpoint_hashes(run).get(STEPS)
        return {
            "loss_difference": largest_loss_difference(lines, expected, first=0, end=STEPS),
            "has_equal_record": lines == expected,
            "has_equal_checkpoint": last is not None and last == self._hashes[STEPS],
        }

    def _figures_of(self, launch: Launch, watch: RunWatch, before: int) -> dict[str, Any]:
        has_begun = watch.first_step is not None
        seconds = round(watch.begins_at - launch.begun, 2) if has_begun else None
        return {
            "run": len(self.completions),
            "first_step": watch.first_step,
            "seconds_to_first_step": seconds,
            "reached": watch.last_step + 1 if has_begun else max(before, watch.last_step + 1),
        }

    def _launch(self, run: Path) -> Launch:
        settings = [
            *small_settings(self._corpus, steps=STEPS, ranks=2), f"run={run}",
            f"training.validate_every_steps={VALIDATE_EVERY}",
            "engine.expert_parallel_size=2",
        ]  # fmt: skip
        if run == self._undisturbed:
            # To compare with: ranks that lose their launcher save at any step.
            settings += ["checkpoint.every_steps=1", "checkpoint.milestone_every_steps=1"]
        else:
            settings.append(f"checkpoint.every_steps={SAVE_EVERY}")
        command = pretrain_by_deepspeed(settings, ranks=2)
        return Launch(command, run, self._log(self._num_starts))

    def _log(self, number: int) -> Path:
        return self._logs / f"start_{number:04}.log"

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _write(self, name: str, values: dict[str, Any]) -> None:
        line = json.dumps(values)
        print(f"{name}: {line}", flush=True)
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def main() -> None:
    """Kill, and record the figures of all kills that the folder knows of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="in all, with earlier ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/rank_kills"))
    parser.add_argument("--sum-up", action="store_true", help="record what there is, kill no more")
    args = parser.parse_args()
    # So that the processes of a start end with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    campaign = Campaign(args.out, seed=args.seed)
    if not args.sum_up:
        campaign.go_on(args.kills)
    record(
        "rank_kills",
        campaign.figures(),
        notes=f"two ranks, expert parallel 2, ZeRO 1, {STEPS} steps a run, validation every "
        f"{VALIDATE_EVERY}; times on a machine that others share",
    )


if __name__ == "__main__":
    main()
