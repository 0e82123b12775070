from pathlib import Path

import pytest

from tsmoe.config import merge_layers, parse_override, read_yaml
from tsmoe.errors import ConfigError


def test_later_layers_win_key_by_key() -> None:
    merged = merge_layers({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 4}}, {"a": 5, "e": {}})
    assert merged == {"a": 5, "b": {"c": 4, "d": 3}, "e": {}}


def test_layers_are_left_as_they_were() -> None:
    below, above = {"b": {"c": 2}}, {"b": {"d": 3}}
    merge_layers(below, above)
    assert (below, above) == ({"b": {"c": 2}}, {"b": {"d": 3}})


def test_changed_type_drops_the_keys_of_the_other_variant() -> None:
    below = {"head": {"type": "quantile", "levels": [0.5]}, "steps": 3}
    assert merge_layers(below, {"head": {"type": "point"}}) == {
        "head": {"type": "point"},
        "steps": 3,
    }


def test_same_type_keeps_the_keys() -> None:
    below = {"head": {"type": "quantile", "levels": [0.5]}}
    assert merge_layers(below, {"head": {"type": "quantile"}}) == below
    assert merge_layers(below, {"head": {"levels": [0.1, 0.5]}})["head"]["type"] == "quantile"


def test_changed_type_drops_inner_sections_too() -> None:
    below = {"feed_forward": {"type": "moe", "router": {"top_k": 2}}}
    above = {"feed_forward": {"type": "dense", "d_ff": 8}}
    assert merge_layers(below, above) == above


def test_list_is_replaced_whole() -> None:
    assert merge_layers({"levels": [0.1, 0.5]}, {"levels": [0.5]}) == {"levels": [0.5]}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("steps=500", {"steps": 500}),
        ("training.steps=500", {"training": {"steps": 500}}),
        ("optimizer.lr=0.002", {"optimizer": {"lr": 0.002}}),
        ("a.b.c=[0.1, 0.5]", {"a": {"b": {"c": [0.1, 0.5]}}}),
        ("name=x=y", {"name": "x=y"}),
        ("engine={type: plain}", {"engine": {"type": "plain"}}),
        ("config_file=", {"config_file": None}),
        ("flag=true", {"flag": True}),
    ],
)
def test_setting_becomes_nested_values(argument: str, expected: dict) -> None:
    assert parse_override(argument) == expected


@pytest.mark.parametrize("argument", ["steps", "=5", " =5", ""])
def test_setting_without_key_and_value_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match="KEY=VALUE") as caught:
        parse_override(argument)
    assert repr(argument) in str(caught.value)


def test_value_that_is_no_yaml_is_refused_by_key() -> None:
    with pytest.raises(ConfigError, match=r"model\.head.*\{type"):
        parse_override("model.head={type")


def test_yaml_is_read_and_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {steps: 5}\n")
    assert read_yaml(path) == {"training": {"steps": 5}}
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        (b"a: [1", "not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"- a\n- b\n", "expected a mapping.*got list"),
        (b"\xff\xfe\x00", "cannot be read|not valid YAML"),
    ],
)
def test_unusable_file_is_refused_by_name(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"run\.yaml: .*({says})") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        read_yaml(tmp_path)
