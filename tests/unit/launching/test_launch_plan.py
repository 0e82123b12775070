"""From a launch file and a command to what is started."""

import shlex
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from launcher.backends import SlurmConfig
from launcher.backends.slurm import job_number, limit_seconds
from launcher.errors import LaunchError
from launcher.plan import PlannedStart, as_text, jobs_of, plan
from launcher.preflight import as_check
from launcher.spec import LaunchSpec
from tsmoe.config import decode
from tsmoe.errors import ConfigError

TRAIN = ("pretrain", "time_tracker_tiny", "run=runs/a b")


def spec_of(**values: Any) -> LaunchSpec:
    return decode(LaunchSpec, {"folder": "/srv", **values}, origin="launch.yaml")


def starts_of(spec: LaunchSpec, command: tuple[str, ...] = TRAIN) -> list[PlannedStart]:
    return plan(spec, jobs_of(spec, command, lambda _: "/srv/runs/a b"), python="/bin/py")


def script_of(command: tuple[str, ...] = TRAIN, **backend: Any) -> str:
    spec = spec_of(nodes=2, ranks_per_node=4, backend={"type": "slurm", **backend})
    (start,) = starts_of(spec, command)
    (text,) = start.files.values()
    return text


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"nodes": 0}, "nodes (0)"),
        (
            {"backend": {"type": "slurm", "time_limit": 86400}},
            "backend.time_limit is 86400, but must be text",
        ),
        ({"nodes": 2}, "backend local is this machine"),
        ({"backend": {"type": "slrum"}}, "backend"),
        ({"backend": {"type": "slurm", "partitoin": "x"}}, "did you mean partition"),
        ({"backend": {"type": "slurm", "time_limit": "5", "stop_seconds_before": 400}}, "300 s"),
        ({"backend": {"type": "slurm", "time_limit": "1 day"}}, "1 day"),
        ({"backend": {"type": "slurm", "least_nodes": 3}, "nodes": 2}, "least_nodes (3)"),
        ({"backend": {"type": "slurm", "gpus_per_node": 2}, "ranks_per_node": 4}, "GPU"),
        ({"backend": {"type": "slurm", "options": ["x\n#SBATCH -y"]}}, "no option of sbatch"),
        ({"backend": {"type": "deepspeed", "hosts": ["a", "b"]}, "nodes": 3}, "nodes is 3"),
        ({"backend": {"type": "accelerate", "hosts": ["a", "a"]}, "nodes": 2}, "twice"),
        ({"environment": {"A B": "1"}}, "'A B'"),
        ({"name": "a/b"}, "a/b"),
        ({"restarts": {"most": -1}}, "most (-1)"),
        ({"threads_per_rank": 0}, "threads_per_rank (0)"),
        ({"stages": [{"name": "a", "command": ["evaluate"], "array": 3}]}, "array (3)"),
        ({"stages": [{"name": "a", "command": ["data"], "after": ["b"]}]}, "comes after b"),
        ({"stages": [{"name": "a", "command": ["x"]}] * 2}, "a is given twice"),
    ],
)
def test_launch_file_that_cannot_be_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=r"^launch\.yaml: ") as error:
        spec_of(**values)
    assert says in str(error.value)


def test_one_process_needs_no_launcher() -> None:
    (start,) = starts_of(spec_of())
    assert start.argv == ("/bin/py", "-m", "tsmoe", *TRAIN)


def test_ranks_of_this_machine_start_under_torchrun() -> None:
    (start,) = starts_of(spec_of(ranks_per_node=2, threads_per_rank=3))
    assert start.argv[:3] == ("/bin/py", "-m", "torch.distributed.run")
    assert start.argv[start.argv.index("--nproc_per_node") + 1] == "2"
    assert start.argv[-4:] == ("tsmoe", *TRAIN)
    assert start.environment["OMP_NUM_THREADS"] == "3"
    assert start.environment["TSMOE_RANKS"] == "2"


def test_command_that_runs_once_gets_one_process_whatever_the_machines() -> None:
    spec = spec_of(ranks_per_node=8)
    (start,) = starts_of(spec, ("evaluate", "package", "--data", "x.csv"))
    assert start.argv[:4] == ("/bin/py", "-m", "tsmoe", "evaluate")
    assert "TSMOE_RANKS" not in start.environment
    assert start.job.run is None


