"""Does the engine build, and do the first steps of the run go through?

The data, model and engine are those of the run; nothing is written, and a run that is there is
neither read nor touched.
"""

from __future__ import annotations

import itertools
import math
import resource
import time
from dataclasses import dataclass, replace

import torch

from tsmoe.engine.build import build_engine
from tsmoe.preflight.scene import Scene
from tsmoe.preflight.verdict import GIB, Check, Row, Told, Verdict
from tsmoe.train.loop import seed_step
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.open_data import open_data, open_source
from tsmoe.train.schedule import balance_rate, learning_rate
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step

# The first one warms up: memory is taken, kernels are chosen or compiled.
_STEPS = 2
_FULL_SHARE = 0.92


@dataclass(frozen=True, kw_only=True)
class EngineFinding:
    """An engine that was built."""

    kind: str
    parameters: int
    """On this rank."""
    seconds: float


def build(scene: Scene) -> EngineFinding:
    """Build model and engine as training does."""
    begun = time.perf_counter()
    scene.doing = f"building the {scene.config.engine.type} engine"
    # Nobody waits for a lost rank longer than a check may take.
    limit = min(scene.options.timeout_seconds, scene.config.training.timeout_seconds)
    training = replace(scene.config.training, timeout_seconds=limit)
    config = replace(scene.config, training=training)
    scene.engine = build_engine(config, scene.ranks, prepare=prepare_pretraining)
    return EngineFinding(
        kind=scene.config.engine.type,
        parameters=sum(p.numel() for p in scene.engine.model.parameters()),
        seconds=time.perf_counter() - begun,
    )


def judge_engine(told: Told[EngineFinding]) -> list[Row]:
    """Say what was built."""
    f = next(iter(told.findings.values()))
    seconds = max(finding.seconds for finding in told.findings.values())
    found = f"{f.kind}, {f.parameters / 1e6:,.2f} M parameters a rank, built in {seconds:.1f} s"
    return [told.row(Verdict.OK, found)]


@dataclass(frozen=True, kw_only=True)
class StepFinding:
    """The last of the first steps."""

    step: int
    loss: float
    seconds: float
    waited_seconds: float
    """Of these, for its data."""
    first_seconds: float
    """Of the first step."""
    points: int
    peak_bytes: int
    """On a GPU what torch reserved there, else the resident size of the process."""
    total_bytes: int
    """That there are: of the GPU, or this rank's part of its node."""


def train(scene: Scene) -> StepFinding:
    """Do the first steps of the run on its own data."""
    assert scene.engine is not None, "the engine check comes before"
    config, engine, ranks = scene.config, scene.engine, scene.engine.ranks
    training = config.training
    scene.doing = "opening the data"
    # The corpus check has read the shards.
    source = open_source(replace(config, data=replace(config.data, verifies_corpus=False)), ranks)
    data = open_data(config, source, ranks, first_window=0, positions=None)
    passes, steps = training.gradient_accumulation_steps(ranks.size), min(_STEPS, training.steps)
    batches = data.load(config, num_batches=steps * passes)
    seconds = []
    for step in range(steps):
        scene.doing = f"step {step} of training"
        begun = time.perf_counter()
        micro_batches = [b.to(ranks.device) for b in itertools.islice(batches, passes)]
        waited = time.perf_counter() - begun
        seed_step(config.seed, step, ranks.rank)
        report = training_step(
            engine,
            micro_batches,
            step=step,
            lr=learning_rate(
                step, steps=training.steps, peak=config.optimizer.lr, config=config.schedule
            ),
            balance_rate=balance_rate(step, steps=training.steps, config=config.balance),
            objective=NextPatchObjective(
                error_unit=training.error_unit, target_clip=training.target_clip
            ),
            series_name=data.corpus.item_id,
        )
        seconds.append(time.perf_counter() - begun)
    peak, total = _memory(scene)
    return StepFinding(
        step=steps - 1,
        loss=report.loss,
        seconds=seconds[-1],
        waited_seconds=waited,
        first_seconds=seconds[0],
        points=report.num_points,
        peak_bytes=peak,
        total_bytes=total,
    )


def _memory(scene: Scene) -> tuple[int, int]:
    device = scene.ranks.device
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_reserved(device), total
    from tsmoe.preflight import host

    node = scene.places[scene.rank].node
    neighbours = sum(place.node == node for place in scene.places.values())
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return resident, host.look(scene).total_bytes // neighbours


def judge_step(told: Told[StepFinding]) -> list[Row]:
    """Say what a step took, and warn where memory was nearly full."""
    f = told.findings[min(told.findings)]
    if not math.isfinite(f.loss):
        return [told.row(Verdict.FAIL, f"the loss of step {f.step} is {f.loss}", "see the data")]
    slowest = max(told.findings.values(), key=lambda finding: finding.seconds)
    fullest = max(told.findings, key=lambda rank: _share(told.findings[rank]))
    full = told.findings[fullest]
    found = (
        f"loss {f.loss:.4g}, {slowest.seconds:.2f} s a step (the first {f.first_seconds:.2f} s, "
        f"waiting for data {slowest.waited_seconds:.2f} s), {f.points / slowest.seconds:,.0f} "
        f"points/s, at most {full.peak_bytes / GIB:.2f} of {full.total_bytes / GIB:.1f} GiB a rank"
    )
    if _share(full) > _FULL_SHARE:
        advice = "lower training.micro_batch_size, or set training.recomputes_activations=true"
        return [told.row(Verdict.WARN, f"{found} ({told.where([fullest])})", advice)]
    return [told.row(Verdict.OK, found)]


def _share(finding: StepFinding) -> float:
    return finding.peak_bytes / finding.total_bytes


ENGINE = Check(
    name="engine", finding=EngineFinding, look=build, judge=judge_engine,
    needs=("joining", "software"),
)  # fmt: skip
STEP = Check(
    name="training step", finding=StepFinding, look=train, judge=judge_step,
    needs=("engine", "corpus"),
)  # fmt: skip
