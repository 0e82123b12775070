"""Losses after a run went on with other ranks, expert-parallel size, ZeRO stage or engine.

A run on two ranks is left alone to its end, in each way that there is. From a checkpoint of it
another run goes on with one process, and from a checkpoint of that one a third with two ranks
again: 2 -> 1 -> 2. Losses of the 50 steps after each switch are compared with those of the
undisturbed run. All are real commands, under DeepSpeed's launcher, torchrun, or none. The runs stay
in --out, so that the same command goes on where it was cut.

    python benchmarks/elastic_resume.py            # each way in each place once, some minutes
    python benchmarks/elastic_resume.py --all      # every pair, 2 -> 1 and 1 -> 2
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import record
from runs import corpus as build_corpus
from runs import environment, pretrain_command
from small_runs import (
    largest_loss_difference,
    pretrain_by_deepspeed,
    recorded,
    small_settings,
)
from tsmoe.checkpoint.layout import step_folder

SWITCH_STEP, AFTER = 20, 50
STEPS = SWITCH_STEP + 2 * AFTER
TARGET = 1e-5


@dataclass(frozen=True)
class Way:
    """Ranks and engine of a run."""

    ranks: int
    zero_stage: int | None = None
    """None: the plain engine."""
    expert_parallel_size: int = 1

    def __str__(self) -> str:
        ranks = "1 process" if self.ranks == 1 else f"{self.ranks} ranks"
        if self.zero_stage is None:
            return f"{ranks}, plain"
        spread = "" if self.ranks == 1 else f", expert parallel {self.expert_parallel_size}"
        return f"{ranks}, ZeRO {self.zero_stage}{spread}"

    def command(self, settings: list[str]) -> list[str]:
        """Return what starts a run in this way."""
        if self.zero_stage is None:
            return pretrain_command([*settings, "engine.type=plain"], ranks=self.ranks)
        engine = [
            "engine.type=deepspeed", f"engine.zero_stage={self.zero_stage}",
            f"engine.expert_parallel_size={self.expert_parallel_size}",
        ]  # fmt: skip
        return pretrain_by_deepspeed([*settings, *engine], ranks=self.ranks)


TWO = [Way(2), *(Way(2, stage, size) for size in (1, 2) for stage in (1, 2, 3))]
ONE = [Way(1), *(Way(1, stage) for stage in (1, 2, 3))]
Chain = tuple[Way, Way, Way]


def chosen_chains() -> list[Chain]:
    """Return chains in which each way stands in each place that it can, no end being its start."""
    return [
        (first, ONE[number % len(ONE)], TWO[(number + 3) % len(TWO)])
        for number, first in enumerate(TWO)
    ]


def all_chains() -> list[Chain]:
    """Return chains with every pair of ways, from two ranks to one and from one to two."""
    return [
        (first, middle, TWO[(number + 2 * place + 1) % len(TWO)])
        for number, first in enumerate(TWO)
        for place, middle in enumerate(ONE)
    ]


class Runs:
    """Runs in a folder, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._corpus = folder.resolve(), folder.resolve() / "corpus"
        if not (self._corpus / "manifest.json").exists():
            build_corpus(self._corpus)

    def run(self, *ways: Way) -> Path:
        """Return the run that went through these ways, a switch between each two."""
        run = self._folder / " then ".join(map(str, ways)).replace(", ", "_").replace(" ", "_")
        if (run / "DONE").exists():
            return run
        shutil.rmtree(run, ignore_errors=True)
        if len(ways) > 1:
            before = self.run(*ways[:-1]) / "checkpoints"
            switched = step_folder(SWITCH_STEP + (len(ways) - 2) * AFTER)
            shutil.copytree(before / switched, run / "checkpoints" / switched)
        settings = [
            *small_settings(self._corpus, steps=STEPS, ranks=ways[-1].ranks), f"run={run}",
            f"training.validate_every_steps={AFTER // 2}", "checkpoint.every_steps=10",
            "checkpoint.milestone_every_steps=10",
        ]  # fmt: skip
        done = subprocess.run(
            ways[-1].command(settings), env=environment(), capture_output=True, text=True
        )
        if done.returncode or not (run / "DONE").exists():
            raise SystemExit(f"{run}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        return run

    def compare(self, chain: Chain) -> list[dict[str, Any]]:
        """Return the differences after both switches of a chain from its undisturbed run."""
        expected = recorded(self.run(chain[0]))
        found = []
        for switches in (1, 2):
            lines = recorded(self.run(*chain[: switches + 1]))
            first = SWITCH_STEP + (switches - 1) * AFTER
            found.append({
                "from": str(chain[switches - 1]),
                "to": str(chain[switches]),
                "begun_as": str(chain[0]),
                "steps": [first, first + AFTER - 1],
                "largest_loss_difference": largest_loss_difference(
                    lines, expected, first=first, end=first + AFTER
                ),
                "equal_loads": loads(lines, first) == loads(expected, first),
            })  # fmt: skip
        return found


def loads(lines: list[dict[str, Any]], first: int) -> list[Any]:
    """Return how many tokens each expert got in the steps after a switch."""
    return [
        line["experts"]["load"]
        for line in lines
        if "experts" in line and first <= line["step"] < first + AFTER
    ]


def table(transitions: list[dict[str, Any]]) -> str:
    """Show all transitions as lines of Markdown."""
    rows = [
        f"| {t['from']} | {t['to']} | {t['begun_as']} | {t['largest_loss_difference']:.1e} |"
        for t in transitions
    ]
    head = "| from | to | undisturbed run | largest loss difference |\n| --- | --- | --- | --- |"
    return "\n".join([head, *rows])


def main() -> None:
    """Run the chains and record the differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every pair; half an hour")
    parser.add_argument("--out", type=Path, default=Path("runs/elastic_resume"))
    args = parser.parse_args()
    runs, transitions = Runs(args.out), []
    for chain in all_chains() if args.all else chosen_chains():
        transitions += runs.compare(chain)
        print(*table(transitions[-2:]).splitlines()[-2:], sep="\n", flush=True)
    largest = max(t["largest_loss_difference"] for t in transitions)
    results = {
        "target": TARGET,
        "steps_after_each_switch": AFTER,
        "transitions": len(transitions),
        "largest_loss_difference": largest,
        "all_within_target": largest <= TARGET,
        "table": transitions,
    }
    path = record("elastic_resume", results, notes="tiny preset made smaller, fp32, global batch "
                  "16, training and validation losses")  # fmt: skip
    path.with_suffix(".md").write_text(table(transitions) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
