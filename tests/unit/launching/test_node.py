"""What becomes of one machine's task of a SLURM step."""

import argparse
import base64
import json
import os
import socket
from pathlib import Path

import pytest

from launcher.environment import device_ids, free_port, interface_to, scratch_variables
from launcher.errors import LaunchError
from launcher.node import rank_command
from launcher.together import run_together

COMMAND = ["pretrain", "time_tracker_tiny", "run=a b"]


def arguments(hosts: str, **values: object) -> argparse.Namespace:
    defaults: dict[str, object] = {
        "hosts": hosts, "port": 15000, "ranks_per_node": 2, "each_rank": False,
        "bind_cores": False, "local_scratch": None, "command": COMMAND,
    }  # fmt: skip
    return argparse.Namespace(**(defaults | values))


SECOND_OF_TWO = {"SLURM_NODEID": "1", "SLURM_NNODES": "2", "GLOO_SOCKET_IFNAME": "eth0"}


def test_node_becomes_deepspeeds_launcher_with_the_devices_that_slurm_gave() -> None:
    environment = SECOND_OF_TWO | {"CUDA_VISIBLE_DEVICES": "3,5"}
    command, variables = rank_command(arguments("n1,n2"), environment, python="py")
    assert variables["TSMOE_RANKS"] == "4"
    named = dict(
        word.removeprefix("--").split("=", 1)
        for word in command
        if word[:2] == "--" and "=" in word
    )
    assert json.loads(base64.urlsafe_b64decode(named["world_info"])) == {
        "n1": ["3", "5"], "n2": ["3", "5"]
    }  # fmt: skip
    assert (named["node_rank"], named["master_addr"], named["master_port"]) == ("1", "n1", "15000")
    assert command[-len(COMMAND) - 2 :] == ["--module", "tsmoe", *COMMAND]


def test_each_rank_becomes_the_command_itself() -> None:
    command, variables = rank_command(
        arguments("n1,n2", each_rank=True), SECOND_OF_TWO, python="py"
    )
    assert command == ["py", "-u", "-m", "tsmoe", *COMMAND]
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("n1", "15000")


def test_step_on_other_machines_than_the_job_is_refused() -> None:
    environment = SECOND_OF_TWO | {"SLURM_NNODES": "1"}
    with pytest.raises(LaunchError, match=r"1 node\(s\), but the job has 2"):
        rank_command(arguments("n1,n2"), environment, python="py")


def test_start_without_srun_is_refused() -> None:
    with pytest.raises(LaunchError, match="SLURM_NODEID"):
        rank_command(arguments("n1"), {}, python="py")


def test_fewer_devices_than_ranks_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"ranks_per_node is 4.*has 2 device"):
        device_ids({"CUDA_VISIBLE_DEVICES": "0,1"}, 4)
    assert device_ids({}, 2) == ["0", "1"]
    assert device_ids({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"}, 2) == ["GPU-a", "GPU-b"]


def test_cores_are_shared_out_among_ranks() -> None:
    _, variables = rank_command(
        arguments("n1,n2", ranks_per_node=10_000), SECOND_OF_TWO, python="p"
    )
    assert variables["OMP_NUM_THREADS"] == "1"
    _, variables = rank_command(
        arguments("n1,n2"), SECOND_OF_TWO | {"OMP_NUM_THREADS": "5"}, python="p"
    )
    assert "OMP_NUM_THREADS" not in variables


def test_port_in_use_is_passed_over() -> None:
    port = free_port(4321)
    with socket.socket() as holder:
        holder.bind(("", port))
        holder.listen()
        assert free_port(4321) != port


def test_interface_to_this_machine_is_the_loopback() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no.such.host.invalid") is None


def test_scratch_folders_are_made_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISK", str(tmp_path))
    variables = scratch_variables("$DISK/mine")
    assert variables["TSMOE_CACHE"] == str(tmp_path / "mine" / "tsmoe")
    assert all(Path(folder).is_dir() for folder in variables.values())
    with pytest.raises(LaunchError, match="NO_SUCH_DISK"):
        scratch_variables("$NO_SUCH_DISK/mine")
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match="cannot be made"):
        scratch_variables(str(tmp_path / "file"))


def test_one_command_that_fails_ends_the_others() -> None:
    assert run_together([["true"], ["true"]]) == 0
    begun = os.times().elapsed
    assert run_together([["sleep", "30"], ["false"]]) == 1
    assert os.times().elapsed - begun < 10
