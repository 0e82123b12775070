"""Files in the stream format of Arrow, which `datasets` and GluonTS write."""

from pathlib import Path

from data_pipeline.errors import DataError

_END = b"\xff\xff\xff\xff\0\0\0\0"


def check_stream_end(path: Path) -> None:
    """Refuse a stream that was cut short.

    Arrow takes the end of the file for the end of the stream, so rows that are missing behind the
    last whole batch would go unnoticed; writers end with a mark.

    Raises:
        DataError: if the mark is missing.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_END)))
        if file.read() != _END:
            raise DataError(
                f"{path}: ends without the mark that an Arrow stream ends with; it is cut short or "
                f"of another format, copy or export it again"
            )
