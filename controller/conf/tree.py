"""nginx's configuration as one tree of directives, whatever they are: includes expanded, each with file and line.

Reading order and inheritance stand here, and the values that nginx writes with units. What is wrong with a
configuration does not.
"""

from __future__ import annotations

import posixpath
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from controller.conf.parse import ConfSyntaxError, Place, Reader, is_pattern
from controller.conf.spans import Directive, directives

_MILLISECONDS = {"ms": 1, "": 1000, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}


@dataclass(eq=False, slots=True)
class Node:
    """A directive. `block` holds what stands in its braces; `lua` the code that it runs, None where that is unseen."""

    name: str
    args: tuple[str, ...]
    place: Place
    outer: Node | None = field(default=None, repr=False)
    block: list[Node] | None = None
    lua: str | None = None
    _by_name: dict[str, list[Node]] | None = field(default=None, repr=False)

    def find(self, *names: str) -> Iterator[Node]:
        """The directives of these names inside, at any depth, in reading order."""
        waiting = list(reversed(self.block or ()))
        while waiting:
            node = waiting.pop()
            if node.name in names:
                yield node
            waiting.extend(reversed(node.block or ()))

    def own(self, *names: str) -> list[Node]:
        """The directives of these names directly inside, those of one name after those of another."""
        if self._by_name is None:
            self._by_name = defaultdict(list)
            for node in self.block or ():
                self._by_name[node.name].append(node)
        return [node for name in names for node in self._by_name.get(name, ())]

    def inherited(self, *names: str) -> list[Node]:
        """Those in force where this directive stands: the ones of the nearest block around it that has any."""
        around = self.outer
        while around is not None:
            if found := around.own(*names):
                return found
            around = around.outer
        return []

    def within(self, name: str) -> Node | None:
        """The nearest block of this name around the directive."""
        around = self.outer
        while around is not None and around.name != name:
            around = around.outer
        return around


EMPTY = Node("", (), Place("", 0), block=[])
"""What stands where no configuration can be read."""


def read(path: str, reader: Reader) -> Node:
    """The tree of `path` with all that it includes, under a nameless root; ConfSyntaxError."""
    root = Node("", (), Place(path, 1), block=[])
    try:
        _Reading(path, reader).fill(root, path, (path,), None)
    except RecursionError as error:
        raise ConfSyntaxError("blocks or includes are nested too deeply", Place(path, 1)) from error
    return root


class _Reading:
    def __init__(self, main: str, reader: Reader) -> None:
        self._directory = posixpath.dirname(main)
        self._reader = reader
        self._files: dict[str, tuple[list[Directive], list[int]]] = {}

    def fill(self, outer: Node, path: str, within: tuple[str, ...], at: Place | None) -> None:
        if path not in self._files:
            try:
                data = self._reader.read(path)
            except OSError as error:
                raise ConfSyntaxError(f'open() "{path}" failed ({error.strerror})', at) from error
            ends = [match.start() for match in re.finditer(rb"\n", data)]
            self._files[path] = directives(data, path), ends
        self._add(self._files[path][0], outer, path, within)

    def _add(self, found: Sequence[Directive], outer: Node, path: str, within: tuple[str, ...]) -> None:
        assert outer.block is not None
        for each in found:
            place = Place(path, bisect_left(self._files[path][1], each.start) + 1)
            args = tuple(_text(argument) for argument in each.args)
            node = Node(_text(each.name), args, place, outer)
            if node.name == "include" and len(args) == 1:
                for included in self._included(args[0]):
                    if included in within:
                        raise ConfSyntaxError(f'"{included}" includes itself', place)
                    self.fill(outer, included, (*within, included), place)
                continue
            outer.block.append(node)
            if each.block is not None:
                node.block = []
                self._add(each.block, node, path, within)
            elif "_by_lua" in node.name:
                node.lua = self._lua(node, each.lua)

    def _included(self, argument: str) -> Sequence[str]:
        pattern = posixpath.join(self._directory, argument)
        return self._reader.glob(pattern) if is_pattern(pattern) else [pattern]

    def _lua(self, node: Node, body: bytes | None) -> str | None:
        if body is not None:
            return _text(body)
        if not node.args:
            return None
        if not node.name.endswith("_file"):
            return node.args[-1]
        if not posixpath.isabs(node.args[-1]) or "$" in node.args[-1]:
            return None
        try:
            return _text(self._reader.read(node.args[-1]))
        except OSError:
            return None


def calls(lua: str, function: str) -> bool:
    """Whether this code loads headgate and calls this function of it."""
    code = re.sub(r"--\[(=*)\[.*?\]\1\]|--[^\n]*", "", lua, flags=re.DOTALL)
    loads = re.search(r"""require\s*\(?\s*(["'])headgate\1""", code)
    return bool(loads and re.search(rf"[.:]\s*{function}\b", code))


def seconds(text: str) -> float | None:
    """nginx's time: `60`, `60s`, `1m 30s`, `500ms`; None where it is none, or counts in months or years."""
    if not re.fullmatch(r"(\d+(ms|[smhdw]?) ?)+", text):
        return None
    return sum(int(number) * _MILLISECONDS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhdw]?)", text)) / 1000


def size(text: str) -> int | None:
    """nginx's size in bytes: `1024`, `8k`, `8m`; None where it is none."""
    match = re.fullmatch(r"(\d+)([kKmMgG]?)", text)
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()] if match else None


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
