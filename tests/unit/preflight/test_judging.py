"""What is made of the findings of ranks, tried with those of 8 nodes that are not there."""

import re
from dataclasses import replace
from typing import Any

import pytest

from tsmoe.preflight import (
    clock,
    compute,
    corpus,
    folder,
    gpu,
    host,
    network,
    software,
    trial,
    world,
)
from tsmoe.preflight.verdict import GIB, Check, Place, Row, Told, Verdict

NODES, PER_NODE = 8, 8
PLACES = {rank: Place(node=f"n{rank // PER_NODE + 1}") for rank in range(NODES * PER_NODE)}
LEADERS = range(0, len(PLACES), PER_NODE)

WORLD = world.WorldFinding(
    world_size=64, local_rank=0, local_world_size=8, slurm_nodes=8, slurm_tasks=None
)
SOFTWARE = software.SoftwareFinding(
    python="3.11.2", torch="2.13.0", deepspeed="0.19.8", tsmoe="0.1.0", code="a" * 64,
    folder="/opt/tsmoe", cuda="13.0", nccl="2.28.3", driver="580.1",
)  # fmt: skip
GPU = gpu.GpuFinding(
    kind="cuda", visible=8, name="NVIDIA H100", total_bytes=80 * GIB, free_bytes=79 * GIB
)
HOST = host.HostFinding(
    cores=list(range(96)), node_cores=96, threads=12, total_bytes=512 * GIB,
    available_bytes=500 * GIB,
)  # fmt: skip
FOLDER = folder.FolderFinding(
    folder="/runs/big", sees_first=True, bytes_per_second=2e9, free_bytes=900 * GIB,
    needed_bytes=150 * GIB, minimum_bytes=GIB, cache="/scratch", cache_free_bytes=70 * GIB,
    cache_is_writable=True,
)  # fmt: skip
CORPUS = corpus.CorpusFinding(
    path="/data/utsd", fingerprint="f" * 64, manifest="e" * 64, series=10, points=1000, files=3,
    read_files=3,
)  # fmt: skip
CLOCK = clock.ClockFinding(times=[100.0, 101.0, 102.0])
COMPUTE = compute.ComputeFinding(flops=700e12, is_gpu=True)
NETWORK = network.NetworkFinding(
    is_gpu=True, ranks=64, sizes=[1 << 16, 1 << 26], all_reduce=[1e9, 40e9], all_to_all=[1e9, 30e9]
)
ENGINE = trial.EngineFinding(kind="deepspeed", parameters=10_000_000, seconds=3.0)
STEP = trial.StepFinding(
    step=1, loss=1.5, seconds=2.0, waited_seconds=0.1, first_seconds=9.0, points=1_000_000,
    peak_bytes=60 * GIB, total_bytes=80 * GIB,
)  # fmt: skip


def sound(check: Check) -> dict[int, Any]:
    """Findings of all ranks, where all is well."""
    match check:
        case world.CHECK:
            return {rank: replace(WORLD, local_rank=rank % PER_NODE) for rank in PLACES}
        case gpu.CHECK:
            return {rank: replace(GPU, uuid=f"GPU-{rank}") for rank in PLACES}
        case network.NETWORK:
            findings = {rank: replace(NETWORK, partners=[], pair_speeds=[]) for rank in PLACES}
            for one in LEADERS:
                for other in LEADERS:
                    if one != other:
                        findings[one].partners.append(other)
                        findings[one].pair_speeds.append(20e9)
            return findings
    example = {
        software.CHECK: SOFTWARE, host.CHECK: HOST, folder.CHECK: FOLDER, corpus.CHECK: CORPUS,
        clock.CHECK: CLOCK, compute.CHECK: COMPUTE, network.EXPERT_GROUPS: NETWORK,
        trial.ENGINE: ENGINE, trial.STEP: STEP,
    }[check]  # fmt: skip
    return dict.fromkeys(LEADERS if check.once_per_node else PLACES, example)


def judged(check: Check, findings: dict[int, Any]) -> list[Row]:
    return check.judge(Told(check.name, findings, PLACES))


def changed(check: Check, ranks: list[int], **values: Any) -> list[Row]:
    """Judge where some ranks found something else."""
    findings = sound(check)
    for rank in ranks:
        findings[rank] = replace(findings[rank], **values)
    return judged(check, findings)


