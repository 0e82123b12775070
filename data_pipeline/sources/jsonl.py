"""JSON with one series per object, as Time-MoE and GluonTS have it: one per line, or one array.

`{"sequence": [1, 2, null]}` or `{"target": [..], "start": "2020-01-01", "item_id": "a"}`; other
keys are left alone. Files may be packed by gzip.
"""

import datetime as dt
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.frequency import modern_alias
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.files import UNKNOWN_DOMAIN, FileSource
from data_pipeline.sources.json_stream import JsonStream
from data_pipeline.sources.lines import LineFile
from data_pipeline.sources.names import one_line, utsd_names
from data_pipeline.sources.unit import Unit
from data_pipeline.steps.clean import BAD_TIMESTAMP, NOT_NUMERIC

_VALUE_KEYS = ("target", "sequence")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ARRAY_OF_OBJECTS = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|\]|$)")
_DATE = re.compile(r"\d{4}-\d{2}.*")


@dataclass(frozen=True, kw_only=True)
class JsonlSource(FileSource):
    """One or many files of JSON lines, or of one JSON array of objects.

    Values are numbers, or one list of numbers per variate; null, "NaN" and NaN are missing. A
    series without `item_id` is called after the file and the byte at which its line starts, or
    its number in an array. Dates in the form of pandas' periods, "2019-12-30/2020-01-05", mean
    their first day.
    """

    type: Literal["jsonl"] = "jsonl"

    def units(self) -> tuple[Unit, ...]:
        """Cut each file into ranges of lines; a packed file or one array is one unit."""
        return tuple(unit for file in self.files() for unit in _units(file))

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield the series of one unit; memory is that of one object as JSON."""
        lines = LineFile(Path(unit.file))
        objects = _array(lines) if _is_array(lines) else _objects(lines, unit.part)
        for where, number, content in objects:
            yield from self._series(content, where, f"{_stem(lines.file)}_{number}")

    def _series(
        self, content: object, where: "_Where", default_name: str
    ) -> Iterator[SeriesRecord | Drop]:
        if not isinstance(content, dict):
            raise DataError(
                f'{where}: expected an object such as {{"target": [1, 2]}}, got {content!r:.60}'
            )
        keys = [key for key in _VALUE_KEYS if key in content]
        if len(keys) != 1:
            raise DataError(
                f"{where}: expected the values under one of the keys {' or '.join(_VALUE_KEYS)}, "
                f"got the keys {', '.join(map(repr, content)) or 'of an empty object'}"
            )
        item_id = _text(content, "item_id", where) or default_name
        names = utsd_names(item_id) or (None, None)
        domain = self.domain or _text(content, "domain", where) or names[0] or UNKNOWN_DOMAIN
        stated = _text(content, "dataset", where) or _text(content, "source", where)
        source = self.source or stated or names[1] or _stem(where.lines.file)
        freq = self.freq or modern_alias(_text(content, "freq", where))
        variates = _variates(content[keys[0]])
        if variates is None:
            yield Drop(item_id=item_id, source=source, reason=NOT_NUMERIC)
            return
        try:
            start, end = _stamp(content.get("start")), _stamp(content.get("end"))
        except (ValueError, OverflowError):
            yield Drop(item_id=item_id, source=source, reason=BAD_TIMESTAMP)
            return
        for variate, values in enumerate(variates):
            yield SeriesRecord(
                item_id=item_id,
                start=start,
                end=end,
                freq=freq,
                domain=domain,
                source=source,
                variate=variate,
                values=values,
            )


@dataclass(frozen=True)
class _Where:
    """Where an object stands; lines are counted only if a message asks."""

    lines: LineFile
    position: int | None
    """Byte of its line, or None in an array."""
    number: int = 0
    """Position in an array."""

    def __str__(self) -> str:
        if self.position is not None:
            return self.lines.where(self.position)
        return f"{self.lines.file}, object {self.number + 1}"


def _units(file: Path) -> tuple[Unit, ...]:
    lines = LineFile(file)
    units = lines.units()
    if _is_array(lines):
        return (Unit(file=str(file), size_bytes=sum(unit.size_bytes for unit in units)),)
    return units


def _stem(file: Path) -> str:
    return Path(file.stem).stem if file.suffix == ".gz" else file.stem


def _is_array(lines: LineFile) -> bool:
    """Tell one array of objects from lines; a line may be no array, so "[" and "{" decide."""
    return _ARRAY_OF_OBJECTS.match(lines.head(64)) is not None


def _objects(lines: LineFile, part: int) -> Iterator[tuple[_Where, int, Any]]:  # Any: JSON
    for position, line in lines.lines(part):
        where = _Where(lines, position)
        try:
            if position == 0:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            content = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: is no JSON ({one_line(error)}); expected one object per line"
            ) from error
        yield where, position, content


def _array(lines: LineFile) -> Iterator[tuple[_Where, int, Any]]:
    count = 0
    with lines.open() as handle:
        try:
            stream = JsonStream(TextIOWrapper(handle, encoding="utf-8-sig"))
            for content in stream.elements():
                yield _Where(lines, None, count), count, content
                count += 1
            stream.end()
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{lines.file}: is no JSON after {count} objects ({one_line(error)}); export it "
                f"again"
            ) from error
    if not count:
        raise DataError(f"{lines.file}: holds an empty array; leave it out, or export it again")


def _text(content: dict[str, Any], key: str, where: _Where) -> str | None:  # Any: JSON
    """Return a name, which may be a number; None where there is none."""
    value = content.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, bool | list | dict):
        raise DataError(f"{where}: {key} is {value!r:.80}, expected a text")
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key} is {value!r:.80}, which is no text in UTF-8") from error
    return str(value)


def _stamp(value: object) -> dt.datetime | None:
    """Read a time, in UTC if it has a zone; raises ValueError if it is none."""
    if value is None or value == "":
        return None
    text = str(value).partition("/")[0]
    if not _DATE.fullmatch(text):
        raise ValueError(text)
    with suppress(ValueError):
        stamp = dt.datetime.fromisoformat(text)
        return stamp.astimezone(dt.UTC).replace(tzinfo=None) if stamp.tzinfo else stamp
    import pandas as pd

    parsed = pd.Timestamp(text)
    if parsed.tz is not None:
        parsed = parsed.tz_convert(None)
    return parsed.to_pydatetime(warn=False)


def _variates(values: object) -> list[np.ndarray] | None:
    """Return one array per variate, or None if there is anything but numbers."""
    if not isinstance(values, list):
        return None
    rows = values if values and isinstance(values[0], list) else [values]
    arrays = [array for row in rows if (array := _numbers(row)) is not None]
    return arrays if len(arrays) == len(rows) else None


def _numbers(values: object) -> np.ndarray | None:
    if not isinstance(values, list):
        return None
    try:
        numbers = np.array(values, np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    if numbers.ndim != 1:
        return None
    with np.errstate(over="ignore"):
        # What is beyond float32 becomes infinite, and is dropped under that name later.
        return numbers.astype(np.float32)
