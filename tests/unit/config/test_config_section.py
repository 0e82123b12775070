from dataclasses import dataclass, field
from typing import Literal

import pytest

from tsmoe.config import Section, decode, encode
from tsmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Round(Section):
    type: Literal["round"] = "round"
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Square(Section):
    type: Literal["square"] = "square"
    side: float = 1.0
    corners: tuple[int, ...] = (4,)

    def __post_init__(self) -> None:
        if self.side <= 0:
            raise ValueError(f"side ({self.side}) must be above 0")


@dataclass(frozen=True, kw_only=True)
class Plate(Section):
    name: str
    shape: Round | Square = field(default_factory=Round)
    num_holes: int = 0
    metal: Literal["iron", "zinc"] = "iron"


def refusal(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        decode(Plate, values, origin="plate.yaml")
    message = str(caught.value)
    assert message.startswith("plate.yaml: ")
    assert "\n" not in message
    return message


def test_values_are_decoded_over_defaults() -> None:
    plate = decode(Plate, {"name": "a", "shape": {"type": "square", "side": 2}}, origin="x")
    assert plate == Plate(name="a", shape=Square(side=2.0))


def test_encoding_is_plain_and_decodes_to_the_same() -> None:
    plate = Plate(name="a", shape=Square(corners=(1, 2)))
    values = encode(plate)
    assert values["shape"] == {"type": "square", "side": 1.0, "corners": [1, 2]}
    assert decode(Plate, values, origin="x") == plate


def test_unknown_key_names_its_path_and_the_nearest() -> None:
    assert "num_hole is not a known key; did you mean num_holes?" in refusal(
        {"name": "a", "num_hole": 3}
    )


def test_unknown_key_without_a_near_one_lists_all() -> None:
    assert "known keys: metal, name, num_holes, shape" in refusal({"name": "a", "zzz": 3})


def test_unknown_key_of_a_variant_is_told_by_that_variant_alone() -> None:
    message = refusal({"name": "a", "shape": {"type": "square", "sides": 3}})
    assert message == "plate.yaml: shape.sides is not a known key; did you mean side?"


def test_key_of_another_variant_is_unknown() -> None:
    message = refusal({"name": "a", "shape": {"type": "round", "side": 3}})
    assert message == "plate.yaml: shape.side is not a known key; known keys: radius, type"


def test_unknown_type_lists_the_known_ones() -> None:
    message = refusal({"name": "a", "shape": {"type": "oval"}, "num_holes": "x"})
    assert "shape.type is 'oval'" in message
    assert "'round'" in message
    assert "'square'" in message
    assert "num_holes is 'x'" in message, "the other problem is named as well"


def test_wrong_value_names_path_value_and_what_was_expected() -> None:
    message = refusal({"name": "a", "num_holes": "many", "metal": "gold"})
    assert "num_holes is 'many': input should be a valid integer" in message
    assert "metal is 'gold': input should be 'iron' or 'zinc'" in message


def test_missing_key_is_named() -> None:
    assert "name is required" in refusal({})


def test_check_across_fields_names_the_section() -> None:
    message = refusal({"name": "a", "shape": {"type": "square", "side": -1}})
    assert message == "plate.yaml: shape: side (-1.0) must be above 0"


def test_section_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Plate(name="a").name = "b"  # type: ignore[misc]
