"""The script of a SLURM job. The same job runs it from the top after each requeue.

The time limit: SLURM signals the ranks ahead, they save and end, and the script puts the job back
into the queue, which SLURM would not do. A lost node or preemption: SLURM requeues by itself. A
crash: the script requeues while checkpoints advance (`launcher.supervise`). Whether a run is done
is told by its marker, never by an exit code.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.containers import DockerContainer, PyxisContainer
from launcher.environment import rank_variables
from launcher.plan import Job
from launcher.supervise import STOP_NOTE

if TYPE_CHECKING:
    from launcher.backends.slurm import SlurmConfig
    from launcher.spec import LaunchSpec

# Of the commands that run once.
_USE_A_GPU = ("evaluate", "forecast")


def batch_script(spec: LaunchSpec, slurm: SlurmConfig, job: Job, *, python: str) -> str:
    """Write the script of one job."""
    python = shlex.quote(python)
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(spec, slurm, job))]
    lines += ["# Written by `tsmoe launch`; runs from the top after each requeue."]
    lines += [
        f"export {name}={shlex.quote(v)}"
        for name, v in rank_variables(spec, world_size=None).items()
    ]
    lines += [f"cd {shlex.quote(spec.folder)} || exit 1", *slurm.before]
    if job.run is not None:
        lines += _training(spec, slurm, job, python=python)
    elif job.is_ranked:
        lines += [
            *_meeting_point(spec, slurm, job, python=python),
            *_ranks(spec, slurm, job, python),
        ]
    else:
        command = [*map(shlex.quote, job.command), *_task_of_array(job)]
        words = " ".join([_inside(spec, slurm), python, "-m", "tsmoe", *command]).strip()
        # As below: without it srun gives the task one core, however many the job has.
        task = '--nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE"'
        lines.append(f"srun {task} {_srun_options(spec, slurm)}{words}")
    return "\n".join(lines) + "\n"


def _options(spec: LaunchSpec, slurm: SlurmConfig, job: Job) -> list[str]:
    """What stands after #SBATCH."""
    named = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "exclude": ",".join(slurm.exclude) or None,
        "time": slurm.time_limit,
        "mem": slurm.memory,
        "cpus-per-task": _cpus_per_task(slurm, job),
    }
    number = "%A_%a" if job.array is not None else "%j"
    options = [
        f"--job-name={shlex.quote(job.name)}",
        f"--output={shlex.quote(f'{spec.log_folder}/{job.name}-{number}.log')}",
        "--open-mode=append",
        *(f"--{name}={value}" for name, value in named.items() if value is not None),
    ]
    if job.array is not None:
        options.append(f"--array=1-{job.array}")
    if not job.is_ranked:
        if slurm.gpus_per_node is not None and job.command[0] in _USE_A_GPU:
            options.append("--gpus-per-node=1")
        return [*options, "--nodes=1", "--ntasks=1", "--requeue", *slurm.options]
    options += _machines(slurm, job)
    if slurm.gpus_per_node is not None:
        options.append(f"--gpus-per-node={slurm.gpus_per_node}")
    if slurm.is_exclusive:
        options.append("--exclusive")
    if job.run is None:
        return [*options, "--no-requeue", *slurm.options]
    # Of a docker container only the batch script hears; it leaves a note for the ranks.
    to = "B:" if isinstance(slurm.container, DockerContainer) else ""
    return [
        *options,
        "--requeue",
        f"--signal={to}{slurm.stop_signal}@{slurm.stop_seconds_before}",
        *slurm.options,
    ]


def _machines(slurm: SlurmConfig, job: Job) -> list[str]:
    """Options that say how many machines, and what of each."""
    tasks = _tasks_per_node(slurm, job)
    if len(job.node_counts) == 1:
        return [f"--nodes={job.nodes}", f"--ntasks-per-node={tasks}"]
    # No --ntasks-per-node: as the least number of machines has room for the tasks of one machine,
    # SLURM would give no more than that.
    options = [f"--nodes={job.node_counts[-1]}-{job.nodes}"]
    if tasks > 1:
        options.append(f"--mincpus={tasks * int(_cpus_per_task(slurm, job) or 1)}")
    return options


def _training(spec: LaunchSpec, slurm: SlurmConfig, job: Job, *, python: str) -> list[str]:
    """Lines that start the ranks of a run, and say what follows when they ended."""
    limits = spec.restarts
    watch = (
        f'tool launcher.supervise %s --run "$run" --most={limits.most} '
        f"--most-without-progress={limits.most_without_progress}"
    )
    return [
        f"run={shlex.quote(job.run or '')}",
        *_meeting_point(spec, slurm, job, python=python),
        f"{watch % 'begin'} || exit 1",
        "trap : TERM  # what the time limit sends must not end this script before its last lines",
        *_stop_note(slurm),
        *_ranks(spec, slurm, job, python),
        "code=$?",
        "# The queue ends this job, not for its time, and has not put it back itself: by scancel.",
        "cancelled=",
        'shown() { echo " $(scontrol show job --oneliner "$SLURM_JOB_ID") "; }',
        'case "$(shown)" in',
        '    *" Reason=TimeLimit "*) ;;',
        '    *" JobState=COMPLETING "*" Restarts=${SLURM_RESTART_COUNT:-0} "*)',
        "        cancelled=--cancelled ;;",
        "esac",
        f'{watch % "end"} --code="$code" --nodes="$hosts" $cancelled',
        "verdict=$?",
        'if [ "$verdict" -eq 75 ]; then',
        "    is_back() {",
        '        case "$(shown)" in',
        '            *" Restarts=${SLURM_RESTART_COUNT:-0} "*) return 1 ;;',
        '            *" Restarts="*) return 0 ;;',
        "            *) return 1 ;;",
        "        esac",
        "    }",
        "    trap '' TERM  # which the queue sends as it takes the job back",
        '    is_back || scontrol requeue "$SLURM_JOB_ID" || is_back && exit 0',
        '    echo "tsmoe launch: job $SLURM_JOB_ID could not be requeued; submit it again" >&2',
        "fi",
        'exit "$verdict"',
    ]


