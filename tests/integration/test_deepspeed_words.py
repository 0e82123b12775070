"""What DeepSpeed makes of the words and variables that `tsmoe launch` hands to it for pdsh."""

import json
import subprocess
from argparse import Namespace
from typing import Any

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from launcher.errors import LaunchError
from launcher.plan import PlannedStart, jobs_of, plan
from launcher.spec import LaunchSpec
from tsmoe.config import decode

COMMAND = (
    "pretrain", "run=runs/a b", "x=it's", "y=$HOME z", 'q="w x"', "b=`id` \\", "*", "n=1;2",
    'e="f"',
)  # fmt: skip
VARIABLES = {"A": "x y", "B": "$HOME `id`", "C": 'it\'s "so" \\', "D": "=mlx5_0:1", "E": ""}
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"


def start_of(environment: dict[str, str]) -> PlannedStart:
    values: dict[str, Any] = {
        "backend": {"type": "deepspeed", "hosts": ["a", "b"]},
        "nodes": 2,
        "folder": "/srv",
        "environment": environment,
    }
    spec = decode(LaunchSpec, values, origin="launch.yaml")
    (start,) = plan(spec, jobs_of(spec, COMMAND, lambda _: "/srv/run"), python="py")
    return start


def test_words_and_variables_come_through_a_shell_as_they_are() -> None:
    start = start_of(VARIABLES)
    place = start.argv.index("tsmoe")
    runner = PDSHRunner(
        Namespace(
            user_args=list(start.argv[place + 1 :]), user_script="tsmoe", launcher_args="",
            ssh_port=None, master_addr="a", master_port=1, venv_script=None, no_python=False,
            module=True, no_local_rank=False, save_pid=False, enable_each_rank_log=None,
        ),
        "world",
    )  # fmt: skip
    (exported,) = (text for path, text in start.files.items() if path.suffix == ".environment")
    for line in exported.splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    command, _, _ = runner.get_cmd({}, {"a": [0], "b": [0]})
    line = " ".join(command[command.index("-w") + 2 :])
    shown = line.replace("-u -m deepspeed.launcher.launch", f"-c '{SHOW}'")
    assert shown != line
    done = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
    words, environment = json.loads(done.stdout)
    assert tuple(words[-len(COMMAND) :]) == COMMAND
    assert {name: environment.get(name) for name in VARIABLES} == VARIABLES


@pytest.mark.parametrize("value", ["two\nlines", " a"])
def test_variable_that_deepspeed_would_change_is_refused(value: str) -> None:
    with pytest.raises(LaunchError, match=r"environment\.A"):
        start_of({"A": value})