CHECKS = (
    world.CHECK, software.CHECK, gpu.CHECK, host.CHECK, folder.CHECK, corpus.CHECK, clock.CHECK,
    compute.CHECK, network.NETWORK, network.EXPERT_GROUPS, trial.ENGINE, trial.STEP,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_sound_machines_give_one_good_line_for_all_nodes(check) -> None:
    rows = judged(check, sound(check))
    assert {row.verdict for row in rows} == {Verdict.OK}, rows
    assert all(not row.advice for row in rows)
    lines = {folder.CHECK: 2, network.NETWORK: 2}  # the disk; pairs
    assert len(rows) == lines.get(check, 1)


N8 = list(range(56, 64))

# A check, the ranks that found something else, what they found, the verdict, and its words.
FAULTS: tuple[tuple[Check, list[int], dict[str, Any], Verdict, str], ...] = (
    (world.CHECK, N8, {"world_size": 8}, Verdict.FAIL, "WORLD_SIZE differs: 64 on n1, .*; 8 on n8"),
    (world.CHECK, [3], {"claims": 2}, Verdict.FAIL, "several processes say that they are rank 3"),
    (world.CHECK, [9], {"local_rank": 0}, Verdict.FAIL,
     "ranks 8, 9 on n2 all have LOCAL_RANK 0"),
    (world.CHECK, list(PLACES), {"slurm_nodes": 9, "local_world_size": None}, Verdict.FAIL,
     "SLURM gave 9 nodes, but .* on 8 only"),
    (world.CHECK, list(PLACES), {"local_world_size": 4}, Verdict.FAIL,
     "WORLD_SIZE is 64, but 8 nodes with 4 ranks each make 32"),
    (world.CHECK, list(PLACES), {"slurm_tasks": 128, "local_world_size": None}, Verdict.FAIL,
     "WORLD_SIZE is 64, but 128 tasks of SLURM make 128"),
    (software.CHECK, N8, {"torch": "2.12.0"}, Verdict.FAIL,
     r"torch differs: 2\.13\.0 on n1, n2, n3, n4, n5, n6 and 1 more nodes; 2\.12\.0 on n8"),
    (software.CHECK, [13], {"code": "b" * 64, "folder": "/home/me/tsmoe"}, Verdict.FAIL,
     r"the code of tsmoe differs: .* bbbbbbbbbbbb \(/home/me/tsmoe\) on n2 \(rank 13\)"),
    (software.CHECK, N8, {"deepspeed": None}, Verdict.FAIL, "deepspeed differs: .* none on n8"),
    (software.CHECK, N8, {"nccl": "2.27.0"}, Verdict.FAIL, "nccl differs"),
    (software.CHECK, N8, {"driver": "570.0"}, Verdict.WARN, "driver differs: .* 570.0 on n8"),
    (gpu.CHECK, N8, {"kind": "cpu"}, Verdict.FAIL, "different kinds of device: cuda .*; cpu on n8"),
    (gpu.CHECK, [1], {"uuid": "GPU-0"}, Verdict.FAIL, r"ranks 0, 1 share one GPU: GPU-0 of n1"),
    (gpu.CHECK, [5], {"free_bytes": 50 * GIB, "others": ["77 (30000 MiB)"]}, Verdict.WARN,
     r"n1 \(rank 5\): 30.0 of 80.0 GiB are held, by 77 \(30000 MiB\)"),
    (gpu.CHECK, N8, {"name": "NVIDIA A100"}, Verdict.WARN,
     "GPUs differ: .* NVIDIA A100 of 80 GiB on n8"),
    (gpu.CHECK, N8, {"visible": 16}, Verdict.WARN, "n8 has 16 GPUs for 8 ranks"),
    (gpu.CHECK, list(PLACES), {"kind": "cpu"}, Verdict.WARN, "training on CPU, though .* has GPUs"),
    (host.CHECK, N8, {"cores": [7]}, Verdict.WARN,
     "n8: all 8 ranks may run on core 7 only, of 96"),
    (host.CHECK, N8, {"threads": 96}, Verdict.WARN,
     "n8: 8 ranks compute with 768 threads on 96 cores"),
    (host.CHECK, N8, {"available_bytes": 12 * GIB}, Verdict.WARN,
     "n8: 12.0 GiB of memory are available to 8 ranks"),
    (folder.CHECK, [56], {"sees_first": False, "folder": "/local/big"}, Verdict.FAIL,
     r"n8 \(rank 56\) does not see in /runs/big what n1 wrote there; its folder is /local/big"),
    (folder.CHECK, [0], {"unseen": [16]}, Verdict.FAIL,
     r"n1 does not see in /runs/big what n3 \(rank 16\) wrote"),
    (folder.CHECK, [56], {"problem": "Permission denied"}, Verdict.FAIL,
     r"n8 \(rank 56\) cannot write to /runs/big: Permission denied"),
    (folder.CHECK, list(LEADERS), {"free_bytes": 140 * GIB}, Verdict.FAIL,
     "140.0 GiB free in /runs/big, checkpoints take 150.00 GiB more, and 1 GiB shall be left"),
    (folder.CHECK, [56], {"cache_free_bytes": GIB // 2}, Verdict.WARN,
     "n8: cache /scratch has 0.5 GiB free"),
    (folder.CHECK, [56], {"cache_is_writable": False}, Verdict.WARN,
     "n8: cache /scratch cannot be written"),
    (corpus.CHECK, [56], {"problems": ["p.arrow: 5 bytes; copy again"]}, Verdict.FAIL,
     r"n8 \(rank 56\): p.arrow: 5 bytes$"),
    (corpus.CHECK, [56], {"fingerprint": "0" * 64}, Verdict.FAIL,
     "the fingerprint differs: ffffffffffff on .*; 000000000000 on n8"),
    (corpus.CHECK, [56], {"manifest": "0" * 64}, Verdict.FAIL, "the manifest differs"),
    (clock.CHECK, [56], {"times": [103.0, 104.0, 300.0]}, Verdict.WARN,
     r"the clock of n8 is 3.0 s ahead of that of n1"),
    (clock.CHECK, [56], {"times": [10.0, 11.0, 12.0]}, Verdict.FAIL,
     r"the clock of n8 is 90.0 s behind that of n1"),
    (compute.CHECK, [42], {"flops": 450e12}, Verdict.WARN,
     r"n6 \(rank 42\) reaches 450 TFLOP/s, the median is 700"),
    (compute.CHECK, [42], {"flops": 300e12}, Verdict.FAIL, r"n6 \(rank 42\) reaches 300"),
    (compute.CHECK, list(range(20)), {"flops": 10e12, "is_gpu": False}, Verdict.WARN,
     r"n3 \(rank 19\) reaches 10 TFLOP/s"),
    (network.NETWORK, list(PLACES), {"all_reduce": [1e8, 1e9]}, Verdict.WARN,
     "all-reduce 0.1, 1, all-to-all 1, 30 GB/s a rank with 0.0625, 64 MiB"),
    (network.EXPERT_GROUPS, N8, {"all_to_all": [1e9, 5e9]}, Verdict.WARN,
     "n8 reach 5, the median 30"),
    (trial.STEP, [42], {"peak_bytes": 79 * GIB}, Verdict.WARN,
     r"at most 79.00 of 80.0 GiB a rank \(n6 \(rank 42\)\)"),
    (trial.STEP, [0], {"loss": float("nan")}, Verdict.FAIL, "the loss of step 1 is nan"),
)  # fmt: skip


@pytest.mark.parametrize(("check", "ranks", "values", "verdict", "words"), FAULTS)
def test_fault_is_named_with_its_node_and_numbers(check, ranks, values, verdict, words) -> None:
    bad = [row for row in changed(check, ranks, **values) if row.verdict is not Verdict.OK]
    assert {row.verdict for row in bad} == {verdict}, bad
    assert any(re.search(words, row.found) for row in bad), bad
    assert all(row.advice for row in bad)


def test_missing_ranks_are_listed() -> None:
    findings = {rank: f for rank, f in sound(world.CHECK).items() if rank not in (5, 40)}
    (row,) = [r for r in judged(world.CHECK, findings) if r.verdict is Verdict.FAIL]
    assert "2 of 64 ranks did not come: rank 5, 40;" in row.found


def test_node_that_trains_alone_is_found() -> None:
    """What a launcher without a hostfile does: each node is a world of its own."""
    findings = {rank: replace(WORLD, world_size=8, local_rank=rank) for rank in range(8)}
    (fail,) = [row for row in judged(world.CHECK, findings) if "SLURM gave 8 nodes" in row.found]
    assert fail.verdict is Verdict.FAIL
    assert "on 1 only (n1)" in fail.found
    assert "hostfile" in fail.advice


def test_one_core_for_each_rank_of_a_wide_node_is_told_with_the_share_to_ask_for() -> None:
    findings = {rank: replace(HOST, cores=[rank % 8], threads=1) for rank in PLACES}
    rows = judged(host.CHECK, findings)
    assert [row.verdict for row in rows] == [Verdict.WARN] * NODES
    assert "one core for each rank, of 96" in rows[0].found
    assert "--cpus-per-task=12" in rows[0].advice


def test_node_behind_a_bad_cable_is_blamed_for_its_slow_pairs() -> None:
    findings = sound(network.NETWORK)
    for rank, finding in findings.items():
        speeds = [2e9 if 24 in (rank, partner) else 20e9 for partner in finding.partners]
        findings[rank] = replace(finding, pair_speeds=speeds)
    (row,) = [r for r in judged(network.NETWORK, findings) if r.verdict is Verdict.WARN]
    assert "2 GB/s between n1 (rank 0) and n4 (rank 24), the median pair has 20" in row.found
    assert "n4 (rank 24) is in 7 of 7 slow pairs" in row.found


def test_uneven_nodes_are_worth_a_word() -> None:
    findings = {
        rank: replace(f, world_size=60, local_world_size=None)
        for rank, f in sound(world.CHECK).items()
        if rank < 60
    }
    (row,) = judged(world.CHECK, findings)
    assert row.verdict is Verdict.WARN
    assert "4 on n8" in row.found