def test_deepspeed_hosts_get_a_host_file_and_their_variables() -> None:
    spec = spec_of(
        backend={"type": "deepspeed", "hosts": ["a", "b"]},
        nodes=2,
        ranks_per_node=8,
        environment={"NCCL_DEBUG": "x y"},
        network_interface="ib0",
    )
    (start,) = starts_of(spec)
    texts = {path.suffix: text for path, text in start.files.items()}
    assert texts[".hosts"] == "a slots=8\nb slots=8\n"
    assert "NCCL_DEBUG=x y\n" in texts[".environment"]
    assert "GLOO_SOCKET_IFNAME=ib0\n" in texts[".environment"]
    assert Path(start.environment["DS_ENV_FILE"]).suffix == ".environment"


def test_accelerate_starts_one_command_on_each_host() -> None:
    spec = spec_of(backend={"type": "accelerate", "hosts": ["a", "b"]}, nodes=2, ranks_per_node=4)
    (start,) = starts_of(spec)
    for number, text in enumerate(start.argv[-2:]):
        ssh, _, _, host, there = shlex.split(text)
        words = shlex.split(there)
        assert (ssh, host) == ("ssh", "ab"[number])
        assert words[words.index("--machine_rank") + 1] == str(number)
        assert words[words.index("--num_processes") + 1] == "8"
        assert words[-1] == "run=runs/a b"


@pytest.mark.parametrize("backend", ["accelerate", "deepspeed"])
def test_stage_on_fewer_hosts_starts_on_the_first_alone(backend: str) -> None:
    spec = spec_of(
        backend={"type": backend, "hosts": ["a", "b"]},
        nodes=2,
        ranks_per_node=4,
        stages=[{"name": "tune", "nodes": 1, "command": list(TRAIN)}],
    )
    (start,) = starts_of(spec, ())
    if backend == "accelerate":
        (text,) = start.argv[start.argv.index("launcher.together") + 1 :]
        assert shlex.split(text)[3] == "a"
    else:
        assert "a slots=4\n" in start.files.values()
        assert "--force_multi" in start.argv  # DeepSpeed would start one host's ranks here


def test_stages_stand_in_order_and_name_what_they_wait_for() -> None:
    spec = spec_of(
        name="uts",
        nodes=2,
        backend={"type": "slurm"},
        stages=[
            {"name": "build", "array": 8, "command": ["data", "build", "c.yaml", "--out", "c"]},
            {"name": "train", "after": ["build"], "command": list(TRAIN)},
            {"name": "test", "after": ["train"], "command": ["evaluate", "p", "--data", "x.csv"]},
        ],
    )
    build, train, test = starts_of(spec, ())
    assert [start.job.name for start in (build, train, test)] == [
        "uts-build", "uts-train", "uts-test"
    ]  # fmt: skip
    assert train.job.after == ("uts-build",)
    (script,) = build.files.values()
    assert "#SBATCH --array=1-8" in script
    assert '--out c --task "$SLURM_ARRAY_TASK_ID/8"' in script
    assert "launcher.supervise" not in script
    assert (train.job.nodes, test.job.nodes) == (2, 1)


@pytest.mark.parametrize("backend", ["local", "deepspeed", "accelerate"])
def test_stage_on_more_machines_than_there_are_is_refused(backend: str) -> None:
    stage = {"name": "train", "nodes": 2, "command": list(TRAIN)}
    spec = spec_of(backend={"type": backend}, stages=[stage])
    with pytest.raises(LaunchError, match=r"tsmoe-train: nodes is 2, but the launch has 1"):
        starts_of(spec, ())


@pytest.mark.parametrize("backend", ["deepspeed", "accelerate"])
def test_start_on_other_machines_names_them(backend: str) -> None:
    stage = {"name": "tune", "nodes": 2, "command": list(TRAIN)}
    spec = spec_of(backend={"type": backend, "hosts": ["a", "b", "c"]}, nodes=3, stages=[stage])
    assert starts_of(spec, ())[0].hosts == ("a", "b")


def test_command_beside_stages_is_refused() -> None:
    spec = spec_of(stages=[{"name": "a", "command": ["data", "status"]}])
    with pytest.raises(LaunchError, match="leave one of them out"):
        starts_of(spec)
    with pytest.raises(LaunchError, match="no command"):
        starts_of(spec_of(), ())


