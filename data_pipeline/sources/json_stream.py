"""Reading one large JSON document value by value, so that only one value is in memory."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_CHUNK_CHARS = 2**20
_GAP = re.compile(r"[ \t\n\r]*")
# An error this far before the end of the text is not one of text that goes on.
_TAIL_CHARS = 4096
# What can stand between the end of a number and the end of a text that cuts it: "e-".
_CUT_NUMBER_CHARS = 2


class JsonStream:
    """Walks through the values of a document from front to back.

    Every method raises json.JSONDecodeError where the document is no JSON, with its position in
    the file counted in characters, and UnicodeDecodeError where it is no text.

    Args:
        handle: text at the start of the document.
    """

    def __init__(self, handle: TextIO) -> None:
        self._handle = handle
        self._text = ""
        self._position = 0
        self._dropped = 0
        self._decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while True:
            match = _GAP.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_on():
                return ""

    def value(self) -> Any:  # Any: JSON
        """Return the next value, decoded whole."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string")
                is_cut = is_cut or error.pos > len(self._text) - _TAIL_CHARS
                if is_cut and self._read_on():
                    continue
                raise self._error(error.msg, error.pos) from None
            # A number may go on behind the text: "1.5" of "1.5e" is decoded, but "1.5e-7" meant.
            if end + _CUT_NUMBER_CHARS >= len(self._text) and self._read_on():
                continue
            self._position = end
            return value

    def elements(self) -> Iterator[Any]:
        """Yield the elements of the array that comes next."""
        for _ in self._items("[", "]"):
            yield self.value()

    def members(self) -> Iterator[str]:
        """Yield the keys of the object that comes next; read each one's value before going on."""
        for _ in self._items("{", "}"):
            key = self.value()
            if not isinstance(key, str):
                raise self._error("Expecting property name in double quotes", self._position)
            self._take(":")
            yield key

    def end(self) -> None:
        """Check that nothing follows."""
        if self.peek():
            raise self._error("Extra data", self._position)

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        """Step over brackets and commas; the caller reads one item at each stop."""
        self._take(opening)
        if self.peek() == closing:
            self._position += 1
            return
        while True:
            yield
            if self.peek() == closing:
                self._position += 1
                return
            self._take(",")

    def _take(self, expected: str) -> None:
        if self.peek() != expected:
            raise self._error(f"Expecting {expected!r} delimiter", self._position)
        self._position += 1

    def _read_on(self) -> bool:
        """Drop what was read and append at least as much as is left; False at the end."""
        left = self._text[self._position :]
        more = self._handle.read(max(_CHUNK_CHARS, len(left)))
        if not more:
            return False
        self._dropped += self._position
        self._text, self._position = left + more, 0
        return True

    def _error(self, reason: str, position: int) -> json.JSONDecodeError:
        error = json.JSONDecodeError(reason, "", 0)
        error.pos = self._dropped + position
        error.args = (f"{reason}: character {error.pos}",)
        return error
