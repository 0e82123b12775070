import io
import json

import pytest

from data_pipeline.sources import json_stream
from data_pipeline.sources.json_stream import JsonStream

TEXT = '[12345, -1.5e-7, "a]\\"b", {"k": [1, {}]}, [], null, true]'


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_values_cut_anywhere_are_put_together(monkeypatch, chunk) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK_CHARS", chunk)
    stream = JsonStream(io.StringIO(TEXT + "  \n"))
    assert list(stream.elements()) == json.loads(TEXT)
    stream.end()


def test_members_are_read_one_by_one() -> None:
    stream = JsonStream(io.StringIO('{"a": 1, "list": [1, 2], "b": {}}'))
    found = {
        key: list(stream.elements()) if key == "list" else stream.value()
        for key in stream.members()
    }
    assert found == {"a": 1, "list": [1, 2], "b": {}}


def test_long_array_is_never_held_whole(monkeypatch) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK_CHARS", 10)
    handle = io.StringIO("[" + ", ".join(["1"] * 1000) + "]")
    stream = JsonStream(handle)
    next(stream.elements())
    assert handle.tell() < 50


def read_whole(text: str) -> None:
    stream = JsonStream(io.StringIO(text))
    list(stream.elements())
    stream.end()


@pytest.mark.parametrize(
    ("text", "position"),
    [("[1, 2", 5), ("[1 2]", 3), ("[1,, 2]", 3), ("[1] x", 4), ("{", 0), ("", 0), ('["abc', 1)],
)
@pytest.mark.parametrize("chunk", [1, 1000])
def test_what_is_no_json_is_refused_with_its_position(monkeypatch, text, position, chunk) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK_CHARS", chunk)
    with pytest.raises(json.JSONDecodeError, match=f"character {position}"):
        read_whole(text)


def test_error_in_front_of_a_large_text_does_not_read_it_all(monkeypatch) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK_CHARS", 10_000)
    handle = io.StringIO("[x" + " " * 10**6)
    with pytest.raises(json.JSONDecodeError):
        list(JsonStream(handle).elements())
    assert handle.tell() == 10_000
