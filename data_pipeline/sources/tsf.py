"""The .tsf format of the Monash forecasting archive (Godahewa et al., arXiv 2105.06643).

A header of lines such as "@attribute series_name string" and "@frequency daily", then "@data" and
one series per line: its attributes, then its values, "T1:1979-01-31 00-00-00:1.5,?,3".
"""

import datetime as dt
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.files import UNKNOWN_DOMAIN, FileSource
from data_pipeline.sources.lines import LineFile
from data_pipeline.sources.names import one_line
from data_pipeline.sources.unit import Unit
from data_pipeline.steps.clean import BAD_TIMESTAMP

_HEADER_BYTES = 2**20
_STAMP_FORMATS = ("%Y-%m-%d %H-%M-%S", "%Y-%m-%d")
_FREQUENCY = re.compile(r"(?:(\d+)_)?([a-z]+)")
_ALIASES = {
    "secondly": "s",
    "seconds": "s",
    "minutely": "min",
    "minutes": "min",
    "hourly": "h",
    "hours": "h",
    "daily": "D",
    "days": "D",
    "weekly": "W",
    "weeks": "W",
    "monthly": "MS",
    "months": "MS",
    "quarterly": "QS",
    "quarters": "QS",
    "yearly": "YS",
    "years": "YS",
}


@dataclass(frozen=True, kw_only=True)
class TsfSource(FileSource):
    """One or many .tsf files.

    A series is called after the file and its attribute `series_name`, or else the byte at which
    its line starts. Months, quarters and years count from `start_timestamp`, whatever day it is.
    """

    type: Literal["tsf"] = "tsf"

    def units(self) -> tuple[Unit, ...]:
        """Cut each file into ranges of lines."""
        return tuple(
            unit for file in self.files() for unit in LineFile(file, _Header.read(file).end).units()
        )

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield the series of one range of lines; memory is that of one line."""
        file = Path(unit.file)
        header = _Header.read(file)
        freq = self.freq or header.freq
        source = self.source or file.stem
        lines = LineFile(file, header.end)
        for position, line in lines.lines(unit.part):
            if line.startswith(b"#"):
                continue
            *fields, text = line.strip().split(b":")
            if len(fields) != len(header.attributes):
                raise DataError(
                    f"{lines.where(position)}: has {len(fields)} attributes before its values, "
                    f"but the header names {len(header.attributes)}: "
                    f"{', '.join(header.attributes)}"
                )
            attributes = dict(zip(header.attributes, map(_decoded, fields), strict=True))
            item_id = f"{file.stem}_{attributes.get('series_name') or position}"
            try:
                start = _stamp(header, attributes)
            except ValueError:
                yield Drop(item_id=item_id, source=source, reason=BAD_TIMESTAMP)
                continue
            values = _values(text)
            if values is None:
                raise DataError(f"{lines.where(position)}: {_fault(text)}")
            if header.has_equal_lengths and not line.endswith(b"\n"):
                _check_last(lines, len(values), position)
            yield SeriesRecord(
                item_id=item_id,
                start=start,
                end=None,
                freq=freq,
                domain=self.domain or UNKNOWN_DOMAIN,
                source=source,
                variate=0,
                values=values,
            )


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What stands before the series of a file."""

    attributes: dict[str, str]
    """Names and types, in the order in which a line gives them."""
    freq: str | None
    has_equal_lengths: bool
    end: int
    """Byte at which the first series starts."""

    @classmethod
    def read(cls, file: Path) -> "_Header":
        """Read the lines up to `@data`.

        Raises:
            DataError: if there is none, or a line of it makes no sense.
        """
        attributes: dict[str, str] = {}
        tags: dict[str, str] = {}
        try:
            with file.open("rb") as handle:
                number = 0
                while handle.tell() < _HEADER_BYTES and (line := handle.readline(_HEADER_BYTES)):
                    number += 1
                    words = _decoded(line).split()
                    match words:
                        case []:
                            pass
                        case ["@data"]:
                            return cls(
                                attributes=attributes,
                                freq=_alias(tags.get("@frequency"), file),
                                has_equal_lengths=tags.get("@equallength", "").lower() == "true",
                                end=handle.tell(),
                            )
                        case ["@attribute", name, kind]:
                            attributes[name] = kind
                        case [tag, *values] if tag.startswith("@") and tag != "@attribute":
                            tags[tag] = " ".join(values)
                        case [comment, *_] if comment.startswith("#"):
                            pass
                        case _:
                            raise DataError(
                                f"{file}, line {number}: {' '.join(words)!r:.80} is no line of a "
                                f".tsf header such as '@attribute series_name string'"
                            )
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({one_line(error)})") from error
        raise DataError(f"{file}: has no line '@data'; expected a whole .tsf file")


def _alias(frequency: str | None, file: Path) -> str | None:
    """Translate "10_minutes" or "daily" to the alias of pandas."""
    if frequency is None:
        return None
    match = _FREQUENCY.fullmatch(frequency.replace("half_hourly", "30_minutes"))
    if match is None or match[2] not in _ALIASES:
        raise DataError(
            f"{file}: unknown @frequency {frequency!r}; known are {', '.join(_ALIASES)} and "
            f"multiples such as 10_minutes; or set `freq` of the source"
        )
    return f"{match[1] or ''}{_ALIASES[match[2]]}"


def _decoded(text: bytes) -> str:
    """Read text in UTF-8, or else in Latin-1, in which the archive has names of places."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _stamp(header: _Header, attributes: dict[str, str]) -> dt.datetime | None:
    """Read the first attribute that is a date; raises ValueError if it is none."""
    text = next(
        (attributes[name] for name, kind in header.attributes.items() if kind == "date"), ""
    )
    if not text:
        return None
    for form in _STAMP_FORMATS[:-1]:
        with suppress(ValueError):
            return dt.datetime.strptime(text, form)
    return dt.datetime.strptime(text, _STAMP_FORMATS[-1])


def _values(text: bytes) -> np.ndarray | None:
    """Read numbers between commas, with NaN for "?"; None if there is anything else."""
    try:
        with warnings.catch_warnings():
            # numpy before 2.3 warns of text that is no number, and returns what came before.
            warnings.simplefilter("error", DeprecationWarning)
            values = np.fromstring(text.replace(b"?", b"nan").decode("ascii"), np.float64, sep=",")
    except (ValueError, DeprecationWarning):
        return None
    if len(values) != text.count(b",") + 1:
        return None
    with np.errstate(over="ignore"):
        # What is beyond float32 becomes infinite, and is dropped under that name later.
        return values.astype(np.float32)


def _fault(text: bytes) -> str:
    """Name the first value that is no number."""
    for number, word in enumerate(text.split(b","), start=1):
        if _values(word) is None:
            shown = _decoded(word)
            return f"value {number} is {shown!r:.80}, expected a number, or ? where it is missing"
    return "the values are not all numbers, or ? where one is missing"


def _check_last(lines: LineFile, length: int, position: int) -> None:
    """Check a line without an end: a file that was cut short ends like that."""
    _, first = next(lines.lines(0))
    expected = first.count(b",") + 1
    if length != expected:
        raise DataError(
            f"{lines.where(position)}: ends after {length} of {expected} values, without an end "
            f"of line; the file is cut short, download it again"
        )