def _meeting_point(spec: LaunchSpec, slurm: SlurmConfig, job: Job, *, python: str) -> list[str]:
    """Lines that find out the machines, and a port on the first, on which this script runs.

    The queue may give any number between the least and the most: those that the batch cannot be
    shared among stay idle.
    """
    container = ""
    if isinstance(slurm.container, PyxisContainer):
        container = f"srun --overlap --nodes=1 --ntasks=1 {_srun_options(spec, slurm)}"
    words = f"{container}{_inside(spec, slurm)} {python}".strip()
    return [
        f'tool() {{ {words} -m "$@"; }}',
        f"for nodes in {' '.join(map(str, job.node_counts))}; do",
        '    [ "$nodes" -gt "$SLURM_JOB_NUM_NODES" ] || break',
        "done",
        'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$nodes" | paste -sd, -)',
        "seed=$((SLURM_JOB_ID + 31 * ${SLURM_RESTART_COUNT:-0}))",
        'port=$(tool launcher.environment "$seed") || exit 1',
    ]


def _ranks(spec: LaunchSpec, slurm: SlurmConfig, job: Job, python: str) -> list[str]:
    """The line that starts all ranks, or the lines where what starts them must be heard beside."""
    node = [
        python, "-m", "launcher.node", '--hosts "$hosts"', '--port "$port"',
        f"--ranks-per-node {job.ranks_per_node}",
    ]  # fmt: skip
    if slurm.starts == "rank":
        node.append("--each-rank")
    elif slurm.binds_cores:
        node.append("--bind-cores")
    if spec.local_scratch is not None:
        node.append(f"--local-scratch {shlex.quote(spec.local_scratch)}")
    tasks = _tasks_per_node(slurm, job)
    cores = "$SLURM_CPUS_ON_NODE" if tasks == 1 else f"$((SLURM_CPUS_ON_NODE / {tasks}))"
    binding = "cores" if slurm.binds_cores and slurm.starts == "rank" else "none"
    # --cpus-per-task: srun does not take it over from sbatch, and gives each task one core.
    srun = (
        'srun --kill-on-bad-exit=1 --nodes="$nodes" --nodelist="$hosts" '
        f"--ntasks-per-node={tasks} --cpus-per-task={cores} "
        f"--cpu-bind={binding} {_srun_options(spec, slurm)}"
    )
    words = " ".join([_inside(spec, slurm), *node, "--", *map(shlex.quote, job.command)]).strip()
    if not isinstance(slurm.container, DockerContainer):
        return [f"{srun}{words}"]
    # A client that is killed leaves its container behind, and a shell that waits hears no signal.
    left_behind = f'{slurm.container.program} rm --force "tsmoe-$SLURM_JOB_ID"'
    clear = f"srun --ntasks-per-node=1 {left_behind} > /dev/null 2>&1"
    named = words.replace(" run ", ' run --name "tsmoe-$SLURM_JOB_ID" ', 1)
    return [
        f"{clear} || true",
        f"{srun}{named} &",
        "ranks=$!",
        'wait "$ranks"',
        'while kill -0 "$ranks" 2> /dev/null; do wait "$ranks"; done',
        'wait "$ranks"',
    ]


def _stop_note(slurm: SlurmConfig) -> list[str]:
    if not isinstance(slurm.container, DockerContainer):
        return []
    return [f"""trap 'echo requeue > "$run/{STOP_NOTE}"' {slurm.stop_signal}"""]


def _tasks_per_node(slurm: SlurmConfig, job: Job) -> int:
    return job.ranks_per_node if slurm.starts == "rank" else 1


def _cpus_per_task(slurm: SlurmConfig, job: Job) -> str | None:
    if slurm.cpus_per_node is None:
        return None
    tasks = _tasks_per_node(slurm, job) if job.is_ranked else 1
    return str(max(1, slurm.cpus_per_node // tasks))


def _srun_options(spec: LaunchSpec, slurm: SlurmConfig) -> str:
    """Options of srun that start the container, each followed by a space."""
    if slurm.container is None:
        return ""
    return "".join(f"{word} " for word in _quoted(slurm.container.srun_options(spec.folder)))


def _inside(spec: LaunchSpec, slurm: SlurmConfig) -> str:
    """Words that start the container."""
    if slurm.container is None:
        return ""
    variables = list(rank_variables(spec, world_size=None))
    return " ".join(_quoted(slurm.container.words(spec.folder, variables)))


def _task_of_array(job: Job) -> list[str]:
    return [] if job.array is None else [f'--task "$SLURM_ARRAY_TASK_ID/{job.array}"']


def _quoted(words: Sequence[str]) -> list[str]:
    """Quote words for the shell, which fills in variables where a word has some."""
    return [_double_quoted(word) if "$" in word else shlex.quote(word) for word in words]


def _double_quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`")
    return f'"{escaped}"'
