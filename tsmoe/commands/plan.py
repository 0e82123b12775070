"""`tsmoe plan`: what a job needs of memory, network and time, before it is queued."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tsmoe.commands.options import require_finite, require_positive
from tsmoe.errors import ConfigError

if TYPE_CHECKING:
    from tsmoe.cost.layout import Layout
    from tsmoe.cost.machine import Machine
    from tsmoe.cost.search import Job
    from tsmoe.train.run_config import RunConfig

_GIB, _MIB = 2**30, 2**20


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    plan = subparsers.add_parser(
        "plan",
        help="predict memory, communication and time of a job before it is queued",
        description="Predict what each rank of a job holds, sends and computes, refuse what cannot "
        "fit (exit code 2), and suggest a faster layout. Nothing is built or started.",
    )
    plan.add_argument("preset", metavar="PRESET|FILE.yaml", help="name of a preset, or a file")
    plan.add_argument(
        "settings", metavar="KEY=VALUE", nargs="*", help="such as engine.zero_stage=2"
    )
    plan.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    plan.add_argument(
        "--gpus-per-node", type=int, default=8, help="ranks of a machine (default: 8)"
    )
    plan.add_argument(
        "--gpu", default="h100", help="h100, h200, a100, .. or cpu: this machine (default: h100)"
    )
    plan.add_argument("--memory-gib", type=float, help="memory of a GPU (default: data sheet)")
    plan.add_argument("--tflops", type=float, help="that a step reaches on a rank (default: 40 %%)")
    plan.add_argument("--network-gbps", type=float, help="Gbit/s of each GPU to other nodes")
    plan.add_argument("--measured", metavar="FILE|RUN", help="rates as JSON, or a run's folder")
    plan.add_argument("--variates", type=int, default=1, help="of each window (default: 1)")
    plan.add_argument(
        "--imbalance", type=float, default=1.0,
        help="rows of the fullest rank of an expert group over the mean (default: 1)",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true", help="print the numbers")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    import json

    from tsmoe.cost.layout import layout_of
    from tsmoe.cost.search import Job
    from tsmoe.train.run_config import resolve

    for option in ("nodes", "gpus_per_node", "variates"):
        require_positive(option, getattr(args, option))
    for option in ("memory_gib", "tflops", "network_gbps"):
        require_finite(option, getattr(args, option), above=0)
    if not 1 <= args.imbalance < float("inf"):
        raise ConfigError(f"--imbalance must be a finite number, at least 1, got {args.imbalance}")
    config = resolve(args.preset, args.settings)
    machine = _machine(args, config)
    job = Job(
        model=config.model, machine=machine, global_batch_size=config.training.global_batch_size,
        variates=args.variates, imbalance=args.imbalance,
    )  # fmt: skip
    world_size = args.nodes * args.gpus_per_node
    config.check_world_size(world_size)
    layout = layout_of(config, world_size, is_on_gpu=machine.is_gpu)
    numbers = _numbers(job, layout)
    print(json.dumps(numbers, indent=1) if args.json else _text(args, job, layout, numbers))
    if not numbers["fits"]:
        raise ConfigError(_refusal(job, layout, numbers))
    return 0


def _machine(args: argparse.Namespace, config: RunConfig) -> Machine:
    from pathlib import Path

    from tsmoe.cost.machine import cpu_machine, gpu_machine
    from tsmoe.cost.measured import with_measured

    given: dict[str, Any] = {
        "precision": config.training.precision,
        "ranks_per_node": args.gpus_per_node,
        "network_gbps": args.network_gbps,
        "memory_gib": args.memory_gib,
        "tflops": args.tflops,
    }
    machine = cpu_machine(**given) if args.gpu == "cpu" else gpu_machine(args.gpu, **given)
    return machine if args.measured is None else with_measured(machine, Path(args.measured))


def _numbers(job: Job, layout: Layout) -> dict[str, Any]:
    """Put all predictions together, as `--json` prints them."""
    from tsmoe.cost.communication import exchanges
    from tsmoe.cost.parameters import parameter_sizes
    from tsmoe.cost.search import largest_micro_batch, suggest
    from tsmoe.cost.step_time import exchange_seconds

    memory, step = job.memory(layout), job.step(layout)
    own = parameter_sizes(job.model, expert_parallel_size=layout.expert_parallel_size)
    return {
        "ranks": layout.world_size,
        "layout": _settings(layout),
        "parameters": sum(p.numel for p in parameter_sizes(job.model)),
        "parameters_per_rank": sum(p.numel for p in own),
        "memory_bytes": memory.parts,
        "peak_bytes": memory.total,
        "host_bytes": memory.host,
        "usable_bytes": int(job.machine.memory.value),
        "fits": job.fits(layout),
        "exchanges": [
            {"kind": e.kind, "what": e.what, "calls": e.calls, "ranks": e.ranks,
             "bytes_out": e.bytes_out, "seconds": exchange_seconds(e, job.machine)}
            for e in exchanges(
                job.model, layout, variates=job.variates, imbalance=job.imbalance
            )
        ],
        "step_seconds": {
            "compute": step.compute, "all_to_all": step.all_to_all, "reduction": step.reduction,
            "gather": step.gather, "update": step.update, "total": step.total,
        },
        "hidden_reduction_seconds": step.hidden_reduction,
        "is_bound_by_launches": step.is_bound_by_launches,
        "points_per_second": step.points_per_second,
        "mfu": step.mfu,
        "communication_share": step.communication_share,
        "largest_micro_batch_size": largest_micro_batch(job, layout),
        "suggestions": [
            {"layout": _settings(c.layout), "describe": c.layout.describe(),
             "peak_bytes": c.memory.total, "host_bytes": c.memory.host,
             "step_seconds": c.step.total, "points_per_second": c.step.points_per_second}
            for c in suggest(job, layout)
        ],
        "assumptions": {
            name: {"value": a.value, "source": a.source}
            for name, a in job.machine.assumptions.items()
        },
    }  # fmt: skip


def _settings(layout: Layout) -> dict[str, Any]:
    """Name a layout by the settings of a run that make it."""
    engine: dict[str, Any] = {"engine.type": "plain"}
    if layout.zero_stage:
        engine = {
            "engine.type": "deepspeed",
            "engine.zero_stage": layout.zero_stage,
            "engine.expert_parallel_size": layout.expert_parallel_size,
            "engine.offloads_optimizer": layout.offloads_optimizer,
        }
    return engine | {
        "training.micro_batch_size": layout.micro_batch_size,
        "training.recomputes_activations": layout.recomputes,
    }


def _refusal(job: Job, layout: Layout, numbers: dict[str, Any]) -> str:
    parts = numbers["memory_bytes"]
    largest = max(parts, key=parts.get)
    needed = numbers["peak_bytes"] + (0 if job.machine.is_gpu else numbers["host_bytes"])
    message = (
        f"{layout.describe()} does not fit: a rank needs {needed / _GIB:.2f} GiB of "
        f"{numbers['usable_bytes'] / _GIB:.2f} usable, most of it {largest.replace('_', ' ')} "
        f"({parts[largest] / _GIB:.2f} GiB)"
    )
    if most := numbers["largest_micro_batch_size"]:
        message += f"; training.micro_batch_size={most} is the most that fits"
    if numbers["suggestions"]:
        best = numbers["suggestions"][0]["layout"]
        changed = [
            f"{key}={str(value).lower()}" for key, value in best.items()
            if _settings(layout).get(key) != value
        ]  # fmt: skip
        return f"{message}; try {' '.join(changed)}"
    return (
        f"{message}; no layout over {layout.world_size} ranks fits: take more ranks, GPUs with "
        "more memory, or a smaller model"
    )


def _text(args: argparse.Namespace, job: Job, layout: Layout, numbers: dict[str, Any]) -> str:
    machine, step = job.machine, numbers["step_seconds"]
    lines = [
        f"{args.preset} on {args.nodes} x {args.gpus_per_node} {machine.name}, "
        f"{numbers['ranks']} ranks: {numbers['parameters'] / 1e6:,.1f} M parameters, "
        f"{numbers['parameters_per_rank'] / 1e6:,.1f} M on each rank",
        f"layout: {layout.describe()}, {layout.precision}",
        "",
        "memory of a rank at the fullest moment of a step, MiB",
    ]
    lines += [
        f"  {part.replace('_', ' '):18} {size / _MIB:12,.1f}"
        for part, size in numbers["memory_bytes"].items() if size
    ]  # fmt: skip
    lines.append(
        f"  {'peak':18} {numbers['peak_bytes'] / _MIB:12,.1f} of "
        f"{numbers['usable_bytes'] / _MIB:,.0f} usable"
    )
    if numbers["host_bytes"]:
        lines.append(f"  {'in host memory':18} {numbers['host_bytes'] / _MIB:12,.1f}")
    lines.append(f"largest micro-batch that fits: {numbers['largest_micro_batch_size']} windows")
    lines += ["", "exchange of a rank and step: calls x MiB sent to other ranks"]
    lines += [
        f"  {e['kind']:14} {e['what']:17} over {e['ranks']:5} {e['calls']:5} x "
        f"{e['bytes_out'] / _MIB:10,.3f} {1e3 * e['calls'] * e['seconds']:10,.2f} ms"
        for e in numbers["exchanges"]
    ] or ["  none"]
    named = ", ".join(f"{k.replace('_', '-')} {1e3 * v:,.1f}" for k, v in step.items() if v)
    lines += [
        "",
        f"step, ms: {named}",
        f"{numbers['points_per_second']:,.0f} points/s, MFU {numbers['mfu']:.1%}, "
        f"{numbers['communication_share']:.1%} of the step in exchange",
    ]
    if numbers["hidden_reduction_seconds"]:
        lines.append(
            f"reduction of {1e3 * numbers['hidden_reduction_seconds']:,.2f} ms passes beside the "
            "backward pass"
        )
    if numbers["is_bound_by_launches"]:
        lines.append("compute waits for kernels to start: larger micro-batches would be faster")
    lines += ["", "suggested, of the same ranks, precision and global batch"]
    lines += [
        f"  {s['describe']}: {1e3 * s['step_seconds']:,.1f} ms a step, "
        f"{s['peak_bytes'] / _MIB:,.0f} MiB" for s in numbers["suggestions"]
    ] or ["  none fits"]  # fmt: skip
    lines += ["", "assumptions"]
    lines += [
        f"  {name:18} {a['value']:10.3g}  {a['source']}"
        for name, a in numbers["assumptions"].items()
    ]
    return "\n".join(lines)
