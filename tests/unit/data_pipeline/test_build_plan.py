import pytest

from data_pipeline.build.plan import describe_change, make_plan, parse_task
from data_pipeline.errors import ConfigError
from data_pipeline.shards.manifest import InputFile


def sizes_of_blocks(plan) -> list[list[int]]:
    return [[piece.unit.size_bytes for piece in block.pieces] for block in plan.blocks]


def test_units_share_a_block_until_it_is_full(listed_config) -> None:
    config = listed_config([], unit_sizes=(3000, 1000, 97, 4096, 5000, 1), shard_size_bytes=4096)
    assert sizes_of_blocks(make_plan(config)) == [[3000, 1000], [97], [4096], [5000], [1]]


def test_unit_of_unknown_size_has_a_block_of_its_own(listed_config) -> None:
    config = listed_config([], unit_sizes=(10, 0, 10, 10), shard_size_bytes=4096)
    assert sizes_of_blocks(make_plan(config)) == [[10], [0], [10, 10]]


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 50])
def test_every_block_belongs_to_one_task(listed_config, num_tasks) -> None:
    plan = make_plan(listed_config([], unit_sizes=(4096,) * 11, shard_size_bytes=4096))
    dealt = [b.index for task in range(num_tasks) for b in plan.of_task(task + 1, num_tasks)]
    assert sorted(dealt) == list(range(11))


def test_plan_is_a_function_of_configuration_and_files(listed_config) -> None:
    first, second = (make_plan(listed_config([], unit_sizes=(1, 2))) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert first.identity == second.identity
    other = make_plan(listed_config([], unit_sizes=(1, 2), name="other"))
    assert other.identity != first.identity


def test_task_is_read_from_text() -> None:
    assert parse_task("3/8") == (3, 8)
    for text in ("0/8", "9/8", "3", "a/b", "3/", "-1/8", "1/0"):
        with pytest.raises(ConfigError, match="expected I/N"):
            parse_task(text)


def test_change_of_the_inputs_is_named() -> None:
    a, b = (InputFile(path=name, bytes=1, mtime_ns=1) for name in ("a", "b"))
    assert describe_change([a], [a, b]) == "b is new"
    assert describe_change([a, b], [b]) == "a is gone"
    assert describe_change([a], [InputFile(path="a", bytes=2, mtime_ns=1)]) == "a has changed"
    assert describe_change([a], [a]) == "the settings differ"