def test_slurm_script_asks_for_what_the_file_says() -> None:
    text = script_of(
        partition="gpu", account="me", qos="long", constraint="a100|h100", time_limit="1-00:00:00",
        gpus_per_node=4, least_nodes=1, cpus_per_node=32, memory="0", exclude=["n7", "n9"],
        options=["--mail-user=me@example.org"],
    )  # fmt: skip
    options = {line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line}
    assert options >= {
        "--partition=gpu", "--account=me", "--qos=long", "--constraint=a100|h100",
        "--time=1-00:00:00", "--gpus-per-node=4", "--nodes=1-2",
        "--cpus-per-task=32", "--mem=0", "--exclude=n7,n9", "--exclusive", "--requeue",
        "--signal=USR1@300", "--open-mode=append", "--mail-user=me@example.org",
    }  # fmt: skip


def test_slurm_script_hands_words_on_unchanged() -> None:
    command = (*TRAIN, "x=$HOME; rm *", "y='z'")
    text = script_of(command)
    line = next(line for line in text.splitlines() if line.startswith("srun"))
    assert tuple(shlex.split(line)[-5:]) == command


def test_interpreter_may_have_a_space_in_its_path() -> None:
    for command in (TRAIN, ("evaluate", "p")):
        spec = spec_of(backend={"type": "slurm"}, python="/my env/py")
        (text,) = starts_of(spec, command)[0].files.values()
        assert "/my env/py" not in text.replace("'/my env/py' -m", "")


def test_command_that_runs_once_gets_all_cores_of_its_job() -> None:
    text = script_of(("evaluate", "p", "--data", "x.csv"), cpus_per_node=32)
    assert "#SBATCH --cpus-per-task=32" in text
    assert 'srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" ' in text


def test_only_commands_that_compute_take_a_gpu_of_the_queue() -> None:
    asks = "#SBATCH --gpus-per-node=1\n"
    assert asks in script_of(("evaluate", "p", "--data", "x.csv"), gpus_per_node=8)
    assert asks not in script_of(("export", "run", "package"), gpus_per_node=8)
    assert asks not in script_of(("evaluate", "p", "--data", "x.csv"))


def test_stage_on_fewer_nodes_than_the_least_asks_for_its_own() -> None:
    spec = spec_of(
        nodes=4,
        backend={"type": "slurm", "least_nodes": 2},
        stages=[{"name": "tune", "nodes": 1, "command": list(TRAIN)}],
    )
    (text,) = starts_of(spec, ())[0].files.values()
    assert "#SBATCH --nodes=1\n" in text


