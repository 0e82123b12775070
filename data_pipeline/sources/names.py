"""What a series is called after the place it was found in.

UTSD (arXiv 2402.02368) writes domain and data set into the name of a series,
"Health_MotorImagery_12"; folders such as "Health/MotorImagery/12.npy" say the same.
"""

import glob
import re
from pathlib import Path

# Domain, data set, and numbers that count its series.
_UTSD_ITEM = re.compile(r"(Energy|Environment|Health|IoT|Nature|Transport|Web)_(.+?)(?:_\d+)*")


def utsd_names(item_id: str) -> tuple[str, str] | None:
    """Return domain and data set that stand in an item_id of UTSD, or None in any other."""
    match = _UTSD_ITEM.fullmatch(item_id)
    return (match[1], match[2]) if match else None


def fixed_folder(pattern: str) -> Path:
    """Return the folder that every file of a pattern lies in: "a/b" of "a/b/**/*.npy"."""
    parts = Path(pattern).parts[:-1]
    is_fixed = [not glob.has_magic(part) for part in parts]
    return Path(*parts[: is_fixed.index(False) if False in is_fixed else len(parts)])


def one_line(error: BaseException) -> str:
    """Put the text of an error on one line, for a message that quotes it."""
    return " ".join(str(error).split()) or type(error).__name__
