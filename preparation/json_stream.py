"""Lists in JSON files, decoded element by element: `json.load` needs 1 GB for COCO's captions, this reader 0.2 GB."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from common.files import read_json

WINDOW = 2**20  # characters to read at once


def iter_json_list(path: Path, name: str) -> Iterator[Any]:
    """Yield the elements of the list at a key of a JSON object. Raises the errors of `iter_json_lists`."""
    return (element for _, element in iter_json_lists(path, [name]))


def iter_json_lists(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield (key, element) for the elements of the lists at some keys of a JSON object, in the order of the file.

    If `names` is empty, the file must be a list, and every key is "". Raises InputError for a missing file and for
    invalid JSON, TypeError for a value that is not a list, and KeyError for a missing key.
    """
    found = set()
    try:
        with open(path, encoding="utf-8-sig") as file:
            stream = _Stream(file)
            for key in stream.keys() if names else [""]:
                if stream.peek() == "[":
                    for element in stream.elements():
                        if not names or key in names:
                            yield key, element
                else:
                    stream.value()
                    if key in names:
                        raise TypeError
                found.add(key)
            if stream.peek():
                raise ValueError
    except (FileNotFoundError, ValueError, RecursionError):
        read_json(path)  # raises an error with the position in the file
        raise TypeError from None
    for name in names:
        if name not in found:
            raise KeyError(name)


class _Stream:
    """A window of the text of a JSON file. The methods raise ValueError for invalid JSON."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.position = file, "", 0
        self.decoder = json.JSONDecoder()
        self.next = re.compile(r"[ \t\n\r]*([^ \t\n\r])")  # the next character that is not white space

    def refill(self) -> bool:
        """Move the window forward, doubling what is left in it; False at the end of the file."""
        more = self.file.read(max(WINDOW, len(self.text) - self.position))
        self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)

    def peek(self) -> str:
        """Move to the next character that is not white space and return it; "" at the end of the file."""
        while not (found := self.next.match(self.text, self.position)):
            if not self.refill():
                return ""
        self.position = found.start(1)
        return found[1]

    def take(self, symbols: str) -> str:
        """Consume and return the next character, one of `symbols`."""
        symbol = self.peek()
        if not symbol or symbol not in symbols:
            raise ValueError
        self.position += 1
        return symbol

    def value(self) -> Any:
        """Consume and return a value."""
        self.peek()
        while True:
            with suppress(ValueError):
                value, end = self.decoder.raw_decode(self.text, self.position)
                following = self.next.match(self.text, end)
                if following and following[1] in ",:]}":  # else the window may end within a number
                    if re.search(r"\\u[dD]", self.text[self.position : end]):
                        json.dumps(value, ensure_ascii=False).encode()  # ValueError for half a pair of surrogates
                    self.position = end
                    return value
            if not self.refill():
                raise ValueError

    def elements(self) -> Iterator[Any]:
        """Consume a list and yield its elements."""
        self.take("[")
        symbol = self.take("]") if self.peek() == "]" else ","
        while symbol == ",":
            yield self.value()
            symbol = self.take(",]")

    def keys(self) -> Iterator[str]:
        """Consume an object and yield its keys; the caller consumes the value of each."""
        self.take("{")
        symbol = self.take("}") if self.peek() == "}" else ","
        while symbol == ",":
            key = self.value()
            if not isinstance(key, str):
                raise ValueError
            self.take(":")
            yield key
            symbol = self.take(",}")
