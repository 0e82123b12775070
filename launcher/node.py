"""Start the ranks of one machine of a SLURM job: runs once on each node, or once for each rank.

It stands between srun and DeepSpeed's per-node launcher and turns off what that does badly under a
queue: no host file, no ssh, no second launcher that loses exit codes; the devices that SLURM gave
are kept; and SIGTERM and SIGUSR1, which SLURM sends to every process of a step, are blocked before
anything else starts. The launcher would end of them and kill ranks that are saving; the ranks take
them up when they are ready to.

    srun --ntasks-per-node=1 python -m launcher.node --hosts n1,n2 --port 15000 \\
        --ranks-per-node 8 -- pretrain time_tracker_base
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from launcher.environment import WORLD_SIZE_VARIABLE, device_ids, interface_to, scratch_variables
from launcher.errors import LaunchError


def world_info(hosts: Sequence[str], devices: Sequence[str]) -> str:
    """Encode what DeepSpeed's per-node launcher wants to know; devices are those of this node."""
    text = json.dumps({host: list(devices) for host in hosts})
    return base64.urlsafe_b64encode(text.encode()).decode()


def rank_command(
    args: argparse.Namespace, environment: Mapping[str, str], *, python: str
) -> tuple[list[str], dict[str, str]]:
    """Return what this process becomes, and the variables to add.

    Raises:
        LaunchError: if SLURM's variables do not fit the hosts, or devices are missing.
    """
    hosts = args.hosts.split(",")
    number, count = (environment.get(name) for name in ("SLURM_NODEID", "SLURM_NNODES"))
    if number is None or count is None:
        raise LaunchError(
            "SLURM_NODEID or SLURM_NNODES is not set; this module is started by srun, from the "
            "script that `tsmoe launch` submits"
        )
    if int(count) != len(hosts):
        raise LaunchError(
            f"SLURM started the step on {count} node(s), but the job has {len(hosts)} "
            f"({args.hosts}); the nodes would train apart from one another"
        )
    variables = {WORLD_SIZE_VARIABLE: str(len(hosts) * args.ranks_per_node)}
    if len(hosts) > 1 and "GLOO_SOCKET_IFNAME" not in environment:
        peer = hosts[0] if int(number) else hosts[1]
        if (interface := interface_to(peer)) is not None:
            variables["GLOO_SOCKET_IFNAME"] = interface
    if args.local_scratch:
        variables |= scratch_variables(args.local_scratch)
    if "OMP_NUM_THREADS" not in environment:
        cores = len(os.sched_getaffinity(0))
        variables["OMP_NUM_THREADS"] = str(max(1, cores // args.ranks_per_node))
    if args.each_rank:
        variables |= {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(args.port)}
        return [python, "-u", "-m", "tsmoe", *args.command], variables
    devices = device_ids(environment, args.ranks_per_node)
    command = [
        python, "-u", "-m", "deepspeed.launcher.launch",
        f"--world_info={world_info(hosts, devices)}",
        f"--node_rank={number}",
        f"--master_addr={hosts[0]}",
        f"--master_port={args.port}",
        *(["--bind_cores_to_rank"] if args.bind_cores else []),
        "--log_level=warning",
        "--module", "tsmoe", *args.command,
    ]  # fmt: skip
    return command, variables


def block_signals() -> None:
    """Block what SLURM sends before the end; the mask outlives exec, and ranks undo it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Become the ranks' launcher, or end with a line that says why that cannot be."""
    parser = argparse.ArgumentParser(prog="launcher.node", description=__doc__)
    parser.add_argument("--hosts", required=True, help="all machines of the job, as a,b")
    parser.add_argument("--port", type=int, required=True, help="where ranks meet on the first")
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--each-rank", action="store_true", help="srun starts every rank itself")
    parser.add_argument("--bind-cores", action="store_true", help="to each rank its own cores")
    parser.add_argument("--local-scratch", help="folder on this machine's own disk")
    parser.add_argument("command", nargs="+", help="words after tsmoe")
    args = parser.parse_args(arguments)
    try:
        command, variables = rank_command(args, os.environ, python=sys.executable)
    except LaunchError as error:
        sys.exit(f"tsmoe launch: {error}")
    block_signals()
    os.environ.update(variables)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
