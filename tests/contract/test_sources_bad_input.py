"""What every source of files makes of bad input: the series, or one line that says what is wrong.

Files are cut at many places, bytes in them are flipped, and they are replaced by others. A source
may refuse with a TsmoeError; it may not fail in another way, hang, or lose series in silence where
the format tells how many there are. New sources join by their examples.
"""

import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from source_examples import EXAMPLES, EXPECTED, LAYOUT_EXAMPLES, Example

from data_pipeline.errors import DataError, TsmoeError
from data_pipeline.record import Drop, SeriesRecord

FORMS: dict[str, Example] = {
    source.type: example
    for source, example in EXAMPLES.items()
    if "path" in source.__dataclass_fields__
} | LAYOUT_EXAMPLES
OF_LINES = {"csv", "csv long", "tsf", "jsonl"}
"""Text formats: whether more lines should follow, no one can tell."""
SECONDS_AT_MOST = 20
CUTS = 60
FLIPS = 120
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256))


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Stop a test that does not come to an end."""

    def stop(*_: object) -> None:
        pytest.fail(f"still reading after {SECONDS_AT_MOST} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_AT_MOST)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=FORMS)
def form(request) -> str:
    return request.param


def outcome(source) -> list[SeriesRecord | Drop] | TsmoeError:
    """Read all series or return the error; an error of another kind fails the test."""
    try:
        return list(source.records())
    except TsmoeError as error:
        return error


def values_of(items: list[SeriesRecord | Drop]) -> list[list[float] | str]:
    """Values of each series, NaN as None so that they can be compared; or why there are none."""
    return [
        item.reason
        if isinstance(item, Drop)
        else [None if np.isnan(value) else value for value in item.values.tolist()]
        for item in items
    ]


def assert_one_line_about(error: TsmoeError, folder: Path) -> None:
    assert "\n" not in str(error), error
    assert str(folder) in str(error), f"names no file: {error}"


def test_file_of_another_kind_is_refused_by_name(form, tmp_path) -> None:
    source = FORMS[form](tmp_path).anchored(tmp_path)
    for file in source.files():
        whole = file.read_bytes()
        for other in (PNG, b"", b"\0" * 4096):
            file.write_bytes(other)
            found = outcome(source)
            assert isinstance(found, DataError), f"{file.name} of {other[:8]!r}: {found}"
            assert_one_line_about(found, tmp_path)
        file.write_bytes(whole)
    assert not isinstance(outcome(source), TsmoeError)


def test_file_cut_short_is_refused(form, tmp_path) -> None:
    source = FORMS[form](tmp_path).anchored(tmp_path)
    expected = values_of(outcome(source))
    for file in source.files():
        whole = file.read_bytes()
        for length in {len(whole) * cut // CUTS for cut in range(CUTS)} | {len(whole) - 1}:
            file.write_bytes(whole[:length])
            found = outcome(source)
            if isinstance(found, TsmoeError):
                assert_one_line_about(found, tmp_path)
            elif form in OF_LINES:
                assert is_cut_of(values_of(found), expected), f"at {length} of {len(whole)}"
            else:
                # A description in JSON is whole without the end of its last line.
                assert whole[length:].strip() == b"", f"{file.name} at {length} of {len(whole)}"
                assert values_of(found) == expected
        file.write_bytes(whole)


def is_cut_of(found: list, expected: list) -> bool:
    """Tell whether series are those expected or less; the last number may have lost digits."""
    known = {value for series in expected for value in series}
    is_known = all(value in known for series in found for value in series[:-1])
    return is_known and len(found) <= len(expected)


def test_flipped_bytes_are_refused_or_lose_no_series(form, tmp_path) -> None:
    source = FORMS[form](tmp_path).anchored(tmp_path)
    generator = random.Random(form)
    for file in source.files():
        whole = file.read_bytes()
        for _ in range(FLIPS):
            damaged = bytearray(whole)
            for _ in range(generator.choice((1, 1, 1, 3))):
                damaged[generator.randrange(len(whole))] ^= generator.randrange(1, 256)
            file.write_bytes(damaged)
            found = outcome(source)
            if isinstance(found, TsmoeError):
                assert "\n" not in str(found)
            elif form not in OF_LINES:
                assert len(found) == len(EXPECTED), f"{file.name}: {bytes(damaged)!r}"
        file.write_bytes(whole)


@pytest.mark.parametrize("form", ["parquet", "parquet wide", "parquet long"])
def test_checksums_leave_no_value_altered(form, tmp_path) -> None:
    source = FORMS[form](tmp_path).anchored(tmp_path)
    expected = values_of(outcome(source))
    (file,) = source.files()
    whole = file.read_bytes()
    group = pq.ParquetFile(file).metadata.row_group(0)
    chunks = [group.column(index) for index in range(group.num_columns)]
    starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    ends = [s + c.total_compressed_size for s, c in zip(starts, chunks, strict=True)]
    generator = random.Random(0)
    refused = 0
    for _ in range(3 * FLIPS):
        damaged = bytearray(whole)
        damaged[generator.randrange(min(starts), max(ends))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        found = outcome(source)
        refused += isinstance(found, TsmoeError)
        assert isinstance(found, TsmoeError) or values_of(found) == expected
    assert refused > FLIPS


numbers = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, 1e38, -1e38, 1e39, 1e308, 5e-324, np.nan, np.inf, 2.0**24 + 1]),
)
series_pairs = st.integers(1, 6).flatmap(
    lambda length: arrays.arrays(np.float64, (2, length), elements=numbers)
)


@given(series_pairs)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_values_come_back_as_written_or_are_refused(form, values) -> None:
    with tempfile.TemporaryDirectory() as folder, np.errstate(over="ignore"):
        found = outcome(FORMS[form](Path(folder), values).anchored(Path(folder)))
        if isinstance(found, TsmoeError):
            # Only infinity is a reason, and tables alone give it.
            assert np.isinf(values.astype(np.float32)).any(), found
            return
        assert not any(isinstance(item, Drop) for item in found)
        for record, expected in zip(found, values.astype(np.float32), strict=True):
            np.testing.assert_array_equal(record.values, expected)


def test_series_without_points_are_refused_or_have_none(form, tmp_path) -> None:
    found = outcome(FORMS[form](tmp_path, EXPECTED[:, :0]).anchored(tmp_path))
    if isinstance(found, TsmoeError):
        assert_one_line_about(found, tmp_path)
    else:
        assert all(isinstance(item, Drop) or len(item.values) == 0 for item in found)
