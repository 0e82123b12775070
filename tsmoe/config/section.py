"""Decode nested values into the frozen dataclasses that configure a run, and back.

Each dataclass stands beside the class it configures; this file knows none of them. Unknown keys
are errors that name their path, and variants are told apart by their `type` tag.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, ClassVar, TypeVar

from tsmoe.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of every part of a configuration: unknown keys are forbidden."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


def decode(section: type[T], values: dict[str, Any], *, origin: str) -> T:
    """Build a config section from nested values.

    Args:
        section: a dataclass, often one with nested sections and tagged unions.
        values: as read from YAML.
        origin: what to call the values in an error, such as a file name.

    Raises:
        ConfigError: one line with the path of every wrong key, its value and what was expected.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(section).validate_python(values)
    except ValidationError as error:
        problems = [_describe(problem, section) for problem in _relevant(error.errors())]
        raise ConfigError(f"{origin}: {'; '.join(problems)}") from None


def encode(section: Any) -> dict[str, Any]:  # Any: dataclasses have no common type
    """Turn a config section into plain values for YAML or JSON; `decode` undoes it."""
    return _plain(dataclasses.asdict(section))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _relevant(problems: list[Any]) -> list[Any]:
    """Leave out what concerns variants of a union that the `type` tag did not choose."""
    paths = [problem["loc"] for problem in problems]
    variants = {path[: n + 1] for path in paths for n in range(len(path)) if _is_variant(path[n])}
    others = {variant for variant in variants if (*variant, "type") in paths}
    unions_with_a_choice = {variant[:-1] for variant in variants - others}
    left_out = [variant for variant in others if variant[:-1] in unions_with_a_choice]
    return [p for p in problems if not any(p["loc"][: len(v)] == v for v in left_out)]


def _is_variant(part: Any) -> bool:
    # The class of a variant is a part of pydantic's path, but not of what the user wrote.
    return str(part)[:1].isupper()


def _describe(problem: Any, section: type) -> str:
    path = ".".join(str(part) for part in problem["loc"] if not _is_variant(part))
    path = path or "the top level"
    match problem["type"]:
        case "unexpected_keyword_argument":
            known = _known_keys(section, problem["loc"][:-1])
            close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
            return f"{path} is not a known key; {hint}"
        case "missing" | "missing_argument":
            return f"{path} is required and has no default"
        case "string_type" if isinstance(problem["input"], int | float):
            # YAML reads 24:00:00 as a number of seconds, so it cannot be turned back.
            return (
                f"{path} is {problem['input']!r}, but must be text; write it in double "
                f"quotes (from a shell: '{path}=\"..\"')"
            )
        case "value_error":
            return (
                f"{path}: {problem['ctx']['error']}"
                if problem["loc"]
                else str(problem["ctx"]["error"])
            )
        case _:
            return (
                f"{path} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
            )


def _known_keys(section: type, path: tuple[Any, ...]) -> list[str]:
    """Fields at a path, following nested dataclasses and tagged unions."""
    import typing

    candidates: list[Any] = [section]
    for part in path:
        following: list[Any] = []
        for candidate in candidates:
            if not dataclasses.is_dataclass(candidate):
                continue
            hints = typing.get_type_hints(candidate)
            if part in hints:
                following += [hints[part], *typing.get_args(hints[part])]
        # The class of a variant is a part of the path without being a field.
        chosen = [c for c in candidates if getattr(c, "__name__", None) == part]
        candidates = following or chosen or candidates
        candidates += [inner for c in candidates for inner in typing.get_args(c)]
    fields = [
        f.name for c in candidates if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)
    ]
    return sorted(set(fields))
