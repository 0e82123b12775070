"""Every file of ds_configs/ trains as one plain process does, started as its README says."""

import re
from pathlib import Path

import pytest

from rank_pool import run_on_ranks
from small_run import StepsRun, build_small_corpus, run_steps, small_config
from tsmoe.config import merge_layers, parse_override
from tsmoe.train.run_config import RunConfig

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
_ROW = re.compile(r"^\| `(\w+\.json)` \| `([^`]+)` \|", re.MULTILINE)
TABLE = dict(_ROW.findall((FOLDER / "README.md").read_text(encoding="utf-8")))
STEPS = {"training": {"steps": 2, "micro_batch_size": 4}}


def test_readme_lists_every_file() -> None:
    assert sorted(TABLE) == sorted(path.name for path in FOLDER.glob("*.json"))


def settings_of(name: str, expert_parallel_size: int) -> dict:
    layers = [parse_override(text) for text in TABLE[name].split()]
    engine = {"type": "deepspeed", "config_file": str(FOLDER / name)}
    return merge_layers(
        {"engine": engine | {"expert_parallel_size": expert_parallel_size}}, *layers, STEPS
    )


def run_all(configs: list[RunConfig]) -> list[StepsRun]:
    return [run_steps(config) for config in configs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[tuple[str, int], tuple[StepsRun, ...]]:
    corpus = build_small_corpus(tmp_path_factory.mktemp("small"))
    keys = [(name, size) for name in TABLE for size in (1, 2)]
    configs = [small_config(corpus, settings_of(*key)) for key in keys]
    of_ranks = run_on_ranks(run_all, configs, num_ranks=2, time_limit=150)
    found = dict(zip(keys, zip(*of_ranks, strict=True), strict=True))
    plain = small_config(corpus, {"training": {"steps": 2, "micro_batch_size": 16}})
    found["plain", 1] = tuple(run_on_ranks(run_steps, plain, num_ranks=1))
    return found


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("expert_parallel_size", [1, 2])
def test_file_gives_the_run_of_one_plain_process(runs, name, expert_parallel_size) -> None:
    (twin,) = runs["plain", 1]
    for run in runs[name, expert_parallel_size]:
        assert run.losses == pytest.approx(twin.losses, rel=1e-5)
        assert run.grad_norms == pytest.approx(twin.grad_norms, rel=1e-5)
