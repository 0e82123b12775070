"""What a rank finds in its environment: devices, ports, interfaces, folders of its machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import LaunchError

if TYPE_CHECKING:
    from launcher.spec import LaunchSpec

_FIRST_PORT, _NUM_PORTS = 15_000, 15_000  # below the range that systems hand out by themselves
_PORTS_TRIED = 64

WORLD_SIZE_VARIABLE = "TSMOE_RANKS"
"""Ranks that were planned: some launchers start each machine's, or each process, alone."""

EXIT_CODE_VARIABLE = "TSMOE_EXIT_CODE_FILE"
"""A file where the first rank that fails leaves its exit code: torchrun makes 1 of all of them."""


def rank_variables(spec: LaunchSpec, *, world_size: int | None) -> dict[str, str]:
    """Return what all ranks find set.

    Args:
        spec: of the launch.
        world_size: ranks that must find one another, which each of them checks; None: not known
            yet, or a command that runs once.
    """
    variables = dict(spec.environment)
    if world_size is not None:
        variables[WORLD_SIZE_VARIABLE] = str(world_size)
    if spec.network_interface is not None:
        variables.setdefault("NCCL_SOCKET_IFNAME", spec.network_interface)
        variables.setdefault("GLOO_SOCKET_IFNAME", spec.network_interface)
    if spec.threads_per_rank is not None:
        variables["OMP_NUM_THREADS"] = str(spec.threads_per_rank)
    return variables


def scratch_variables(local_scratch: str) -> dict[str, str]:
    """Make the folders of this machine's own disk and return the variables that name them.

    Raises:
        LaunchError: if a variable in the path is not set here, or the folder cannot be made.
    """
    path = os.path.expandvars(local_scratch)
    if "$" in path:
        raise LaunchError(
            f"{socket.gethostname()}: local_scratch is {local_scratch}, and not all of its "
            "variables are set on this machine"
        )
    folders = {
        "TSMOE_CACHE": Path(path) / "tsmoe",
        "TORCH_EXTENSIONS_DIR": Path(path) / "torch_extensions",
        "TRITON_CACHE_DIR": Path(path) / "triton",
    }
    try:
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"{socket.gethostname()}: local_scratch {path} cannot be made ({error.strerror}); "
            "name a folder that every machine lets you write to"
        ) from error
    return {name: str(folder) for name, folder in folders.items()}


def device_ids(environment: Mapping[str, str], ranks_per_node: int) -> list[str]:
    """Return the devices of this machine's ranks: those that the queue gave, in its order.

    Raises:
        LaunchError: if fewer devices are visible than ranks are wanted.
    """
    given = environment.get("CUDA_VISIBLE_DEVICES", "")
    visible = [name for name in given.split(",") if name]
    if not visible:
        return [str(number) for number in range(ranks_per_node)]
    if len(visible) < ranks_per_node:
        raise LaunchError(
            f"{socket.gethostname()}: ranks_per_node is {ranks_per_node}, but "
            f"CUDA_VISIBLE_DEVICES has {len(visible)} device(s) ({given}); ask for more GPUs or "
            "start fewer ranks"
        )
    return visible[:ranks_per_node]


def free_port(seed: int) -> int:
    """Find a port on this machine that nobody listens on; the same seed tries the same ones.

    Raises:
        LaunchError: if none of those tried is free.
    """
    for attempt in range(_PORTS_TRIED):
        port = _FIRST_PORT + (seed + attempt * 7919) % _NUM_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise LaunchError(
        f"{socket.gethostname()}: none of {_PORTS_TRIED} ports from {_FIRST_PORT} on is free; look "
        "for processes that an earlier job left behind: ss -ltnp"
    )


def interface_to(host: str) -> str | None:
    """Name the network interface that leads to another machine; None if that cannot be told.

    gloo otherwise takes the one of the own host name, on many machines the loopback.
    """
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing; asks the routing table
            address = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None


if __name__ == "__main__":
    import sys

    print(free_port(int(sys.argv[1])))