@pytest.mark.parametrize(
    ("given", "used"), [(4, "a,b,c,d"), (3, "a,b"), (2, "a,b"), (9, "a,b,c,d")]
)
def test_machines_that_cannot_share_the_batch_stay_idle(given: int, used: str) -> None:
    spec = spec_of(nodes=4, backend={"type": "slurm", "least_nodes": 1, "starts": "rank"},
                   ranks_per_node=8)  # fmt: skip
    (job,) = jobs_of(spec, TRAIN, lambda _: "/srv/run")
    assert job.node_counts == (4, 3, 2, 1)
    (start,) = plan(spec, [replace(job, node_counts=(4, 2, 1))], python="/bin/py")
    (text,) = start.files.values()
    assert "#SBATCH --nodes=1-4\n" in text
    assert "#SBATCH --ntasks-per-node" not in text  # SLURM would give no more than the least
    assert "#SBATCH --mincpus=8\n" in text
    assert 'srun --kill-on-bad-exit=1 --nodes="$nodes" --nodelist="$hosts" ' in text
    chosen = text[text.index("for nodes in") : text.index("\nseed=")]
    names = "\n".join("abcdefghi"[:given])
    script = f"""scontrol() {{ echo "{names}"; }}
SLURM_JOB_NUM_NODES={given}
{chosen}
echo "$hosts"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == used


def test_check_of_a_run_that_needs_long_to_save_fits_its_short_job() -> None:
    spec = spec_of(backend={"type": "slurm", "time_limit": "24:00:00", "stop_seconds_before": 1200})
    checked, command = as_check(spec, TRAIN)
    (text,) = starts_of(checked, command)[0].files.values()
    assert "#SBATCH --time=15\n" in text


def test_rank_starts_get_a_share_of_the_cores() -> None:
    text = script_of(starts="rank", binds_cores=True)
    assert "--ntasks-per-node=4" in text
    assert "--cpus-per-task=$((SLURM_CPUS_ON_NODE / 4)) --cpu-bind=cores" in text
    assert "--each-rank" in text


@pytest.mark.parametrize(
    ("container", "parts"),
    [
        (
            {"type": "pyxis", "image": "team/tsmoe.sqsh", "mounts": ["/data:/data"]},
            ["srun --overlap --nodes=1 --ntasks=1 --container-image=team/tsmoe.sqsh",
             "--container-mounts=/srv:/srv,/data:/data"],
        ),
        (
            {"type": "apptainer", "image": "tsmoe.sif", "mounts": ["$SCRATCH:/scratch"]},
            ["apptainer exec --nv --pwd /srv --bind /srv:/srv --bind \"$SCRATCH:/scratch\"",
             "tsmoe.sif python -m launcher.node"],
        ),
        (
            {"type": "docker", "image": "tsmoe:1", "shows_gpus": False},
            ['docker run --name "tsmoe-$SLURM_JOB_ID" --rm', "--env SLURM_NODEID",
             'docker rm --force "tsmoe-$SLURM_JOB_ID"', "#SBATCH --signal=B:USR1@300",
             """trap 'echo requeue > "$run/STOP"' USR1"""],
        ),
    ],
)  # fmt: skip
def test_containers_start_as_their_program_wants(
    container: dict[str, Any], parts: list[str]
) -> None:
    text = script_of(container=container)
    for part in parts:
        assert part in text
    assert "/bin/py" not in text  # the interpreter is that of the container


def test_variables_of_the_launch_file_reach_the_ranks_in_a_docker_container() -> None:
    backend = {"type": "slurm", "container": {"type": "docker", "image": "tsmoe:1"}}
    (text,) = starts_of(spec_of(environment={"A": "b c"}, backend=backend))[0].files.values()
    (line,) = [line for line in text.splitlines() if "launcher.node" in line]
    assert "export A='b c'" in text
    assert "--env A " in line
    assert line.count("--env DS_ACCELERATOR ") == 1


def test_check_has_no_run_and_is_not_requeued() -> None:
    text = script_of(("preflight", "time_tracker_tiny"))
    assert "--no-requeue" in text
    assert "supervise" not in text
    assert "launcher.node" in text


def test_every_option_of_the_back_end_reaches_the_script() -> None:
    """No option that nothing reads: each changes what is submitted."""
    changed = {
        "partition": "p", "account": "a", "qos": "q", "constraint": "c", "reservation": "r",
        "exclude": ["x"], "time_limit": "10:00:00", "memory": "1G", "gpus_per_node": 4,
        "cpus_per_node": 8, "is_exclusive": False, "least_nodes": 1, "starts": "rank",
        "binds_cores": True, "stop_signal": "TERM", "stop_seconds_before": 30,
        "container": {"type": "apptainer", "image": "i"}, "before": ["module load x"],
        "options": ["--x"],
    }  # fmt: skip
    names = {field.name for field in fields(SlurmConfig)} - {"type"}
    assert names == set(changed)
    plain = script_of()
    for name, value in changed.items():
        assert script_of(**{name: value}) != plain, name


def test_text_of_a_plan_can_be_typed() -> None:
    text = as_text(starts_of(spec_of(ranks_per_node=2, environment={"A": "b c"})))
    assert "A='b c' TSMOE_RANKS=2 /bin/py -m torch.distributed.run" in text
    assert text.endswith("'run=runs/a b'")
    (queued,) = starts_of(spec_of(backend={"type": "slurm"}, folder="/my work"))
    assert as_text([queued]).endswith("sbatch --parsable < '/my work/logs/tsmoe.sbatch'")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:01", 7201), ("1-2", 93600), ("1-2:3", 93780)],
)
def test_time_limits_are_read_as_slurm_does(text: str, seconds: int) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize(
    "printed",
    ["123\n", "123;cluster\n", "Welcome!\nquota: 12 % used\n123\n", "Submitted batch job 123\n"],
)
def test_number_is_found_whatever_a_site_prints_around_it(printed: str) -> None:
    assert job_number(printed) == "123"


def test_missing_number_is_told_with_what_was_printed() -> None:
    with pytest.raises(LaunchError, match="hello"):
        job_number("hello\n")
