"""JSON files with long lists, decoded element by element: all of COCO's captions would take gigabytes of memory."""

import json
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from common.files import read_json

WINDOW = 2**20  # characters of a file that are read at once


def iter_json_list(path: Path, name: str) -> Iterator[Any]:
    """Yield the elements of the list that a JSON object has under a key, `name`; raises as `iter_json_lists`."""
    return (element for _, element in iter_json_lists(path, [name]))


def iter_json_lists(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield (key, element) for the elements of the lists that a JSON object has under some keys, in the file's order.

    Without names the file is a list itself, and the keys are "". Raises InputError where the file is missing or turns
    out to be no JSON, TypeError where something else is where a list should be, and KeyError where a key is missing.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            stream = _Stream(file)
            found: set[str] = set()
            if names:
                found = yield from stream.lists(names)
            else:
                yield from (("", element) for element in stream.elements())
            if stream.peek():
                raise ValueError
    except (FileNotFoundError, ValueError, RecursionError):
        read_json(path)  # raises an error that says what is wrong and where
        raise TypeError from None
    for name in names:
        if name not in found:
            raise KeyError(name)


class _Stream:
    """The text of a JSON file, of which a window is in memory. Its methods raise ValueError where it is no JSON."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.position = file, "", 0
        self.decoder = json.JSONDecoder()
        self.following = re.compile(r"[ \t\n\r]*([^ \t\n\r])")

    def refill(self) -> bool:
        """Read more text, at least as much as is left, and forget what lies behind; False at the end of the file."""
        more = self.file.read(max(WINDOW, len(self.text) - self.position))
        self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)

    def peek(self) -> str:
        """Go to the next character that is not white space, and return it; "" at the end of the file."""
        while not (found := self.following.match(self.text, self.position)):
            if not self.refill():
                return ""
        self.position = found.start(1)
        return found[1]

    def take(self, symbols: str) -> str:
        """Consume the next character, which must be one of `symbols`."""
        symbol = self.peek()
        if not symbol or symbol not in symbols:
            raise ValueError
        self.position += 1
        return symbol

    def value(self, symbols: str) -> tuple[Any, str]:
        """Consume a value and the character behind it, which must be one of `symbols`; returns both."""
        self.peek()
        while True:  # a value may go on behind the window, and a number that it cuts looks like a whole one
            with suppress(ValueError):
                value, end = self.decoder.raw_decode(self.text, self.position)
                symbol = self.following.match(self.text, end)
                if symbol and symbol[1] in symbols:
                    if re.search(r"\\u[dD]", self.text[self.position : end]):
                        json.dumps(value, ensure_ascii=False).encode()  # half of a pair of surrogates cannot be
                    self.position = symbol.end()
                    return value, symbol[1]
            if not self.refill():
                raise ValueError

    def elements(self) -> Iterator[Any]:
        """Consume a list; yields its elements."""
        self.take("[")
        symbol = self.take("]") if self.peek() == "]" else ","
        while symbol == ",":
            element, symbol = self.value(",]")
            yield element

    def lists(self, names: Sequence[str]) -> Generator[tuple[str, Any], None, set[str]]:
        """Consume an object; yields (key, element) of the lists under some keys, and returns the keys that it has.

        Raises TypeError where something else than a list is under one of them.
        """
        found = set()
        self.take("{")
        symbol = self.take("}") if self.peek() == "}" else ","
        while symbol == ",":
            key, _ = self.value(":")
            if not isinstance(key, str):
                raise ValueError
            if self.peek() == "[":
                for element in self.elements():
                    if key in names:
                        yield key, element
                symbol = self.take(",}")
            else:
                _, symbol = self.value(",}")
                if key in names:
                    raise TypeError
            found.add(key)
        return found
